"""Shards of one study become one dump, entropy bucketed anew over their union."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError, first_few, raise_if_any
from ..common.files import locked, make_directory, read_json, real_path, sha256_of, write_json, write_jsonl
from . import format as contract
from .blocks import iter_row_blocks
from .buckets import bucket_of, fit_edges
from .check import checksum_problems, checksums_of, read_content
from .format import Dump
from .growing import new_rows
from .on_policy import Tokens, claims_on_policy
from .records import PromptKey, Rollout, iter_rollouts, prompt_key_from_json, write_records

log = logging.getLogger(__name__)
SAME_IN_ALL = (
    "target",
    "row_idx",
    "row_dim",
    "bins",
    "num_samples_per_prompt",
    "pos_per_bin_per_rollout",
    "max_new_tokens",
    "temperature",
    "dtype",
    "attention",
    "sampling",
    "rollouts_from",
    "prompts",
    "pooling",
    "bucket_by",
    "projection",
    "left_out",
    "end_ids",
)
"""Manifest keys that shards of one study share. Keys that a manifest of the original lacks count as None."""

SAME_BUT_FOR_ROUNDING = ("device", "versions", "threads", "batch_tokens", "sample_rows")
"""Manifest keys that may differ between shards, and of which a reader is told."""

SUMMED = (
    "num_prompts",
    "num_rollouts",
    "num_positions",
    "num_correct_rollouts",
    "num_response_tokens",
    "num_nonfinite_rows",
    "num_zero_rows",
    "num_unverified_rollouts",
    "num_rollouts_due",
)
SHOWN_MISSING = 5
OF_ONE_SHARD = ("shard", "seconds", "on_policy", "entropy_edges_from", "checksums", "nonfinite_rows", "zero_rows")
OF_ONE_SHARD += ("prompt_idxs", "prompts_due", "prompt_hashes")
"""Manifest keys that say nothing about the merged dump."""


def merge_shards(out_dir: Path, shard_dirs: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Merge shards into one dump, or one for each target; yields each one's directory and manifest when it is written.

    Args:
        out_dir: of the merged dump; replaced if it holds one.
        shard_dirs: of the shards, in the order in which their gradients stand one behind the other.

    Raises:
        InputError: shards that don't belong together, are not whole, or are no shards; nothing is written then.
    """
    # 1. Nothing that is no merged dump is written over.
    refuse_to_replace_a_probe(out_dir, shard_dirs)
    if len(set(map(real_path, shard_dirs))) < len(shard_dirs):
        raise InputError("a shard is given twice")
    # 2. The shards belong together, and are as they were written.
    targets = shards_by_target(shard_dirs)
    for shards in targets.values():
        for warning in (warning for shard in shards for warning in shard.warnings):
            log.warning(warning)
        check_belong_together(shards)
        for line in differences_in_rounding(shards):
            log.warning(line)
        check_disjoint(shards, namespaces(shards))
        merged_prompts([shard.manifest for shard in shards], namespaces(shards))
    refuse_changed_files(targets)
    for shards in targets.values():
        refuse_copies(shards)
    # 3. Rollouts once, then each target.
    first = next(iter(targets.values()))
    found = [contract.find_rollouts(shard.path) for shard in first]
    rollout_files = [file for file in found if file is not None] if None not in found else None
    make_directory(out_dir)
    with locked(out_dir):
        clear(out_dir, list(targets))
        if rollout_files is not None:
            write_records(out_dir / contract.ROLLOUTS, merged_rollouts(rollout_files, namespaces(first)))
        for name, shards in targets.items():
            yield merge_target(out_dir / (name or ""), shards, rollout_files)


def check_belong_together(shards: list[Dump]) -> None:
    """Raise `InputError` with every difference between the first shard's manifest and the others'."""
    first = shards[0]
    problems = []
    for shard in shards:
        if any(isinstance(key, tuple) for key in shard.prompt_keys):
            problems.append(f"{shard.path}: merged already, of shards of unknown origin; merge its shards instead")
    for shard in shards[1:]:
        for key, here, there in differing_keys(first.manifest, shard.manifest):
            problems.append(f"{key} is {here} in {first.path} but {there} in {shard.path}")
    raise_if_any([*problems, *edges_given_to_some(shards), *missing_shards(shards)])


def edges_given_to_some(shards: list[Dump]) -> Iterator[str]:
    """Shards whose tokens were picked by other edges than the first's, where edges were given to any of them."""

    def given(shard: Dump) -> list[float] | None:
        return shard.manifest["entropy_edges"] if "entropy_edges_from" in shard.manifest else None

    for shard in shards[1:]:
        if given(shard) != given(shards[0]):
            which = "other" if given(shard) and given(shards[0]) else "none" if given(shards[0]) else "such"
            yield f"{shard.path}: was probed with {which} `entropy_edges`, unlike {shards[0].path}"


