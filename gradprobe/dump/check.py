"""Is a dump sound? Everything in it is read and held against everything else."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError, first_few, first_of
from ..common.files import open_binary, sha256_of
from . import format as contract
from .blocks import iter_row_blocks
from .format import Dump
from .pooled import pooled_tokens
from .records import Rollout, iter_rollouts, prompt_hash, prompt_key_from_json


@dataclass(frozen=True)
class Content:
    """What one pass over a dump's gradients tells.

    Attributes:
        sha256: of the file `grads.npy`.
        nonfinite: [k] ascending rows with a NaN or an infinity.
        zero: [k] ascending rows that are zero throughout.
    """

    sha256: str
    nonfinite: np.ndarray
    zero: np.ndarray


def read_content(dump: Dump) -> Content:
    """Read all gradients once, in blocks."""
    file = dump.path / contract.GRADS
    digest = hashlib.sha256()
    with open_binary(file) as stream:
        digest.update(stream.read(dump.grads_file.offset))
    nonfinite, zero, start = [], [], 0
    for block in iter_row_blocks(dump.grads):
        digest.update(block.data.cast("B"))
        with np.errstate(invalid="ignore"):  # flipped bits can make a NaN that signals
            nonfinite.append(start + np.flatnonzero(~np.isfinite(block).all(axis=1)))
            zero.append(start + np.flatnonzero(~block.any(axis=1)))
        start += len(block)
    none = [np.zeros(0, np.int64)]
    return Content(digest.hexdigest(), np.concatenate(none + nonfinite), np.concatenate(none + zero))


def checksum_problems(dump: Dump, content: Content) -> list[str]:
    """Files whose content is not what the manifest's `checksums` say; dumps of the original have none."""
    recorded = dump.manifest.get("checksums", {})
    problems = []
    for name, file in checked_files(dump.path).items():
        if name not in recorded:
            continue
        if file is None or not file.is_file():
            problems.append(f"{dump.path / name}: no such file")
        elif recorded[name] != (content.sha256 if name == contract.GRADS else sha256_of(file)):
            problems.append(f"{file}: has changed since it was written (its SHA-256 is not the manifest's)")
    return problems


def checked_files(path: Path) -> dict[str, Path | None]:
    """The files of a dump whose checksums its manifest holds."""
    rollouts = contract.find_rollouts(path)
    return {contract.GRADS: path / contract.GRADS, contract.META: path / contract.META, contract.ROLLOUTS: rollouts}


def checksums_of(path: Path) -> dict[str, str]:
    """The `checksums` of a dump's manifest: SHA-256 by file name."""
    return {name: sha256_of(file) for name, file in checked_files(path).items() if file is not None}


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
            dump = contract.load_dump(directory)
        except InputError as error:
            problems += error.problems
            continue
        content = read_content(dump)
        notes += [*dump.warnings, *_rows_left_out(dump, content)]
        problems += [*checksum_problems(dump, content), *_unnamed_rows(dump, content)]
        file = contract.find_rollouts(directory)
        try:
            if file is not None and "format_version" in dump.manifest:
                problems += _rollout_problems(dump, file)
        except InputError as error:
            problems += error.problems
    return list(dict.fromkeys(problems)), list(dict.fromkeys(notes))


def _unnamed_rows(dump: Dump, content: Content) -> Iterator[str]:
    """Non-finite rows that the manifest does not tell of."""
    unnamed = sorted(set(content.nonfinite.tolist()) - set(dump.manifest.get("nonfinite_rows", [])))
    if unnamed:
        yield f"{dump.path / contract.GRADS}: NaN or infinity in {len(unnamed)} rows ({first_of(unnamed)})"


def _rows_left_out(dump: Dump, content: Content) -> Iterator[str]:
    named = sorted(set(content.nonfinite.tolist()) & set(dump.manifest.get("nonfinite_rows", [])))
    faults = ((named, "not finite, as its manifest says"), (content.zero.tolist(), "zero throughout"))
    for rows, fault in faults:
        if rows:
            yield f"{dump.path}: {len(rows)} rows are {fault} ({first_of(rows)}); analyses leave them out"


