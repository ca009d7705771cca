"""What the analysis scripts have in common: dumps in and checked, what figures call them, tables for people."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..common.errors import InputError, raise_if_any
from ..dump.check import checksum_problems, first_of, read_content
from ..dump.format import GRADS, Dump, load_dump, target_directories
from ..figures.look import Subject

log = logging.getLogger(__name__)

MISSING = "-"
Tag = TypeVar("Tag", bound="str | None")


def open_dumps(paths: Mapping[Tag, Path]) -> dict[Tag, list[Dump]]:
    """Open every dump, read all of its gradients once, and leave out those that say nothing.

    Rows with a NaN or an infinity, and rows that are zero throughout, are left out; the dump's `warnings` say how many.

    Returns:
        For each tag its dumps: one, or one for each target that was probed, in the order they were asked for.

    Raises:
        InputError: with the problems of all dumps.
    """
    dumps: dict[Tag, list[Dump]] = {}
    problems: list[str] = []
    for tag, path in paths.items():
        try:
            dumps[tag] = [_usable(load_dump(directory), problems) for directory in target_directories(path)]
        except InputError as error:
            problems.extend(error.problems)
    raise_if_any(dict.fromkeys(problems))  # once, where two tags name the same dump
    return dumps


def _usable(dump: Dump, problems: list[str]) -> Dump:
    """The dump without faulty rows; `problems` gets files that have changed since they were written."""
    content = read_content(dump)
    problems += checksum_problems(dump, content)
    left_out = [
        f"{dump.path / GRADS}: {len(rows)} rows {fault} are left out ({first_of(rows.tolist())})"
        for rows, fault in ((content.nonfinite, "with NaN or infinity"), (content.zero, "that are zero throughout"))
        if len(rows)
    ]
    kept = np.setdiff1d(dump.row, np.concatenate([content.nonfinite, content.zero]))
    return replace(dump.only(kept), warnings=(*dump.warnings, *left_out))


def first_targets(dumps: Mapping[Tag, list[Dump]]) -> dict[Tag, Dump]:
    """Each tag's first target: the one that tables and headline figures show."""
    return {tag: targets[0] for tag, targets in dumps.items()}


def warn(dumps: Mapping[Tag, list[Dump]]) -> None:
    """Say each dump's warnings."""
    for targets in dumps.values():
        for dump in targets:
            for warning in dump.warnings:
                log.warning(warning)


def default_output_dir(dump: Path) -> Path:
    """`exp12_figures` beside `dump`, where the launcher keeps a study's results."""
    return Path(os.path.abspath(dump)).parent / "exp12_figures"


def directory_name(path: Path) -> str:
    """The name of a directory, also where it is given as `.` or `..`."""
    return os.path.basename(os.path.abspath(path))


def target_name(dump: Dump) -> str:
    """The weight and the row of it that was probed, for example `model.layers.14.mlp.down_proj.weight[0]`."""
    return f"{dump.manifest['target']}[{dump.manifest['row_idx']}]"


def subjects_of(dumps: Mapping[Tag, Dump]) -> list[Subject]:
    """What the figures call each dump."""
    return [Subject(tag, dump.manifest["model_path"], target_name(dump), dump.bins - 1) for tag, dump in dumps.items()]


def format_number(value: float | int | None, decimals: int = 3) -> str:
    """A number for a table: integers as they are, others with `decimals`, None as `-`."""
    if value is None:
        return MISSING
    return str(value) if isinstance(value, int) else f"{value:.{decimals}f}"


def format_with_interval(value: float | None, interval: Sequence[float] | None, decimals: int = 2) -> str:
    """`-0.63 [-1.33, -0.27]`; `-` for what there is not."""
    if value is None:
        return MISSING
    ends = MISSING if interval is None else ", ".join(format_number(end, decimals) for end in interval)
    return f"{format_number(value, decimals)} [{ends}]"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_replication(spreads: Mapping[str, Mapping[str, float | int | None]]) -> str:
    """A table of numbers over targets, see `replication.spread_of`."""
    columns = ("n", "mean", "std", "min", "max")
    return format_table(
        ["over targets", *columns],
        [[name, *(format_number(spread[column]) for column in columns)] for name, spread in spreads.items()],
    )
