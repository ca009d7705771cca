"""Gradient rows in: a `.npy` opened without trusting it, and read in blocks that leave no pages behind."""

import ast
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError

BLOCK_BYTES = 64 << 20
MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 1 << 16


@dataclass(frozen=True)
class SelectedRows:
    """Some rows of a larger array, in their order, without a copy: what an analysis sees of a dump with faulty rows.

    Attributes:
        source: [n_all, row_dim], for example a memory map.
        rows: [n] which of them.
    """

    source: np.ndarray
    rows: np.ndarray

    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        """(n, row_dim)."""
        return len(self.rows), self.source.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """That of the source."""
        return self.source.dtype

    @property
    def itemsize(self) -> int:
        """That of the source."""
        return self.source.itemsize

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: slice | np.ndarray | tuple[slice | np.ndarray, slice]) -> np.ndarray:
        if isinstance(key, tuple):
            rows, columns = key
            return self.source[self.rows[rows], columns]
        return self.source[self.rows[key]]


def open_rows(file: Path) -> np.ndarray:
    """The array of a `.npy` as a read-only memory map, [n_rows, row_dim] float32.

    The header is read here rather than by numpy, and believed only where the file's length agrees: no pickle is ever
    loaded, and nothing is allocated on a header's word.

    Raises:
        InputError: no such file, or not just such an array.
    """
    try:
        with file.open("rb") as stream:
            length = os.fstat(stream.fileno()).st_size
            shape, start = _read_header(file, stream.read(LONGEST_HEADER))
            expected = start + 4 * shape[0] * shape[1]
            if length != expected:
                fault = "cut short" if length < expected else "longer than its header says"
                raise InputError(f"{file}: {fault}: {length} bytes, {expected} for {shape[0]} x {shape[1]} numbers")
            if shape[0] * shape[1] == 0:  # an empty file can't be mapped
                return np.zeros(shape, np.float32)
            return np.memmap(stream, dtype="<f4", mode="r", offset=start, shape=shape)
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error


def _read_header(file: Path, beginning: bytes) -> tuple[tuple[int, int], int]:
    """Shape of the array, and where its numbers start."""
    version = beginning[6:8]
    size_bytes = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}.get(version)
    if beginning[:6] != MAGIC or size_bytes is None:
        raise InputError(f"{file}: not a readable .npy array")
    start = 8 + size_bytes + int.from_bytes(beginning[8 : 8 + size_bytes], "little")
    text = beginning[8 + size_bytes : start]
    if len(beginning) < start:
        raise InputError(f"{file}: not a readable .npy array (its header is cut short, or too long)")
    try:
        header = ast.literal_eval(text.decode("latin-1").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(f"{file}: not a readable .npy array (its header can't be parsed)") from error
    return _checked_shape(file, header), start


def _checked_shape(file: Path, header: Any) -> tuple[int, int]:
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise InputError(f"{file}: not a readable .npy array (its header lacks keys or has others)")
    shape = header["shape"]
    is_shape = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    if not is_shape or len(shape) != 2 or shape[1] == 0 or header["descr"] != "<f4":
        raise InputError(
            f"{file}: must be little-endian float32 ('<f4') of two dimensions, is {header['descr']!r} {shape!r}"
        )
    if header["fortran_order"] is not False and shape[0] > 1:
        raise InputError(f"{file}: must be in C order (row by row), is in Fortran order")
    return shape


def iter_row_blocks(grads: np.ndarray | SelectedRows, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield the rows of a memory map (all, or those of `rows`) as arrays of at most 64 MiB, in order."""
    n = len(grads) if rows is None else len(rows)
    step = max(1, BLOCK_BYTES // max(1, grads.shape[1] * grads.itemsize))
    for start in range(0, n, step):
        yield np.asarray(grads[start : start + step] if rows is None else grads[rows[start : start + step]])
        release_pages(grads)


def release_pages(grads: np.ndarray | SelectedRows) -> None:
    """Let go of the memory map's pages in this process: they stay in the system's cache, but count as nobody's."""
    source: Any = grads.source if isinstance(grads, SelectedRows) else grads
    while isinstance(source, np.ndarray):
        source = source.base
    if isinstance(source, mmap.mmap):
        source.madvise(mmap.MADV_DONTNEED)


def read_rows(grads: np.ndarray | SelectedRows, rows: np.ndarray) -> np.ndarray:
    """`grads[rows]` in float64, a copy; no page of a memory map stays with this process."""
    block = np.asarray(grads[rows]).astype(np.float64)
    release_pages(grads)
    return block


def copy_rows(grads: np.ndarray | SelectedRows, rows: np.ndarray) -> np.ndarray:
    """`grads[rows]` as they are, a copy read block by block."""
    chosen = np.empty((len(rows), grads.shape[1]), grads.dtype)
    for part in block_slices(len(rows), grads.itemsize * grads.shape[1]):
        chosen[part] = grads[rows[part]]
        release_pages(grads)
    return chosen


def block_slices(length: int, bytes_each: int) -> Iterator[slice]:
    """Cut 0 .. length into slices of at most 64 MiB."""
    step = max(1, BLOCK_BYTES // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
