"""The contract on disk: the only module that knows the file names and keys of a dump.

A dump is a directory with `grads.npy` (float32, [n_positions, row_dim]), `meta.jsonl` (one line per gradient
row), `manifest.json` (written last: a directory without it is unfinished) and, since this tool,
`rollouts.jsonl` (what is needed to probe the same tokens again).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .errors import InputError, raise_if_any

GRADS = "grads.npy"
META = "meta.jsonl"
MANIFEST = "manifest.json"
ROLLOUTS = "rollouts.jsonl"
SETTINGS = "settings.json"
FORMAT_VERSION = 1
BLOCK_BYTES = 64 << 20

REQUIRED_MANIFEST_KEYS = {
    "model_path": str,
    "target": str,
    "row_idx": int,
    "row_dim": int,
    "num_prompts": int,
    "num_samples_per_prompt": int,
    "num_rollouts": int,
    "num_positions": int,
    "entropy_edges": list,
    "bins": int,
}

PromptKey = int | tuple[int, int]
"""A prompt's index in its data set, or (shard, index) where shards of unknown origin were merged."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response and all that is needed to probe it again; one line of `rollouts.jsonl`.

    `entropies` (nats) and `logprobs` are those of the full softmax at temperature 1, one per response token.
    """

    prompt_idx: PromptKey
    sample_idx: int
    problem_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    entropies: list[float]
    logprobs: list[float]
    response: str
    ground_truth: str
    correct: bool


@dataclass(frozen=True)
class Position:
    """One gradient row's description; one line of `meta.jsonl`. `pos` counts response tokens from 0."""

    row: int
    prompt_idx: PromptKey
    sample_idx: int
    pos: int
    bin: int
    entropy: float
    correct: bool
    token_id: int
    logprob: float


