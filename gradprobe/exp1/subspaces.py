"""Exp 1, across buckets: do entropy buckets share their leading directions, and would they if they repeated at all?

X_b stacks the gradients of bucket b, V_b holds its leading right singular vectors. For each pair of buckets

    top-1 cosine    |v_i · v_j| of the first ones
    overlap         ‖V_iᵀ V_j‖_F² / k of the first k: 1 if the spaces are the same, k/d of random ones
    captured        ‖X_j V_i‖_F² / ‖X_j‖_F²: the share of j's energy inside i's first k directions

and beside each its ceiling (the same between two halves, by prompt, of one bucket) and its null (bucket labels
shuffled within rollouts). Halves hold half the rows, so the ceiling errs on the low side; two buckets come from the
same prompts, two halves don't.

Draws by the dozen need the leading directions of many sets of rows. Where a bucket has fewer rows than d, all come
from one matrix of the cosines of all rows (`CosineGeometry`): with X̂ the rows at unit length and s their norms, a
direction is v = X̂ᵀ w, so X v = s ∘ (X̂ X̂ᵀ w) and v · v' = w · (X̂ X̂ᵀ w'). Else they come from d × d matrices of the rows
(`ColumnGeometry`), of as many draws at a time as fit.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ..analysis.gram import HOST, Arithmetic
from ..dump.blocks import block_slices, read_rows
from .spectrum import leading_eigenpairs, smaller_gram

SUBSPACE_SIZES = (1, 5, 10, 20)
CEILING_DRAWS = 10
NULL_DRAWS = 10
MAX_COSINE_BYTES = 2 << 30
MAX_HELD_BYTES = 1 << 29
ROUNDING_OF_COSINES = 1e-5
"""λ / Σ w², the energy of a direction against that of the weighted rows that make it up, of what is only rounding."""
ROUNDING_OF_ENERGIES = 1e-12


@dataclass(frozen=True)
class Space:
    """The leading right singular vectors of a set of rows.

    Attributes:
        rows: [m] row numbers.
        basis: [m, r] weights w of the unit-length rows, v = X̂ᵀ w, in a `CosineGeometry`; [d, r] the vectors in a
            `ColumnGeometry`. r is at most the rank.
    """

    rows: np.ndarray
    basis: np.ndarray

    @property
    def size(self) -> int:
        """The number of directions."""
        return self.basis.shape[1]


@dataclass(frozen=True)
class Comparison:
    """B spaces against each other.

    Attributes:
        dots: [i][j] is V_iᵀ V_j, [r_i, r_j].
        energies: [i][j] is ‖X_j v‖² of each direction v of space i, [r_i].
        totals: [B] ‖X_j‖_F².
    """

    dots: list[list[np.ndarray]]
    energies: list[list[np.ndarray]]
    totals: np.ndarray


class Geometry(Protocol):
    """Inner products of all rows of a dump, in one form or the other."""

    def space(self, rows: np.ndarray, seed: int = 0) -> Space:
        """The leading directions of `rows`."""

    def space_of_eigenvectors(self, rows: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> Space:
        """The same, from the leading eigenpairs of the smaller Gram matrix of `rows`."""

    def compare(self, spaces: list[Space]) -> Comparison:
        """Compare disjoint sets of rows."""

    def compare_parts(self, rows: np.ndarray, labellings: Iterable[np.ndarray], n_parts: int) -> Iterator[Comparison]:
        """Cut `rows` in `n_parts` by each of the `labellings`, [len(rows)], and compare the parts."""


class CosineGeometry:
    """Cosines between all rows, [n, n] float32: four bytes each is what makes a full dump fit.

    Their error, 1e-6 of the norms' product, stays relative to each row's own norm, since norms are kept aside in
    float64. A bucket's own spectrum does not come from here but from its float64 Gram matrix, through `set_gram`.
    """

    def __init__(self, grads: np.ndarray, arithmetic: Arithmetic = HOST) -> None:
        self._grads = grads
        self._arithmetic = arithmetic
        self._norms = np.zeros(len(grads))
        self._cosines = np.zeros((len(grads), len(grads)), np.float32)

    def set_gram(self, rows: np.ndarray, gram: np.ndarray) -> None:
        """Take the cosines within `rows` from their Gram matrix, [m, m]."""
        self._norms[rows] = np.sqrt(np.diag(gram))
        inverse = _inverse(self._norms[rows])
        cosines = gram * inverse
        cosines *= inverse[:, None]
        self._cosines[np.ix_(rows, rows)] = cosines

    def set_cross(self, first: np.ndarray, second: np.ndarray) -> None:
        """Compute the cosines between two disjoint sets of rows, of which both Gram matrices were given."""
        cosines = self._arithmetic.product(self._unit_rows(first), self._unit_rows(second).T)
        self._cosines[np.ix_(first, second)] = cosines
        self._cosines[np.ix_(second, first)] = cosines.T

    def _unit_rows(self, rows: np.ndarray) -> np.ndarray:
        unit = np.empty((len(rows), self._grads.shape[1]), np.float32)
        inverse = _inverse(self._norms[rows])
        for part in block_slices(len(rows), 8 * self._grads.shape[1]):
            unit[part] = read_rows(self._grads, rows[part]) * inverse[part, None]
        return unit

    def space(self, rows: np.ndarray, seed: int = 0) -> Space:
        """The leading directions of `rows`."""
        n_vectors = min(max(SUBSPACE_SIZES), len(rows))
        if n_vectors == 0:
            return Space(rows, np.zeros((0, 0)))
        norms = self._norms[rows]
        gram = self._cosines[np.ix_(rows, rows)].astype(np.float64)
        gram *= norms
        gram *= norms[:, None]
        return self.space_of_eigenvectors(rows, *leading_eigenpairs(gram, n_vectors, seed, self._arithmetic))

    def space_of_eigenvectors(self, rows: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> Space:
        """The same, from the leading eigenpairs of X Xᵀ."""
        weights = self._norms[rows][:, None] * vectors
        kept = _leading_true(values > ROUNDING_OF_COSINES * np.sum(weights**2, axis=0))
        return Space(rows, weights[:, :kept] / np.sqrt(values[:kept]))

    def compare(self, spaces: list[Space]) -> Comparison:
        """Compare disjoint sets of rows."""
        members = np.concatenate([space.rows for space in spaces])
        ends = np.cumsum([len(space.rows) for space in spaces])
        if len(members) == len(self._grads):
            cosines, places = self._cosines, [space.rows for space in spaces]
        else:
            cosines = self._cosines[np.ix_(members, members)]
            places = [np.arange(end - len(space.rows), end) for end, space in zip(ends, spaces, strict=True)]
        columns = _column_slices(spaces)
        weights = np.zeros((len(cosines), columns[-1].stop), np.float32)
        for space, place, column in zip(spaces, places, columns, strict=True):
            weights[place, column] = space.basis
        along = cosines @ weights  # [n, directions] of the unit-length rows
        found = [along[place].astype(np.float64) for place in places]
        squared_norms = [self._norms[space.rows] ** 2 for space in spaces]
        return Comparison(
            [[found[j][:, column].T @ other.basis for j, other in enumerate(spaces)] for column in columns],
            [[a @ part[:, column] ** 2 for a, part in zip(squared_norms, found, strict=True)] for column in columns],
            np.array([a.sum() for a in squared_norms]),
        )

    def compare_parts(self, rows: np.ndarray, labellings: Iterable[np.ndarray], n_parts: int) -> Iterator[Comparison]:
        """Compare the parts of `rows` by each labelling."""
        return _compare_one_by_one(self, rows, labellings, n_parts)


class ColumnGeometry:
    """Directions as vectors of length d, from Gram matrices of the rows at hand; nothing is kept."""

    def __init__(self, grads: np.ndarray, arithmetic: Arithmetic = HOST) -> None:
        self._grads = grads
        self._arithmetic = arithmetic

    def space(self, rows: np.ndarray, seed: int = 0) -> Space:
        """The leading directions of `rows`."""
        if len(rows) == 0:
            return Space(rows, np.zeros((self._grads.shape[1], 0)))
        gram = smaller_gram(self._grads, rows, self._arithmetic)
        n_vectors = min(max(SUBSPACE_SIZES), len(gram))
        return self.space_of_eigenvectors(rows, *leading_eigenpairs(gram, n_vectors, seed, self._arithmetic))

    def space_of_eigenvectors(self, rows: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> Space:
        """The same, from the leading eigenpairs of X Xᵀ or Xᵀ X, whichever is smaller."""
        dim = self._grads.shape[1]
        if len(rows) == 0:
            return Space(rows, np.zeros((dim, 0)))
        kept = _leading_true(values > ROUNDING_OF_ENERGIES * values[0])
        if len(rows) >= dim:
            return Space(rows, vectors[:, :kept])
        basis = np.zeros((dim, kept))
        for part in block_slices(len(rows), 8 * dim):
            basis += read_rows(self._grads, rows[part]).T @ vectors[part, :kept]
        return Space(rows, basis / np.sqrt(values[:kept]))

    def compare(self, spaces: list[Space]) -> Comparison:
        """Compare sets of rows."""
        columns = _column_slices(spaces)
        basis = np.concatenate([space.basis for space in spaces], axis=1)
        dots = basis.T @ basis
        energies, totals = np.zeros((len(spaces), basis.shape[1])), np.zeros(len(spaces))
        for j, space in enumerate(spaces):
            for part in block_slices(len(space.rows), 8 * self._grads.shape[1]):
                block = read_rows(self._grads, space.rows[part])
                energies[j] += np.sum((block @ basis) ** 2, axis=0)
                totals[j] += np.sum(block**2)
        return _comparison(dots, energies, totals, columns)

    def compare_parts(self, rows: np.ndarray, labellings: Iterable[np.ndarray], n_parts: int) -> Iterator[Comparison]:
        """Compare the parts of `rows` by each labelling; where matrices of several fit, from one pass over the rows."""
        dim = self._grads.shape[1]
        at_once = MAX_HELD_BYTES // (8 * dim**2 * n_parts)
        if at_once == 0 or len(rows) < n_parts * dim:  # matrices too large, or rows too few to need matrices that large
            yield from _compare_one_by_one(self, rows, labellings, n_parts)
            return
        labellings, draw = iter(labellings), 0
        while held := list(islice(labellings, at_once)):
            for grams in self._grams_of_parts(rows, held, n_parts):
                yield self._compare_grams(grams, seed=draw)
                draw += 1

    def _grams_of_parts(self, rows: np.ndarray, held: list[np.ndarray], n_parts: int) -> Iterator[list[np.ndarray]]:
        """[d, d] of each part, by each labelling."""
        dim = self._grads.shape[1]
        grams = [[self._arithmetic.new_gram(dim) for _ in range(n_parts)] for _ in held]
        for part in block_slices(len(rows), 8 * dim):
            block = read_rows(self._grads, rows[part])
            for labels, of_labelling in zip(held, grams, strict=True):
                for index, gram in enumerate(of_labelling):
                    gram.add(block[labels[part] == index])
        while grams:
            yield [gram.total() for gram in grams.pop(0)]

    def _compare_grams(self, grams: list[np.ndarray], seed: int) -> Comparison:
        """`space` and `compare` where the [d, d] matrix of each part is at hand."""
        no_rows = np.zeros(0, int)
        n_vectors = min(max(SUBSPACE_SIZES), self._grads.shape[1])
        spaces = []
        for gram in grams:
            values, vectors = leading_eigenpairs(gram, n_vectors, seed, self._arithmetic)
            spaces.append(Space(no_rows, vectors[:, : _leading_true(values > ROUNDING_OF_ENERGIES * values[0])]))
        columns = _column_slices(spaces)
        basis = np.concatenate([space.basis for space in spaces], axis=1)
        energies = np.array([np.einsum("ij,ij->j", basis, gram @ basis) for gram in grams])
        return _comparison(basis.T @ basis, energies, np.array([np.trace(gram) for gram in grams]), columns)


def _comparison(dots: np.ndarray, energies: np.ndarray, totals: np.ndarray, columns: list[slice]) -> Comparison:
    """From the products, [r, r], of all spaces' directions side by side, and their energies in each set, [B, r]."""
    return Comparison(
        [[dots[first, second] for second in columns] for first in columns],
        [[row[column] for row in energies] for column in columns],
        totals,
    )


