"""Entropy buckets: edges, the bucket of a value, and which of its tokens are differentiated: some, or their sum."""

from collections.abc import Iterable, Iterator

import numpy as np

from .records import PooledTokens, Rollout

MIN_EDGE_GAP = 1e-6
POOLING, BUCKET, NO_POOLING = "pooling", "bucket", "none"
"""What a manifest says of pooled dumps: one gradient for each rollout and bucket that has tokens, summed over them."""


def fit_edges(entropies: np.ndarray, bins: int) -> np.ndarray:
    """Edges of `bins` equally filled buckets: the quantiles 0, 1/bins, ..., 1 (linear interpolation).

    Args:
        entropies: [n] in nats, finite, n >= 1.
        bins: number of buckets.

    Returns:
        [bins + 1] float64, strictly increasing: a repeated edge is raised to the one before + 1e-6.
    """
    edges = np.quantile(np.asarray(entropies, dtype=np.float64), np.linspace(0.0, 1.0, bins + 1))
    for i in range(1, len(edges)):
        if edges[i] <= edges[i - 1]:
            edges[i] = edges[i - 1] + MIN_EDGE_GAP
    return edges


def bucket_of(entropies: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bucket of each value: the one whose [lo, hi) holds it; the last is closed above.

    Values outside the edges, which occur where the edges were fitted on other tokens, go to the first or the
    last bucket.

    Args:
        entropies: [...] in nats.
        edges: [bins + 1], increasing.

    Returns:
        [...] int64 in 0 .. bins - 1.
    """
    return np.searchsorted(np.asarray(edges, np.float64)[1:-1], np.asarray(entropies, np.float64), side="right")


def choose_positions(buckets: np.ndarray, bins: int, per_bucket: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `per_bucket` positions of each bucket, drawn without replacement.

    Every position gets one random priority and each bucket keeps its lowest ones: a token that changes its
    bucket (under slightly different edges) leaves the choice among all others as it was.

    Args:
        buckets: [n_tokens] bucket of each response token of one rollout.
        bins: number of buckets.
        per_bucket: how many of each; 0 means every position.
        rng: this rollout's own generator.

    Returns:
        [n_chosen] int64 positions, ascending.
    """
    if per_bucket == 0:
        return np.arange(len(buckets))
    priority = rng.random(len(buckets))
    chosen = []
    for bucket in range(bins):
        members = np.flatnonzero(buckets == bucket)
        chosen.append(members[np.argsort(priority[members], kind="stable")[:per_bucket]])
    return np.sort(np.concatenate(chosen))


def buckets_of(rollout: Rollout, edges: np.ndarray) -> np.ndarray:
    """[n_tokens] the bucket of each response token, by its score, or by its entropy where it has none."""
    return bucket_of(np.asarray(rollout.bucket_scores or rollout.entropies, dtype=np.float64), edges)


def pooled_tokens(rollouts: Iterable[Rollout], edges: np.ndarray) -> Iterator[PooledTokens]:
    """Yield the lines of a pooled dump's `meta.jsonl`, in the order of its gradients."""
    row = 0
    for rollout in rollouts:
        bucket = buckets_of(rollout, edges)
        entropies, logprobs = np.asarray(rollout.entropies), np.asarray(rollout.logprobs)
        tail_mass = np.asarray(rollout.tail_mass)
        for index in np.unique(bucket):
            members = bucket == index
            yield PooledTokens(
                row=row,
                prompt_idx=rollout.prompt_idx,
                sample_idx=rollout.sample_idx,
                bin=int(index),
                n_tokens=int(members.sum()),
                n_response_tokens=len(bucket),
                correct=rollout.correct,
                entropy=float(entropies[members].mean()),
                logprob=float(logprobs[members].mean()),
                rare=float(tail_mass[members].sum()),
                reward=rollout.reward,
            )
            row += 1
