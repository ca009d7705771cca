"""Shards of one study become one dump, entropy bucketed anew over their union."""

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError, first_few, first_of, raise_if_any
from ..common.files import locked, make_directory, read_json, sha256_of, write_json, write_jsonl
from . import format as contract
from .buckets import bucket_of, fit_edges
from .consistency import Content, checksum_problems, checksums_of, load_dump, read_content
from .format import Dump
from .growing import GrowingRows
from .mapped import iter_row_blocks
from .on_policy import OnPolicy, Tokens, claims_on_policy, warning_of
from .records import PromptKey, Rollout, iter_rollouts, prompt_key_from_json, write_records

log = logging.getLogger(__name__)
SAME, SAME_BUT_FOR_ROUNDING, SUMMED, OF_ONE_SHARD = "same", "same but for rounding", "summed", "of one shard"
KEYS = {
    **dict.fromkeys(("target", "row_idx", "row_dim", "bins", "num_samples_per_prompt"), SAME),
    **dict.fromkeys(("pos_per_bin_per_rollout", "max_new_tokens", "temperature", "dtype", "attention"), SAME),
    **dict.fromkeys(("sampling", "rollouts_from", "prompts", "pooling", "bucket_by", "projection", "end_ids"), SAME),
    **dict.fromkeys(("left_out", "step"), SAME),
    **dict.fromkeys(("device", "versions", "threads", "batch_tokens", "sample_rows"), SAME_BUT_FOR_ROUNDING),
    **dict.fromkeys(("num_prompts", "num_rollouts", "num_positions", "num_correct_rollouts"), SUMMED),
    **dict.fromkeys(("num_response_tokens", "num_nonfinite_rows", "num_zero_rows"), SUMMED),
    **dict.fromkeys(("num_unverified_rollouts", "num_rollouts_due"), SUMMED),
    **dict.fromkeys(("shard", "seconds", "on_policy", "entropy_edges_from", "checksums"), OF_ONE_SHARD),
    **dict.fromkeys(("nonfinite_rows", "zero_rows", "prompt_idxs", "prompts_due", "prompt_hashes"), OF_ONE_SHARD),
}
"""What becomes of a manifest's keys: the same in all shards (None where a manifest of the original lacks one), the same
save for rounding, of which a reader is told, summed, or made anew. Others are the first shard's."""


OF_THE_SET = ("num_prompts_of_study", "prompts_sha256")
"""Of what shards share: other in each set of shards by which a study has grown."""


def keys_that_are(kind: str) -> list[str]:
    """Those of `KEYS`."""
    return [key for key, its_kind in KEYS.items() if its_kind == kind]


