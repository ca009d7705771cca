"""The seal of a summary: it is what an analysis wrote, and a figure with the same seal was drawn from these numbers.

A tag's part holds, under `content_sha256`, SHA-256 of all else in it. Whatever was changed, cut or mixed since then is
found before a number is read.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..common.errors import InputError, first_of
from ..common.files import read_json

log = logging.getLogger(__name__)
Tag = TypeVar("Tag", bound="str | None")
SEAL = "content_sha256"
LONGEST_TAG = 40
LAYOUT = 1
"""Of the summaries' keys and meanings: raise it where a reader of one could not read the other."""


def seal_of(numbers: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of one tag's part of a summary as JSON, in its order, without the seal."""
    content = {key: value for key, value in numbers.items() if key != SEAL}
    return hashlib.sha256(json.dumps([LAYOUT, content]).encode()).hexdigest()


def sealed(summary: Mapping[Tag, Mapping[str, Any]]) -> dict[Tag, dict[str, Any]]:
    """The summary with a seal in every tag's part."""
    return {tag: {**numbers, SEAL: seal_of(numbers)} for tag, numbers in summary.items()}


def seals_of(summary: Mapping[Tag, Mapping[str, Any]]) -> dict[Tag, str]:
    """Of each tag, its part's seal: what figures and arrays carry."""
    return {tag: numbers[SEAL] for tag, numbers in summary.items()}


def read_summary(file: Path) -> dict[str, dict[str, Any]]:
    """A summary by tag; empty where there is none, and, with a warning, where it is of an earlier version.

    Raises:
        InputError: it can't be read, or is not what an analysis wrote.
    """
    if not os.path.lexists(file):
        return {}
    if not file.is_file():  # a pipe would never end
        raise InputError(f"{file}: is no regular file; remove it and run the analysis again")
    summary = read_json(file)
    if SEAL in summary and _is_intact(summary):
        return {}  # of one untagged dump
    if not any(SEAL in part for part in (summary, *summary.values()) if isinstance(part, dict)):
        if summary:
            log.warning(f"{file}: is of an earlier version of gradprobe and is left out; run the analysis again")
        return {}
    changed = [tag for tag, one in summary.items() if not isinstance(one, dict) or not _is_intact(one)]
    if changed:
        shown = first_of([repr(tag[:LONGEST_TAG]) for tag in changed], 3)
        raise InputError(f"{file}: {shown}: not what an analysis wrote; run the analysis again")
    return summary


def _is_intact(numbers: Mapping[str, Any]) -> bool:
    try:
        return numbers.get(SEAL) == seal_of(numbers)
    except (ValueError, RecursionError):  # integers and nesting that can be read, but not written
        return False