def differences_in_rounding(shards: list[Dump]) -> Iterator[str]:
    """A line for each setting that made shards round in other ways."""
    for key in SAME_BUT_FOR_ROUNDING:
        found = dict.fromkeys(json.dumps(shard.manifest[key]) for shard in shards if key in shard.manifest)
        if len(found) > 1:
            yield f"shards were computed with other {key}, so that they may round differently: {', '.join(found)}"


def missing_shards(shards: list[Dump]) -> list[str]:
    """Shards of an i-of-n set that are not among `shards`; those of the original scripts don't say what they are."""
    parts = [shard.manifest.get("shard") or {} for shard in shards]
    counts = {part.get("num_shards") for part in parts}
    if counts == {None}:
        return []
    if len(counts) > 1 or not all(type(part.get("index")) is int for part in parts):
        return [
            f"{s.path}: is shard {p.get('index')} of {p.get('num_shards')}" for s, p in zip(shards, parts, strict=True)
        ]
    (count,) = counts
    present = {part["index"] for part in parts}
    if len(present) == count:
        return missing_prompts(shards)
    missing = (
        f"shard {index} of {count} is missing (they count from 0)" for index in range(count) if index not in present
    )
    return first_few(missing, "shards", SHOWN_MISSING, n_all=count - len(present))


def missing_prompts(shards: list[Dump]) -> list[str]:
    """Whether shards that are all there were due fewer prompts than the study has; old ones don't say which."""
    sampling, lists = shards[0].manifest.get("sampling") or {}, [s.manifest.get("prompts_due") for s in shards]
    n_of_study = sampling.get("num_prompts_of_study")
    if n_of_study is None or None in lists or "rollouts_from" in shards[0].manifest:
        return []
    n_due = len({prompt_key_from_json(key) for due in lists for key in due})
    return [] if n_due == n_of_study else [f"the study has {n_of_study} prompts, but these shards were due {n_due}"]


def differing_keys(first: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value in `first`, value in `other`) for keys that shards of one study share."""
    # A hash says what the model is; a path, which may differ between machines, only where there is no hash.
    model_keys = ["model_identity"] if "model_identity" in first and "model_identity" in other else ["model_path"]
    # The original gave each shard a seed of its own; ours slices one seeded permutation.
    seed_keys = ["seed"] if "format_version" in first and "format_version" in other else []
    # Of an original's data set nothing is known; what is known must be the same.
    data_keys = ["dataset"] if (first.get("dataset") or {}).keys() & (other.get("dataset") or {}).keys() else []
    for key in (*model_keys, *seed_keys, *data_keys, *SAME_IN_ALL):
        here, there = (_without_path(manifest.get(key)) for manifest in (first, other))
        if here != there:
            yield key, json.dumps(here), json.dumps(there)


def _without_path(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else value


def namespaces(shards: list[Dump]) -> list[int | None]:
    """None for every shard if all come from the same data set, else each shard's number, to keep prompts apart."""
    hashes = {(shard.manifest.get("dataset") or {}).get("sha256") for shard in shards}
    known_to_be_one = len(hashes) == 1 and None not in hashes
    return [None if known_to_be_one else number for number in range(len(shards))]


def merged_key(key: PromptKey, namespace: int | None) -> PromptKey:
    """A prompt's key in the merged dump."""
    return key if namespace is None else (namespace, key)


def check_disjoint(shards: list[Dump], spaces: list[int | None]) -> None:
    """Raise `InputError` if two shards hold the same rollout."""
    owner: dict[tuple[PromptKey, int], Path] = {}
    problems = []
    for shard, space in zip(shards, spaces, strict=True):
        rollouts = set(zip(shard.prompt.tolist(), shard.sample_idx.tolist(), strict=True))
        for code, sample_idx in sorted(rollouts):
            rollout = (merged_key(shard.prompt_keys[code], space), sample_idx)
            if rollout in owner:
                problems.append(
                    f"prompt {rollout[0]} sample {sample_idx} is in {owner[rollout]} and again in {shard.path}"
                )
            owner[rollout] = shard.path
    raise_if_any(first_few(problems, "rollouts", 1))


def refuse_copies(shards: list[Dump]) -> None:
    """Raise `InputError` if a shard is there twice; where data sets are unknown its prompts can't tell."""
    if namespaces(shards)[0] is None:
        return  # of one data set: `check_disjoint` has told by their prompts, without reading all gradients once more
    owner: dict[str, Path] = {}
    for shard in shards:
        content = sha256_of(shard.path / contract.META, shard.path / contract.GRADS)
        if content in owner and len(shard.grads):
            raise InputError(f"{shard.path}: is a copy of {owner[content]}; a shard is to be given once")
        owner[content] = shard.path


