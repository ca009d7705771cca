"""A dump opened, and everything in it held against everything else.

`load_manifest` and `load_dump` refuse what contradicts itself as far as that shows without the gradients;
`problems_of` reads all of it.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.errors import InputError, first_few, first_of, raise_if_any
from ..common.fields import Kind, faults_of
from ..common.files import iter_jsonl, read_json, sha256_of
from . import format as contract
from .buckets import bucket_of, pooled_tokens
from .format import COLUMNS, GRADS, MANIFEST, META, ROLLOUTS, Dump
from .mapped import iter_row_blocks, open_rows
from .records import PromptKey, Rollout, iter_rollouts, prompt_hash, prompt_key_from_json

EDGE_TOLERANCE = 1e-6


# The manifest


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the dump in directory `path`, sound by itself."""
    file = path / MANIFEST
    manifest = read_json(file, missing="not a finished dump (the manifest is written last)")
    faults = list(faults_of(manifest, contract.MANIFEST_KINDS)) or _manifest_faults(manifest)
    raise_if_any(f"{file}: {fault}" for fault in faults)
    return manifest


def _manifest_faults(manifest: dict[str, Any]) -> Iterator[str]:
    edges, bins = manifest["entropy_edges"], manifest["bins"]
    if len(edges) != bins + 1 or not contract.are_edges(edges):
        yield f"{len(edges)} entropy_edges for {bins} bins, or not increasing numbers"
    n_there = manifest["num_rollouts"] + manifest.get("num_unverified_rollouts", 0)
    n_due = manifest.get("num_rollouts_due", n_there)
    if n_there != n_due:
        yield f"{n_due} rollouts were due, but {n_there} were made; probe it again"
    if "prompts_due" in manifest:
        due = set(map(prompt_key_from_json, manifest["prompts_due"]))
        others = sorted(set(map(prompt_key_from_json, manifest.get("prompt_idxs", []))) - due)
        if others:
            yield f"prompt_idxs has prompts that were not due ({first_of(others)})"


# The lines


def load_dump(path: Path) -> Dump:
    """Open a dump and place every meta line by its `row`.

    What can be told without reading the gradients is checked: types, the rows' permutation, counts against the
    manifest, buckets against edges, no token twice. All problems are named.
    """
    manifest = load_manifest(path)
    n_rows, row_dim = open_rows(path / GRADS).shape
    raise_if_any(
        f"{path / MANIFEST}: {key} is {manifest[key]}, but {GRADS} has {actual}"
        for key, actual in (("num_positions", n_rows), ("row_dim", row_dim))
        if manifest[key] != actual
    )
    dump = Dump(path, manifest, row=np.arange(n_rows), warnings=(), **_load_meta(path / META, n_rows, manifest))
    repeated = _repeated_tokens(dump)
    is_ours = contract.find_rollouts(path) is not None  # the original did not promise to dump a token once
    raise_if_any([*_bucket_problems(dump), *_count_problems(dump), *(repeated if is_ours else [])])
    return replace(dump, warnings=(*_warnings(path, manifest), *repeated, *_eaten_by_rounding(dump)))


