"""What the analysis scripts have in common: dumps in and checked, and what tells one from another."""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..common.errors import InputError, raise_if_any
from ..dump.check import checksum_problems, first_of, read_content
from ..dump.format import GRADS, MANIFEST, Dump, load_dump, target_directories

log = logging.getLogger(__name__)

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


def fingerprint(dump: Path) -> str:
    """SHA-256 of a dump's manifest, hexadecimal.

    Raises:
        InputError: there is none.
    """
    try:
        return hashlib.sha256((dump / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{dump / MANIFEST}: {error.strerror}") from error


def fingerprints_of(dumps: Mapping[Tag, list[Any]]) -> dict[Tag, list[str]]:
    """Of each tag's targets: what summaries and figures are about."""
    return {tag: [fingerprint(dump.path) for dump in targets] for tag, targets in dumps.items()}
