"""What the probed softmax says of single tokens, beside what a dump's rows hold."""

from collections.abc import Sequence

import numpy as np

from ..dump.format import Dump
from .prompts import rollouts_of


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

    def at_rows(dump: Dump) -> np.ndarray | None:
        rows = zip(dump.prompt.tolist(), dump.sample_idx.tolist(), dump.pos.tolist(), strict=True)
        found = [known.get((dump.prompt_keys[code], sample), ())[pos : pos + 1] for code, sample, pos in rows]
        return np.array(found).ravel() if all(map(len, found)) else None

    return list(map(at_rows, dumps))
