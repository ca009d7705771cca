"""Where a probe writes: what is there already, and rollouts and gradients that outlive a killed run.

While a probe is at work its directory holds `settings.json`, `progress.jsonl` (the record of what is written) and files
whose names end in `.partial`. The manifest, written last, ends that.
"""

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError
from ..common.fields import is_index
from ..common.files import aside, make_directory, read_json, write_json
from ..dump import format as contract
from ..dump.check import first_of, problems_of
from ..dump.growing import GrowingLines, GrowingRows, Piece, Record, crc32_of
from ..dump.records import PromptKey, Rollout, iter_rollouts

log = logging.getLogger(__name__)

ROLLOUTS, GRADIENTS = "rollouts", "gradients"
KINDS = ("nonfinite_rows", "zero_rows")
COMPUTING = "computing"


def prepare(
    output_dir: Path, directories: list[Path], identity: dict[str, Any], computing: dict[str, int], overwrite: bool
) -> dict[str, int] | None:
    """Make a locked output directory ready.

    Args:
        output_dir: of the probe.
        directories: of each target's dump; `output_dir` itself where there is one target.
        identity: all that changes the dump's bytes.
        computing: what rounds sums in another order; a dump that was begun is finished with what it was begun with.
        overwrite: begin anew whatever is there.

    Returns:
        With what to compute; None if the dump that is asked for is finished and sound there already.

    Raises:
        InputError: the directory holds a dump, or the beginning of one, of other settings.
    """
    if overwrite:
        _clear(output_dir, directories)
    elif (output_dir / contract.SETTINGS).exists():
        refuse_other_settings(output_dir, identity)
        if all((directory / contract.MANIFEST).exists() for directory in directories):
            problems, _ = problems_of(output_dir)
            if not problems:
                (output_dir / contract.RECORD).unlink(missing_ok=True)
                return None
            log.warning(f"{output_dir}: finished but not sound ({'; '.join(problems)}); made anew")
            _clear(output_dir, directories)
        else:
            log.info(f"{output_dir}: unfinished dump of the same settings, continuing")
            computing = _as_begun(output_dir, computing)
    else:
        refuse_foreign_dump(output_dir)
    write_json(output_dir / contract.SETTINGS, {**identity, COMPUTING: computing})
    for directory in directories:
        make_directory(directory)
    return computing


def _as_begun(output_dir: Path, computing: dict[str, int]) -> dict[str, int]:
    """What an unfinished dump was begun with, where the settings tell it soundly."""
    begun = read_json(output_dir / contract.SETTINGS).get(COMPUTING)
    if not isinstance(begun, dict) or not all(is_index(begun.get(key)) and begun[key] > 0 for key in computing):
        return computing
    kept = {key: begun[key] for key in computing}
    if kept != computing:
        changed = ", ".join(f"{key} {kept[key]}, not {now}" for key, now in computing.items() if kept[key] != now)
        log.info(f"as it was begun, so that its bytes are the same: {changed}")
    return kept


def refuse_other_settings(output_dir: Path, identity: dict[str, Any]) -> None:
    """Raise `InputError` if the directory holds a dump, or the beginning of one, of other settings."""
    file = output_dir / contract.SETTINGS
    before = read_json(file) if file.exists() else identity
    found = differences({key: value for key, value in before.items() if key != COMPUTING}, identity)
    if found:
        raise InputError(
            f"{output_dir}: holds a dump of other settings ({'; '.join(found)}); "
            "choose another `output_dir`, or `overwrite`"
        )


def refuse_foreign_dump(output_dir: Path) -> None:
    """Raise `InputError` if the directory holds a dump, but no settings to compare with."""
    names = (contract.MANIFEST, contract.GRADS, contract.ROLLOUTS)
    if not (output_dir / contract.SETTINGS).exists() and any((output_dir / name).exists() for name in names):
        raise InputError(
            f"{output_dir}: holds a dump that this probe did not make; choose another `output_dir`, or `overwrite`"
        )


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Each leaf in which two nested settings differ, as `name: old, now new`."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key}: {before}, now {now}")
    return found


def _clear(output_dir: Path, directories: list[Path]) -> None:
    """Take away what makes a directory a dump, the manifests first."""
    for directory in directories:
        (directory / contract.MANIFEST).unlink(missing_ok=True)
    rollouts = output_dir / contract.ROLLOUTS
    for stale in (output_dir / contract.RECORD, output_dir / contract.SETTINGS, rollouts, aside(rollouts)):
        stale.unlink(missing_ok=True)
    for directory in directories:
        for stale in (directory / contract.GRADS, aside(directory / contract.GRADS), directory / contract.META):
            stale.unlink(missing_ok=True)


