"""Exp 1, across buckets: do entropy buckets share their leading directions, and would they if they repeated at all?

X_b stacks the gradients of bucket b, V_b holds its leading right singular vectors. For each pair of buckets

    top-1 cosine    |v_i · v_j| of the first ones
    overlap         ‖V_iᵀ V_j‖_F² / k of the first k: 1 if the spaces are the same, k/d of random ones
    captured        ‖X_j V_i‖_F² / ‖X_j‖_F²: the share of j's energy inside i's first k directions

and beside each its ceiling (the same between two halves, by prompt, of one bucket) and its null (bucket labels
shuffled within rollouts). Halves hold half the rows, so the ceiling errs on the low side; two buckets come from the
same prompts, two halves don't.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..analysis.bucket import KRYLOV_TOLERANCE, Bucket, to_device

if TYPE_CHECKING:
    from torch import Tensor

SUBSPACE_SIZES = (1, 5, 10, 20)
CEILING_DRAWS = 10
NULL_DRAWS = 10


@dataclass(frozen=True)
class Comparison:
    """B sets of gradients against each other.

    Attributes:
        dots: [i][j] is V_iᵀ V_j, [r_i, r_j]; r is at most the rank.
        energies: [i][j] is ‖X_j v‖² of each direction v of set i, [r_i].
        totals: [B] ‖X_j‖_F².
    """

    dots: list[list[np.ndarray]]
    energies: list[list[np.ndarray]]
    totals: np.ndarray


def directions_of(
    bucket: Bucket, seed: int = 0, tolerance: float = KRYLOV_TOLERANCE, dtype: type = np.float64
) -> "Tensor":
    """[d, r] the leading right singular vectors, as many as `measures_of` compares."""
    return bucket.leading_directions(max(SUBSPACE_SIZES), seed, tolerance, dtype)[1]


def compare(buckets: list[Bucket], directions: list["Tensor"]) -> Comparison:
    """Compare sets of gradients by their directions, [d, r] each."""
    import torch

    basis = torch.cat(directions, dim=1)
    energies = [bucket.energies_along(basis) for bucket in buckets]
    sizes = [found.shape[1] for found in directions]
    return _comparison((basis.T @ basis).cpu().numpy(), energies, sizes, buckets)


def compare_parts(whole: Bucket, labels: np.ndarray, n_parts: int, seed: int) -> Comparison:
    """Cut gradients in `n_parts` by `labels`, [n], and compare the parts.

    By the Gram matrix X Xᵀ of the whole where that is at hand, without reading the gradients; else directions are
    sought in float32.
    """
    parts = [whole.part(labels == index) for index in range(n_parts)]
    if whole.has_gram and whole.is_wide:
        return _compare_by_gram(whole, parts, [np.flatnonzero(labels == index) for index in range(n_parts)], seed)
    return compare(parts, [directions_of(part, seed, dtype=np.float32) for part in parts])


def _compare_by_gram(whole: Bucket, parts: list[Bucket], rows: list[np.ndarray], seed: int) -> Comparison:
    """With G = X Xᵀ and eigenpairs (λ, u) of a part's: v = Xᵀ u / √λ, so V = Xᵀ W, X V = G W and Vᵀ V = Wᵀ G W."""
    pairs = [part.leading_eigenpairs(max(SUBSPACE_SIZES), seed) for part in parts]
    sizes = [len(values) for values, _ in pairs]
    weights = np.zeros((whole.n, sum(sizes)))
    for of_part, column, (values, vectors) in zip(rows, _columns(sizes), pairs, strict=True):
        weights[of_part, column] = vectors.cpu().numpy() / np.sqrt(values)
    along = (whole.gram @ to_device(weights, whole.device)).cpu().numpy()
    energies = [np.square(along[of_part]).sum(axis=0) for of_part in rows]
    return _comparison(weights.T @ along, energies, sizes, parts)


def _comparison(dots: np.ndarray, energies: list[np.ndarray], sizes: list[int], buckets: list[Bucket]) -> Comparison:
    """From what all directions, the sets' one after the other, have in common and hold of each set."""
    columns = _columns(sizes)
    return Comparison(
        [[dots[first, second] for second in columns] for first in columns],
        [[of_bucket[column] for of_bucket in energies] for column in columns],
        np.array([bucket.total_energy for bucket in buckets]),
    )


def _columns(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


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


def split_half_ceiling(bucket: Bucket, draws: int = CEILING_DRAWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Each measure between two halves of one bucket, by prompt: how much two buckets could share at most.

    Args:
        bucket: the gradients; a half holds whole prompts.
        draws: how many ways to halve.
        seed: of the draws.

    Returns:
        Each measure, [draws] with NaN for no number, by its path (see `measures_of`); captured is the mean of both
        ways. Empty arrays with fewer than 2 prompts.
    """
    found: dict[str, list[float]] = {name: [] for name in _measure_names()}
    for draw, labels in enumerate(_halvings(bucket.prompt, draws, seed)):
        for name, values in measures_of(compare_parts(bucket, labels, 2, draw)).items():
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
    dump: Bucket, labellings: Iterable[np.ndarray], n_buckets: int, on_draw: Callable[[], Any] = lambda: None
) -> dict[str, np.ndarray]:
    """Each measure where buckets mean nothing.

    Args:
        dump: all gradients.
        labellings: [n] each, of `shuffled_labels`.
        n_buckets: how many there are.
        on_draw: called after each.

    Returns:
        Each measure, [draws, n_buckets, n_buckets] with NaN for no number and on the diagonal, by its path.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in _measure_names()}
    for draw, labels in enumerate(labellings):
        for name, values in measures_of(compare_parts(dump, labels, n_buckets, draw)).items():
            np.fill_diagonal(values, np.nan)
            found[name].append(values)
        on_draw()
    return {name: np.array(values).reshape(-1, n_buckets, n_buckets) for name, values in found.items()}


def _measure_names() -> list[str]:
    return ["top1_cosine", *(f"{name}/{k}" for name in ("overlap", "captured") for k in SUBSPACE_SIZES)]
