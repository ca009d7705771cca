"""Where a probe writes: what is there already, and rollouts and gradients that outlive a killed run.

While a probe is at work its directory holds `settings.json`, `progress.jsonl` (the record of progress) and files whose
names end in `.partial`. The manifest, written last, ends that.
"""

import dataclasses
import itertools
import json
import logging
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError
from ..common.files import aside, json_line, make_directory, read_json, replace, write_json, write_jsonl
from ..dump import format as contract
from ..dump.consistency import problems_of
from ..dump.growing import GrowingRows, append_lines, crc32_of
from ..dump.records import PromptKey, Rollout, iter_rollouts
from .plan import Plan

log = logging.getLogger(__name__)

ROLLOUTS, STEP, STEPPED, GRADIENTS = "rollouts", "step", "stepped", "gradients"
COMPUTING = "computing"
AS_BEGUN = ("batch_tokens", "sample_rows")
"""What of `computing` a dump is finished with as it was begun, whatever is asked for now."""


def prepare(plan: Plan) -> Plan | None:
    """Make a locked output directory ready; this decides whether a run may continue.

    What was begun with the same identity is continued. Sizes of batches stay those that it was begun with, so that its
    bytes are the same; the number of threads is this machine's, where another could cost hours, and the user is told.

    Returns:
        The plan, with batches as they were begun; None if its dump is finished and sound there already.
    """
    output_dir, computing, overwrite = plan.settings.output_dir, plan.computing, plan.settings.overwrite
    settings = output_dir / contract.SETTINGS
    is_finished = all((directory / contract.MANIFEST).exists() for directory in plan.directories)
    if not overwrite:
        refuse_other_settings(plan)
        problems = problems_of(output_dir)[0] if is_finished else []
        if is_finished and not problems:
            (output_dir / contract.PROGRESS).unlink(missing_ok=True)
            return None
        if problems:
            log.warning(f"{output_dir}: finished but not sound ({'; '.join(problems)}); made anew")
    if overwrite or is_finished:
        _clear(output_dir, plan.directories)
    elif settings.exists():
        log.info(f"{output_dir}: unfinished dump of the same settings, continuing")
        begun = {**computing, **read_json(settings).get(COMPUTING, {})}
        for key, now in computing.items():
            if begun[key] != now and key in AS_BEGUN:
                log.info(f"as it was begun, so that its bytes are the same: {key} {begun[key]}, not {now}")
            elif begun[key] != now:
                log.warning(f"{key} {now}, but it was begun with {begun[key]}: what is left may round differently")
        computing = computing | {key: begun[key] for key in AS_BEGUN}
    write_json(settings, {**plan.identity, COMPUTING: computing})
    for directory in plan.directories:
        make_directory(directory)
    return dataclasses.replace(plan, computing=computing)


def refuse_other_settings(plan: Plan) -> None:
    """Raise `InputError` if the directory holds a dump, or the beginning of one, of other settings, or of none."""
    output_dir, hint = plan.settings.output_dir, "choose another `output_dir`, or `overwrite`"
    file = output_dir / contract.SETTINGS
    if not file.exists():
        if any((output_dir / name).exists() for name in (contract.MANIFEST, contract.GRADS, contract.ROLLOUTS)):
            raise InputError(f"{output_dir}: holds a dump that this probe did not make; {hint}")
        return
    found = differences({key: value for key, value in read_json(file).items() if key != COMPUTING}, plan.identity)
    if found:
        raise InputError(f"{output_dir}: holds a dump of other settings ({'; '.join(found)}); {hint}")


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
    others = (contract.PROGRESS, contract.SETTINGS, contract.ROLLOUTS, contract.GRADS, contract.META)
    for name in (contract.MANIFEST, *others):
        for directory in (output_dir, *directories):
            (directory / name).unlink(missing_ok=True)
            aside(directory / name).unlink(missing_ok=True)


