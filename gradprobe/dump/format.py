"""The contract on disk: the only module that knows the file names and keys of a dump.

A dump is a directory with `grads.npy` (float32, [n_positions, row_dim]), `meta.jsonl` (one line per gradient
row), `manifest.json` (written last: a directory without it is unfinished) and, since this tool,
`rollouts.jsonl` (what is needed to probe the same tokens again).
"""

import itertools
import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import FaultyRecord, InputError, first_few, first_of, raise_if_any
from ..common.fields import (
    INDEX,
    LIST,
    NUMBER,
    OBJECT,
    TEXT,
    TRUE_OR_FALSE,
    Kind,
    faults_of,
    is_finite,
    is_index,
    list_of,
)
from ..common.files import iter_jsonl, open_binary, read_json
from .blocks import MappedFile, SelectedRows
from .buckets import bucket_of
from .pooled import BUCKET, POOLING
from .records import HASH_DIGITS, PROMPT_KEY, PromptKey, is_prompt_hash, prompt_key_from_json

GRADS = "grads.npy"
META = "meta.jsonl"
MANIFEST = "manifest.json"
ROLLOUTS = "rollouts.jsonl"
SETTINGS = "settings.json"
RECORD = "progress.jsonl"
FORMAT_VERSION = 2
"""Since 2, gradients of tokens of which the model is certain are exact; before, rounding ate them."""
CERTAIN_TAIL_MASS, CERTAIN_ENTROPY = 1e-6, 1.5e-5
"""Below this tail mass, of which so much entropy (nats) speaks too, a gradient before version 2 is mostly rounding."""
EDGE_TOLERANCE = 1e-6

MANIFEST_KINDS = {
    **dict.fromkeys(("model_path", "target"), TEXT),
    **dict.fromkeys(("row_dim", "num_prompts", "num_samples_per_prompt"), INDEX),
    "row_idx": replace(INDEX.or_null(), is_optional=False),  # null of whole weights, see `projection`
    **dict.fromkeys(("num_rollouts", "num_positions"), INDEX),
    "entropy_edges": LIST,
    "bins": INDEX,
    **dict.fromkeys(("num_correct_rollouts", "num_response_tokens"), INDEX.optional()),
    **dict.fromkeys(("num_nonfinite_rows", "num_zero_rows"), INDEX.optional()),
    **dict.fromkeys(("num_rollouts_due", "num_unverified_rollouts"), INDEX.optional()),
    **dict.fromkeys(("prompt_idxs", "prompts_due", "shards", "nonfinite_rows", "zero_rows"), LIST.optional()),
    "prompt_hashes": list_of(is_prompt_hash, f"hashes of {HASH_DIGITS} hex digits").optional(),
    **dict.fromkeys(("checksums", "shard", "projection", "left_out", "on_policy"), OBJECT.optional()),
    **dict.fromkeys(("adapter_path", "tokenizer_path", "pooling", "bucket_by"), TEXT.optional()),
    **dict.fromkeys(("sampling", "dataset"), OBJECT.or_null()),  # null of rollouts whose file doesn't say it
    **dict.fromkeys(("entropy_edges_over", "entropy_edges_from"), TEXT.optional()),
}
_COMMON_KINDS = {
    **dict.fromkeys(("row", "bin", "sample_idx"), INDEX),
    "prompt_idx": PROMPT_KEY,
    "entropy": NUMBER,
    "correct": TRUE_OR_FALSE,
}
META_KINDS = {**_COMMON_KINDS, "pos": INDEX, "logprob": NUMBER.optional(), "tail_mass": NUMBER.optional()}
POOLED_KINDS = {
    **_COMMON_KINDS,
    **dict.fromkeys(("n_tokens", "n_response_tokens"), INDEX),
    **dict.fromkeys(("logprob", "rare"), NUMBER),
    "reward": NUMBER.or_null(),
}
COLUMNS = ("sample_idx", "bin", "entropy", "correct", "pos", "logprob", "tail_mass", "n_tokens", "n_response_tokens")
COLUMNS += ("rare", "reward")
"""What of a line becomes an array; one that not every line has becomes None."""