class GrowingRollouts:
    """`rollouts.jsonl`, growing chunk by chunk.

    Args:
        file: its final name.
        record: what is written so far.
        prompts: of each chunk that is due, in order; kept is what an earlier run wrote of the very same.

    Attributes:
        n_chunks_kept: how many chunks an earlier run left sound.
        notes: of each chunk, kept or new, what was said of it beside its rollouts.
    """

    def __init__(self, file: Path, record: Record, prompts: Sequence[list[PromptKey]]):
        self._file, self._record, self._prompts = file, record, prompts
        found = [entry for entry in record.entries if entry["kind"] == ROLLOUTS]
        pairs = zip(found, json.loads(json.dumps(prompts)), strict=False)
        entries = [entry for entry, due in itertools.takewhile(lambda pair: pair[0].get("prompts") == pair[1], pairs)]
        self._lines = GrowingLines(file, [Piece(entry["end"], entry["crc32"]) for entry in entries])
        self.n_chunks_kept = self._lines.n_kept
        if self.n_chunks_kept < len(found):
            log.info(f"{file}: {len(found) - self.n_chunks_kept} batches are torn or changed, they are sampled again")
            record.keep(entries[: self.n_chunks_kept])
        self.notes = [entry["notes"] for entry in entries[: self.n_chunks_kept]]

    def append(self, rollouts: list[Rollout], notes: dict[str, Any]) -> None:
        """Write one chunk's rollouts, on disk when this returns."""
        piece = self._lines.append(rollout.to_record() for rollout in rollouts)
        prompts = self._prompts[len(self.notes)]
        self._record.append({"kind": ROLLOUTS, "prompts": prompts, **asdict(piece), "notes": notes})
        self.notes.append(notes)

    def finish(self) -> list[Rollout]:
        """Give the file its name; all of its rollouts."""
        self._lines.finish()
        return list(iter_rollouts(self._file))


@dataclass(frozen=True)
class FaultyRows:
    """Rows of one target that no analysis can use."""

    nonfinite_rows: list[int]
    zero_rows: list[int]

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return {f"num_{kind}": len(rows) for kind, rows in asdict(self).items()}

    def warnings(self) -> list[str]:
        """What a person must be told."""
        kinds = ((self.nonfinite_rows, "are not finite"), (self.zero_rows, "are zero throughout"))
        return [
            f"{len(rows)} rows {fault}, which the manifest names and analyses leave out ({first_of(rows)})"
            for rows, fault in kinds
            if rows
        ]

    @staticmethod
    def among(rows: np.ndarray, row_numbers: np.ndarray) -> "FaultyRows":
        """Those of `rows`, [n, row_dim], which are rows `row_numbers`, [n], of their dump."""
        nonfinite, zero = ~np.isfinite(rows).all(axis=1), ~rows.any(axis=1)
        return FaultyRows(row_numbers[nonfinite].tolist(), row_numbers[zero].tolist())


class GrowingGradients:
    """`grads.npy` of every target, growing batch by batch.

    Args:
        directories: of each target's dump.
        row_dims: of each target.
        n_rows: of each file.
        rows_of_items: [items] the row numbers that each work item fills.
        record: what is written so far.

    Attributes:
        items_kept: work items whose rows an earlier run left sound.
        seconds_kept: what the earlier run spent on them.
        batch_tokens_kept: the batch size in force when it ended; None if it left nothing.
    """

    def __init__(
        self, directories: list[Path], row_dims: list[int], n_rows: int, rows_of_items: list[range], record: Record
    ):
        self._record, self._rows_of_items = record, rows_of_items
        self._files = [
            GrowingRows(directory / contract.GRADS, n_rows, dim)
            for directory, dim in zip(directories, row_dims, strict=True)
        ]
        before = [entry for entry in record.entries if entry["kind"] == GRADIENTS]
        self._entries = []
        for entry in before:
            if not self._is_sound(entry):
                break
            self._entries.append(entry)
        if len(self._entries) < len(before):
            n_torn = len(before) - len(self._entries)
            log.info(f"{directories[0]}: {n_torn} batches of gradients are torn, they are redone")
            record.keep([*(e for e in record.entries if e["kind"] != GRADIENTS), *self._entries])
        self.items_kept = [item for entry in self._entries for item in entry["items"]]
        self.seconds_kept = sum(entry["seconds"] for entry in self._entries)
        self._since = time.perf_counter()
        self.batch_tokens_kept: int | None = self._entries[-1]["batch_tokens"] if self._entries else None

    def append(self, items: list[int], row_numbers: np.ndarray, rows: Sequence[np.ndarray], batch_tokens: int) -> None:
        """Write one batch's rows, [n, row_dim] for each target, to `row_numbers`, [n]; on disk when this returns."""
        order = np.argsort(row_numbers)
        ordered = [part[order] for part in rows]
        for file, part in zip(self._files, ordered, strict=True):
            file.write(row_numbers[order], part)
        entry = {
            "kind": GRADIENTS,
            "items": items,
            "crc32": list(map(crc32_of, ordered)),
            "faulty": [asdict(FaultyRows.among(part, row_numbers[order])) for part in ordered],
            "batch_tokens": batch_tokens,
            "seconds": round(time.perf_counter() - self._since, 3),
        }
        self._since = time.perf_counter()
        self._record.append(entry)
        self._entries.append(entry)

    def finish(self) -> list[FaultyRows]:
        """Give the files their names; for each target, which rows no analysis can use."""
        for file in self._files:
            file.finish()
        return [
            FaultyRows(*(sorted(row for found in of_target for row in found[kind]) for kind in KINDS))
            for of_target in zip(*(entry["faulty"] for entry in self._entries), strict=True)
        ] or [FaultyRows([], [])] * len(self._files)

    def _is_sound(self, entry: dict[str, Any]) -> bool:
        rows = np.sort(np.concatenate([np.array(self._rows_of_items[item]) for item in entry["items"]]))
        return [crc32_of(file.read(rows)) for file in self._files] == entry["crc32"]
