"""Gradients in: a `.npy` mapped into memory, and read in blocks that leave no pages behind."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from ..common.errors import InputError

BLOCK_BYTES = 64 << 20
PAGES_AROUND = 16


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
    shape = property(lambda self: (len(self.rows), self.source.shape[1]))
    dtype = property(lambda self: self.source.dtype)
    itemsize = property(lambda self: self.source.itemsize)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: slice | np.ndarray | tuple[slice | np.ndarray, slice]) -> np.ndarray:
        rows, *columns = key if isinstance(key, tuple) else (key,)
        return self.source[(self.rows[rows], *columns)]


def open_rows(file: Path) -> np.memmap:
    """The array of a `.npy` as a read-only memory map, [n_rows, row_dim] float32; no pickle is ever loaded."""
    try:
        rows = npy.open_memmap(file, mode="r")
    except ValueError as error:
        raise InputError(f"{file}: not a readable .npy array of numbers, or cut short ({error})") from error
    if rows.dtype != np.dtype("<f4") or rows.ndim != 2 or rows.shape[1] == 0 or not rows.flags.c_contiguous:
        shown = f"{rows.dtype.str!r} {rows.shape!r}" + (" in Fortran order" if np.isfortran(rows) else "")
        raise InputError(f"{file}: must be little-endian float32 ('<f4') of two dimensions in C order, is {shown}")
    return rows


def iter_row_blocks(grads: np.ndarray | SelectedRows) -> Iterator[np.ndarray]:
    """Yield the rows as arrays of at most 64 MiB, in order."""
    for part in block_slices(len(grads), grads.shape[1] * grads.itemsize):
        yield np.asarray(grads[part])
        release_pages(grads)


def release_pages(grads: np.ndarray | SelectedRows) -> None:
    """Let go of the memory map's pages in this process: they stay in the system's cache, but count as nobody's."""
    source: Any = grads.source if isinstance(grads, SelectedRows) else grads
    while isinstance(source, np.ndarray):
        source = source.base
    if isinstance(source, mmap.mmap):
        source.madvise(mmap.MADV_DONTNEED)


def read_rows(grads: np.ndarray | SelectedRows, rows: np.ndarray, dtype: type | None = np.float64) -> np.ndarray:
    """`grads[rows]` in `dtype` (None: their own), a copy; no page of a memory map stays with this process.

    A few rows at a time: the system maps up to sixteen pages around each one that is read.
    """
    chosen = np.empty((len(rows), grads.shape[1]), dtype or grads.dtype)
    for part in block_slices(len(rows), PAGES_AROUND * grads.itemsize * grads.shape[1]):
        chosen[part] = grads[rows[part]]
        release_pages(grads)
    return chosen


def block_slices(length: int, bytes_each: int) -> Iterator[slice]:
    """Cut 0 .. length into slices of at most 64 MiB."""
    step = max(1, BLOCK_BYTES // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
