"""Files, whatever is in them: JSON in, written whole or not at all, hashed, and directories made and locked."""

import hashlib
import json
import math
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from .errors import InputError, one_line

LOCK = ".lock"
HASH_BLOCK_BYTES = 1 << 22


def read_json(file: Path, missing: str = "no such file") -> dict[str, Any]:
    """One JSON object.

    Raises:
        InputError: the file is missing (said as `missing`), unreadable, or not a JSON object.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{file}: {missing}") from error
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    return json_object(content, str(file))


def iter_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line of a JSONL file.

    Raises:
        InputError: the file can't be read or a line is no JSON object.
    """
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, json_object(line, f"{file}:{number}")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error


def json_object(content: bytes, where: str, is_strict: bool = False) -> dict[str, Any]:
    """What `content` holds, refused unless our own writers could write it again.

    Args:
        where: for messages.
        is_strict: refuse a key that stands twice in one object as well, for content of others.

    Raises:
        InputError: no such JSON object.
    """
    pairs = {"object_pairs_hook": no_key_twice} if is_strict else {}
    try:
        text = content.decode("utf-8")
        found = json.loads(text, parse_constant=_no_number, parse_float=_finite, **pairs)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair in its text") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: not a JSON object")
    return found


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of `pairs`; for `json.loads`, which would keep the last of equal keys without a word.

    Raises:
        ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"'{one_line(twice, 40)}' stands twice in one object")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def sha256_of(*files: Path) -> str:
    """One SHA-256 over the contents of `files`, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
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
def locked(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes that ask for it out of `directory`; the lock ends with the process, however that ends.

    Args:
        patience: how many seconds to wait for another process to let go.

    Raises:
        InputError: another process holds it, or the directory takes no lock.
    """
    file = directory / LOCK
    lock = FileLock(file, timeout=patience, poll_interval=min(1.0, patience / 2 + 0.01))
    try:
        lock.acquire()
    except Timeout as error:
        holder = file.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
        raise InputError(f"{directory}: in use by another process ({holder}); wait for it, or end it") from error
    except OSError as error:  # a link is not followed
        raise InputError(f"{file}: can't be locked: {error.strerror or error}") from error
    try:
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def aside(file: Path) -> Path:
    """Where `file` is written until it is whole."""
    return file.with_name(file.name + ".partial")


@contextmanager
def written_aside(file: Path) -> Iterator[TextIO]:
    """A text stream whose content appears under `file`'s name whole or not at all."""
    with aside(file).open("w", encoding="utf-8", newline="\n") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    replace(aside(file), file)


def replace(source: Path, target: Path) -> None:
    """Rename, and make the new name last through a power cut."""
    os.replace(source, target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all. NaN is refused: a number that can't be had is None."""
    with written_aside(file) as stream:
        json.dump(content, stream, indent=2, allow_nan=False)
        stream.write("\n")


def write_text(file: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    with written_aside(file) as stream:
        stream.write(content)


def write_jsonl(file: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write JSON objects, one a line, whole or not at all."""
    with written_aside(file) as stream:
        for content in objects:
            stream.write(json_line(content))


def json_line(content: dict[str, Any]) -> str:
    """One line of a JSONL file."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"
