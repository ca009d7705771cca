"""What tokens are put into buckets by: their entropy, or another rule that people choose tokens to train on by."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..common.errors import InputError
from ..dump.records import Rollout
from ..rollouts.score import TokenScores

ENTROPY, SURPRISAL, LOGIT_NORM, POSITION, RANDOM, SCORE = (
    *("entropy", "surprisal", "logit-norm", "position", "random"),
    "score:",
)
RULES = (ENTROPY, SURPRISAL, LOGIT_NORM, POSITION, RANDOM)
STREAM = 7
"""Keeps random scores apart from the choice of positions, which draws from (seed, prompt, sample) too."""


@dataclass(frozen=True)
class BucketRule:
    """A number for every response token; buckets are quantiles of it.

    `entropy`; `surprisal`, -log π of the token; `logit-norm`, ‖onehot - π‖; `position` in the response; `random`; or a
    score of one's own, `score:KEY`, a list with a number per token in the rollouts' file. Surprisal and logit-norm look
    at the token that was drawn: their buckets are not chosen by the prefix alone, and ∇ log π does not average to 0.

    Attributes:
        name: as the flag has it.
        seed: of random scores.
    """

    name: str
    seed: int

    def of_scored(self, rollout: Rollout, scores: TokenScores) -> list[float]:
        """[n_tokens] what the tokens of a rollout that was just scored are bucketed by; empty for their entropy."""
        if self.name == LOGIT_NORM:
            return scores.logit_norms.tolist()
        return self.of_stored(rollout)

    def of_stored(self, rollout: Rollout) -> list[float]:
        """The same of a rollout whose scores stand in a file already; its own were read with it."""
        n_tokens = len(rollout.response_ids)
        if self.name == ENTROPY:
            return []
        if self.name == SURPRISAL:
            return [-value for value in rollout.logprobs]
        if self.name == POSITION:
            return list(map(float, range(n_tokens)))
        if self.name == RANDOM:
            key = rollout.prompt_idx if isinstance(rollout.prompt_idx, tuple) else (rollout.prompt_idx,)
            return np.random.default_rng([self.seed, *key, rollout.sample_idx, STREAM]).random(n_tokens).tolist()
        return rollout.bucket_scores


def rule_of(name: str, seed: int, has_rollouts: bool) -> BucketRule:
    """The rule that `bucket_by` names."""
    if name in RULES:
        return BucketRule(name, seed)
    if not score_key_of(name):
        raise InputError(f"`bucket_by` {name}: must be one of {', '.join(RULES)}, or score:KEY")
    if not has_rollouts:
        raise InputError(f"`bucket_by` {name}: scores stand in a file of rollouts; name it by `rollouts`")
    return BucketRule(name, seed)


def score_key_of(name: str) -> str | None:
    """The field of one's own scores that `bucket_by` names, or None where it names another rule."""
    return name.removeprefix(SCORE) if name.startswith(SCORE) else None


def stored_scores(rule: BucketRule, rollouts: Iterable[Rollout]) -> np.ndarray:
    """[n] the scores of all response tokens of a dump's rollouts, for edges that all shards share."""
    parts = [np.asarray(rule.of_stored(r) or r.entropies, dtype=np.float64) for r in rollouts]
    return np.concatenate([np.zeros(0), *parts])
