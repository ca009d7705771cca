"""Files that grow batch by batch, and the record by which a killed run is continued.

The data of a batch are written and synced first, then its entry in the record: an entry without its data can't be. What
an entry says of its data (length, checksum) is checked before they are trusted; the first batch that does not hold
ends what is kept, so that a continued run does the very batches that an uninterrupted one would have done.
"""

import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from ..common.files import aside, json_line, naming, opened, refuse_other_kinds, replace


class Record:
    """What has been written: one JSON object a line with its CRC-32, on disk before the next batch begins.

    Attributes:
        entries: those of an earlier run that are whole, then what this run appended.
    """

    def __init__(self, file: Path):
        self.entries: list[dict[str, Any]] = []
        n_bytes = 0
        descriptor = opened(file, os.O_RDWR | os.O_CREAT)
        self._file, self._stream = file, os.fdopen(descriptor, "r+b")
        for line in self._stream.read().splitlines(keepends=True):
            entry = _whole_entry(line)
            if entry is None:
                break
            self.entries.append(entry)
            n_bytes += len(line)
        self._cut(n_bytes)

    def keep(self, entries: list[dict[str, Any]]) -> None:
        """Forget all entries but these."""
        self._cut(0)
        self._write(b"".join(map(_line_of, entries)))
        self.entries = list(entries)

    def append(self, entry: dict[str, Any]) -> None:
        """Add one entry, on disk when this returns."""
        self._write(_line_of(entry))
        self.entries.append(entry)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _cut(self, n_bytes: int) -> None:
        self._stream.truncate(n_bytes)
        self._stream.seek(n_bytes)

    def _write(self, lines: bytes) -> None:
        with naming(self._file):
            self._stream.write(lines)
            _sync(self._stream)


def _line_of(entry: dict[str, Any]) -> bytes:
    return json_line({"crc32": zlib.crc32(json_line(entry).encode()), "entry": entry}).encode()


def _whole_entry(line: bytes) -> dict[str, Any] | None:
    """The entry of a line; None if it is torn or changed."""
    try:
        entry = json.loads(line)["entry"]
        return entry if line == _line_of(entry) else None
    except (ValueError, TypeError, KeyError):
        return None


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _as_beginning(file: Path) -> Path:
    """Where `file` grows until it is whole; what stands whole under its name becomes a beginning again.

    Raises:
        OSError: one of the two is no ordinary file, or has other names, which must not be written through.
    """
    beginning = aside(file)
    for name in (file, beginning):
        refuse_other_kinds(name, is_written=True)
    if file.exists():
        replace(file, beginning)
    return beginning


@dataclass(frozen=True)
class Piece:
    """The lines that one batch appended: where they end, in bytes from the file's start, and their CRC-32."""

    end: int
    crc32: int


class GrowingLines:
    """A JSONL file that appears under its name when it is whole; until then it grows piece by piece beside it.

    Args:
        file: its final name.
        pieces: what an earlier run recorded; the longest sound beginning is kept, the rest cut off.

    Attributes:
        n_kept: how many of `pieces` were kept.
    """

    def __init__(self, file: Path, pieces: Iterable[Piece] = ()):
        self._file, self._beginning = file, _as_beginning(file)
        self._stream = os.fdopen(opened(self._beginning, os.O_RDWR | os.O_CREAT), "r+b")
        self.n_kept, self._end = 0, 0
        for piece in pieces:
            content = self._stream.read(piece.end - self._end)
            if len(content) != piece.end - self._end or zlib.crc32(content) != piece.crc32:
                break
            self.n_kept, self._end = self.n_kept + 1, piece.end
        self._stream.truncate(self._end)
        self._stream.seek(self._end)

    def append(self, objects: Iterable[dict[str, Any]]) -> Piece:
        """Write objects, on disk when this returns."""
        content = "".join(map(json_line, objects)).encode("utf-8")
        with naming(self._beginning):
            self._stream.write(content)
            _sync(self._stream)
        self._end += len(content)
        return Piece(self._end, zlib.crc32(content))

    def finish(self) -> None:
        """Give the file its name."""
        self._stream.close()
        replace(self._beginning, self._file)


class GrowingRows:
    """A float32 `.npy` of known shape, [n_rows, row_dim], written row by row in any order.

    It appears under its name when it is whole. Its space on disk is taken at the start, so that a disk that is too full
    fails there and not hours later. The file is open only while it is written or read: a probe has one for each target,
    and a process may have as few as 256 descriptors.

    Raises:
        OSError: no space.
    """

    def __init__(self, file: Path, n_rows: int, row_dim: int):
        self._file, self._beginning = file, _as_beginning(file)
        self._row_bytes = 4 * row_dim
        header = _npy_header(n_rows, row_dim)
        self._start = len(header)
        size = self._start + n_rows * self._row_bytes
        with self._opened(os.O_CREAT) as descriptor:
            if os.pread(descriptor, len(header), 0) != header or os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, 0)
                os.posix_fallocate(descriptor, 0, size)
                os.pwrite(descriptor, header, 0)

    def write(self, row_numbers: np.ndarray, rows: np.ndarray) -> None:
        """Write `rows`, [n, row_dim], to distinct ascending `row_numbers`, [n]; on disk when this returns."""
        rows = np.ascontiguousarray(rows, dtype="<f4")
        with self._opened() as descriptor:
            for start, stop in _runs(row_numbers):
                _write_all(descriptor, rows[start:stop].data.cast("B"), self._offset(row_numbers[start]))
            os.fsync(descriptor)

    def read(self, row_numbers: np.ndarray) -> np.ndarray:
        """The rows, [n, row_dim] float32, at distinct ascending `row_numbers`."""
        with self._opened() as descriptor:
            parts = [
                os.pread(descriptor, (stop - start) * self._row_bytes, self._offset(row_numbers[start]))
                for start, stop in _runs(row_numbers)
            ]
        return np.frombuffer(b"".join(parts), dtype="<f4").reshape(len(row_numbers), self._row_bytes // 4)

    def finish(self) -> None:
        """Give the file its name."""
        replace(self._beginning, self._file)

    @contextmanager
    def _opened(self, flags: int = 0) -> Iterator[int]:
        with naming(self._beginning):
            descriptor = opened(self._beginning, os.O_RDWR | flags)
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    def _offset(self, row_number: int) -> int:
        return self._start + int(row_number) * self._row_bytes


@contextmanager
def new_rows(file: Path, n_rows: int, row_dim: int) -> Iterator[GrowingRows]:
    """`GrowingRows` that start from nothing and are finished where the `with` block ends without an error."""
    for stale in (file, aside(file)):
        stale.unlink(missing_ok=True)
    rows = GrowingRows(file, n_rows, row_dim)
    yield rows
    rows.finish()


def crc32_of(rows: np.ndarray) -> int:
    """CRC-32 of float32 rows as they lie in the file."""
    return zlib.crc32(np.ascontiguousarray(rows, dtype="<f4").data.cast("B")) if rows.size else 0


def _npy_header(n_rows: int, row_dim: int) -> bytes:
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (n_rows, row_dim)})
    return header.getvalue()


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of consecutive ascending `numbers`."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    edges: Sequence[int] = [0, *cuts.tolist(), len(numbers)]
    return ((a, b) for a, b in itertools.pairwise(edges) if b > a)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while len(content):
        n_written = os.pwrite(descriptor, content, offset)
        content, offset = content[n_written:], offset + n_written
