"""Spectra of sets of gradients: how many directions they span, and which.

`compression` puts intervals and comparisons on these numbers, `subspaces` compares the directions. All of it runs in
float64 on Gram matrices, the smaller of X Xᵀ and Xᵀ X, accumulated in blocks: X is given as an array and row numbers,
so it may be a memory map of which one block is read at a time (where there are fewer rows than d, as many rows in
float32 as make up at most half a d × d matrix).

"Energy" is a squared singular value of X, an eigenvalue of either Gram matrix. Where there is no number (no rows,
or rows that are all zero), functions return None.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..analysis.gram import HOST, Arithmetic, eigen_of_gram
from ..dump.blocks import block_slices, copy_rows, read_rows

MAX_PLANE_GRAM = 256
PLANE_STEPS, PLANE_TOLERANCE = 10, 1e-3
MAX_POINTS = 5000
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
        rows: [m] which rows are given as points; all of them, or a random sample of 5,000.
        coordinates: [m, 2] float64; of all rows, the one farthest from 0 along each axis is on the positive side.
        explained: [2] float64, each component's share of the variance; None where the rows do not vary.
        n_rows: how many rows there were: the components are those of all.
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
    grads: np.ndarray, rows: np.ndarray, gram: np.ndarray, n_vectors: int, arithmetic: Arithmetic = HOST
) -> tuple[Spectrum, np.ndarray]:
    """The spectrum of `grads[rows]` and the leading eigenvectors of its smaller Gram matrix.

    Args:
        grads: [n, d], may be a memory map.
        rows: [m] row numbers.
        gram: `smaller_gram(grads, rows)`; [0, 0] where there are no rows.
        n_vectors: how many eigenvectors are wanted, at least 1.
        arithmetic: where it is decomposed.

    Returns:
        the spectrum, and [len(gram), at most n_vectors] unit vectors.
    """
    if len(rows) == 0:
        return Spectrum(0, np.zeros(0), None), np.zeros((0, 0))
    energies, vectors = arithmetic.eigen(gram, min(n_vectors, len(gram)))
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
    """Project `grads[rows]`, centred, on their first two principal components, found over all of these rows.

    Where both the number of rows and d exceed 256, by `block_krylov` on the rows themselves, in at most thirteen passes
    over them, block by block: no matrix is larger than d × 100. It stops when a component's residual is below 1e-3 of
    its variance, which leaves 1e-6 of error in the variance.

    Args:
        grads: [n, d], may be a memory map.
        rows: [m] row numbers. With more than 5,000, a random sample of 5,000 is returned as points.
        seed: of the sample, and of the iteration's start.
    """
    if len(rows) == 0:
        return Projection(rows, np.zeros((0, 2)), None, 0)
    mean = combine_rows(grads, rows, np.full(len(rows), 1 / len(rows)))
    variance, raw_energy = _variance(grads, rows, mean)
    shown = np.arange(len(rows))
    if len(rows) > MAX_POINTS:
        shown = np.sort(np.random.default_rng(seed).choice(len(rows), MAX_POINTS, replace=False))
    if not variance > ROUNDING * raw_energy:  # rows that are all equal leave only rounding
        return Projection(rows[shown], np.zeros((len(shown), 2)), None, len(rows))
    energies, components = _principal_components(grads, rows, mean, variance, seed)
    components = components * (energies > ROUNDING * variance)  # a direction of no variance is only rounding
    coordinates = np.zeros((len(rows), 2))
    for part in block_slices(len(rows), 8 * grads.shape[1]):
        coordinates[part, : len(energies)] = (read_rows(grads, rows[part]) - mean) @ components
    farthest = coordinates[np.argmax(np.abs(coordinates), axis=0), [0, 1]]
    explained = np.zeros(2)
    explained[: len(energies)] = energies / variance
    return Projection(rows[shown], coordinates[shown] * np.where(farthest < 0, -1.0, 1.0), explained, len(rows))


def _variance(grads: np.ndarray, rows: np.ndarray, mean: np.ndarray) -> tuple[float, float]:
    """Σ ‖g - mean‖² and Σ ‖g‖²."""
    centred = raw = 0.0
    for part in block_slices(len(rows), 8 * grads.shape[1]):
        block = read_rows(grads, rows[part])
        raw += float(np.einsum("ij,ij->", block, block))
        block -= mean
        centred += float(np.einsum("ij,ij->", block, block))
    return centred, raw


def _principal_components(
    grads: np.ndarray, rows: np.ndarray, mean: np.ndarray, variance: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Energies [k] and unit vectors [d, k] of the first two principal components, or of the one there is."""
    n_rows, dim = len(rows), grads.shape[1]
    n_components = min(2, n_rows, dim)
    if n_rows <= min(MAX_PLANE_GRAM, dim):
        centred = read_rows(grads, rows) - mean
        energies, vectors = eigen_of_gram(centred @ centred.T, n_components)
        components = centred.T @ vectors
        lengths = np.linalg.norm(components, axis=0)
        return energies[:n_components], np.divide(components, lengths, out=components, where=lengths > 0)

    def spread(basis: np.ndarray) -> np.ndarray:
        total = np.zeros_like(basis)
        for part in block_slices(n_rows, 8 * dim):
            block = read_rows(grads, rows[part])
            block -= mean
            total += block.T @ (block @ basis)
        return total

    if dim <= MAX_PLANE_GRAM:
        energies, components = eigen_of_gram(spread(np.eye(dim)), n_components)
        return energies[:n_components], components
    return block_krylov(spread, dim, variance, n_components, seed, PLANE_STEPS, PLANE_TOLERANCE)


