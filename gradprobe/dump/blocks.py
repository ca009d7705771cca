"""Gradient rows in: a `.npy` opened without trusting it, and read in blocks that leave no pages behind."""

import mmap
import os
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from ..common.errors import InputError
from ..common.files import open_binary

BLOCK_BYTES = 64 << 20
LONGEST_HEADER = 1 << 16
BAD_HEADER = (ValueError, TypeError, SyntaxError, ArithmeticError, EOFError, MemoryError, RecursionError)
"""What numpy raises on headers that are none, or lie about the size of what follows."""
BAD_HEADER += (tokenize.TokenError,)


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


@dataclass(frozen=True)
class MappedFile:
    """A `.npy` that `open_rows` has found sound, to be mapped when its rows are asked for.

    Attributes:
        file: its name.
        shape: (n_rows, row_dim).
        offset: bytes before the first row.
    """

    file: Path
    shape: tuple[int, int]
    offset: int

    @staticmethod
    def of(file: Path) -> "MappedFile":
        """See `open_rows`."""
        rows = open_rows(file)
        return MappedFile(file, rows.shape, rows.offset)

    def mapped(self) -> np.memmap:
        """The rows as a read-only memory map, [n_rows, row_dim] float32.

        Raises:
            InputError: the file is not there any more, or is shorter.
        """
        try:
            with open_binary(self.file) as stream:
                return np.memmap(stream, "<f4", "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file}: has changed since it was opened ({error})") from error


def open_rows(file: Path) -> np.memmap:
    """The array of a `.npy` as a read-only memory map, [n_rows, row_dim] float32.

    No pickle is ever loaded, and nothing is allocated on a header's word: what is mapped is held against the file's
    length.

    Raises:
        InputError: no such file, or not just such an array.
    """
    try:
        with open_binary(file) as stream:
            length, beginning = os.fstat(stream.fileno()).st_size, stream.read(LONGEST_HEADER)
        rows = _mapped(file, beginning)
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except BAD_HEADER as error:
        fault = "its header can't be parsed, or promises more"
        raise InputError(
            f"{file}: not a readable .npy array of numbers, or cut short: {length} bytes, {fault}"
        ) from error
    if rows.dtype != np.dtype("<f4") or rows.ndim != 2 or rows.shape[1] == 0:
        shown = f"{rows.dtype.str!r} {rows.shape!r}"
        raise InputError(f"{file}: must be little-endian float32 ('<f4') of two dimensions, is {shown}")
    if not rows.flags.c_contiguous:
        raise InputError(f"{file}: must be in C order (row by row), is in Fortran order")
    expected = rows.offset + rows.nbytes
    if length != expected:
        numbers = " x ".join(map(str, rows.shape))
        raise InputError(f"{file}: longer than its header says: {length} bytes, {expected} for {numbers} numbers")
    return rows


def _mapped(file: Path, beginning: bytes) -> np.memmap:
    """What numpy makes of the file, once its beginning says that it is an array with a short header."""
    if not beginning.startswith(npy.MAGIC_PREFIX):
        raise ValueError("it does not begin like one")
    size_bytes = 2 if beginning[6:7] == b"\x01" else 4
    if int.from_bytes(beginning[8 : 8 + size_bytes], "little") > len(beginning) - 8 - size_bytes:
        raise ValueError("its header is cut short, or too long")
    with np.errstate(over="raise"), warnings.catch_warnings():  # of sizes beyond all integers; of Python 2's headers
        warnings.simplefilter("ignore")
        return np.load(file, mmap_mode="r", allow_pickle=False)


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


def read_rows(grads: np.ndarray | SelectedRows, rows: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """`grads[rows]` in float64, or `dtype`, a copy; no page of a memory map stays with this process."""
    block = np.asarray(grads[rows]).astype(dtype, copy=False)  # that is a copy as it is: `rows` are integers
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
