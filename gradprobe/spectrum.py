"""Spectra of sets of gradients: how many directions they span, and which.

`compression` puts intervals and comparisons on these numbers, `subspaces` compares the directions. All of it runs in
float64 on Gram matrices, the smaller of X Xᵀ and Xᵀ X, accumulated in blocks: X is given as an array and row numbers,
so it may be a memory map of which never more than one block is read at a time.

"Energy" is a squared singular value of X, an eigenvalue of either Gram matrix. Where there is no number (no rows,
or rows that are all zero), functions return None.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, get_lapack_funcs, lapack

BLOCK_BYTES = 64 << 20
MAX_PROJECTION_GRAM = 4096
MAX_EXACT_EIGEN = 600
KRYLOV_EXTRA, KRYLOV_STEPS, KRYLOV_TOLERANCE = 8, 20, 1e-4
ROUNDING = 1e-12
"""Slack on a share of energy: 19 of 20 equal energies are 95% although their float64 sum may fall below 0.95."""


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of the rows X, [n, d], of one entropy bucket (uncentred, as in the study).

    Attributes:
        n: number of rows.
        energies: [min(n, d)] float64, squared singular values of X, descending; [0] if n is 0.
        top_direction: [d] float64, the first right singular vector, of unit length, its largest entry positive;
            None where all energy is 0.
    """

    n: int
    energies: np.ndarray
    top_direction: np.ndarray | None

    @property
    def participation_ratio(self) -> float | None:
        """See `participation_ratio`."""
        return participation_ratio(self.energies)

    @property
    def top1_energy_frac(self) -> float | None:
        """See `top1_energy_frac`."""
        return top1_energy_frac(self.energies)

    @property
    def effective_rank(self) -> float | None:
        """See `effective_rank`."""
        return effective_rank(self.energies)

    def rank(self, share: float) -> int | None:
        """See `rank_of_share`."""
        return rank_of_share(self.energies, share)


@dataclass(frozen=True)
class Projection:
    """Rows projected on their first two principal components.

    Attributes:
        rows: [m] which rows were projected; all of them, or a random sample where that was too many.
        coordinates: [m, 2] float64; the point farthest from 0 along each axis is on the positive side.
        explained: [2] float64, each component's share of the variance; None where the rows do not vary.
        n_rows: how many rows there were to project.
    """

    rows: np.ndarray
    coordinates: np.ndarray
    explained: np.ndarray | None
    n_rows: int


def participation_ratio(energies: np.ndarray) -> float | None:
    """(Σσ²)² / Σσ⁴: k if k directions share the energy equally. `energies`: [r] squared singular values."""
    total = energies.sum()
    if not total > 0:
        return None
    shares = energies / total  # first, so that squares of tiny gradients don't vanish
    return float(1.0 / np.sum(shares**2))


def top1_energy_frac(energies: np.ndarray) -> float | None:
    """σ₁² / Σσ². `energies`: [r] squared singular values, descending."""
    total = energies.sum()
    return float(energies[0] / total) if total > 0 else None


def effective_rank(energies: np.ndarray) -> float | None:
    """exp(-Σ p ln p) with p = σ/Σσ (Roy & Vetterli 2007). `energies`: [r] squared singular values.

    A σ below 1e-7 of the largest can't be told from the rounding of a Gram matrix, and counts as 0: σ is the root of
    an eigenvalue whose error is about 1e-16 of the largest, and thousands of such roots would add up.
    """
    sigma = np.sqrt(energies[energies > 0])
    if len(sigma) == 0:
        return None
    sigma = sigma[sigma > 1e-7 * sigma.max()]
    p = sigma / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def cumulative_energy(energies: np.ndarray) -> np.ndarray | None:
    """[r] share of all energy that the first 1, 2, ... r directions hold. `energies`: [r], descending."""
    total = energies.sum()
    return np.cumsum(energies) / total if total > 0 else None


def rank_of_share(energies: np.ndarray, share: float) -> int | None:
    """The fewest directions that hold `share` of all energy. `energies`: [r] squared singular values, descending."""
    cumulative = cumulative_energy(energies)
    if cumulative is None:
        return None
    return min(len(energies), int(np.searchsorted(cumulative, share - ROUNDING)) + 1)


