"""A pooled dump as arrays, and its rollouts' gradients prompt by prompt."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..dump.mapped import SelectedRows, read_rows


@dataclass(frozen=True)
class Pooled:
    """The rows of a pooled dump and all its rollouts, those without a row included; n rows, m rollouts.

    Attributes:
        grads: [n, d] float32, may be a memory map. Row i is Σ ∇ log π_t over all tokens of one rollout in one bucket.
        prompt, sample: [n] int codes of the row's rollout, at least 0.
        bucket: [n] int, 0 .. n_buckets - 1.
        n_tokens: [n] tokens in the sum.
        rare: [n] Σ tail mass of these tokens; None where it is not known.
        rollout_prompt, rollout_sample: [m] int codes; each pair once.
        outcome: [m] float, the reward, or 1 for correct and 0 for incorrect.
        correct: [m] bool.
        n_response_tokens: [m] tokens of the whole response.
        n_buckets: B, empty buckets included.
        outcome_is: "reward" or "verdict".
        weights: of several weights in a row, where each one's numbers begin, ascending, by its full name; else empty.
    """

    grads: np.ndarray | SelectedRows
    prompt: np.ndarray
    sample: np.ndarray
    bucket: np.ndarray
    n_tokens: np.ndarray
    rare: np.ndarray | None
    rollout_prompt: np.ndarray
    rollout_sample: np.ndarray
    outcome: np.ndarray
    correct: np.ndarray
    n_response_tokens: np.ndarray
    n_buckets: int
    outcome_is: str = "verdict"
    weights: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRollouts:
    """The R rollouts of one prompt, by ascending sample code.

    Attributes:
        sums: [R, B, d] float64, a rollout's Σ ∇ log π_t over its tokens in each bucket; 0 where it has none.
        outcome, correct, n_response_tokens: [R], as of `Pooled`.
    """

    sums: np.ndarray
    outcome: np.ndarray
    correct: np.ndarray
    n_response_tokens: np.ndarray


def iter_prompts(pooled: Pooled) -> Iterator[PromptRollouts]:
    """Every prompt that has rollouts, by ascending code; `grads` is read one prompt at a time.

    Raises:
        ValueError: a rollout stands twice, a row's rollout is not there, or a rollout has two rows in one bucket.
    """
    rollout_order = np.lexsort((pooled.rollout_sample, pooled.rollout_prompt))
    keys = _keys(pooled, pooled.rollout_prompt, pooled.rollout_sample)[rollout_order]
    if np.any(keys[1:] == keys[:-1]):
        raise ValueError("a rollout stands twice")
    row_keys = _keys(pooled, pooled.prompt, pooled.sample)
    place = np.searchsorted(keys, row_keys)  # of each row's rollout in rollout_order
    if np.any(keys[np.minimum(place, len(keys) - 1)] != row_keys) if len(keys) else len(row_keys) > 0:
        raise ValueError("a row belongs to a rollout that is not there")
    slots = place * pooled.n_buckets + pooled.bucket
    if len(np.unique(slots)) < len(slots):
        raise ValueError("a rollout has two rows in one bucket")
    row_order = np.argsort(place, kind="stable")
    starts = np.unique(pooled.rollout_prompt[rollout_order], return_index=True)[1]
    ends = np.append(starts[1:], len(keys))[: len(starts)]
    row_starts, row_ends = (np.searchsorted(place[row_order], edges) for edges in (starts, ends))
    for start, end, first_row, last_row in zip(starts, ends, row_starts, row_ends, strict=True):
        rows = np.sort(row_order[first_row:last_row])  # in the order of the file
        sums = np.zeros((end - start, pooled.n_buckets, pooled.grads.shape[1]))
        if len(rows):
            sums[place[rows] - start, pooled.bucket[rows]] = read_rows(pooled.grads, rows)
        own = rollout_order[start:end]
        yield PromptRollouts(sums, pooled.outcome[own], pooled.correct[own], pooled.n_response_tokens[own])


def _keys(pooled: Pooled, prompt: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """One int64 per rollout, ascending with (prompt, sample)."""
    n_samples = 1 + max((int(codes.max()) for codes in (pooled.sample, pooled.rollout_sample) if len(codes)), default=0)
    return prompt.astype(np.int64) * n_samples + sample