def _compare_one_by_one(
    geometry: Geometry, rows: np.ndarray, labellings: Iterable[np.ndarray], n_parts: int
) -> Iterator[Comparison]:
    for draw, labels in enumerate(labellings):
        yield geometry.compare([geometry.space(rows[labels == index], seed=draw) for index in range(n_parts)])


def measures_of(comparison: Comparison) -> dict[str, np.ndarray]:
    """Each measure of each pair, [B, B] with NaN for no number, by its path: "top1_cosine", "overlap/5", ...

    overlap and top1_cosine are symmetric; in captured, [i, j] is the share of j's energy in i's space.
    """
    n_spaces = len(comparison.totals)
    found = {name: np.full((n_spaces, n_spaces), np.nan) for name in _measure_names()}
    for i, j in np.ndindex(n_spaces, n_spaces):
        dots, energies = comparison.dots[i][j], comparison.energies[i][j]
        if min(dots.shape) > 0:
            found["top1_cosine"][i, j] = abs(dots[0, 0])
        for k in SUBSPACE_SIZES:
            if min(dots.shape) >= k:
                found[f"overlap/{k}"][i, j] = np.sum(dots[:k, :k] ** 2) / k
            if len(energies) >= k and comparison.totals[j] > 0:
                found[f"captured/{k}"][i, j] = energies[:k].sum() / comparison.totals[j]
    return {name: np.minimum(values, 1.0) for name, values in found.items()}