def iter_bucket_spectra(grads: np.ndarray, bucket: np.ndarray, n_buckets: int) -> Iterator[Spectrum]:
    """Yield the spectrum of each bucket 0 .. n_buckets - 1, each computed when asked for.

    Args:
        grads: [n, d] gradients, may be a memory map.
        bucket: [n] the bucket of each row.
        n_buckets: how many buckets there are, empty ones included.
    """
    for index in range(n_buckets):
        yield spectrum_of_rows(grads, np.flatnonzero(bucket == index))


def spectrum_of_rows(grads: np.ndarray, rows: np.ndarray) -> Spectrum:
    """The spectrum of `grads[rows]`. `grads`: [n, d], may be a memory map; `rows`: [m] row numbers."""
    if len(rows) == 0:
        return Spectrum(0, np.zeros(0), None)
    return spectrum_of_gram(grads, rows, smaller_gram(grads, rows), n_vectors=1)[0]


def spectrum_of_gram(
    grads: np.ndarray, rows: np.ndarray, gram: np.ndarray, n_vectors: int
) -> tuple[Spectrum, np.ndarray]:
    """The spectrum of `grads[rows]` and the leading eigenvectors of its smaller Gram matrix.

    Args:
        grads: [n, d], may be a memory map.
        rows: [m] row numbers.
        gram: `smaller_gram(grads, rows)`; [0, 0] where there are no rows.
        n_vectors: how many eigenvectors are wanted, at least 1.

    Returns:
        the spectrum, and [len(gram), at most n_vectors] unit vectors.
    """
    if len(rows) == 0:
        return Spectrum(0, np.zeros(0), None), np.zeros((0, 0))
    energies, vectors = eigen_of_gram(gram, min(n_vectors, len(gram)))
    if not energies.sum() > 0:
        return Spectrum(len(rows), energies, None), vectors
    top = vectors[:, 0] if len(gram) == grads.shape[1] else combine_rows(grads, rows, vectors[:, 0])
    top = top / np.linalg.norm(top)
    return Spectrum(len(rows), energies, top * np.sign(top[np.argmax(np.abs(top))])), vectors


def cross_cosines(directions: list[np.ndarray | None]) -> list[list[float | None]]:
    """|cos| between each two unit directions; None where one of them is missing.

    The sign of a singular vector is arbitrary, so a signed cosine would have no meaning.
    """
    return [[None if a is None or b is None else min(1.0, abs(float(a @ b))) for b in directions] for a in directions]


def project_to_plane(grads: np.ndarray, rows: np.ndarray, seed: int = 0) -> Projection:
    """Project `grads[rows]`, centred, on their first two principal components.

    Where both the number of rows and d exceed 4,096, a random sample of 4,096 rows is projected instead: the
    smaller Gram matrix of more would not fit a few hundred MB.

    Args:
        grads: [n, d], may be a memory map.
        rows: [m] row numbers.
        seed: of the sample, if one is taken.
    """
    n_rows = len(rows)
    if min(n_rows, grads.shape[1]) > MAX_PROJECTION_GRAM:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_PROJECTION_GRAM, replace=False))
    coordinates = np.zeros((len(rows), 2))
    if len(rows) == 0:
        return Projection(rows, coordinates, None, n_rows)
    mean = combine_rows(grads, rows, np.full(len(rows), 1 / len(rows)))
    gram = smaller_gram(grads, rows, mean)
    energies, vectors = eigen_of_gram(gram, n_vectors=min(2, len(gram)))
    raw_energy = energies.sum() + len(rows) * float(mean @ mean)
    if not energies.sum() > ROUNDING * raw_energy:  # rows that are all equal leave only rounding
        return Projection(rows, coordinates, None, n_rows)
    n_components = vectors.shape[1]
    if len(gram) == grads.shape[1]:
        for part in block_slices(len(rows), 8 * grads.shape[1]):
            coordinates[part, :n_components] = (read_rows(grads, rows[part], slice(None)) - mean) @ vectors
    else:
        coordinates[:, :n_components] = vectors * np.sqrt(energies[:n_components])
    farthest = coordinates[np.argmax(np.abs(coordinates), axis=0), [0, 1]]
    explained = np.zeros(2)
    explained[:n_components] = energies[:n_components] / energies.sum()
    return Projection(rows, coordinates * np.where(farthest < 0, -1.0, 1.0), explained, n_rows)