def smaller_gram(grads: np.ndarray, rows: np.ndarray, arithmetic: Arithmetic = HOST) -> np.ndarray:
    """X Xᵀ, [m, m], or Xᵀ X, [d, d], whichever is smaller (the latter if m = d), with X = grads[rows].

    Args:
        grads: [n, d], may be a memory map.
        rows: [m] row numbers, m >= 1.
        arithmetic: where the products are formed.

    Returns:
        float64, symmetric.
    """
    n_rows, dim = len(rows), grads.shape[1]
    if n_rows >= dim:
        return column_gram(grads, rows, arithmetic)
    chosen = copy_rows(grads, rows)
    gram = arithmetic.new_gram(n_rows)
    for columns in block_slices(dim, 8 * n_rows):
        gram.add(chosen[:, columns].astype(np.float64).T)
    return gram.total()


def column_gram(grads: np.ndarray, rows: np.ndarray, arithmetic: Arithmetic = HOST) -> np.ndarray:
    """[d, d] Xᵀ X in float64, with X = grads[rows]."""
    gram = arithmetic.new_gram(grads.shape[1])
    for part in block_slices(len(rows), 8 * grads.shape[1]):
        gram.add(read_rows(grads, rows[part]))
    return gram.total()


def leading_eigenpairs(
    gram: np.ndarray, n_vectors: int, seed: int = 0, arithmetic: Arithmetic = HOST
) -> tuple[np.ndarray, np.ndarray]:
    """The leading eigenpairs of a Gram matrix: exact ones of a small matrix, else by `block_krylov`.

    It reads the matrix some ten times, where a decomposition does so thousands of times. It stops when
    ‖G u - λ u‖ < 1e-4 λ for each pair, or at 20 steps. Isotropic rows, 1,500 × 3,000, of which no direction leads by
    much: eigenvalues to 1e-8.

    Args:
        gram: [m, m] float64, symmetric positive semidefinite, m >= 1.
        n_vectors: how many, 1 .. m.
        seed: of the start.
        arithmetic: where a small matrix is decomposed.

    Returns:
        eigenvalues [n_vectors], descending, and unit eigenvectors [m, n_vectors].
    """
    if len(gram) <= MAX_EXACT_EIGEN:
        values, vectors = arithmetic.eigen(gram, n_vectors)
        return values[:n_vectors], vectors
    scale = float(np.trace(gram))
    if not scale > 0:
        return np.zeros(n_vectors), np.eye(len(gram), n_vectors)
    return block_krylov(lambda block: gram @ block, len(gram), scale, n_vectors, seed)


def block_krylov(
    apply: Callable[[np.ndarray], np.ndarray],
    size: int,
    scale: float,
    n_vectors: int,
    seed: int = 0,
    steps: int = KRYLOV_STEPS,
    tolerance: float = KRYLOV_TOLERANCE,
) -> tuple[np.ndarray, np.ndarray]:
    """The leading eigenpairs of a symmetric positive semidefinite operator that is known by what it does to vectors.

    Block Krylov iteration with full reorthogonalisation (Musco & Musco 2015) from a seeded random start.

    Args:
        apply: takes [size, k] and gives the operator's product with it.
        size: the operator's; steps × (n_vectors + 8) must not exceed it by much for the result to gain.
        scale: the operator's trace, above 0.
        n_vectors: how many pairs.
        seed: of the start.
        steps: the most applications.
        tolerance: stop when the residual of each pair is below this share of its eigenvalue.

    Returns:
        eigenvalues [n_vectors], descending, and unit eigenvectors [size, n_vectors].
    """
    width = n_vectors + KRYLOV_EXTRA
    basis = np.empty((size, width * steps), order="F")
    images = np.empty_like(basis)
    block = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, width)))[0]
    for step in range(steps):
        known = width * (step + 1)
        basis[:, known - width : known] = block
        images[:, known - width : known] = apply(block)
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
            if (errors <= np.maximum(tolerance * values, ROUNDING * scale)).all():
                break
    return np.maximum(values, 0.0), basis[:, :known] @ ritz


def combine_rows(grads: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[d] Σ_i weights[i] · grads[rows[i]], float64."""
    total = np.zeros(grads.shape[1])
    for part in block_slices(len(rows), 8 * grads.shape[1]):
        total += weights[part] @ read_rows(grads, rows[part])
    return total