def merged_edges(shards: list[Dump], rollout_files: list[Path] | None) -> dict[str, Any]:
    """Entropy edges of the union, and what they were fitted over."""
    manifests = [shard.manifest for shard in shards]
    given = [(m["entropy_edges"], m.get("entropy_edges_from")) for m in manifests]
    if given[0][1] is not None and all(edges == given[0][0] and source is not None for edges, source in given):
        log.info("all shards were probed with the same `entropy_edges`: they are kept")
        return {key: manifests[0][key] for key in ("entropy_edges", "entropy_edges_over", "entropy_edges_from")}
    if shards[0].is_pooled:
        raise_if_any(
            f"{shard.path}: pooled by other edges than {shards[0].path}; sums can't be bucketed anew, probe it with "
            "the same edges"
            for shard, (edges, _) in zip(shards, given, strict=True)
            if edges != given[0][0]
        )
        return {key: manifests[0][key] for key in ("entropy_edges", "entropy_edges_over")}
    if rollout_files is None:
        entropies, over = np.concatenate([shard.entropy for shard in shards]), "dumped_positions"
    else:
        parts = [np.array(r.entropies) for file in rollout_files for r in iter_rollouts(file)]
        entropies, over = np.concatenate(parts), "response_tokens"
    if entropies.size == 0:
        raise InputError("the shards hold no positions")
    edges = fit_edges(entropies, manifests[0]["bins"])
    return {"entropy_edges": edges.tolist(), "entropy_edges_over": over}


def write_merged_grads(file: Path, shards: list[Dump]) -> None:
    """Copy the shards' gradient rows one behind the other, in blocks."""
    start = 0
    with new_rows(file, sum(len(shard.grads) for shard in shards), shards[0].row_dim) as merged:
        for shard in shards:
            for block in iter_row_blocks(shard.grads):
                merged.write(np.arange(start, start + len(block)), block)
                start += len(block)