def merge_shards(out_dir: Path, shard_dirs: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Merge shards into one dump, or one for each target; yields each one's directory and manifest when it is written.

    Nothing is written where they don't belong together, are not whole, or are no shards.

    Args:
        out_dir: of the merged dump; replaced if it holds one.
        shard_dirs: of the shards, in the order in which their gradients stand one behind the other.
    """
    # 1. Nothing that is no merged dump is written over.
    refuse_to_replace_a_probe(out_dir, shard_dirs)
    # 2. The shards belong together, and are as they were written.
    targets = shards_by_target(shard_dirs)
    for shards in targets.values():
        for line in [*(warning for shard in shards for warning in shard.warnings), *differences_in_rounding(shards)]:
            log.warning(line)
        raise_if_any(what_does_not_belong_together(shards))
        raise_if_any(first_few(rollouts_in_two(shards), "rollouts", 1))
        merged_prompts(shards)
        raise_if_any(
            problem
            for shard in shards
            if "checksums" in shard.manifest
            for problem in checksum_problems(shard.path, shard.manifest, read_content(shard.path))
        )
        raise_if_any(copies(shards))
    # 3. Rollouts once, then each target.
    first = next(iter(targets.values()))
    found = [contract.find_rollouts(shard.path) for shard in first]
    rollout_files = [file for file in found if file is not None] if None not in found else None
    make_directory(out_dir)
    with locked(out_dir):
        # Unfinished from now on: no manifest in it or in a target's directory.
        manifests = out_dir.glob(f"*/{contract.MANIFEST}")
        for stale in (out_dir / contract.MANIFEST, out_dir / contract.SETTINGS, *manifests):
            stale.unlink(missing_ok=True)
        if list(targets) != [None]:
            write_json(out_dir / contract.SETTINGS, {"targets": list(targets)})
        if rollout_files is not None:
            write_records(out_dir / contract.ROLLOUTS, merged_rollouts(rollout_files, namespaces(first)))
        for name, shards in targets.items():
            directory, manifest = merge_target(out_dir / (name or ""), shards, rollout_files)
            tested = OnPolicy(**manifest["on_policy"]) if shards is first and rollout_files is not None else None
            if tested and (warning := warning_of(tested, manifest)):
                log.warning(f"merged, {warning}")
            yield directory, manifest


# What must be so


def what_does_not_belong_together(shards: list[Dump]) -> Iterator[str]:
    """Every difference between the first shard and the others, and shards that are not there."""
    first = shards[0]
    for shard in shards:
        if any(isinstance(key, tuple) for key in shard.prompt_keys):
            yield f"{shard.path}: merged already, of shards of unknown origin; merge its shards instead"
    for shard in shards[1:]:
        for key, here, there in differing_keys(first.manifest, shard.manifest):
            yield f"{key} is {here} in {first.path} but {there} in {shard.path}"
        given = [of.manifest["entropy_edges"] for of in (first, shard) if "entropy_edges_from" in of.manifest]
        if len(given) == 1 or given[:1] != given[1:]:
            yield f"{shard.path}: was probed with other `entropy_edges` than {first.path}, or one of both with none"
    yield from missing_shards(shards)


def differences_in_rounding(shards: list[Dump]) -> Iterator[str]:
    """A line for each setting that made shards round in other ways."""
    for key in keys_that_are(SAME_BUT_FOR_ROUNDING):
        found = dict.fromkeys(json.dumps(shard.manifest[key]) for shard in shards if key in shard.manifest)
        if len(found) > 1:
            yield f"shards were computed with other {key}, so that they may round differently: {', '.join(found)}"


def missing_shards(shards: list[Dump]) -> Iterator[str]:
    """Shards of an i-of-n set that are not there; the original's don't say. A study that grew has several sets."""
    sets: dict[int, list[Dump]] = {}
    for shard in shards:
        sets.setdefault(_skipped(shard.manifest), []).append(shard)
    end = 0
    for skipped, of_set in sorted(sets.items()):
        if skipped != end:
            yield f"{of_set[0].path}: begins behind the study's first {skipped} prompts, of which {end} are there"
        end = (of_set[0].manifest.get("sampling") or {}).get("num_prompts_of_study", 0)
        yield from _missing_of_set(of_set)


def _missing_of_set(shards: list[Dump]) -> Iterator[str]:
    parts = [shard.manifest.get("shard") or {} for shard in shards]
    first, *others = dict.fromkeys(part.get("num_shards") for part in parts)
    if others:
        for shard, part in zip(shards, parts, strict=True):
            yield f"{shard.path}: is shard {part.get('index')} of {part.get('num_shards')}"
    elif missing := sorted(set(range(first or 0)) - {part.get("index") for part in parts}):
        yield f"shard {first_of(missing)} of {first} is missing (they count from 0)"


def _skipped(manifest: dict[str, Any]) -> int:
    """How many of the study's prompts come before those of a shard's set."""
    return (manifest.get("shard") or {}).get("skip_prompts", 0)


def differing_keys(first: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value in `first`, value in `other`) for keys that shards of one study share."""
    # A hash says what the model is; a path, which may differ between machines, only where there is no hash.
    model_keys = ["model_identity"] if "model_identity" in first and "model_identity" in other else ["model_path"]
    # The original gave each shard a seed of its own; ours slices one seeded permutation.
    seed_keys = ["seed"] if "format_version" in first and "format_version" in other else []
    # Of an original's data set nothing is known; what is known must be the same.
    data_keys = ["dataset"] if (first.get("dataset") or {}).keys() & (other.get("dataset") or {}).keys() else []
    for key in (*model_keys, *seed_keys, *data_keys, *keys_that_are(SAME)):
        here, there = (contract.without_path(manifest.get(key)) for manifest in (first, other))
        if _skipped(first) != _skipped(other) and isinstance(here, dict) and isinstance(there, dict):
            here, there = ({k: v for k, v in fact.items() if k not in OF_THE_SET} for fact in (here, there))
        if here != there:
            yield key, json.dumps(here), json.dumps(there)


def namespaces(shards: list[Dump]) -> list[int | None]:
    """None for every shard if all come from the same data set, else each shard's number, to keep prompts apart."""
    hashes = {(shard.manifest.get("dataset") or {}).get("sha256") for shard in shards}
    known_to_be_one = len(hashes) == 1 and None not in hashes
    return [None if known_to_be_one else number for number in range(len(shards))]


def merged_key(key: PromptKey, namespace: int | None) -> PromptKey:
    """A prompt's key in the merged dump."""
    return key if namespace is None else (namespace, key)


def rollouts_in_two(shards: list[Dump]) -> Iterator[str]:
    """Rollouts that two shards hold."""
    owner: dict[Any, Path] = {}
    for shard, space in zip(shards, namespaces(shards), strict=True):
        for code, sample_idx in sorted(set(zip(shard.prompt.tolist(), shard.sample_idx.tolist(), strict=True))):
            prompt = merged_key(shard.prompt_keys[code], space)
            if (prompt, sample_idx) in owner:
                yield f"prompt {prompt} sample {sample_idx} is in {owner[prompt, sample_idx]} and again in {shard.path}"
            owner[prompt, sample_idx] = shard.path


def copies(shards: list[Dump]) -> Iterator[str]:
    """Shards that are there twice, where data sets are unknown and their prompts can't tell."""
    owner: dict[str, Path] = {}
    for shard in shards if namespaces(shards)[0] is not None else ():
        first = owner.setdefault(sha256_of(shard.path / contract.META, shard.path / contract.GRADS), shard.path)
        if first != shard.path and len(shard.row):
            yield f"{shard.path}: is a copy of {first}; a shard is to be given once"


def refuse_to_replace_a_probe(out_dir: Path, shard_dirs: list[Path]) -> None:
    """Raise `InputError` where the merge would write over a shard, or over a dump that is no merged one."""
    elsewhere, out = "give the merged dump another directory", out_dir.resolve()
    shards = [directory.resolve() for directory in shard_dirs]
    for directory, shard in zip(shard_dirs, shards, strict=True):
        if out in (shard, *shard.parents) or shard in out.parents:
            raise InputError(f"{out_dir}: is, or holds, or is in the shard {directory}; {elsewhere}")
    if len(set(shards)) < len(shards):
        raise InputError("a shard is given twice")
    if (out_dir / contract.PROGRESS).exists():
        raise InputError(f"{out_dir}: holds the beginning of a probe's dump; {elsewhere}")
    others = list(out_dir.glob(f"*/{contract.MANIFEST}"))
    if others and not (out_dir / contract.SETTINGS).exists():
        raise InputError(f"{out_dir}: holds other dumps ({others[0].parent.name}); {elsewhere}")
    for manifest in (out_dir / contract.MANIFEST, *others):
        if manifest.is_file() and "shards" not in read_json(manifest):
            raise InputError(f"{manifest}: is of a dump that is no merged one; {elsewhere}")


# What the merged dump has


def merged_edges(shards: list[Dump], rollout_files: list[Path] | None) -> dict[str, Any]:
    """Entropy edges of the union, and what they were fitted over; those that were given to all shards stay."""
    first, keys = shards[0].manifest, ["entropy_edges", "entropy_edges_over"]
    others = [shard.path for shard in shards if shard.manifest["entropy_edges"] != first["entropy_edges"]]
    if shards[0].is_pooled and others:
        raise InputError(
            f"{others[0]}: pooled by other edges than {shards[0].path}; sums can't be bucketed anew, probe it with the "
            "same edges"
        )
    if not others and all("entropy_edges_from" in shard.manifest for shard in shards):
        log.info("all shards were probed with the same `entropy_edges`: they are kept")
        keys.append("entropy_edges_from")
    elif not shards[0].is_pooled:
        if rollout_files is None:
            entropies, over = np.concatenate([shard.entropy for shard in shards]), "dumped_positions"
        else:
            parts = [np.array(r.entropies) for file in rollout_files for r in iter_rollouts(file)]
            entropies, over = np.concatenate(parts), "response_tokens"
        if entropies.size == 0:
            raise InputError("the shards hold no positions")
        return {"entropy_edges": fit_edges(entropies, first["bins"]).tolist(), "entropy_edges_over": over}
    return {key: first[key] for key in keys}


def write_merged_grads(file: Path, shards: list[Dump]) -> None:
    """Copy the shards' gradients one behind the other, in blocks."""
    start, merged = 0, GrowingRows(file, sum(len(shard.row) for shard in shards), shards[0].row_dim)
    for shard in shards:
        for block in iter_row_blocks(shard.grads):
            merged.write(np.arange(start, start + len(block)), block)
            start += len(block)
    merged.finish()


def merged_meta(shards: list[Dump], spaces: list[int | None], edges: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield the merged meta lines: rows renumbered, prompts namespaced, buckets of the union's edges."""
    start = 0
    for shard, space in zip(shards, spaces, strict=True):
        buckets = shard.bin if shard.is_pooled else bucket_of(shard.entropy, edges)
        for record in shard.meta_records():
            row = record["row"]
            key = merged_key(prompt_key_from_json(record["prompt_idx"]), space)
            yield {**record, "row": start + row, "prompt_idx": key, "bin": int(buckets[row])}
        start += len(shard.row)


def merged_rollouts(files: list[Path], spaces: list[int | None]) -> Iterator[Rollout]:
    """Yield all shards' rollouts, prompts namespaced."""
    for file, space in zip(files, spaces, strict=True):
        for rollout in iter_rollouts(file):
            yield replace(rollout, prompt_idx=merged_key(rollout.prompt_idx, space))


def merged_prompts(shards: list[Dump]) -> dict[str, list[Any]]:
    """The union of `prompts_due` and of `prompt_idxs`, ascending, and the `prompt_hashes` beside these.

    Each only where all shards have it. A prompt of one data set has the same ids in all, or is refused.
    """
    manifests = [shard.manifest for shard in shards]

    def united(name: str, beside: str) -> list[tuple[PromptKey, Any]]:
        """Each key of the merged dump with what stands `beside` it in its shard, ascending."""
        return sorted(
            (merged_key(prompt_key_from_json(key), space), other)
            for manifest, space in zip(manifests, namespaces(shards), strict=True)
            for key, other in zip(manifest[name], manifest[beside], strict=True)
        )

    told = [name for name in ("prompts_due", "prompt_idxs") if all(name in manifest for manifest in manifests)]
    found: dict[str, list[Any]] = {name: [key for key, _ in united(name, name)] for name in told}
    if "prompt_idxs" in told and all("prompt_hashes" in manifest for manifest in manifests):
        pairs = united("prompt_idxs", "prompt_hashes")
        raise_if_any(
            f"prompt {key} has other token ids in one shard than in another; were they made with one tokenizer?"
            for (key, here), (after, there) in itertools.pairwise(pairs)
            if key == after and here != there
        )
        found["prompt_hashes"] = [prompt_hash for _, prompt_hash in pairs]
    return found


def merged_manifest(shards: list[Dump], edges: dict[str, Any], content: Content) -> dict[str, Any]:
    """The first shard's manifest with sums, the union of prompts, the new edges and the shards' names."""
    manifests = [shard.manifest for shard in shards]
    faulty = {"nonfinite_rows": content.nonfinite.tolist(), "zero_rows": content.zero.tolist()}
    summed = [key for key in keys_that_are(SUMMED) if all(key in manifest for manifest in manifests)]
    return {
        **{key: value for key, value in manifests[0].items() if KEYS.get(key) not in (SUMMED, OF_ONE_SHARD)},
        **{key: sum(manifest[key] for manifest in manifests) for key in summed},
        **_of_the_grown_study(manifests),
        **merged_prompts(shards),
        **edges,
        **{key: rows for key, rows in faulty.items() if all(key in manifest for manifest in manifests)},
        # What one shard's gradients lack the merged dump's lack too.
        "format_version": min(manifest.get("format_version", 1) for manifest in manifests),
        "shards": [shard.path.name for shard in shards],
        "shard_seeds": [manifest.get("seed") for manifest in manifests],
        "shard_seconds": [manifest.get("seconds") for manifest in manifests],
    }


def _of_the_grown_study(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a study has grown: the sampling of its last set, and no hash over the prompts of one."""
    last = max(manifests, key=_skipped)
    if _skipped(last) == 0:
        return {}
    facts = {key: manifests[0].get(key) for key in ("dataset", "prompts")}
    of_all = {key: {k: v for k, v in fact.items() if k not in OF_THE_SET} for key, fact in facts.items() if fact}
    return {**of_all, "sampling": last["sampling"]}


def merge_target(out_dir: Path, shards: list[Dump], rollout_files: list[Path] | None) -> tuple[Path, dict[str, Any]]:
    """Write one target's merged `grads.npy`, `meta.jsonl` and, last, `manifest.json`. Gives directory and manifest."""
    spaces, edges = namespaces(shards), merged_edges(shards, rollout_files)
    make_directory(out_dir)
    write_merged_grads(out_dir / contract.GRADS, shards)
    write_jsonl(out_dir / contract.META, merged_meta(shards, spaces, np.array(edges["entropy_edges"])))
    content = read_content(out_dir)
    manifest = merged_manifest(shards, edges, content) | {"checksums": checksums_of(out_dir, content)}
    if rollout_files is not None:
        tokens = Tokens.of(merged_rollouts(rollout_files, spaces))
        manifest["on_policy"] = asdict(tokens.test(claims_on_policy(manifest)))
    write_json(out_dir / contract.MANIFEST, manifest)
    return out_dir, manifest


def shards_by_target(shard_dirs: list[Path]) -> dict[str | None, list[Dump]]:
    """The shards of each target; the key is the name of its directory, None where a shard has a single target."""
    found = {directory: contract.target_directories(directory) for directory in shard_dirs}
    names = {shard: [None] if of == [shard] else [target.name for target in of] for shard, of in found.items()}
    first = names[shard_dirs[0]]
    raise_if_any(
        f"{shard}: its targets are {', '.join(filter(None, other)) or 'one'}, but those of {shard_dirs[0]} are "
        + (", ".join(filter(None, first)) or "one")
        for shard, other in names.items()
        if other != first
    )
    return {name: [load_dump(found[shard][number]) for shard in shard_dirs] for number, name in enumerate(first)}