@dataclass(frozen=True)
class Dump:
    """A dump opened for reading. Row i of every array describes `grads[i]`.

    Attributes:
        path: its directory.
        manifest: `manifest.json` as it stands.
        grads_file: all of `grads.npy`, mapped into memory where `grads` is asked for.
        row: [n] int64, which rows of `grads.npy` these are.
        prompt_keys: the distinct prompts, sorted.
        prompt: [n] index into `prompt_keys`.
        sample_idx, bin: [n] int64.
        entropy: [n] float64, nats; in a pooled dump the mean of the tokens summed.
        correct: [n] bool, whether the gradient's rollout was correct.
        pos: [n] int64; None in a pooled dump.
        logprob: [n] float64, or None in dumps of the original scripts; in a pooled dump the mean.
        tail_mass: [n] float64, 1 - max π; None in a pooled dump and where it is not known.
        n_tokens, n_response_tokens, rare, reward: [n], see `records.PooledTokens`; None where that says so, or in a
            dump of tokens.
        lines_in_row_order: whether the lines of `meta.jsonl` stand in the order of the rows.
        warnings: what the reader must be told, one line each.
    """

    path: Path
    manifest: dict[str, Any]
    grads_file: MappedFile
    row: np.ndarray
    prompt_keys: list[PromptKey]
    prompt: np.ndarray
    sample_idx: np.ndarray
    bin: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray
    pos: np.ndarray | None
    logprob: np.ndarray | None
    tail_mass: np.ndarray | None
    n_tokens: np.ndarray | None
    n_response_tokens: np.ndarray | None
    rare: np.ndarray | None
    reward: np.ndarray | None
    lines_in_row_order: bool
    warnings: tuple[str, ...]

    @property
    def grads(self) -> np.ndarray | SelectedRows:
        """[n, row_dim] float32, a read-only memory map, or some rows of one (see `only`).

        It is made anew each time: a map keeps a descriptor, of which a process may have as few as 256, and there is a
        dump for each of a thousand targets.
        """
        source = self.grads_file.mapped()
        return source if len(self.row) == len(source) else SelectedRows(source, self.row)

    @property
    def is_pooled(self) -> bool:
        """Whether gradients are sums over a rollout's tokens in a bucket."""
        return is_pooled(self.manifest)

    @property
    def tail_masses(self) -> np.ndarray | None:
        """[n] the rare tokens to be expected behind each gradient, Σ (1 - max π) of its tokens; None where unknown."""
        return self.rare if self.is_pooled else self.tail_mass

    @property
    def bins(self) -> int:
        """The number of entropy buckets."""
        return self.manifest["bins"]

    @property
    def row_dim(self) -> int:
        """The length of a gradient row."""
        return self.grads_file.shape[1]

    def rows_of_bucket(self, bucket: int) -> np.ndarray:
        """Ascending row numbers of `bucket`."""
        return np.flatnonzero(self.bin == bucket)

    def meta_records(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of `meta.jsonl` with all their keys, in row order."""
        file = self.path / META
        if self.lines_in_row_order:
            yield from (record for _, record in iter_jsonl(file))
            return
        starts = np.zeros(len(self.row), np.int64)
        with open_binary(file) as stream:
            start = 0
            for line in stream:
                starts[json.loads(line)["row"]] = start
                start += len(line)
            for start in starts.tolist():
                stream.seek(start)
                yield json.loads(stream.readline())

    def only(self, kept: np.ndarray) -> "Dump":
        """The dump as if it had no rows but `kept`, [n_kept] ascending indices into this one's."""
        if len(kept) == len(self.row):
            return self
        per_row = ("row", "prompt", *COLUMNS)
        columns = {name: None if getattr(self, name) is None else getattr(self, name)[kept] for name in per_row}
        return replace(self, **columns)


def load_dump(path: Path) -> Dump:
    """Open a dump and place every meta line by its `row`.

    What can be told without reading the gradients is checked: types, the rows' permutation, counts against the
    manifest, buckets against edges, no token twice. `check.problems_of` reads the rest too.

    Raises:
        InputError: a file is missing or malformed, or the files contradict each other; all problems are named.
    """
    manifest = load_manifest(path)
    grads = MappedFile.of(path / GRADS)
    raise_if_any(
        f"{path / MANIFEST}: {key} is {manifest[key]}, but {GRADS} has {actual}"
        for key, actual in zip(("num_positions", "row_dim"), grads.shape, strict=True)
        if manifest[key] != actual
    )
    n_rows = grads.shape[0]
    columns, prompt_keys = _load_meta(path / META, n_rows, manifest)
    warnings = _warnings(path, manifest)
    dump = Dump(path, manifest, grads, np.arange(n_rows), prompt_keys, warnings=warnings, **columns)
    repeated = _repeated_tokens(dump)
    is_ours = find_rollouts(path) is not None  # the original did not promise to dump a token once
    raise_if_any([*_bucket_problems(dump), *_count_problems(dump), *(repeated if is_ours else [])])
    return replace(dump, warnings=(*warnings, *repeated, *_eaten_by_rounding(dump)))


def prompt_hashes_of(manifest: Mapping[str, Any]) -> dict[PromptKey, str] | None:
    """The hash of each prompt, see `records.prompt_hash`; None where the manifest has none."""
    if "prompt_hashes" not in manifest:
        return None
    keys = map(prompt_key_from_json, manifest["prompt_idxs"])
    return dict(zip(keys, manifest["prompt_hashes"], strict=True))


def is_pooled(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is of a pooled dump."""
    return manifest.get(POOLING) == BUCKET


def model_of(manifest: Mapping[str, Any]) -> str:
    """Path or name of what was probed; of a model with an adapter, which others may share, that of the adapter."""
    return manifest.get("adapter_path", manifest["model_path"])


def target_name(manifest: Mapping[str, Any]) -> str:
    """What was probed: `model.layers.14.mlp.down_proj.weight[0]`, or whole weights, `all-linear (16x16)`."""
    projection = manifest.get("projection")
    of_it = f" ({projection['rows']}x{projection['cols']})" if projection else f"[{manifest['row_idx']}]"
    return manifest["target"] + of_it


def shown_projection(manifest: Mapping[str, Any]) -> dict[str, int] | None:
    """What `target_name` needs of a projection, for summaries; None of a weight row."""
    projection = manifest.get("projection")
    return projection and {side: projection[side] for side in ("rows", "cols")}


def target_directories(path: Path) -> list[Path]:
    """The dumps in `path`: itself, or those of several targets inside it, in the order they were asked for.

    Raises:
        InputError: some of the targets that `settings.json` names are not finished.
    """
    if (path / MANIFEST).is_file() or not path.is_dir():
        return [path]
    names = _names_of_targets(path / SETTINGS)
    names = names or sorted(child.name for child in path.iterdir() if (child / MANIFEST).is_file())
    if len(names) < 2:
        return [path]
    raise_if_any(
        f"{path / name}: not a finished dump (the manifest is written last)"
        for name in names
        if not (path / name / MANIFEST).is_file()
    )
    return [path / name for name in names]


def _names_of_targets(settings: Path) -> list[str]:
    """The directories of several targets that `settings.json`, if there is one, tells of."""
    names = (read_json(settings).get("targets") or []) if settings.is_file() else []
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_file_name(name) for name in names):
        raise InputError(f"{settings}: 'targets' is not a list of directories' names")
    return names


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the dump in directory `path`.

    Raises:
        InputError: it is missing (the dump is unfinished), not JSON, or lacks a key or has one of a wrong type.
    """
    file = path / MANIFEST
    manifest = read_json(file, missing="not a finished dump (the manifest is written last)")
    raise_if_any(f"{file}: {fault}" for fault in _manifest_faults(manifest))
    return manifest


def _manifest_faults(manifest: dict[str, Any]) -> list[str]:
    faults = list(faults_of(manifest, MANIFEST_KINDS))
    if faults:
        return faults
    edges, bins = manifest["entropy_edges"], manifest["bins"]
    if bins < 1 or len(edges) != bins + 1:
        faults.append(f"{len(edges)} entropy_edges for {bins} bins")
    if not are_edges(edges):
        faults.append("entropy_edges are not increasing numbers")
    if "entropy_edges_from" in manifest and "entropy_edges_over" not in manifest:
        faults.append("'entropy_edges_over' is missing")
    for name in ("prompt_idxs", "prompts_due"):
        try:
            kinds = {type(prompt_key_from_json(key)) for key in manifest.get(name, [])}
        except FaultyRecord as error:
            faults.append(f"{name}: {error}")
        else:
            faults += [f"{name}: some are integers, others [shard, integer]"] if len(kinds) > 1 else []
    n_hashes, n_prompts = (len(manifest.get(key, [])) for key in ("prompt_hashes", "prompt_idxs"))
    if "prompt_hashes" in manifest and n_hashes != n_prompts:
        faults.append(f"{n_hashes} prompt_hashes for {n_prompts} prompt_idxs")
    for key in ("nonfinite_rows", "zero_rows"):
        if not all(is_index(row) and row < manifest["num_positions"] for row in manifest.get(key, [])):
            faults.append(f"{key} are not row numbers below {manifest['num_positions']}")
    return faults or [*_shard_faults(manifest.get("shard", {})), *_missing_rollouts(manifest)]


def _missing_rollouts(manifest: dict[str, Any]) -> Iterator[str]:
    """Rollouts and prompts that were due and that the dump neither has nor says it left out."""
    n_there = manifest["num_rollouts"] + manifest.get("num_unverified_rollouts", 0)
    n_due = manifest.get("num_rollouts_due", _rollouts_due_by_shard(manifest))
    if n_due is not None and n_there != n_due:
        yield f"{n_due} rollouts were due, but {n_there} were made; probe it again"
    if "prompts_due" in manifest:
        due = set(map(prompt_key_from_json, manifest["prompts_due"]))
        others = sorted(set(map(prompt_key_from_json, manifest.get("prompt_idxs", []))) - due)
        if others:
            yield f"prompt_idxs has prompts that were not due ({first_of(others)})"


def _rollouts_due_by_shard(manifest: dict[str, Any]) -> int | None:
    """What a dump of sampled rollouts had to make, from its place among the shards; None where that is not said."""
    whole = {"index": 0, "num_shards": 1} if "shards" in manifest else None
    shard, sampling = manifest.get("shard", whole), manifest.get("sampling") or {}
    n_prompts = sampling.get("num_prompts_of_study")
    if "rollouts_from" in manifest or shard is None or not is_index(n_prompts):
        return None
    index, count = shard["index"], shard["num_shards"]
    return (n_prompts // count + (index < n_prompts % count)) * manifest["num_samples_per_prompt"]


def _shard_faults(shard: dict[str, Any]) -> list[str]:
    index, count = shard.get("index", 0), shard.get("num_shards", 1)
    is_sound = is_index(index) and is_index(count) and index < count
    return [] if is_sound else [f"'shard' is not an index below num_shards: {reprlib.repr(shard)}"]


def are_edges(edges: list[Any]) -> bool:
    """Whether these are finite numbers, each above the one before."""
    return all(map(is_finite, edges)) and all(a < b for a, b in itertools.pairwise(edges))


def _load_meta(file: Path, n_rows: int, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], list[PromptKey]]:
    """Columns of `meta.jsonl` in row order, and the sorted distinct prompts that its `prompt` counts in."""
    kinds = POOLED_KINDS if is_pooled(manifest) else META_KINDS
    columns = {name: np.zeros(n_rows, _dtype_of(name)) for name in COLUMNS if name in kinds}
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
    if len({type(key) for key in code_of}) > 1:
        problems.append(f"{file}: prompt_idx is an integer in some lines and [shard, integer] in others")
    raise_if_any(first_few(problems))
    keys = sorted(code_of)
    rank_of_code = np.zeros(len(keys), np.int64)
    rank_of_code[[code_of[key] for key in keys]] = np.arange(len(keys))
    known = {name: column for name, column in columns.items() if n_known[name] == n_rows}
    return {
        "prompt": rank_of_code[prompt],
        **dict.fromkeys(COLUMNS),
        **known,
        "lines_in_row_order": in_order,
    }, keys


def _dtype_of(column: str) -> type:
    if column == "correct":
        return np.bool_
    return np.float64 if column in ("entropy", "logprob", "tail_mass", "rare", "reward") else np.int64


def _bucket_problems(dump: Dump) -> list[str]:
    """Rows whose bucket is not the one that the manifest's edges give their entropy; sums have no single one."""
    if dump.is_pooled:
        return []
    edges = np.array(dump.manifest["entropy_edges"], dtype=np.float64)
    wrong = np.flatnonzero(bucket_of(dump.entropy, edges) != dump.bin)
    # An entropy on an edge may have been rounded to either side by whoever wrote it.
    nearest = np.abs(dump.entropy[wrong, None] - edges).min(axis=1)
    wrong = wrong[nearest > EDGE_TOLERANCE * np.maximum(1.0, np.abs(dump.entropy[wrong]))]
    if len(wrong) == 0:
        return []
    shown = first_of(wrong, 5)
    return [f"{dump.path / META}: {len(wrong)} rows are not in the bin of their entropy's edges (rows {shown})"]


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
    rollouts, of_row = np.unique(np.stack([dump.prompt, dump.sample_idx]), axis=1, return_inverse=True)
    n_rows = np.bincount(of_row.ravel(), minlength=rollouts.shape[1])
    n_correct = np.bincount(of_row.ravel(), dump.correct, rollouts.shape[1])
    mixed = rollouts[:, (n_correct > 0) & (n_correct < n_rows)].T.tolist()
    problems = [
        f"{dump.path / META}: the rollout of prompt_idx {dump.prompt_keys[code]}, sample_idx {sample_idx} is called "
        "both correct and incorrect; probe again"
        for code, sample_idx in mixed
    ]
    counts = {"num_prompts": len(dump.prompt_keys), "num_rollouts": rollouts.shape[1]}
    counts["num_correct_rollouts"] = int(np.count_nonzero(n_correct))
    file = dump.path / MANIFEST
    hashes = prompt_hashes_of(dump.manifest)
    unknown = [] if hashes is None else [key for key in dump.prompt_keys if key not in hashes]
    if unknown:
        problems.append(
            f"{dump.path / META}: prompt_idx {unknown[0]} (and {len(unknown) - 1} others) is not among the "
            "manifest's prompt_idxs"
        )
    problems += [
        f"{file}: {key} is {dump.manifest[key]}, but {META} has rows of {count}"
        for key, count in counts.items()
        if count > dump.manifest.get(key, count)
    ]
    return first_few(problems)


def _eaten_by_rounding(dump: Dump) -> list[str]:
    """What must be said of gradients that were taken from 1 − π as a difference."""
    if dump.manifest.get("format_version", 0) >= FORMAT_VERSION:
        return []
    is_known = dump.tail_mass is not None
    n = np.count_nonzero(dump.tail_mass < CERTAIN_TAIL_MASS if is_known else dump.entropy < CERTAIN_ENTROPY)
    return [
        f"{dump.path}: {n} of {len(dump.row)} rows are of tokens of which the model was certain (1 − π below "
        f"{CERTAIN_TAIL_MASS:g}), whose gradients an earlier version lost to rounding; probe its rollouts again"
    ] if n else []


def _meta_faults(record: dict[str, Any], kinds: Mapping[str, Kind], n_rows: int, bins: int) -> Iterator[str]:
    yield from faults_of(record, kinds)
    for name, number, end in (("row", record["row"], n_rows), ("bin", record["bin"], bins)):
        if number >= end:
            yield f"{name} {number} is outside 0..{end - 1}"


def _warnings(path: Path, manifest: dict[str, Any]) -> tuple[str, ...]:
    warnings = []
    if "shards" in manifest and "format_version" not in manifest:
        warnings.append(
            f"{path}: merged by the original scripts, which may have put labels on the wrong rows; that can't be "
            "checked here, so merge it again from its shards"
        )
    noise = (manifest.get("rollouts_from") or {}).get("shared_noise")
    if isinstance(noise, dict) and noise.get("is_shared"):
        warnings.append(f"{path}: rollouts of different prompts share their noise; intervals take them for independent")
    return tuple(warnings)


def find_rollouts(path: Path) -> Path | None:
    """The `rollouts.jsonl` of a dump: its own, or the one above it that several targets share; None if absent."""
    own, above = path / ROLLOUTS, path.parent / ROLLOUTS
    if own.is_file():
        return own
    return above if above.is_file() and path.name in _names_of_targets(path.parent / SETTINGS) else None


def find_manifest(rollouts: Path) -> Path | None:
    """The manifest that says how a file of rollouts came about: beside it, or of the first of several targets below."""
    names = _names_of_targets(rollouts.with_name(SETTINGS)) if rollouts.name == ROLLOUTS else []
    found = (rollouts.parent / name / MANIFEST for name in ("", *names))
    return next((file for file in found if file.is_file()), None)