@dataclass(frozen=True)
class Dump:
    """A dump opened for reading. Row i of every array describes `grads[i]`.

    Attributes:
        path: its directory.
        manifest: `manifest.json` as it stands.
        grads: [n, row_dim] float32, a read-only memory map.
        prompt_keys: the distinct prompts, sorted.
        prompt: [n] index into `prompt_keys`.
        sample_idx, pos, bin: [n] int64.
        entropy: [n] float64, nats.
        correct: [n] bool, whether the position's rollout was correct.
        logprob: [n] float64, or None in dumps of the original scripts.
        warnings: what the reader must be told, one line each.
    """

    path: Path
    manifest: dict[str, Any]
    grads: np.ndarray
    prompt_keys: list[PromptKey]
    prompt: np.ndarray
    sample_idx: np.ndarray
    pos: np.ndarray
    bin: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray
    logprob: np.ndarray | None
    warnings: tuple[str, ...]

    @property
    def bins(self) -> int:
        """The number of entropy buckets."""
        return self.manifest["bins"]

    @property
    def row_dim(self) -> int:
        """The length of a gradient row."""
        return self.grads.shape[1]

    def rows_of_bucket(self, bucket: int) -> np.ndarray:
        """Ascending row numbers of `bucket`."""
        return np.flatnonzero(self.bin == bucket)

    def meta_records(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of `meta.jsonl` with all their keys, in row order."""
        records = {record["row"]: record for _, record in iter_jsonl(self.path / META)}
        for row in range(len(self.grads)):
            yield records[row]


def prompt_key_from_json(value: Any) -> PromptKey:
    """`7` -> 7, `[1, 7]` -> (1, 7).

    Raises:
        ValueError: neither of both.
    """
    if _is_int(value):
        return value
    if isinstance(value, list) and len(value) == 2 and all(_is_int(part) for part in value):
        return (value[0], value[1])
    raise ValueError(f"prompt_idx is neither an integer nor [shard, integer]: {value!r}")


def load_dump(path: Path) -> Dump:
    """Open a dump and place every meta line by its `row`.

    Raises:
        InputError: a file is missing or malformed, or the files contradict each other; all problems are named.
    """
    manifest = load_manifest(path)
    grads = _open_grads(path / GRADS)
    problems = [
        f"{path / MANIFEST}: {key} is {manifest[key]}, but {GRADS} has {actual}"
        for key, actual in zip(("num_positions", "row_dim"), grads.shape, strict=True)
        if manifest[key] != actual
    ]
    raise_if_any(problems)
    columns = _load_meta(path / META, len(grads), manifest["bins"])
    keys = columns.pop("prompt_idx")
    if len({type(key) for key in keys}) > 1:
        raise InputError(f"{path / META}: prompt_idx is an integer in some lines and [shard, integer] in others")
    prompt_keys = sorted(set(keys))
    code_of = {key: code for code, key in enumerate(prompt_keys)}
    prompt = np.array([code_of[key] for key in keys], dtype=np.int64)
    return Dump(path, manifest, grads, prompt_keys, prompt, warnings=_warnings(path, manifest), **columns)


def target_directories(path: Path) -> list[Path]:
    """The dumps in `path`: itself, or those of several targets inside it, in the order they were asked for.

    Raises:
        InputError: some of the targets that `settings.json` names are not finished.
    """
    if (path / MANIFEST).is_file() or not path.is_dir():
        return [path]
    settings = read_json(path / SETTINGS) if (path / SETTINGS).is_file() else {}
    names = settings.get("targets") or sorted(child.name for child in path.iterdir() if (child / MANIFEST).is_file())
    if len(names) < 2:
        return [path]
    raise_if_any(
        f"{path / name}: not a finished dump (the manifest is written last)"
        for name in names
        if not (path / name / MANIFEST).is_file()
    )
    return [path / name for name in names]


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the dump in directory `path`.

    Raises:
        InputError: it is missing (the dump is unfinished), not JSON, or lacks a key or has one of a wrong type.
    """
    file = path / MANIFEST
    manifest = read_json(file, missing="not a finished dump (the manifest is written last)")
    raise_if_any(
        f"{file}: '{key}' " + ("is missing" if key not in manifest else f"is not of type {kind.__name__}")
        for key, kind in REQUIRED_MANIFEST_KEYS.items()
        if not isinstance(manifest.get(key), kind) or isinstance(manifest.get(key), bool)
    )
    if len(manifest["entropy_edges"]) != manifest["bins"] + 1:
        raise InputError(f"{file}: {len(manifest['entropy_edges'])} entropy_edges for {manifest['bins']} bins")
    return manifest


def read_json(file: Path, missing: str = "no such file") -> dict[str, Any]:
    """One JSON object.

    Raises:
        InputError: the file is missing (said as `missing`), unreadable, or not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: {missing}") from error
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a JSON object")
    return content


def _open_grads(file: Path) -> np.ndarray:
    try:
        grads = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except OSError as error:
        raise InputError(f"{file}: {error}") from error
    except ValueError as error:
        raise InputError(f"{file}: not a readable .npy array ({error})") from error
    if not isinstance(grads, np.ndarray) or grads.ndim != 2 or grads.dtype != np.dtype("<f4"):
        found = f"{grads.dtype.str} {grads.shape}" if isinstance(grads, np.ndarray) else type(grads).__name__
        raise InputError(f"{file}: must be little-endian float32 of two dimensions, is {found}")
    return grads


def iter_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line of a JSONL file.

    Raises:
        InputError: the file can't be read or a line is no JSON object.
    """
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{file}:{number}: not JSON ({error})") from error
                if not isinstance(record, dict):
                    raise InputError(f"{file}:{number}: not a JSON object")
                yield number, record
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error


def _load_meta(file: Path, n_rows: int, bins: int) -> dict[str, Any]:
    """Columns of `meta.jsonl` in row order; `prompt_idx` as a list of keys, the rest as arrays."""
    by_row: list[dict[str, Any] | None] = [None] * n_rows
    problems: list[str] = []
    n_lines = 0
    for number, record in iter_jsonl(file):
        n_lines += 1
        fault = _meta_fault(record, n_rows, bins)
        if fault is None and by_row[record["row"]] is not None:
            fault = f"row {record['row']} stands twice"
        if fault is None:
            by_row[record["row"]] = record
        else:
            problems.append(f"{file}:{number}: {fault}")
    if n_lines != n_rows:
        problems.append(f"{file}: {n_lines} lines for the {n_rows} rows of {GRADS}")
    if problems:
        shown, n_more = problems[:20], len(problems) - 20
        raise InputError(*shown, *([f"and {n_more} more problems"] if n_more > 0 else []))
    records: list[dict[str, Any]] = [record for record in by_row if record is not None]

    def column(key: str, dtype: type) -> np.ndarray:
        return np.array([record[key] for record in records], dtype=dtype)

    has_logprob = all("logprob" in record for record in records)
    return {
        "prompt_idx": [prompt_key_from_json(record["prompt_idx"]) for record in records],
        "sample_idx": column("sample_idx", np.int64),
        "pos": column("pos", np.int64),
        "bin": column("bin", np.int64),
        "entropy": column("entropy", np.float64),
        "correct": column("correct", np.bool_),
        "logprob": column("logprob", np.float64) if has_logprob else None,
    }


def _meta_fault(record: dict[str, Any], n_rows: int, bins: int) -> str | None:
    for key in ("row", "sample_idx", "pos", "bin"):
        if not _is_int(record.get(key)):
            return f"'{key}' is missing or not an integer"
    if not 0 <= record["row"] < n_rows:
        return f"row {record['row']} is outside 0..{n_rows - 1}"
    if not 0 <= record["bin"] < bins:
        return f"bin {record['bin']} is outside 0..{bins - 1}"
    if not isinstance(record.get("entropy"), int | float) or isinstance(record["entropy"], bool):
        return "'entropy' is missing or not a number"
    if not isinstance(record.get("correct"), bool):
        return "'correct' is missing or not true or false"
    try:
        prompt_key_from_json(record.get("prompt_idx"))
    except ValueError as error:
        return str(error)
    return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _warnings(path: Path, manifest: dict[str, Any]) -> tuple[str, ...]:
    if "shards" in manifest and "format_version" not in manifest:
        return (
            f"{path}: merged by the original scripts, which may have put labels on the wrong rows; that can't be "
            "checked here, so merge it again from its shards",
        )
    return ()


def find_rollouts(path: Path) -> Path | None:
    """The `rollouts.jsonl` of a dump: its own, or the one above it that several targets share; None if absent."""
    for candidate in (path / ROLLOUTS, path.parent / ROLLOUTS):
        if candidate.is_file():
            return candidate
    return None


def iter_rollouts(file: Path) -> Iterator[Rollout]:
    """Yield the rollouts of a `rollouts.jsonl`.

    Raises:
        InputError: a line is malformed, or the numbers per token don't match the tokens.
    """
    for number, record in iter_jsonl(file):
        try:
            rollout = Rollout(
                **{name: record[name] for name in Rollout.__dataclass_fields__ if name != "prompt_idx"},
                prompt_idx=prompt_key_from_json(record.get("prompt_idx")),
            )
        except KeyError as error:
            raise InputError(f"{file}:{number}: key {error} is missing") from error
        except ValueError as error:
            raise InputError(f"{file}:{number}: {error}") from error
        if not len(rollout.response_ids) == len(rollout.entropies) == len(rollout.logprobs):
            raise InputError(f"{file}:{number}: response_ids, entropies and logprobs differ in length")
        yield rollout


def iter_row_blocks(grads: np.ndarray, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield the rows of a memory map (all, or those of `rows`) as arrays of at most 64 MiB, in order."""
    n = len(grads) if rows is None else len(rows)
    step = max(1, BLOCK_BYTES // max(1, grads.shape[1] * grads.itemsize))
    for start in range(0, n, step):
        yield np.asarray(grads[start : start + step] if rows is None else grads[rows[start : start + step]])


def sha256_of(*files: Path) -> str:
    """One SHA-256 over the contents of `files`, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def make_directory(path: Path) -> None:
    """Create `path` and its parents.

    Raises:
        InputError: it is a file, or can't be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{path}: is a file, a directory is needed") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: not writable")


@contextmanager
def _written_aside(file: Path) -> Iterator[TextIO]:
    """A text stream whose content appears under `file`'s name whole or not at all."""
    aside = file.with_name(file.name + ".partial")
    with aside.open("w", encoding="utf-8", newline="\n") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, file)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all. NaN is refused: a number that can't be had is None."""
    with _written_aside(file) as stream:
        json.dump(content, stream, indent=2, allow_nan=False)
        stream.write("\n")


def write_text(file: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    with _written_aside(file) as stream:
        stream.write(content)


def write_records(file: Path, records: Iterable[Rollout | Position]) -> None:
    """Write `rollouts.jsonl` or `meta.jsonl`, one record a line, whole or not at all."""
    write_jsonl(file, map(asdict, records))


def write_jsonl(file: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write JSON objects, one a line, whole or not at all."""
    with _written_aside(file) as stream:
        for content in objects:
            stream.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_grads(file: Path, n_rows: int, row_dim: int) -> Iterator[np.ndarray]:
    """A writable float32 memory map, [n_rows, row_dim], that appears under `file`'s name when complete."""
    aside = file.with_name(file.name + ".partial")
    if n_rows == 0 or row_dim == 0:  # an empty file can't be mapped
        grads = np.zeros((n_rows, row_dim), np.float32)
        yield grads
        with aside.open("wb") as stream:
            np.save(stream, grads, allow_pickle=False)
    else:
        grads = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=(n_rows, row_dim))
        yield grads
        grads.flush()
        del grads
    os.replace(aside, file)
