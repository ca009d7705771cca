"""The contract on disk: the only module that knows the file names and keys of a dump.

A dump is a directory with `grads.npy` (float32, [n_positions, row_dim]), `meta.jsonl` (one line per gradient
row), `manifest.json` (written last: a directory without it is unfinished) and, since this tool,
`rollouts.jsonl` (what is needed to probe the same tokens again).
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import raise_if_any
from ..common.fields import INDEX, LIST, NUMBER, TEXT, TRUE_OR_FALSE, is_finite
from ..common.files import iter_jsonl, read_json
from .buckets import BUCKET, POOLING
from .mapped import SelectedRows, open_rows
from .records import PROMPT_KEY, PromptKey, prompt_key_from_json

GRADS = "grads.npy"
META = "meta.jsonl"
MANIFEST = "manifest.json"
ROLLOUTS = "rollouts.jsonl"
SETTINGS = "settings.json"
PROGRESS = "progress.jsonl"
WITHIN_A_HUB = re.compile(r"[\w.-]+/[^/\\]+|[^/\\]+")
PLACES = ("path", "from", "to")
"""Of a data set, of rollouts, and of a step's ends."""
FORMAT_VERSION = 2
EXACT_SINCE = 2
"""Since this version gradients of tokens of which the model is certain are exact; before, rounding ate them."""
CERTAIN_TAIL_MASS, CERTAIN_ENTROPY = 1e-6, 1.5e-5
"""Below this tail mass, of which so much entropy (nats) speaks too, a gradient before version 2 is mostly rounding."""

MANIFEST_KINDS = {
    **dict.fromkeys(("model_path", "target"), TEXT),
    **dict.fromkeys(("row_dim", "bins", "num_prompts", "num_samples_per_prompt"), INDEX),
    **dict.fromkeys(("num_rollouts", "num_positions"), INDEX),
    "row_idx": replace(INDEX.or_null(), is_optional=False),  # null of whole weights, see `projection`
    "entropy_edges": LIST,
}
"""What the manifest of every dump has, the original's too; the rest is as we wrote it."""
_COMMON_KINDS = {
    **dict.fromkeys(("row", "bin", "sample_idx"), INDEX),
    "prompt_idx": PROMPT_KEY,
    "entropy": NUMBER,
    "correct": TRUE_OR_FALSE,
}
META_KINDS = {
    **_COMMON_KINDS,
    **{"pos": INDEX, "token_id": INDEX.optional()},
    **dict.fromkeys(("logprob", "tail_mass"), NUMBER.optional()),
}
POOLED_KINDS = {
    **_COMMON_KINDS,
    **dict.fromkeys(("n_tokens", "n_response_tokens"), INDEX),
    **dict.fromkeys(("logprob", "rare"), NUMBER),
    "reward": NUMBER.or_null(),
}
COLUMNS = {
    **dict.fromkeys(("sample_idx", "bin", "pos", "token_id", "n_tokens", "n_response_tokens"), np.int64),
    **dict.fromkeys(("entropy", "logprob", "tail_mass", "rare", "reward"), np.float64),
    "correct": np.bool_,
}
"""What of a line becomes an array, of which type; one that not every line has becomes None."""


