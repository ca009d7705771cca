"""Files: JSON in, written whole or not at all, hashed, and directories made and locked."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from .errors import InputError

LOCK = ".lock"
HASH_BLOCK_BYTES = 1 << 22


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Give the errors of what is done to an open file its name, so that a full disk says what was being written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def read_json(file: Path, missing: str = "no such file") -> dict[str, Any]:
    """One JSON object; a file that is not there is refused in the words of `missing`."""
    try:
        return json_object(file.read_bytes(), str(file))
    except FileNotFoundError as error:
        raise InputError(f"{file}: {missing}") from error


def iter_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line of a JSONL file."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            yield number, json_object(line, f"{file}:{number}")


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `content` holds; `where` is for messages."""
    try:
        found = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: not a JSON object")
    return found


def sha256_of(*files: Path) -> str:
    """One SHA-256 over the contents of `files`, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def make_directory(path: Path) -> None:
    """Create `path` and its parents, or say now, and not when there is something to write, that it is not writable."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: not writable")


@contextmanager
def locked(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes that ask for it out of `directory`; the lock ends with the process, however that ends.

    Args:
        patience: how many seconds to wait for another process to let go.
    """
    if not directory.is_dir():  # the lock would make it
        raise InputError(f"{directory}: no such directory")
    file = directory / LOCK
    lock = FileLock(file, timeout=patience, poll_interval=min(1.0, patience / 2 + 0.01))
    try:
        lock.acquire()
    except Timeout as error:
        holder = file.read_text(errors="replace").strip() or "unknown"
        raise InputError(f"{directory}: in use by another process ({holder}); wait for it, or end it") from error
    try:
        with naming(file):
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def aside(file: Path) -> Path:
    """Where `file` is written until it is whole."""
    return file.with_name(file.name + ".partial")


@contextmanager
def bytes_aside(file: Path) -> Iterator[BinaryIO]:
    """A stream of bytes that appear under `file`'s name whole or not at all; nothing is left where it fails."""
    beginning = aside(file)
    with naming(beginning), beginning.open("wb") as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            replace(beginning, file)
        except BaseException:
            beginning.unlink(missing_ok=True)
            raise


def replace(source: Path, target: Path) -> None:
    """Rename, and make the new name last through a power cut."""
    os.replace(source, target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(file: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    with bytes_aside(file) as stream:
        stream.write(content.encode())


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all. NaN is refused: a number that can't be had is None."""
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_jsonl(file: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write JSON objects, one a line, whole or not at all."""
    with bytes_aside(file) as stream:
        stream.writelines(json_line(content).encode() for content in objects)


def json_line(content: dict[str, Any]) -> str:
    """One line of a JSONL file."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"
