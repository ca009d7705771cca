"""What tokens are put into buckets by: their entropy, or another rule that people choose tokens to train on by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.errors import InputError
from ..common.fields import is_finite
from ..common.files import iter_jsonl
from ..dump.records import PromptKey, Rollout, iter_rollouts, prompt_key_from_json
from ..rollouts.score import TokenScores

ENTROPY, SURPRISAL, LOGIT_NORM, POSITION, RANDOM, SCORE = (
    *("entropy", "surprisal", "logit-norm", "position", "random"),
    "score:",
)
RULES = (ENTROPY, SURPRISAL, LOGIT_NORM, POSITION, RANDOM)
STREAM = 7
"""Keeps random scores apart from the choice of positions, which draws from (seed, prompt, sample) too."""

RolloutKey = tuple[PromptKey, int]


@dataclass(frozen=True)
class BucketRule:
    """A number for every response token; buckets are quantiles of it.

    `entropy`; `surprisal`, -log π of the token; `logit-norm`, ‖onehot - π‖; `position` in the response; `random`; or a
    score of one's own, `score:KEY`, a list with a number per token in the rollouts' file. Surprisal and logit-norm look
    at the token that was drawn: their buckets are not chosen by the prefix alone, and ∇ log π does not average to 0.

    Attributes:
        name: as the flag has it.
        seed: of random scores.
        own: a score of one's own, for each rollout.
    """

    name: str
    seed: int
    own: Mapping[RolloutKey, list[float]] | None = None

    def of_scored(self, rollout: Rollout, scores: TokenScores) -> list[float]:
        """[n_tokens] what the tokens of a rollout that was just scored are bucketed by; empty for their entropy."""
        if self.name == LOGIT_NORM:
            return scores.logit_norms.tolist()
        return self.of_stored(rollout)

    def of_stored(self, rollout: Rollout) -> list[float]:
        """The same from what a file holds.

        Raises:
            InputError: it does not hold that, or not for this rollout.
        """
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
        found = (self.own or {}).get((rollout.prompt_idx, rollout.sample_idx))
        if found is None or len(found) != n_tokens:
            raise InputError(
                f"`bucket_by` {self.name}: prompt {rollout.prompt_idx} sample {rollout.sample_idx} has no list of "
                f"{n_tokens} numbers there"
            )
        return found


def rule_of(name: str, seed: int, rollout_files: Sequence[Path]) -> BucketRule:
    """The rule that `bucket_by` names.

    Raises:
        InputError: there is none of that name, or no file of rollouts to take one's own scores from.
    """
    if name in RULES:
        return BucketRule(name, seed)
    key = name.removeprefix(SCORE)
    if not name.startswith(SCORE) or not key:
        raise InputError(f"`bucket_by` {name}: must be one of {', '.join(RULES)}, or score:KEY")
    if not rollout_files:
        raise InputError(f"`bucket_by` {name}: scores stand in a file of rollouts; name it by `rollouts`")
    own = {}
    for file in rollout_files:
        for number, record in iter_jsonl(file):
            values = record.get(key)
            if not isinstance(values, list) or not all(map(is_finite, values)):
                raise InputError(f"{file}:{number}: '{key}' is not a list of finite numbers")
            own[prompt_key_from_json(record.get("prompt_idx")), record.get("sample_idx")] = values
    return BucketRule(name, seed, own)


def stored_scores(rule: BucketRule, rollouts_file: Path) -> np.ndarray:
    """[n] the scores of all response tokens of a file of our own format, for edges that all shards share."""
    parts = [np.asarray(rule.of_stored(r) or r.entropies, dtype=np.float64) for r in iter_rollouts(rollouts_file)]
    return np.concatenate([np.zeros(0), *parts])
