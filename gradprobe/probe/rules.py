"""What tokens are put into buckets by: their entropy, or another rule that people choose tokens to train on by."""

import numpy as np

from ..dump.records import Rollout

RULES = ENTROPY, SURPRISAL, LOGIT_NORM, POSITION, RANDOM = ("entropy", "surprisal", "logit-norm", "position", "random")
SCORE = "score:"
STREAM = 7
"""Keeps random scores apart from the choice of positions, which draws from (seed, prompt, sample) too."""


def score_key_of(rule: str) -> str | None:
    """The field of one's own scores that a rule names, or None where it names another."""
    return rule.removeprefix(SCORE) if rule.startswith(SCORE) else None


def bucket_scores(rule: str, seed: int, rollout: Rollout, logit_norms: np.ndarray | None = None) -> list[float]:
    """[n_tokens] what a rollout's tokens are bucketed by, by quantiles; empty for their entropy.

    `entropy`; `surprisal`, -log π of the token; `logit-norm`, ‖onehot - π‖; `position` in the response; `random`; or a
    score of one's own, `score:KEY`, a list with a number per token in the rollouts' file. Surprisal and logit-norm look
    at the token that was drawn: their buckets are not chosen by the prefix alone, and ∇ log π does not average to 0.

    Args:
        rule: one of these.
        seed: of random scores.
        rollout: scored; scores of its own were read with it.
        logit_norms: [n_tokens], for the rule of that name: no file has them.
    """
    n_tokens = len(rollout.response_ids)
    return {
        ENTROPY: lambda: [],
        SURPRISAL: lambda: [-value for value in rollout.logprobs],
        LOGIT_NORM: lambda: logit_norms.tolist(),
        POSITION: lambda: list(map(float, range(n_tokens))),
        RANDOM: lambda: rng_of(seed, rollout, STREAM).random(n_tokens).tolist(),
    }.get(rule, lambda: rollout.bucket_scores)()


def rng_of(seed: int, rollout: Rollout, *stream: int) -> np.random.Generator:
    """A generator of this rollout's own, in whatever shard it lies."""
    key = rollout.prompt_idx if isinstance(rollout.prompt_idx, tuple) else (rollout.prompt_idx,)
    return np.random.default_rng([seed, *key, rollout.sample_idx, *stream])
