"""Which tokens of a rollout are differentiated, and which of their gradients are summed."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chosen:
    """Of one rollout, the tokens that are differentiated; those of the same number give one gradient, their sum.

    Attributes:
        positions: [n] response tokens, counted from 0, ascending.
        gradient: [n] which gradient each is part of, 0 .. n_gradients - 1, none of them empty.
    """

    positions: np.ndarray
    gradient: np.ndarray

    @staticmethod
    def each(positions: np.ndarray) -> "Chosen":
        """A gradient for each of these positions, [n] ascending."""
        return Chosen(positions, np.arange(len(positions)))

    @staticmethod
    def pooled(buckets: np.ndarray) -> "Chosen":
        """All tokens of a rollout, summed bucket by bucket. `buckets`: [n_tokens]; empty ones are passed over."""
        return Chosen(np.arange(len(buckets)), np.unique(buckets, return_inverse=True)[1].reshape(-1))

    @property
    def n_gradients(self) -> int:
        """How many gradients there are."""
        return int(self.gradient.max(initial=-1)) + 1