class Progress:
    """What a probe has written so far: rollouts chunk by chunk, then gradients batch by batch.

    The data of a batch are on disk before its entry in the record is. What an earlier run left is trusted as far as an
    entry's line is whole and its data have its checksum; the first that does not hold ends what is kept, so that a
    continued run does the very batches that an uninterrupted one would have done.

    Args:
        output_dir: of the probe.
        prompts: of each chunk of rollouts that is due, in order; kept are those of the very same.

    Attributes:
        chunks: of rollouts that are there: their entries, of which `notes` is what was said beside them.
        batches: of gradients that are there: their entries, with `items` (rollouts), `seconds` and `batch_tokens`.
        steps: of the chunks that were taken along a step: their entries, with what was found.
        stepped: what is said of the step once the file of rollouts holds all of it; else None.
    """

    def __init__(self, output_dir: Path, prompts: Sequence[list[PromptKey]]):
        self._file, self._record_file = output_dir / contract.ROLLOUTS, output_dir / contract.PROGRESS
        self._prompts = json.loads(json.dumps(prompts))
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (ROLLOUTS, STEP, STEPPED, GRADIENTS)}
        for entry in _entries(self._record_file):
            found[entry["kind"]].append(entry)
        self.batches, self.steps, self._stepped = found[GRADIENTS], found[STEP], found[STEPPED][-1:]
        self.chunks = self._sound_chunks(found[ROLLOUTS])
        if n_lost := len(found[ROLLOUTS]) - len(self.chunks):
            log.info(f"{self._file}: {n_lost} batches are torn or changed, they are sampled again")
            self.batches, self.steps, self._stepped = [], self.steps[: len(self.chunks)], []
        self._begin_record()

    def add_rollouts(self, rollouts: list[Rollout], notes: dict[str, Any]) -> None:
        """Write one chunk, on disk when this returns."""
        end, crc32 = append_lines(self._rollouts, (rollout.to_record() for rollout in rollouts))
        prompts = self._prompts[len(self.chunks)]
        self.chunks.append({"kind": ROLLOUTS, "prompts": prompts, "end": end, "crc32": crc32, "notes": notes})
        self.add(self.chunks[-1])

    def finish_rollouts(self) -> list[Rollout]:
        """Give the file its name; all of its rollouts."""
        self._rollouts.close()
        replace(aside(self._file), self._file)
        return list(iter_rollouts(self._file))

    @property
    def stepped(self) -> dict[str, Any] | None:
        """What was said of the step when the last of it was written; None while some is missing."""
        return self._stepped[0]["said"] if self._stepped else None

    def add_step(self, found: list[dict[str, list[float]]]) -> None:
        """Keep what one chunk's rollouts are along the step, in their order; on disk when this returns."""
        self.steps.append({"kind": STEP, "found": found})
        self.add(self.steps[-1])

    def finish_step(self, rollouts: list[Rollout], sizes: Sequence[int], said: dict[str, Any]) -> None:
        """Write the rollouts again, with their step. The record says both what the file was and what it will be.

        Args:
            rollouts: all, with their step.
            sizes: how many of them each chunk has.
            said: of the step.
        """
        ends, of_file = [], iter(rollouts)
        with aside(self._file).open("wb") as stream:
            for size in sizes:
                part = itertools.islice(of_file, size)
                ends.append(append_lines(stream, (rollout.to_record() for rollout in part)))
        self._stepped = [{"kind": STEPPED, "ends": ends, "said": said}]
        self.add(self._stepped[0])
        replace(aside(self._file), self._file)

    def begin_gradients(self, directories: list[Path], row_dims: list[int], n_rows: list[int]) -> None:
        """Open every target's file; `batches` are those that are sound. `n_rows`: of each rollout."""
        files = (directory / contract.GRADS for directory in directories)
        self._grads = [GrowingRows(file, sum(n_rows), dim) for file, dim in zip(files, row_dims, strict=True)]
        starts = np.cumsum([0, *n_rows])

        def is_sound(batch: dict[str, Any]) -> bool:
            rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in sorted(batch["items"])])
            return [file.crc32(rows) for file in self._grads] == batch["crc32"]

        sound = list(itertools.takewhile(is_sound, self.batches))
        if n_lost := len(self.batches) - len(sound):
            log.info(f"{directories[0]}: {n_lost} batches of gradients are torn, they are redone")
            self.batches = sound
            self._begin_record()
        self._since = time.perf_counter()

    def add_gradients(
        self, items: list[int], row_numbers: np.ndarray, rows: Sequence[np.ndarray], batch_tokens: int
    ) -> None:
        """Write one batch's rows, [n, row_dim] for each target, to `row_numbers`, [n]; on disk when this returns."""
        order = np.argsort(row_numbers)
        ordered = [part[order] for part in rows]
        for file, part in zip(self._grads, ordered, strict=True):
            file.write(row_numbers[order], part)
        before, self._since = self._since, time.perf_counter()
        entry = {"kind": GRADIENTS, "items": items, "crc32": list(map(crc32_of, ordered))}
        self.batches.append({**entry, "batch_tokens": batch_tokens, "seconds": round(self._since - before, 3)})
        self.add(self.batches[-1])

    def finish_gradients(self) -> None:
        """Give the files their names."""
        for file in self._grads:
            file.finish()

    def add(self, entry: dict[str, Any]) -> None:
        """Add an entry to the record, on disk when this returns."""
        append_lines(self._record, [_sealed(entry)])

    def close(self) -> None:
        """Close the record."""
        self._record.close()
        self._rollouts.close()

    def _sound_chunks(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The longest sound beginning of the chunks that the record tells of; the file is cut off behind it."""
        if self._file.exists():
            replace(self._file, aside(self._file))
        self._rollouts = aside(self._file).open("a+b")
        self._rollouts.seek(0)
        if self._stepped and self._stepped[0]["ends"]:
            end, crc32 = self._stepped[0]["ends"][0]
            if zlib.crc32(self._rollouts.read(end)) == crc32:  # it was written again, with the step
                ends = self._stepped[0]["ends"]
                found = [{**entry, "end": e, "crc32": c} for entry, (e, c) in zip(found, ends, strict=True)]
            else:
                self._stepped = []
            self._rollouts.seek(0)
        kept, end = [], 0
        for entry, due in zip(found, self._prompts, strict=False):
            content = self._rollouts.read(entry["end"] - end)
            if entry["prompts"] != due or zlib.crc32(content) != entry["crc32"]:
                break
            kept, end = [*kept, entry], entry["end"]
        self._rollouts.truncate(end)
        self._rollouts.seek(end)
        return kept

    def _begin_record(self) -> None:
        """Write the record of what is kept, whole or not at all, and open it for more."""
        write_jsonl(self._record_file, map(_sealed, [*self.chunks, *self.steps, *self._stepped, *self.batches]))
        self._record = self._record_file.open("ab")


def _sealed(entry: dict[str, Any]) -> dict[str, Any]:
    return {"crc32": zlib.crc32(json_line(entry).encode()), "entry": entry}


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """The record's entries, up to the first line that is torn or changed."""
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
        try:
            entry = json.loads(line)["entry"]
        except (ValueError, TypeError, KeyError):
            return
        if line != json_line(_sealed(entry)).encode():
            return
        yield entry