@dataclass(frozen=True)
class Dump:
    """A dump opened for reading. Row i of every array describes `grads[i]`.

    Attributes:
        path: its directory.
        manifest: `manifest.json` as it stands.
        row: [n] int64, which rows of `grads.npy` these are.
        prompt_keys: the distinct prompts, sorted.
        prompt: [n] index into `prompt_keys`.
        sample_idx, bin: [n] int64.
        entropy: [n] float64, nats; in a pooled dump the mean of the tokens summed.
        correct: [n] bool, whether the gradient's rollout was correct.
        pos: [n] int64; None in a pooled dump.
        token_id: [n] int64; None in a pooled dump and in dumps of the original scripts.
        logprob: [n] float64, or None in dumps of the original scripts; in a pooled dump the mean.
        tail_mass: [n] float64, 1 - max π; None in a pooled dump and where it is not known.
        n_tokens, n_response_tokens, rare, reward: [n], see `records.PooledTokens`; None where that says so, or in a
            dump of tokens.
        lines_in_row_order: whether the lines of `meta.jsonl` stand in the order of the rows.
        warnings: what the reader must be told, one line each.
    """

    path: Path
    manifest: dict[str, Any]
    row: np.ndarray
    prompt_keys: list[PromptKey]
    prompt: np.ndarray
    sample_idx: np.ndarray
    bin: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray
    pos: np.ndarray | None
    token_id: np.ndarray | None
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
        source = open_rows(self.path / GRADS)
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
        return self.manifest["row_dim"]

    def rows_of_bucket(self, bucket: int) -> np.ndarray:
        """Ascending row numbers of `bucket`."""
        return np.flatnonzero(self.bin == bucket)

    def meta_records(self) -> Iterator[dict[str, Any]]:
        """The lines of `meta.jsonl` with all their keys, in row order."""
        records = (record for _, record in iter_jsonl(self.path / META))
        return records if self.lines_in_row_order else iter(sorted(records, key=lambda record: record["row"]))

    def only(self, kept: np.ndarray) -> "Dump":
        """The dump as if it had no rows but `kept`, [n_kept] ascending indices into this one's."""
        if len(kept) == len(self.row):
            return self
        per_row = ("row", "prompt", *COLUMNS)
        columns = {name: None if getattr(self, name) is None else getattr(self, name)[kept] for name in per_row}
        return replace(self, **columns)


def prompt_hashes_of(manifest: Mapping[str, Any]) -> dict[PromptKey, str] | None:
    """The hash of each prompt, see `records.prompt_hash`; None where the manifest has none."""
    if "prompt_hashes" not in manifest:
        return None
    keys = map(prompt_key_from_json, manifest["prompt_idxs"])
    return dict(zip(keys, manifest["prompt_hashes"], strict=True))


def without_path(fact: Any) -> Any:
    """What a manifest says of something, without the places where it lay: a moved file is the same file."""
    return {k: value for k, value in fact.items() if k not in PLACES} if isinstance(fact, dict) else fact


def is_pooled(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is of a pooled dump."""
    return manifest.get(POOLING) == BUCKET


def model_of(manifest: Mapping[str, Any]) -> str:
    """Path or name of what was probed; of a model with an adapter, which others may share, that of the adapter."""
    return manifest.get("adapter_path", manifest["model_path"])


def model_name(path: str) -> str:
    """A model as a reader knows it: `owner/name` of a hub, or the last part of a path."""
    return path if WITHIN_A_HUB.fullmatch(path) else re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


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
    """The dumps in `path`: itself, or those of several targets inside it, all finished, in the order asked for."""
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
    return (read_json(settings).get("targets") or []) if settings.is_file() else []


def are_edges(edges: list[Any]) -> bool:
    """Whether these are finite numbers, each above the one before."""
    return all(map(is_finite, edges)) and all(a < b for a, b in itertools.pairwise(edges))


def find_rollouts(path: Path) -> Path | None:
    """The `rollouts.jsonl` of a dump: its own, or the one above it that several targets share; None if absent."""
    if (path / ROLLOUTS).is_file():
        return path / ROLLOUTS
    if path.name in ("", ".."):  # from within a target
        path = Path(os.path.abspath(path))
    above = path.parent / ROLLOUTS
    return above if above.is_file() and path.name in _names_of_targets(path.parent / SETTINGS) else None


def find_manifest(rollouts: Path) -> Path | None:
    """The manifest that says how a file of rollouts came about: beside it, or of the first of several targets below."""
    names = _names_of_targets(rollouts.with_name(SETTINGS)) if rollouts.name == ROLLOUTS else []
    found = (rollouts.parent / name / MANIFEST for name in ("", *names))
    return next((file for file in found if file.is_file()), None)