def smaller_gram(grads: np.ndarray, rows: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """X Xᵀ, [m, m], or Xᵀ X, [d, d], whichever is smaller (the latter if m = d), with X = grads[rows] - offset.

    Args:
        grads: [n, d], may be a memory map.
        rows: [m] row numbers, m >= 1.
        offset: [d] subtracted from every row; None for nothing.

    Returns:
        float64, symmetric.
    """
    n_rows, dim = len(rows), grads.shape[1]
    gram = np.zeros((min(n_rows, dim),) * 2)
    if n_rows < dim:
        for columns in block_slices(dim, 8 * n_rows):
            block = read_rows(grads, rows, columns)
            if offset is not None:
                block -= offset[columns]
            gram += block @ block.T
    else:
        for part in block_slices(n_rows, 8 * dim):
            block = read_rows(grads, rows[part], slice(None))
            if offset is not None:
                block -= offset
            gram += block.T @ block
    return gram


def leading_eigenpairs(gram: np.ndarray, n_vectors: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The leading eigenpairs of a Gram matrix: exact ones of a small matrix, else by block Krylov iteration.

    Block Krylov with full reorthogonalisation (Musco & Musco 2015) from a seeded random start: it reads the matrix
    some ten times, where a decomposition does so thousands of times. It stops when ‖G u - λ u‖ < 1e-4 λ for each
    pair, or at 20 steps. Isotropic rows, 1,500 × 3,000, of which no direction leads by much: eigenvalues to 1e-8.

    Args:
        gram: [m, m] float64, symmetric positive semidefinite, m >= 1.
        n_vectors: how many, 1 .. m.
        seed: of the start.

    Returns:
        eigenvalues [n_vectors], descending, and unit eigenvectors [m, n_vectors].
    """
    if len(gram) <= MAX_EXACT_EIGEN:
        values, vectors = eigen_of_gram(gram, n_vectors)
        return values[:n_vectors], vectors
    scale = float(np.trace(gram))
    if not scale > 0:
        return np.zeros(n_vectors), np.eye(len(gram), n_vectors)
    width = n_vectors + KRYLOV_EXTRA
    basis = np.empty((len(gram), width * KRYLOV_STEPS), order="F")
    images = np.empty_like(basis)
    block = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(gram), width)))[0]
    for step in range(KRYLOV_STEPS):
        known = width * (step + 1)
        basis[:, known - width : known] = block
        images[:, known - width : known] = gram @ block
        residual = images[:, known - width : known].copy()
        for _ in range(2):  # once is not enough to stay orthogonal where eigenvalues spread over many magnitudes
            residual -= basis[:, :known] @ (basis[:, :known].T @ residual)
        block, coupling = np.linalg.qr(residual)
        block -= basis[:, :known] @ (basis[:, :known].T @ block)
        block = np.linalg.qr(block)[0]
        if step % 2 == 1 or known + width > basis.shape[1]:
            values, ritz = np.linalg.eigh(basis[:, :known].T @ images[:, :known])
            values, ritz = values[::-1][:n_vectors], ritz[:, ::-1][:, :n_vectors]
            errors = np.linalg.norm(coupling @ ritz[-width:], axis=0)
            if (errors <= np.maximum(KRYLOV_TOLERANCE * values, ROUNDING * scale)).all():
                break
    return np.maximum(values, 0.0), basis[:, :known] @ ritz


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


def combine_rows(grads: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[d] Σ_i weights[i] · grads[rows[i]], float64."""
    total = np.zeros(grads.shape[1])
    for part in block_slices(len(rows), 8 * grads.shape[1]):
        total += weights[part] @ read_rows(grads, rows[part], slice(None))
    return total


def read_rows(grads: np.ndarray, rows: np.ndarray, columns: slice) -> np.ndarray:
    """`grads[rows, columns]` in float64."""
    return np.asarray(grads[rows, columns]).astype(np.float64)


def block_slices(length: int, bytes_each: int) -> Iterator[slice]:
    """Cut 0 .. length into slices of at most 64 MiB."""
    step = max(1, BLOCK_BYTES // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
