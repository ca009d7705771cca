"""Summaries on disk: what an analysis wrote, of which dumps, in which layout."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..common.files import make_directory, read_json, write_json

Tag = TypeVar("Tag", bound="str | None")
Summary = Mapping[str, Mapping[str, Any]]
"""Of each tag its numbers: what tables, figures and sentences are made from."""
LAYOUT = 3
"""Of the summaries' keys and meanings: raise it where a reader of one could not read the other."""


def write_results(
    directory: Path, name: str, summary: Mapping[Tag, Mapping[str, Any]], write_others: Callable[[], list[str]]
) -> list[str]:
    """Write what an analysis found, the summary last: where one lies, the files that it names are of the same run.

    Args:
        directory: made if needed.
        name: the summary's.
        summary: by tag; that of an untagged dump, under None, is written without its key.
        write_others: writes figures and arrays, and returns their names.

    Returns:
        The names of all files; under `files`, each tag's part has those beside the summary.
    """
    make_directory(directory)
    (directory / name).unlink(missing_ok=True)
    written = write_others()
    named = {tag: {**numbers, "files": written} for tag, numbers in summary.items()}
    write_json(directory / name, named.get(None, named))
    return [name, *written]


def read_summary(file: Path, fingerprints: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]] | None:
    """What an analysis wrote of these dumps, whatever other tags stand there; None where it did not, or long ago.

    Args:
        file: the summary.
        fingerprints: of each tag's dumps, `inputs.fingerprints_of`.
    """
    found = read_json(file) if file.exists() else {}
    parts = {tag: found[tag] for tag in fingerprints if isinstance(found.get(tag), dict)}
    is_about = len(parts) == len(fingerprints) and all(
        part.get("layout") == LAYOUT and part.get("manifest_sha256") == list(fingerprints[tag])
        for tag, part in parts.items()
    )
    return parts if is_about else None