def _load_meta(file: Path, n_rows: int, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a `Dump` has of `meta.jsonl`: columns in row order, and the sorted distinct prompts that `prompt` counts."""
    kinds = contract.POOLED_KINDS if contract.is_pooled(manifest) else contract.META_KINDS
    columns = {name: np.zeros(n_rows, dtype) for name, dtype in COLUMNS.items() if name in kinds}
    n_known = dict.fromkeys(columns, 0)
    seen, prompt = np.zeros(n_rows, np.bool_), np.zeros(n_rows, np.int64)
    code_of: dict[PromptKey, int] = {}
    problems: list[str] = []
    n_lines, in_order = 0, True
    for number, record in iter_jsonl(file):
        n_lines += 1
        fault = next(_meta_faults(record, kinds, n_rows, manifest["bins"]), None)
        row = record.get("row")
        if fault is None and seen[row]:
            fault = f"row {row} stands twice"
        if fault is not None:
            problems.append(f"{file}:{number}: {fault}")
            continue
        seen[row] = True
        in_order &= row == number - 1
        prompt[row] = code_of.setdefault(prompt_key_from_json(record["prompt_idx"]), len(code_of))
        for name, column in columns.items():
            if record.get(name) is not None:
                column[row] = record[name]
                n_known[name] += 1
    if n_lines != n_rows:
        problems.append(f"{file}: {n_lines} lines for the {n_rows} rows of {GRADS}")
    raise_if_any(first_few(problems))
    keys = sorted(code_of)
    rank_of_code = np.argsort([code_of[key] for key in keys])
    known = {name: column for name, column in columns.items() if n_known[name] == n_rows}
    place = {"prompt_keys": keys, "prompt": rank_of_code[prompt] if keys else prompt, "lines_in_row_order": in_order}
    return {**dict.fromkeys(COLUMNS), **known, **place}


def _meta_faults(record: dict[str, Any], kinds: Mapping[str, Kind], n_rows: int, bins: int) -> Iterator[str]:
    yield from faults_of(record, kinds)
    for name, number, end in (("row", record["row"], n_rows), ("bin", record["bin"], bins)):
        if number >= end:
            yield f"{name} {number} is outside 0..{end - 1}"


def _bucket_problems(dump: Dump) -> list[str]:
    """Rows whose bucket is not the one that the manifest's edges give their entropy; sums have no single one."""
    if dump.is_pooled:
        return []
    edges = np.array(dump.manifest["entropy_edges"], dtype=np.float64)
    wrong = np.flatnonzero(bucket_of(dump.entropy, edges) != dump.bin)
    # An entropy on an edge may have been rounded to either side by whoever wrote it.
    nearest = np.abs(dump.entropy[wrong, None] - edges).min(axis=1)
    wrong = wrong[nearest > EDGE_TOLERANCE * np.maximum(1.0, np.abs(dump.entropy[wrong]))]
    where = f"{dump.path / META}: {len(wrong)} rows are not in the bin of their entropy's edges"
    return [f"{where} (rows {first_of(wrong, 5)})"] if len(wrong) else []


def _repeated_tokens(dump: Dump) -> list[str]:
    """Tokens, (prompt, sample, pos), or pooled buckets, (prompt, sample, bin), that stand in more than one row."""
    keys = (dump.bin if dump.is_pooled else dump.pos, dump.sample_idx, dump.prompt)
    order = np.lexsort(keys)
    same = np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys])
    pairs = [f"{a} and {b}" for a, b in zip(order[:-1][same].tolist(), order[1:][same].tolist(), strict=True)]
    what = "rollout's bucket" if dump.is_pooled else "token"
    where = f"{dump.path / META}: a {what} stands in two rows {len(pairs)} times"
    return [f"{where} (rows {first_of(pairs, 3)})"] if pairs else []


def _count_problems(dump: Dump) -> list[str]:
    """Rollouts with two verdicts, and counts that the meta lines contradict. A rollout or prompt may have no row."""
    verdicts_of = {key: set(dump.correct[rows].tolist()) for key, rows in _rows_by_rollout(dump).items()}
    file, hashes = dump.path / META, contract.prompt_hashes_of(dump.manifest)
    unknown = [] if hashes is None else [key for key in dump.prompt_keys if key not in hashes]
    counts = {"num_prompts": len(dump.prompt_keys), "num_rollouts": len(verdicts_of)}
    counts["num_correct_rollouts"] = sum(True in verdicts for verdicts in verdicts_of.values())
    problems = [
        f"{file}: the rollout of prompt_idx {prompt}, sample_idx {sample_idx} is called both correct and incorrect; "
        "probe again"
        for (prompt, sample_idx), verdicts in verdicts_of.items()
        if len(verdicts) > 1
    ]
    problems += [f"{file}: prompt_idx {key} is not among the manifest's prompt_idxs" for key in unknown]
    problems += [
        f"{dump.path / MANIFEST}: {key} is {dump.manifest[key]}, but {META} has rows of {count}"
        for key, count in counts.items()
        if count > dump.manifest.get(key, count)
    ]
    return first_few(problems)


def _eaten_by_rounding(dump: Dump) -> list[str]:
    """What must be said of gradients that were taken from 1 − π as a difference."""
    if dump.manifest.get("format_version", 0) >= contract.EXACT_SINCE:
        return []
    known, most = dump.tail_mass, contract.CERTAIN_TAIL_MASS
    if known is None:
        known, most = dump.entropy, contract.CERTAIN_ENTROPY
    n = np.count_nonzero(known < most)
    said = f"{n} of {len(dump.row)} rows are of tokens of which the model was certain"
    lost = f"1 − π below {contract.CERTAIN_TAIL_MASS:g}: an earlier version lost their gradients to rounding"
    return [f"{dump.path}: {said} ({lost}); probe its rollouts again"] if n else []


