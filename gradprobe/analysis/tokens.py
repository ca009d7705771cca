"""What the probed softmax says of single tokens, beside what a dump's rows hold."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..dump.format import Dump
from ..dump.records import PromptKey
from .prompts import rollouts_of

NONE = np.zeros(0)


def logit_norm(logprob: np.ndarray, sum_p2: np.ndarray) -> np.ndarray:
    """[T] ‖onehot − π‖ = sqrt((1 − π)² + Σ' π²), the length of ∇ log π in the logits; Σ' over the words not drawn.

    Σ' π² is between 0 and (1 − π)². It is held there: Σ π² next to 1 has no digits left of it below 1 − π = 1e-8.

    Args:
        logprob: [T] log π of the words drawn, nats.
        sum_p2: [T] Σ π² over all words.
    """
    square = np.expm1(logprob) ** 2
    return np.sqrt(square + np.clip(sum_p2 - np.exp(2 * logprob), 0.0, square))


def sum_p2_of(dumps: Sequence[Dump]) -> list[np.ndarray | None]:
    """Of targets of one probe, [n] Σ π² at each gradient's token; None where their rollouts don't tell it."""
    known = {(one.prompt_idx, one.sample_idx): np.array(one.sum_p2) for one in rollouts_of(dumps[0])}
    return [_at_rows(dump, known) for dump in dumps]


def _at_rows(dump: Dump, known: Mapping[tuple[PromptKey, int], np.ndarray]) -> np.ndarray | None:
    keys = [dump.prompt_keys[code] for code in dump.prompt.tolist()]
    found = [
        known.get((key, sample), NONE)[pos : pos + 1]
        for key, sample, pos in zip(keys, dump.sample_idx.tolist(), dump.pos.tolist(), strict=True)
    ]
    return np.concatenate([NONE, *found]) if all(map(len, found)) else None
