"""Files that grow batch by batch: lines at their end, gradients at their rows; what was written is on disk."""

import io
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from ..common.files import aside, json_line, naming, replace


def append_lines(stream: BinaryIO, objects: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Write objects at a file's end, one a line; the end in bytes from the file's start, and the lines' CRC-32."""
    content = "".join(map(json_line, objects)).encode()
    with naming(Path(stream.name)):
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return stream.tell(), zlib.crc32(content)


class GrowingRows:
    """A float32 `.npy` of known shape, [n_rows, row_dim], written row by row in any order.

    It grows beside its name and takes it when it is whole; what stands under the name becomes a beginning again. Its
    space on disk is taken at the start, so that a disk that is too full fails there and not hours later. The file is
    open only while it is written or read: a probe has one for each target, and a process may have as few as 256
    descriptors.

    Raises:
        OSError: no space.
    """

    def __init__(self, file: Path, n_rows: int, row_dim: int):
        self._file, self._row_bytes = file, 4 * row_dim
        if file.exists():
            replace(file, aside(file))
        header = io.BytesIO()
        npy.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (n_rows, row_dim)})
        self._start = header.tell()
        aside(file).touch()
        with self._opened() as stream:
            size = self._start + n_rows * self._row_bytes
            if stream.read(self._start) != header.getvalue() or os.fstat(stream.fileno()).st_size != size:
                stream.truncate(0)
                os.posix_fallocate(stream.fileno(), 0, size)
                os.pwrite(stream.fileno(), header.getvalue(), 0)

    def write(self, row_numbers: np.ndarray, rows: np.ndarray) -> None:
        """Write `rows`, [n, row_dim], to distinct ascending `row_numbers`, [n]; on disk when this returns."""
        rows = np.ascontiguousarray(rows, dtype="<f4")
        with self._opened() as stream:
            for start, stop in _runs(row_numbers):
                stream.seek(self._start + int(row_numbers[start]) * self._row_bytes)
                stream.write(rows[start:stop].data.cast("B"))
            stream.flush()
            os.fsync(stream.fileno())

    def crc32(self, row_numbers: np.ndarray) -> int:
        """Of the rows at distinct ascending `row_numbers`, as `crc32_of`."""
        found = 0
        with self._opened() as stream:
            for start, stop in _runs(row_numbers):
                stream.seek(self._start + int(row_numbers[start]) * self._row_bytes)
                found = zlib.crc32(stream.read((stop - start) * self._row_bytes), found)
        return found

    def finish(self) -> None:
        """Give the file its name."""
        replace(aside(self._file), self._file)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with naming(aside(self._file)), aside(self._file).open("r+b") as stream:
            yield stream


def crc32_of(rows: np.ndarray) -> int:
    """CRC-32 of float32 rows as they lie in the file."""
    return zlib.crc32(np.ascontiguousarray(rows, dtype="<f4").tobytes())


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of consecutive ascending `numbers`."""
    cuts = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    return ((a, b) for a, b in itertools.pairwise([0, *cuts, len(numbers)]) if b > a)