def _warnings(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    if "shards" in manifest and "format_version" not in manifest:
        yield (
            f"{path}: merged by the original scripts, which may have put labels on the wrong rows; that can't be "
            "checked here, so merge it again from its shards"
        )
    noise = (manifest.get("rollouts_from") or {}).get("shared_noise") or {}
    if noise.get("is_shared"):
        yield f"{path}: rollouts of different prompts share their noise; intervals take them for independent"


# The gradients, and the files' checksums


class Content(NamedTuple):
    """What one pass over a dump's gradients tells; rows ascend, [k] each."""

    sha256: str  # of the file `grads.npy`
    nonfinite: np.ndarray  # rows with a NaN or an infinity
    zero: np.ndarray  # rows that are zero throughout


def read_content(path: Path) -> Content:
    """Read all gradients of the dump in directory `path` once, in blocks."""
    digest, rows = hashlib.sha256(), open_rows(path / GRADS)
    with (path / GRADS).open("rb") as stream:
        digest.update(stream.read(rows.offset))
    nonfinite, zero, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for block in iter_row_blocks(rows):
        digest.update(block.data.cast("B"))
        with np.errstate(invalid="ignore"):  # flipped bits can make a NaN that signals
            nonfinite.append(start + np.flatnonzero(~np.isfinite(block).all(axis=1)))
            zero.append(start + np.flatnonzero(~block.any(axis=1)))
        start += len(block)
    return Content(digest.hexdigest(), np.concatenate(nonfinite), np.concatenate(zero))


def checksum_problems(path: Path, manifest: Mapping[str, Any], content: Content | None) -> list[str]:
    """Files whose content is not what the manifest's `checksums` say; dumps of the original have none.

    Args:
        content: of the gradients; None leaves them out.
    """
    recorded, problems = manifest.get("checksums", {}), []
    for name, file in _checked_files(path).items():
        if name not in recorded or (name == GRADS and content is None):
            continue
        if file is None or not file.is_file():
            problems.append(f"{path / name}: no such file")
        elif recorded[name] != (content.sha256 if content and name == GRADS else sha256_of(file)):
            problems.append(f"{file}: has changed since it was written (its SHA-256 is not the manifest's)")
    return problems


def checksums_of(path: Path, content: Content) -> dict[str, str]:
    """The `checksums` of a dump's manifest: SHA-256 by file name."""
    files = {name: file for name, file in _checked_files(path).items() if file is not None}
    return {name: content.sha256 if name == GRADS else sha256_of(file) for name, file in files.items()}


def _checked_files(path: Path) -> dict[str, Path | None]:
    return {GRADS: path / GRADS, META: path / META, ROLLOUTS: contract.find_rollouts(path)}


# The whole dump


def problems_of(path: Path) -> tuple[list[str], list[str]]:
    """Everything wrong with the dump, or the dumps of several targets, in directory `path`.

    Returns:
        (problems, notes): notes are what a reader should know of a dump that is sound.
    """
    problems: list[str] = []
    notes: list[str] = []
    try:
        directories = contract.target_directories(path)
    except InputError as error:
        return list(error.problems), []
    for directory in directories:
        try:
            dump = load_dump(directory)
            content = read_content(directory)
            faults, left_out = _unusable_rows(dump, content)
            notes += [*dump.warnings, *left_out]
            problems += [*checksum_problems(directory, dump.manifest, content), *faults]
            file = contract.find_rollouts(directory)
            if file is not None and "format_version" in dump.manifest:
                problems += _rollout_problems(dump, file)
        except InputError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{error.filename}: {error.strerror}")
    return list(dict.fromkeys(problems)), list(dict.fromkeys(notes))


def _unusable_rows(dump: Dump, content: Content) -> tuple[list[str], list[str]]:
    """(problems, notes): non-finite rows that the manifest does not tell of, and rows that analyses leave out."""
    told, found = set(dump.manifest.get("nonfinite_rows", [])), content.nonfinite.tolist()
    unnamed, named = ([row for row in found if (row in told) == is_told] for is_told in (False, True))
    problem = f"{dump.path / GRADS}: NaN or infinity in {len(unnamed)} rows ({first_of(unnamed)})"
    notes = [
        f"{dump.path}: {len(rows)} rows are {fault} ({first_of(rows)}); analyses leave them out"
        for rows, fault in ((named, "not finite, as its manifest says"), (content.zero.tolist(), "zero throughout"))
        if rows
    ]
    return [problem] if unnamed else [], notes


def _rollout_problems(dump: Dump, file: Path) -> list[str]:
    """`rollouts.jsonl` against the manifest's counts and against the tokens of `meta.jsonl`."""
    problems: list[str] = []
    rows_of = _rows_by_rollout(dump)
    seen: set[tuple[PromptKey, int]] = set()
    hashes = contract.prompt_hashes_of(dump.manifest) or {}
    counts = {"num_rollouts": 0, "num_correct_rollouts": 0, "num_response_tokens": 0}
    for rollout in iter_rollouts(file):
        key = (rollout.prompt_idx, rollout.sample_idx)
        if key in seen:
            problems.append(f"{file}: prompt {key[0]} sample {key[1]} stands twice")
        seen.add(key)
        counts["num_rollouts"] += 1
        counts["num_correct_rollouts"] += rollout.correct
        counts["num_response_tokens"] += len(rollout.response_ids)
        problems += _disagreements(dump, rollout, rows_of.pop(key, []))
        actual = prompt_hash(rollout.prompt_ids)
        if hashes.get(rollout.prompt_idx, actual) != actual:
            expected = hashes.pop(rollout.prompt_idx)  # so that it is said once
            problems.append(
                f"{file}: the ids of prompt {rollout.prompt_idx} are not those of its prompt_hash in "
                f"{dump.path / MANIFEST} ({actual}, not {expected})"
            )
    problems += [
        f"{dump.path / META}: prompt {prompt} sample {sample_idx} (row {rows[0]}) is not in {file}"
        for (prompt, sample_idx), rows in rows_of.items()
    ]
    prompts = {prompt for prompt, _ in seen}
    named = set(map(prompt_key_from_json, dump.manifest.get("prompt_idxs", prompts)))
    if prompts != named:
        problems.append(f"{file}: its prompts are not those of prompt_idxs ({first_of(sorted(prompts ^ named))})")
    found = [
        f"{dump.path / MANIFEST}: {key} is {dump.manifest[key]}, but {file} has {count}"
        for key, count in counts.items()
        if dump.manifest.get(key, count) != count
    ]
    return first_few([*found, *problems])


def _rows_by_rollout(dump: Dump) -> dict[tuple[PromptKey, int], list[int]]:
    rows_of: dict[tuple[PromptKey, int], list[int]] = defaultdict(list)
    for row, (code, sample_idx) in enumerate(zip(dump.prompt.tolist(), dump.sample_idx.tolist(), strict=True)):
        rows_of[dump.prompt_keys[code], sample_idx].append(row)
    return rows_of


def _disagreements(dump: Dump, rollout: Rollout, rows: list[int]) -> Iterator[str]:
    """Meta lines of `rows` that say something else than their rollout's tokens, or sums of them, give."""
    if dump.is_pooled:
        place, keys = "bin", ("n_tokens", "n_response_tokens", "correct", "entropy", "logprob", "rare")
        lines = pooled_tokens([rollout], np.array(dump.manifest["entropy_edges"]))
        expected = {line.bin: {key: getattr(line, key) for key in keys} for line in lines}
    else:
        place, keys = "pos", ("entropy", "logprob", "token_id", "correct")
        tokens = zip(rollout.entropies, rollout.logprobs, rollout.response_ids, itertools.repeat(rollout.correct))
        expected = {pos: dict(zip(keys, token, strict=True)) for pos, token in enumerate(tokens)}
    name = f"{dump.path / META}: prompt {rollout.prompt_idx} sample {rollout.sample_idx}"
    row_at = dict(zip(getattr(dump, place)[rows].tolist(), rows, strict=True))
    for at in sorted(row_at.keys() - expected.keys()):
        yield f"{name}: row {row_at[at]} is of {place} {at}, of which its rollout in {ROLLOUTS} has no token"
    for at in sorted(expected.keys() - row_at.keys()) if dump.is_pooled else ():
        yield f"{name}: bin {at} has tokens and no row"
    for at in sorted(expected.keys() & row_at.keys()):
        for key, there in expected[at].items():
            here = getattr(dump, key)
            if here is not None and here[row_at[at]] != there:
                yield f"{name}: row {row_at[at]}: {key} is {here[row_at[at]]}, but {there} by its rollout in {ROLLOUTS}"