def _rollout_problems(dump: Dump, file: Path) -> list[str]:
    """`rollouts.jsonl` against the manifest's counts and against the tokens of `meta.jsonl`."""
    problems: list[str] = []
    code_of = {key: code for code, key in enumerate(dump.prompt_keys)}
    rows_of = _rows_by_rollout(dump)
    seen: set[tuple[Any, int]] = set()
    hashes, told = contract.prompt_hashes_of(dump.manifest) or {}, set()
    counts = {"num_rollouts": 0, "num_correct_rollouts": 0, "num_response_tokens": 0}
    for rollout in iter_rollouts(file):
        key = (rollout.prompt_idx, rollout.sample_idx)
        if key in seen:
            problems.append(f"{file}: prompt {key[0]} sample {key[1]} stands twice")
        seen.add(key)
        counts["num_rollouts"] += 1
        counts["num_correct_rollouts"] += rollout.correct
        counts["num_response_tokens"] += len(rollout.response_ids)
        rows = rows_of.pop((code_of.get(rollout.prompt_idx, -1), rollout.sample_idx), np.zeros(0, np.int64))
        problems += _disagreements(dump, rollout, rows)
        expected, actual = hashes.get(rollout.prompt_idx), prompt_hash(rollout.prompt_ids) if hashes else None
        if expected not in (None, actual) and rollout.prompt_idx not in told:
            told.add(rollout.prompt_idx)
            problems.append(
                f"{file}: the ids of prompt {rollout.prompt_idx} are not those of its prompt_hash in "
                f"{dump.path / contract.MANIFEST} ({actual}, not {expected})"
            )
    if rows_of:
        (code, sample_idx), rows = next(iter(rows_of.items()))
        problems.append(
            f"{dump.path / contract.META}: prompt {dump.prompt_keys[code]} sample {sample_idx} (row {rows[0]}) "
            f"is not in {file}"
        )
    prompts = {prompt for prompt, _ in seen}
    named = set(map(prompt_key_from_json, dump.manifest.get("prompt_idxs", prompts)))
    if prompts != named:
        problems.append(f"{file}: its prompts are not those of prompt_idxs ({first_of(sorted(prompts ^ named))})")
    found = [
        f"{dump.path / contract.MANIFEST}: {key} is {dump.manifest[key]}, but {file} has {count}"
        for key, count in counts.items()
        if dump.manifest.get(key, count) != count
    ]
    return first_few([*found, *problems])


def _rows_by_rollout(dump: Dump) -> dict[tuple[int, int], np.ndarray]:
    order = np.lexsort((dump.sample_idx, dump.prompt))
    keys = np.stack([dump.prompt, dump.sample_idx], axis=1)[order]
    cuts = np.flatnonzero(np.any(np.diff(keys, axis=0) != 0, axis=1)) + 1
    groups = [rows for rows in np.split(order, cuts) if len(rows)]
    return {(int(dump.prompt[rows[0]]), int(dump.sample_idx[rows[0]])): rows for rows in groups}


def _disagreements(dump: Dump, rollout: Rollout, rows: np.ndarray) -> Iterable[str]:
    """Meta lines of `rows` that say something else than their rollout."""
    if dump.is_pooled:
        yield from _pooled_disagreements(dump, rollout, rows)
        return
    name = f"prompt {rollout.prompt_idx} sample {rollout.sample_idx}"
    for row in rows.tolist():
        pos = int(dump.pos[row])
        where = f"{dump.path / contract.META}: row {row} ({name} pos {pos})"
        if pos >= len(rollout.response_ids):
            yield f"{where}: the response has {len(rollout.response_ids)} tokens"
        elif rollout.entropies[pos] != dump.entropy[row]:
            yield f"{where}: entropy is {dump.entropy[row]}, in {contract.ROLLOUTS} {rollout.entropies[pos]}"
        elif dump.logprob is not None and rollout.logprobs[pos] != dump.logprob[row]:
            yield f"{where}: logprob is {dump.logprob[row]}, in {contract.ROLLOUTS} {rollout.logprobs[pos]}"
        elif rollout.correct != dump.correct[row]:
            yield f"{where}: correct differs from {contract.ROLLOUTS}"


def _pooled_disagreements(dump: Dump, rollout: Rollout, rows: np.ndarray) -> Iterable[str]:
    """Lines of a pooled dump against what its rollout's tokens and the manifest's edges give."""
    name = f"{dump.path / contract.META}: prompt {rollout.prompt_idx} sample {rollout.sample_idx}"
    expected = {line.bin: line for line in pooled_tokens([rollout], np.array(dump.manifest["entropy_edges"]))}
    found = {int(dump.bin[row]): row for row in rows.tolist()}
    for bucket in sorted(expected.keys() ^ found.keys()):
        yield f"{name}: bin {bucket} has {'tokens and no row' if bucket in expected else 'a row and no tokens'}"
    for bucket in sorted(expected.keys() & found.keys()):
        line, row = expected[bucket], found[bucket]
        for key in ("n_tokens", "n_response_tokens", "correct", "entropy", "logprob", "rare"):
            here, there = getattr(dump, key)[row], getattr(line, key)
            if here != there:
                yield f"{name}: row {row}: {key} is {here}, but {there} of its tokens in {contract.ROLLOUTS}"
