"""Which files `rollouts` names: those given, the one of a dump, or the completions of one training step."""

from collections.abc import Sequence
from pathlib import Path

from ..common.errors import InputError, first_of
from ..dump import format as contract

COMPLETIONS = "completions"
"""TRL's trainers write `completions/completions_00001.parquet`, a file a logged step, below their output directory."""
RECORD_FILES = (".jsonl", ".json", ".parquet")


def rollout_files(given: Sequence[Path]) -> list[Path]:
    """The files that hold rollouts, of files, dumps, or folders with the completions of one training step."""
    files = [_file_at(place) for place in given]
    if len({file.resolve() for file in files}) < len(files):
        raise InputError(f"`rollouts` {in_words(files)}: a file is given twice")
    for file in files if len(files) > 1 else ():
        if contract.find_manifest(file) is not None:
            raise InputError(f"`rollouts` {file}: is a dump's, and goes with no other; merge dumps and name that one")
    return files


def in_words(files: Sequence[Path]) -> str:
    """One file, or the first of several."""
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _file_at(place: Path) -> Path:
    if not place.is_dir():
        return place  # or nothing, which whoever opens it says
    found = contract.find_rollouts(place)
    if found is not None:
        return found
    # In the order of their steps, which are numbers of at least five digits.
    steps = [*place.glob("completions_*.parquet")] or [*(place / COMPLETIONS).glob("completions_*.parquet")]
    steps.sort(key=lambda file: (len(file.name), file.name))
    if len(steps) == 1:
        return steps[0]
    if steps:
        raise InputError(
            f"`rollouts` {place}: holds the completions of {len(steps)} training steps, each sampled by other weights; "
            f"name one file, from {steps[0].name} to {steps[-1].name} in {steps[0].parent}"
        )
    others = sorted(file.name for file in place.iterdir() if file.suffix in RECORD_FILES)
    hint = f"; name one or several of {first_of(others)}" if others else ""
    raise InputError(f"`rollouts` {place}: no {contract.ROLLOUTS} there, nor completions_*.parquet{hint}")
