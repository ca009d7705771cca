"""Exp 1, across buckets: do entropy buckets share their leading directions, and would they if they repeated at all?

X_b stacks the gradients of bucket b, V_b holds its leading right singular vectors. For each pair of buckets

    top-1 cosine    |v_i · v_j| of the first ones
    overlap         ‖V_iᵀ V_j‖_F² / k of the first k = 10: 1 if the spaces are the same, k/d of random ones

and beside each its ceiling (the same between two halves, by prompt, of one bucket) and its null (bucket labels
shuffled within rollouts). Halves hold half the rows, so the ceiling errs on the low side; two buckets come from the
same prompts, two halves don't.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..analysis.bucket import KRYLOV_TOLERANCE, Array, Bucket, library_of, to_device, to_host

OVERLAP_SIZE = 10
MEASURES = 2
"""Of every comparison, in this order: the top-1 cosine and the overlap."""
CEILING_DRAWS = 10
NULL_DRAWS = 10


def directions_of(
    bucket: Bucket, seed: int = 0, tolerance: float = KRYLOV_TOLERANCE, dtype: type = np.float64
) -> Array:
    """[d, r] the leading right singular vectors, r at most the rank and 10: what `compare` needs of a set."""
    return bucket.leading_directions(OVERLAP_SIZE, seed, tolerance, dtype)[1]


def compare(directions: list[Array]) -> np.ndarray:
    """[2, B, B] each measure of each pair of B sets, NaN where a set has too few directions. `directions`: [d, r]."""
    basis = library_of(directions[0].device).concatenate(directions, 1)
    return _measures_of(to_host(basis.T @ basis), [found.shape[1] for found in directions])


def compare_parts(whole: Bucket, labels: np.ndarray, n_parts: int, seed: int) -> np.ndarray:
    """Cut gradients in `n_parts` by `labels`, [n], and compare the parts.

    By the Gram matrix X Xᵀ of the whole where that is at hand, without reading the gradients; else directions are
    sought in float32.
    """
    parts = [whole.part(labels == index) for index in range(n_parts)]
    if not (whole.has_gram and whole.is_wide):
        return compare([directions_of(part, seed, dtype=np.float32) for part in parts])
    # With G = X Xᵀ and eigenpairs (λ, u) of a part's: v = Xᵀ u / √λ, so V = Xᵀ W and Vᵀ V = Wᵀ G W.
    columns = []
    for index, part in enumerate(parts):
        values, vectors = part.leading_eigenpairs(OVERLAP_SIZE, seed)
        columns.append(np.zeros((whole.n, len(values))))
        columns[-1][labels == index] = to_host(vectors) / np.sqrt(values)
    weights = np.concatenate(columns, axis=1)
    along = to_host(whole.gram @ to_device(weights, whole.device))
    return _measures_of(weights.T @ along, [found.shape[1] for found in columns])


def _measures_of(dots: np.ndarray, sizes: list[int]) -> np.ndarray:
    """[2, B, B] from Vᵀ V of all directions, the sets' one after the other."""
    found = np.full((MEASURES, len(sizes), len(sizes)), np.nan)
    places = [slice(*ends) for ends in pairwise(np.cumsum([0, *sizes]).tolist())]
    for i, j in np.ndindex(len(sizes), len(sizes)):
        of_pair = dots[places[i], places[j]]
        if min(of_pair.shape) > 0:
            found[0, i, j] = abs(of_pair[0, 0])
        if min(of_pair.shape) >= OVERLAP_SIZE:
            found[1, i, j] = np.sum(of_pair**2) / OVERLAP_SIZE
    return np.minimum(found, 1.0)


def split_half_ceiling(bucket: Bucket, draws: int = CEILING_DRAWS, seed: int = 0) -> np.ndarray:
    """[draws, 2] each measure between two halves of one bucket: how much two buckets could share.

    Args:
        bucket: the gradients; a half holds whole prompts.
        draws: how many ways to halve; none with fewer than 2 prompts.
        seed: of the draws.
    """
    halvings = _halvings(bucket.prompt, draws, seed)
    found = [compare_parts(bucket, labels, 2, draw)[:, 0, 1] for draw, labels in enumerate(halvings)]
    return np.array(found).reshape(-1, MEASURES)


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