def split_half_ceiling(
    geometry: Geometry, rows: np.ndarray, prompt: np.ndarray, draws: int = CEILING_DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Each measure between two halves of one bucket: how much two buckets could share at most.

    Args:
        geometry: of the dump.
        rows: [m] row numbers of the bucket.
        prompt: [m] of each of these rows; a half holds whole prompts.
        draws: how many ways to halve.
        seed: of the draws.

    Returns:
        Each measure, [draws] with NaN for no number, by its path (see `measures_of`); captured is the mean of both
        ways. Empty arrays with fewer than 2 prompts.
    """
    found: dict[str, list[float]] = {name: [] for name in _measure_names()}
    for comparison in geometry.compare_parts(rows, _halvings(prompt, draws, seed), 2):
        for name, values in measures_of(comparison).items():
            found[name].append((values[0, 1] + values[1, 0]) / 2)
    return {name: np.array(values) for name, values in found.items()}


def _halvings(prompt: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `draws` times [m] 0 or 1, each for half of the prompts; nothing with fewer than 2."""
    prompts = np.unique(prompt)
    rng = np.random.default_rng(seed)
    for _ in range(draws if len(prompts) > 1 else 0):
        yield (~np.isin(prompt, rng.permutation(prompts)[: len(prompts) // 2])).astype(np.int8)


def shuffled_labels(bucket: np.ndarray, rollout: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `draws` times the bucket labels, [n], shuffled within each rollout. `bucket`, `rollout`: [n]."""
    rng = np.random.default_rng(seed)
    by_rollout = np.argsort(rollout, kind="stable")
    for _ in range(draws):
        shuffled = np.empty_like(bucket)
        shuffled[by_rollout] = bucket[np.lexsort((rng.random(len(bucket)), rollout))]
        yield shuffled


def shuffled_null(
    geometry: Geometry,
    bucket: np.ndarray,
    rollout: np.ndarray,
    n_buckets: int,
    draws: int = NULL_DRAWS,
    seed: int = 0,
    on_draw: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Each measure where buckets mean nothing: labels shuffled within rollouts.

    Returns:
        Each measure, [draws, n_buckets, n_buckets] with NaN for no number and on the diagonal, by its path.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in _measure_names()}
    labellings = shuffled_labels(bucket, rollout, draws, seed)
    for comparison in geometry.compare_parts(np.arange(len(bucket)), labellings, n_buckets):
        for name, values in measures_of(comparison).items():
            np.fill_diagonal(values, np.nan)
            found[name].append(values)
        on_draw()
    return {name: np.array(values).reshape(-1, n_buckets, n_buckets) for name, values in found.items()}


def nested(by_path: dict[str, Any]) -> dict[str, Any]:
    """{"top1_cosine": x, "overlap/5": y} as {"top1_cosine": x, "overlap": {"5": y}}."""
    tree: dict[str, Any] = {}
    for path, value in by_path.items():
        name, _, size = path.partition("/")
        if size:
            tree.setdefault(name, {})[size] = value
        else:
            tree[name] = value
    return tree


def _measure_names() -> list[str]:
    return ["top1_cosine", *(f"{name}/{k}" for name in ("overlap", "captured") for k in SUBSPACE_SIZES)]


def _inverse(norms: np.ndarray) -> np.ndarray:
    return np.divide(1.0, norms, out=np.zeros(len(norms)), where=norms > 0)


def _leading_true(flags: np.ndarray) -> int:
    return len(flags) if flags.all() else int(np.argmin(flags))


def _column_slices(spaces: list[Space]) -> list[slice]:
    ends = np.cumsum([space.size for space in spaces])
    return [slice(int(end) - space.size, int(end)) for end, space in zip(ends, spaces, strict=True)]