def merged_meta(shards: list[Dump], spaces: list[int | None], edges: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield the merged meta lines: rows renumbered, prompts namespaced, buckets of the union's edges."""
    start = 0
    for shard, space in zip(shards, spaces, strict=True):
        buckets = shard.bin if shard.is_pooled else bucket_of(shard.entropy, edges)
        for record in shard.meta_records():
            row = record["row"]
            key = merged_key(prompt_key_from_json(record["prompt_idx"]), space)
            yield {**record, "row": start + row, "prompt_idx": key, "bin": int(buckets[row])}
        start += len(shard.grads)


def merged_rollouts(files: list[Path], spaces: list[int | None]) -> Iterator[Rollout]:
    """Yield all shards' rollouts, prompts namespaced."""
    for file, space in zip(files, spaces, strict=True):
        for rollout in iter_rollouts(file):
            yield replace(rollout, prompt_idx=merged_key(rollout.prompt_idx, space))


def merged_faulty_rows(shards: list[Dump]) -> dict[str, list[int]]:
    """The rows that no analysis can use, in the merged dump's numbers, where all shards name theirs."""
    starts = np.cumsum([0, *(len(shard.grads) for shard in shards)]).tolist()
    return {
        key: [start + row for shard, start in zip(shards, starts, strict=False) for row in shard.manifest[key]]
        for key in ("nonfinite_rows", "zero_rows")
        if all(key in shard.manifest for shard in shards)
    }


def merged_prompts(manifests: list[dict[str, Any]], spaces: list[int | None]) -> dict[str, list[Any]]:
    """The union of `prompts_due` and of `prompt_idxs`, ascending, and the `prompt_hashes` beside these.

    Each only where all shards have it.

    Raises:
        InputError: a prompt of one data set has other ids in one shard than in another.
    """

    def keys_of(name: str) -> list[tuple[PromptKey, int, int]]:
        """(key in the merged dump, place in its shard's list, number of the shard), ascending."""
        return sorted(
            (merged_key(prompt_key_from_json(key), space), place, number)
            for number, (manifest, space) in enumerate(zip(manifests, spaces, strict=True))
            for place, key in enumerate(manifest[name])
        )

    told = [name for name in ("prompts_due", "prompt_idxs") if all(name in manifest for manifest in manifests)]
    united: dict[str, list[Any]] = {name: [key for key, _, _ in keys_of(name)] for name in told}
    if "prompt_idxs" in told and all("prompt_hashes" in manifest for manifest in manifests):
        keys = keys_of("prompt_idxs")
        hashes = [manifests[number]["prompt_hashes"][place] for _, place, number in keys]
        raise_if_any(
            f"prompt {key} has other token ids in one shard than in another; were they made with one tokenizer?"
            for (key, _, _), (after, _, _), here, there in zip(keys, keys[1:], hashes, hashes[1:], strict=False)
            if key == after and here != there
        )
        united["prompt_hashes"] = hashes
    return united


def merged_manifest(shards: list[Dump], spaces: list[int | None], edges: dict[str, Any]) -> dict[str, Any]:
    """The first shard's manifest with sums, the union of prompts, the new edges and the shards' names."""
    manifests = [shard.manifest for shard in shards]
    of_shards = {*OF_ONE_SHARD, *SUMMED}
    merged = {key: value for key, value in manifests[0].items() if key not in of_shards}
    for key in SUMMED:
        if all(key in manifest for manifest in manifests):
            merged[key] = sum(manifest[key] for manifest in manifests)
    return {
        **merged,
        **merged_prompts(manifests, spaces),
        **edges,
        **merged_faulty_rows(shards),
        # What one shard's gradients lack the merged dump's lack too.
        "format_version": min(manifest.get("format_version", 1) for manifest in manifests),
        "shards": [shard.path.name for shard in shards],
        "shard_seeds": [manifest.get("seed") for manifest in manifests],
        "shard_seconds": [manifest.get("seconds") for manifest in manifests],
    }


def merge_target(out_dir: Path, shards: list[Dump], rollout_files: list[Path] | None) -> tuple[Path, dict[str, Any]]:
    """Write one target's merged `grads.npy`, `meta.jsonl` and, last, `manifest.json`. Gives directory and manifest."""
    spaces = namespaces(shards)
    edges = merged_edges(shards, rollout_files)
    make_directory(out_dir)
    write_merged_grads(out_dir / contract.GRADS, shards)
    write_jsonl(out_dir / contract.META, merged_meta(shards, spaces, np.array(edges["entropy_edges"])))
    manifest = merged_manifest(shards, spaces, edges) | {"checksums": checksums_of(out_dir)}
    if rollout_files is not None:
        tokens = Tokens.of(merged_rollouts(rollout_files, spaces))
        manifest["on_policy"] = asdict(tokens.test(claims_on_policy(manifest)))
    write_json(out_dir / contract.MANIFEST, manifest)
    return out_dir, manifest


def shards_by_target(shard_dirs: list[Path]) -> dict[str | None, list[Dump]]:
    """The shards of each target; the key is the name of its directory, None where a shard has a single target.

    Raises:
        InputError: the shards have different targets, or a dump can't be read.
    """
    found = {directory: contract.target_directories(directory) for directory in shard_dirs}
    names = [[None] if targets == [shard] else [t.name for t in targets] for shard, targets in found.items()]
    raise_if_any(
        f"{shard}: its targets are {', '.join(filter(None, other)) or 'one'}, but those of {shard_dirs[0]} are "
        + (", ".join(filter(None, names[0])) or "one")
        for shard, other in zip(shard_dirs, names, strict=False)
        if other != names[0]
    )
    return {
        name: [contract.load_dump(found[shard][number]) for shard in shard_dirs] for number, name in enumerate(names[0])
    }


def clear(out_dir: Path, targets: list[str | None]) -> None:
    """Make the output directory unfinished: no manifest in it or in a target's directory."""
    for stale in (out_dir / contract.MANIFEST, out_dir / contract.SETTINGS, *out_dir.glob(f"*/{contract.MANIFEST}")):
        stale.unlink(missing_ok=True)
    if targets != [None]:
        write_json(out_dir / contract.SETTINGS, {"targets": targets})


def refuse_changed_files(targets: dict[str | None, list[Dump]]) -> None:
    """Raise `InputError` where a shard's files are not what its probe wrote."""
    raise_if_any(
        problem
        for shard in {shard.path: shard for shards in targets.values() for shard in shards}.values()
        if "checksums" in shard.manifest
        for problem in checksum_problems(shard, read_content(shard))
    )


def refuse_to_replace_a_probe(out_dir: Path, shard_dirs: list[Path]) -> None:
    """Raise `InputError` where the merge would write over a shard, or over a dump that is no merged one."""
    out = real_path(out_dir)
    for directory in shard_dirs:
        shard = real_path(directory)
        if out == shard:
            raise InputError(f"{out_dir}: is one of the shards; give the merged dump a directory of its own")
        if out in shard.parents or shard in out.parents:
            raise InputError(f"{out_dir}: holds the shard {directory}, or is in it; give the merged dump another place")
    if (out_dir / contract.RECORD).exists():
        raise InputError(f"{out_dir}: holds the beginning of a probe's dump; give the merged dump another directory")
    others = list(out_dir.glob(f"*/{contract.MANIFEST}"))
    if others and not (out_dir / contract.SETTINGS).exists():
        raise InputError(
            f"{out_dir}: holds other dumps ({others[0].parent.name}); give the merged dump another directory"
        )
    for manifest in (out_dir / contract.MANIFEST, *others):
        if manifest.is_file() and "shards" not in read_json(manifest):
            raise InputError(f"{manifest}: is of a dump that is no merged one; give the merged dump another directory")
