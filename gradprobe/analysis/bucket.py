"""A set of gradients and the linear algebra on it, by numpy on the CPU, by torch on any other device.

    bucket = Bucket(grads, rows, prompt, rollout, device_for("auto"))
    bucket.energies()                          # squared singular values of X = grads[rows], descending
    bucket.leading_directions(n_vectors=20)    # and the first right singular vectors
    bucket.part(is_kept)                       # some of the gradients; shares what is known of all

All of it is float64 where nothing else is said. X may be a memory map: gradients are read in blocks. The smaller of
X Xᵀ and Xᵀ X is made when first asked for and lives as long as the bucket does. What is written here holds for arrays
of both libraries; torch and scipy, whose imports take time, are imported where they compute.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Optional

import numpy as np

from ..common.errors import InputError
from ..dump.format import Dump
from ..dump.mapped import SelectedRows, block_slices, read_rows

Array = Any
"""numpy's on the CPU, torch's elsewhere."""
DEVICES = ("auto", "cpu", "cuda")
MAX_EXACT = 600
"""Where n or d is no larger, directions are those of the decomposed Gram matrix; else they are found by iteration."""
HELD_BYTES = 512 << 20
"""Gradients that take no more are read once for an iteration instead of once for each step."""
PANEL, WHOLE = 192, 1024
"""Gram matrices are made in panels, but those up to `WHOLE` at once: of Bᵀ B numpy then takes one half alone."""
LARGE = 2048
"""torch decomposes larger Gram matrices on the CPU, too: its LAPACK takes a third of numpy's time."""
READ_BYTES = 128 << 20
"""A dump whose gradients take no more is read once."""
KRYLOV_EXTRA, KRYLOV_STEPS, KRYLOV_TOLERANCE = 8, 20, 1e-4
ROUNDING = 1e-12
"""Energies below this share of all are only rounding."""
SINGLE_SPREAD = 1e-3
"""float32 is enough for leading energies that spread no further; its rounding is about 1e-7 of the largest."""


def device_for(name: str) -> str:
    """What torch calls one of `DEVICES`; "auto" is a GPU if there is one.

    Raises:
        InputError: "cuda" was asked for and torch finds no GPU.
    """
    if name == "cpu":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise InputError("`device` cuda: torch finds no CUDA GPU; use `device` cpu, or auto")
    return "cpu"


def library_of(device: str) -> Any:
    """numpy for "cpu", torch for anything else."""
    if device == "cpu":
        return np
    import torch

    return torch


def to_device(array: np.ndarray, device: str) -> Array:
    """The array itself for "cpu", else a tensor there."""
    if device == "cpu":
        return array
    return library_of(device).from_numpy(np.ascontiguousarray(array)).to(device)


