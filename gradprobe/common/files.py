"""Files, whatever is in them: JSON in, written whole or not at all, hashed, and directories made and locked.

What is read or continued must be an ordinary file, which `opened` sees to: a FIFO would keep whoever opens it waiting,
a device may never end. Reading follows links, as people lay large files elsewhere; writing follows none, so that no
link in an output directory leads to another file of the user's.
"""

import errno
import hashlib
import io
import json
import math
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from filelock import FileLock, Timeout

from .errors import InputError, one_line

LOCK = ".lock"
HASH_BLOCK_BYTES = 1 << 22
OTHER_KINDS = {
    stat.S_IFLNK: "is a link",
    stat.S_IFDIR: os.strerror(errno.EISDIR),
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}
"""What is no ordinary file, in words."""


def refuse_other_kinds(file: Path, is_written: bool = False) -> None:
    """Raise `OSError` if there is something else than an ordinary file; a file to be written has no other name either.

    Raises:
        OSError: with the file's name, and why in its `strerror`; `FileNotFoundError` where there is none to be read.
    """
    try:
        found = os.lstat(file) if is_written else os.stat(file)
    except FileNotFoundError:
        if is_written:
            return
        raise
    kind = OTHER_KINDS.get(stat.S_IFMT(found.st_mode))
    if kind is None and is_written and found.st_nlink > 1:
        kind = "has another name, a hard link,"
    if kind is not None:
        hint = " and is not written to; take it away" if is_written else ", not an ordinary file"
        raise OSError(errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL, kind + hint, str(file))


def opened(file: Path, flags: int = os.O_RDONLY) -> int:
    """`os.open` of an ordinary file, new or there already, that waits for nobody; to be written, no link is followed.

    Raises:
        OSError: as `refuse_other_kinds` and the system say.
    """
    is_written = flags & (os.O_WRONLY | os.O_RDWR) != 0
    refuse_other_kinds(file, is_written)
    # These two for whoever puts something else there at this very moment.
    return os.open(file, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if is_written else 0), 0o666)


def open_binary(file: Path) -> BinaryIO:
    """An ordinary file, maybe behind a link, as a stream of bytes to be read.

    Raises:
        OSError: see `opened`.
    """
    return open(opened(file), "rb")


def read_bytes(file: Path, most: int = -1) -> bytes:
    """All bytes of an ordinary file, maybe behind a link, or its first `most`.

    Raises:
        OSError: see `opened`.
    """
    with naming(file), open_binary(file) as stream:
        # No more than there is: the memory for what is asked for is taken at once.
        return stream.read(most if most < 0 else min(most, os.fstat(stream.fileno()).st_size))


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Give the errors of what is done to an open file its name, so that a full disk says what was being written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def read_json(file: Path, missing: str = "no such file") -> dict[str, Any]:
    """One JSON object.

    Raises:
        InputError: the file is missing (said as `missing`), unreadable, or not a JSON object.
    """
    try:
        content = read_bytes(file)
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
        with open_binary(file) as stream:
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
        with naming(file), open_binary(file) as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def real_path(path: Path) -> Path:
    """Where a path leads, links followed; of links in a circle, on which `Path.resolve` raises, where they begin."""
    return Path(os.path.realpath(path))


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
        refuse_other_kinds(file, is_written=True)
        lock.acquire()
    except Timeout as error:
        holder = read_bytes(file).decode("utf-8", errors="replace").strip() or "unknown"
        raise InputError(f"{directory}: in use by another process ({holder}); wait for it, or end it") from error
    except OSError as error:
        raise InputError(f"{file}: can't be locked: {error.strerror or error}") from error
    try:
        with naming(file), open(opened(file, os.O_WRONLY | os.O_TRUNC), "wb") as stream:
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        lock.release()


def aside(file: Path) -> Path:
    """Where `file` is written until it is whole."""
    return file.with_name(file.name + ".partial")


@contextmanager
def bytes_aside(file: Path) -> Iterator[BinaryIO]:
    """A stream of bytes that appear under `file`'s name whole or not at all.

    What lies beside it under the name of a beginning is taken away, not written to: it may be a link. A beginning that
    comes to nothing, for example on a full disk, leaves none.
    """
    beginning = aside(file)
    with naming(beginning):
        beginning.unlink(missing_ok=True)
        try:
            with open(opened(beginning, os.O_RDWR | os.O_CREAT | os.O_EXCL), "w+b") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            replace(beginning, file)
        except BaseException:
            beginning.unlink(missing_ok=True)
            raise


@contextmanager
def written_aside(file: Path) -> Iterator[TextIO]:
    """A text stream whose content appears under `file`'s name whole or not at all."""
    with bytes_aside(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


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
