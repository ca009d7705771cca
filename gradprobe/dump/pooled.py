"""Pooled dumps: one gradient for each rollout and bucket that has tokens, summed over all of them."""

from collections.abc import Iterable, Iterator

import numpy as np

from .buckets import bucket_of
from .records import PooledTokens, Rollout

POOLING, BUCKET, NO_POOLING = "pooling", "bucket", "none"


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
