"""Where Gram products are formed and eigenvalues taken: numpy and LAPACK on the host, or torch on a device.

    arithmetic = arithmetic_for("cuda")
    gram = arithmetic.new_gram(dim)
    for block in blocks:  # [k, dim] float64 each: what is on the device is one block and the Gram matrix
        gram.add(block)
    energies, vectors = arithmetic.eigen(gram.total(), n_vectors=20)

Arrays go in and out as numpy's; all of it is float64 unless a function says otherwise.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, get_lapack_funcs, lapack

from ..common.errors import InputError

DEVICES = ("auto", "cpu", "cuda")


class Gram(Protocol):
    """Σ Bᵀ B over blocks B."""

    def add(self, block: np.ndarray) -> None:
        """Add the product of a block, [k, size]."""

    def total(self) -> np.ndarray:
        """[size, size] the sum so far."""


class Arithmetic(Protocol):
    """The products and decompositions that take nearly all of the analyses' time."""

    def new_gram(self, size: int) -> Gram:
        """An empty sum, [size, size]."""

    def product(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """left @ right, in their precision."""

    def forms(self, gram: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """A function that takes a block, [k, size], and gives xᵀ gram x of each of its rows, [k]."""

    def eigen(self, gram: np.ndarray, n_vectors: int) -> tuple[np.ndarray, np.ndarray]:
        """All eigenvalues, descending, and the leading eigenvectors: see `eigen_of_gram`."""

    def rough_energies(self, gram: np.ndarray) -> np.ndarray:
        """[m] eigenvalues, descending, exact to 1e-6 of the largest: see `energies_in_single_precision`."""


class _HostGram:
    def __init__(self, size: int) -> None:
        self._total = np.zeros((size, size))

    def add(self, block: np.ndarray) -> None:
        self._total += block.T @ block

    def total(self) -> np.ndarray:
        return self._total


class HostArithmetic:
    """numpy and LAPACK."""

    def new_gram(self, size: int) -> Gram:
        return _HostGram(size)

    def product(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return left @ right

    def forms(self, gram: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda block: np.einsum("ij,ij->i", block @ gram, block)

    def eigen(self, gram: np.ndarray, n_vectors: int) -> tuple[np.ndarray, np.ndarray]:
        return eigen_of_gram(gram, n_vectors)

    def rough_energies(self, gram: np.ndarray) -> np.ndarray:
        return energies_in_single_precision(gram)


class _TorchGram:
    def __init__(self, arithmetic: "TorchArithmetic", size: int) -> None:
        self._moved = arithmetic.moved
        self._total = self._moved(np.zeros((size, size)))

    def add(self, block: np.ndarray) -> None:
        there = self._moved(block)
        self._total.addmm_(there.T, there)

    def total(self) -> np.ndarray:
        return self._total.cpu().numpy()


class TorchArithmetic:
    """torch on one of its devices."""

    def __init__(self, device: str) -> None:
        import torch  # here, since it takes seconds and hundreds of MB that numpy's way does without

        self._linalg, self._from_numpy = torch.linalg, torch.from_numpy
        self._device = device

    def moved(self, array: np.ndarray) -> Any:
        """A tensor on the device, in the array's precision."""
        return self._from_numpy(np.ascontiguousarray(array)).to(self._device)

    def new_gram(self, size: int) -> Gram:
        return _TorchGram(self, size)

    def product(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (self.moved(left) @ self.moved(right)).cpu().numpy()

    def forms(self, gram: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        there = self.moved(gram)

        def of_rows(block: np.ndarray) -> np.ndarray:
            rows = self.moved(block)
            return ((rows @ there) * rows).sum(dim=1).cpu().numpy()

        return of_rows

    def eigen(self, gram: np.ndarray, n_vectors: int) -> tuple[np.ndarray, np.ndarray]:
        scale = float(np.trace(gram))
        if len(gram) == 1 or not scale > 0:
            return np.maximum(np.diag(gram), 0.0), np.eye(len(gram), n_vectors)
        values, vectors = self._linalg.eigh(self.moved(gram / scale))
        leading = vectors[:, -n_vectors:].flip(1).cpu().numpy()
        return np.maximum(values.flip(0).cpu().numpy() * scale, 0.0), leading

    def rough_energies(self, gram: np.ndarray) -> np.ndarray:
        scale = float(np.trace(gram))
        if len(gram) == 1 or not scale > 0:
            return np.maximum(np.diag(gram), 0.0)
        values = self._linalg.eigvalsh(self.moved(gram / scale))
        return np.maximum(values.flip(0).cpu().numpy() * scale, 0.0)


HOST = HostArithmetic()


def arithmetic_for(device: str) -> Arithmetic:
    """What `device` means: numpy for "cpu", torch on a GPU for "cuda"; "auto" takes a GPU if there is one.

    Raises:
        InputError: "cuda" was asked for and torch finds no GPU.
    """
    if device == "cpu":
        return HOST
    import torch

    if torch.cuda.is_available():
        return TorchArithmetic("cuda")
    if device == "cuda":
        raise InputError("`device` cuda: torch finds no CUDA GPU; use `device` cpu, or auto")
    return HOST


def eigen_of_gram(gram: np.ndarray, n_vectors: int) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues and the leading eigenvectors of a Gram matrix, from one reduction to tridiagonal form.

    `scipy.linalg.eigh` has no such call: it gives the eigenvalues without vectors, or a vector for each of them,
    which for thousands of rows takes three times as long and three times the memory.

    Args:
        gram: [m, m] float64, symmetric positive semidefinite, m >= 1. Left as it is.
        n_vectors: how many eigenvectors, 1 .. m.

    Returns:
        eigenvalues: [m] descending; those below 0, which only rounding makes, are 0.
        eigenvectors: [m, n_vectors] of unit length, columns in the same order.
    """
    size = len(gram)
    scale = float(np.trace(gram))
    if size == 1 or not scale > 0:
        return np.maximum(np.diag(gram), 0.0), np.eye(size, n_vectors)
    # In Fortran's order, and its own transpose: LAPACK then needs no copy of its own.
    reflectors, diagonal, off_diagonal, tau = _tridiagonal((gram / scale).T)
    values = eigvalsh_tridiagonal(diagonal, off_diagonal, lapack_driver="sterf")[::-1]
    _, vectors = eigh_tridiagonal(
        diagonal, off_diagonal, select="i", select_range=(size - n_vectors, size - 1), lapack_driver="stemr"
    )
    # From the tridiagonal basis back to the Gram's: dsytrd's reflectors leave the first coordinate alone and are,
    # below the diagonal, those of a QR decomposition.
    below = np.asfortranarray(reflectors[1:, :-1])
    del reflectors
    rotated, _, info = lapack.dormqr("L", "N", below, tau, np.asfortranarray(vectors[1:]), 64 * max(size, 1))
    _raise_on_failure("dormqr", info)
    vectors[1:] = rotated
    return np.maximum(values * scale, 0.0), vectors[:, ::-1]


def energies_in_single_precision(gram: np.ndarray) -> np.ndarray:
    """[m] eigenvalues of a Gram matrix, descending, in half the time of double precision.

    An error of about 1e-7 of the largest: enough to count the directions that hold 95% of the energy (within one or
    so of thousands), not enough to count those that hold the last 0.01%.

    Args:
        gram: [m, m] float64, symmetric positive semidefinite, m >= 1. Left as it is.
    """
    scale = float(np.trace(gram))
    if len(gram) == 1 or not scale > 0:
        return np.maximum(np.diag(gram), 0.0)
    _, diagonal, off_diagonal, _ = _tridiagonal((gram / scale).astype(np.float32).T)
    values = eigvalsh_tridiagonal(diagonal.astype(np.float64), off_diagonal.astype(np.float64), lapack_driver="sterf")
    return np.maximum(values[::-1] * scale, 0.0)


def _tridiagonal(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """sytrd of a symmetric matrix in Fortran's order, which is overwritten: reflectors, diagonal, off-diagonal, tau."""
    reduce, best_size = get_lapack_funcs(("sytrd", "sytrd_lwork"), (matrix,))
    work_size, _ = best_size(len(matrix), lower=1)
    reflectors, diagonal, off_diagonal, tau, info = reduce(matrix, lower=1, lwork=int(work_size), overwrite_a=1)
    _raise_on_failure("sytrd", info)
    return reflectors, diagonal, off_diagonal, tau


def _raise_on_failure(routine: str, info: int) -> None:
    if info != 0:
        raise ArithmeticError(f"LAPACK's {routine} failed with info = {info}")