def to_host(array: Array) -> np.ndarray:
    """The array as numpy's."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def rollout_codes(prompt: np.ndarray, sample_idx: np.ndarray) -> np.ndarray:
    """[n] a number 0, 1, ... for each distinct (prompt, sample), in their order. Takes [n] integers each."""
    return np.unique(np.stack([prompt, sample_idx], axis=1), axis=0, return_inverse=True)[1].reshape(-1)


class Bucket:
    """Gradients X, [n, d], and whose they are.

    Attributes:
        grads: [n_all, d] float32 or float64, may be a memory map.
        rows: [n] which of them X holds.
        prompt: [n] number of each gradient's prompt.
        rollout: [n] number of each gradient's rollout, see `rollout_codes`.
        device: where X is multiplied and decomposed: "cpu", or what torch calls another.
    """

    def __init__(
        self,
        grads: np.ndarray | SelectedRows,
        rows: np.ndarray,
        prompt: np.ndarray,
        rollout: np.ndarray,
        device: str = "cpu",
    ) -> None:
        self.grads, self.rows, self.prompt, self.rollout, self.device = grads, rows, prompt, rollout, device
        self._whole: Optional[Bucket] = None  # noqa: UP045, the class is not defined yet
        self._kept = np.zeros(0, bool)
        self._library = library_of(device)
        self._mean: Array | None = None
        self._held: list[Array] | None = None

    @property
    def n(self) -> int:
        """The number of gradients."""
        return len(self.rows)

    @property
    def dim(self) -> int:
        """The length of a gradient."""
        return self.grads.shape[1]

    @property
    def is_wide(self) -> bool:
        """Whether there are fewer gradients than numbers in each: `gram` is then X Xᵀ."""
        return self.n < self.dim

    def part(self, is_kept: np.ndarray) -> "Bucket":
        """The gradients of `is_kept`, [n] bool; its Gram matrix comes from this one's where that saves work."""
        found = Bucket(self.grads, self.rows[is_kept], self.prompt[is_kept], self.rollout[is_kept], self.device)
        found._whole, found._kept = self, is_kept
        return found

    def centred(self) -> "Bucket":
        """The same gradients less their mean; n >= 1."""
        found = Bucket(self.grads, self.rows, self.prompt, self.rollout, self.device)
        found._mean = self.combined(np.full((self.n, 1), 1 / self.n))[:, 0]
        return found

    def blocks(self, dtype: type = np.float64) -> Iterator[Array]:
        """X in order, [k, d] arrays of at most 64 MiB, in float64 or `dtype`."""
        if self._held is not None:
            yield from self._held
            return
        for part in block_slices(self.n, np.dtype(dtype).itemsize * self.dim):
            yield self._read(part, dtype)

    def _read(self, places: slice | np.ndarray, dtype: type = np.float64) -> Array:
        block = to_device(read_rows(self.grads, self.rows[places], dtype), self.device)
        return block if self._mean is None else block - self._mean

    def combined(self, weights: Array) -> Array:
        """[d, k] Xᵀ W. `weights`: [n, k] float64."""
        weights = to_device(weights, self.device) if isinstance(weights, np.ndarray) else weights
        total, start = self._zeros(self.dim, weights.shape[1]), 0
        for block in self.blocks():
            total += block.T @ weights[start : start + len(block)]
            start += len(block)
        return total

    def times(self, directions: Array) -> np.ndarray:
        """[n, k] X V. `directions`: [d, k]."""
        parts = [to_host(block @ directions) for block in self.blocks()]
        return np.concatenate([np.zeros((0, directions.shape[1])), *parts])

    @cached_property
    def squared_norms(self) -> np.ndarray:
        """[n] float64 ‖g‖²."""
        if self.is_wide and self.has_gram:
            return to_host(self.gram.diagonal())
        if self._whole is not None:
            return self._whole.squared_norms[self._kept]
        found = [to_host(self._library.einsum("ij,ij->i", block, block)) for block in self.blocks()]
        return np.concatenate([np.zeros(0), *found])

    @property
    def total_energy(self) -> float:
        """‖X‖_F²."""
        if self.has_gram or min(self.n, self.dim) <= MAX_EXACT:
            return float(self.gram.trace()) if self.n else 0.0
        return float(self.squared_norms.sum())

    @cached_property
    def gram(self) -> Array:
        """X Xᵀ, [n, n], or Xᵀ X, [d, d], whichever is smaller (the latter if n = d); n >= 1."""
        whole = self._whole
        if whole is not None and whole.has_gram and whole.is_wide:
            return _crossing(whole.gram, np.flatnonzero(self._kept))
        size = min(self.n, self.dim)
        squared = _Squared(self._zeros(size, size))
        if not self.is_wide:
            for block in self.blocks():
                squared.add(block)
            return squared.total()
        held = read_rows(self.grads, self.rows, None)
        for columns in block_slices(self.dim, 8 * self.n):
            part = to_device(held[:, columns].astype(np.float64), self.device)
            squared.add((part if self._mean is None else part - self._mean[columns]).T)
        return squared.total()

    def _zeros(self, *shape: int) -> Array:
        return self._library.zeros(shape, dtype=self._library.float64, device=self.device)

    @property
    def has_gram(self) -> bool:
        """Whether the Gram matrix is at hand, or comes from one that is at no cost."""
        whole = self._whole
        return "gram" in self.__dict__ or (whole is not None and whole.is_wide and whole.has_gram)

    def dots(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """[k, m] dot products of some of the gradients, [k] of 0 .. n - 1, with others, [m]."""
        if self.is_wide:
            return to_host(self.gram)[np.ix_(first, second)]
        own, found = self._read(first), np.empty((len(first), len(second)))
        for part in block_slices(len(second), 8 * self.dim):
            found[:, part] = to_host(own @ self._read(second[part]).T)
        return found

    def energies(self) -> np.ndarray:
        """[min(n, d)] squared singular values of X, descending; those below 0, which only rounding makes, are 0."""
        if self.n == 0:
            return np.zeros(0)
        scale = float(self.gram.trace())  # eigenvalues of tiny gradients would underflow
        if not scale > 0:
            return np.zeros(len(self.gram))
        shares = self.gram / scale
        if self._library is np and len(shares) > LARGE:
            shares = to_device(shares, "cpu:0")
        shares = to_host(library_of(shares.device).linalg.eigvalsh(shares))
        return np.maximum(shares[::-1] * scale, 0.0)

    def leading_directions(
        self, n_vectors: int, seed: int = 0, tolerance: float = KRYLOV_TOLERANCE, dtype: type = np.float64
    ) -> tuple[np.ndarray, Array]:
        """The first right singular vectors of X.

        Those of the Gram matrix, decomposed, where n or d is at most 600. Else by `block_krylov` on the Gram matrix
        if that is there already, or on X itself, which it then multiplies some ten times: the Gram matrix alone would
        cost n or d products with a vector, this costs 28 a step.

        Args:
            n_vectors: how many are wanted.
            seed: of the iteration's start.
            tolerance: of the iteration.
            dtype: float32 where an iteration on X may be: it is, if the energies found spread by less than 1,000.

        Returns:
            energies: [k] squared singular values, descending, k at most n_vectors: what is only rounding is left out.
            directions: [d, k] of unit length, float64 or `dtype`.
        """
        if self.has_gram or min(self.n, self.dim) <= MAX_EXACT:
            values, vectors = self.leading_eigenpairs(n_vectors, seed, tolerance)
            vectors = self.combined(vectors) if self.is_wide else vectors
        else:
            values, vectors = self._leading_of_rows(n_vectors, seed, tolerance, dtype)
            if dtype is not np.float64 and not (values > SINGLE_SPREAD * values[:1]).all():
                values, vectors = self._leading_of_rows(n_vectors, seed, tolerance, np.float64)
        return values, vectors / self._library.linalg.norm(vectors, axis=0)

    def leading_eigenpairs(
        self, n_vectors: int, seed: int = 0, tolerance: float = KRYLOV_TOLERANCE
    ) -> tuple[np.ndarray, Array]:
        """The leading eigenvalues of the Gram matrix, as `leading_directions`, and eigenvectors, [n or d, k]."""
        n_vectors, scale = min(n_vectors, self.n, self.dim), float(self.gram.trace()) if self.n else 0.0
        if n_vectors == 0 or not scale > 0:
            return np.zeros(0), self._zeros(min(self.n, self.dim), 0)
        if min(self.n, self.dim) <= MAX_EXACT:
            found = leading_eigenpairs(self.gram, n_vectors)
        else:
            gram = self.gram
            found = block_krylov(lambda block: gram @ block, len(gram), scale, n_vectors, seed, tolerance, self.device)
        return _above_rounding(*found)

    def _leading_of_rows(self, n_vectors: int, seed: int, tolerance: float, dtype: type) -> tuple[np.ndarray, Array]:
        """The same by products with X. What is multiplied has about unit length: squares must not underflow."""
        scale = self.total_energy
        if not scale > 0:
            return np.zeros(0), self._zeros(self.dim, 0)
        if self.n * self.dim * np.dtype(dtype).itemsize <= HELD_BYTES:
            self._held = list(self.blocks(dtype))
        length = (scale / self.n) ** 0.5

        def apply(vectors: Array) -> Array:
            vectors = vectors / length
            return sum((block @ vectors).T @ block for block in self.blocks(dtype)).T / length

        values, vectors = block_krylov(apply, self.dim, self.n, n_vectors, seed, tolerance, self.device, dtype)
        self._held = None
        return _above_rounding(values, vectors, length**2)


def _above_rounding(values: Array, vectors: Array, scale: float = 1.0) -> tuple[np.ndarray, Array]:
    """Eigenpairs less those that are only rounding. `values`: [k], descending, over `scale`; `vectors`: [m, k]."""
    energies = to_host(values).astype(np.float64) * scale
    kept = int((energies > ROUNDING * energies[0]).sum())
    return energies[:kept], vectors[:, :kept]


def bucket_of(dump: Dump, index: int | None = None, device: str = "cpu") -> Bucket:
    """The gradients of one entropy bucket; of all where `index` is None."""
    grads, rows = dump.grads, np.arange(len(dump.grads)) if index is None else dump.rows_of_bucket(index)
    if index is None and grads.itemsize * len(grads) * dump.row_dim <= READ_BYTES:
        grads = read_rows(grads, rows, None)
    return Bucket(grads, rows, dump.prompt[rows], rollout_codes(dump.prompt, dump.sample_idx)[rows], device)


class _Squared:
    """Σ Bᵀ B over blocks B, [k, m]; of each product only what stands on and below the diagonal is formed."""

    def __init__(self, zeros: Array) -> None:
        self._total, size = zeros, len(zeros)
        step = size if size <= WHOLE else max(PANEL, -(-size // 8))
        self._panels = [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def add(self, block: Array) -> None:
        for panel in self._panels:
            self._total[panel.start :, panel] += block[:, panel.start :].T @ block[:, panel]

    def total(self) -> Array:
        for panel in self._panels:
            self._total[panel, panel.stop :] = self._total[panel.stop :, panel].T
        return self._total


def _crossing(matrix: Array, kept: np.ndarray) -> Array:
    """The rows and columns `kept`, [k], of a matrix."""
    kept = to_device(kept, matrix.device)
    return matrix[kept[:, None], kept]


def leading_eigenpairs(matrix: Array, n_vectors: int) -> tuple[Array, Array]:
    """The leading eigenvalues [n_vectors], descending, and eigenvectors [m, n_vectors] of a symmetric [m, m] matrix.

    The matrix is positive semidefinite and not all 0. On the CPU only these are computed, in half of the time.
    """
    scale, size, library = matrix.trace(), len(matrix), library_of(matrix.device)
    matrix = matrix / scale  # eigenvalues of tiny gradients would underflow
    if library is np:
        from scipy.linalg import eigh

        leading = (size - n_vectors, size - 1)
        values, vectors = eigh(matrix.T, subset_by_index=leading, overwrite_a=True, check_finite=False)
    else:
        values, vectors = library.linalg.eigh(matrix)
    return scale * library.flip(values, (0,))[:n_vectors], library.flip(vectors, (1,))[:, :n_vectors]


def block_krylov(
    apply: Callable[[Array], Array],
    size: int,
    scale: float,
    n_vectors: int,
    seed: int = 0,
    tolerance: float = KRYLOV_TOLERANCE,
    device: str = "cpu",
    dtype: type = np.float64,
) -> tuple[Array, Array]:
    """The leading eigenpairs of a symmetric positive semidefinite operator that is known by what it does to vectors.

    Block Krylov iteration with full reorthogonalisation (Musco & Musco 2015) from a seeded random start. It stops when
    ‖G u - λ u‖ < tolerance · λ for each pair, or at 20 steps. Isotropic rows, 1,500 × 3,000, of which no direction
    leads by much: eigenvalues to 1e-8 at a tolerance of 1e-4.

    Args:
        apply: takes [size, k] and gives the operator's product with it.
        size: the operator's; 20 (n_vectors + 8) must not exceed it by much for the result to gain.
        scale: the operator's trace, above 0.
        n_vectors: how many pairs.
        seed: of the start.
        tolerance: of the residual of each pair, as a share of its eigenvalue.
        device: where the vectors are.
        dtype: of the vectors, float64 or float32.

    Returns:
        eigenvalues [n_vectors], descending, and unit eigenvectors [size, n_vectors].
    """
    library, width = library_of(device), min(n_vectors + KRYLOV_EXTRA, size)
    block = to_device(np.random.default_rng(seed).standard_normal((size, width)).astype(dtype), device)
    block = library.linalg.qr(block).Q
    basis, images = library.empty((2, size, width * KRYLOV_STEPS), dtype=block.dtype, device=device)
    for step in range(KRYLOV_STEPS):
        known = width * (step + 1)
        basis[:, known - width : known] = block
        images[:, known - width : known] = residual = apply(block)
        so_far = basis[:, :known]
        for _ in range(2):  # once is not enough to stay orthogonal where eigenvalues spread over many magnitudes
            residual = residual - so_far @ (so_far.T @ residual)
        block, coupling = library.linalg.qr(residual)
        block = library.linalg.qr(block - so_far @ (so_far.T @ block)).Q
        if step % 2 == 1 or step + 1 == KRYLOV_STEPS:
            values, ritz = library.linalg.eigh(so_far.T @ images[:, :known])
            values, ritz = library.flip(values, (0,))[:n_vectors], library.flip(ritz, (1,))[:, :n_vectors]
            errors = library.linalg.norm(coupling @ ritz[-width:], axis=0)
            if (errors <= library.clip(tolerance * values, float(ROUNDING * scale), None)).all():
                break
    return library.clip(values, 0.0, None), so_far @ ritz
