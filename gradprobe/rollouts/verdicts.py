"""Whether a completion from elsewhere is correct, by what its file says of it: a verdict, a reward, or neither."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import FaultyRecord
from ..common.fields import is_finite
from .formats import TRUTH_KEYS

VERIFIER, ANEW = "the verifier", "`correct_from` verifier judges them anew"
VERDICTS = ("correct", "acc")
"""Fields that hold verdicts, by themselves or (verl's `acc`) as 1 and 0."""
NO_REWARDS = {"step", "prompt", "completion", "advantage", "prompt_ids", "completion_ids", *TRUTH_KEYS}
"""TRL's columns that are no reward; each reward function has a column of its name."""


@dataclass
class Verdicts:
    """Takes the verdicts from completions' fields, as `read_rollouts` is told; None leaves one to the verifier."""

    format: str
    correct_from: str
    correct_above: float | None
    first: tuple[str, ...] = ()
    """What the first that was kept is from (a field, maybe with a threshold, or the verifier), and its place."""

    def of(self, fields: dict[str, Any]) -> tuple[bool | None, str]:
        """The verdict, and what it is from."""
        key = self._key(fields)
        if key is None:
            return None, VERIFIER
        value = fields[key]
        if isinstance(value, bool) or (key in VERDICTS and self._is_verdict(key, value)):
            return bool(value), key
        if not is_finite(value):
            raise FaultyRecord(f"'{key}' is {json.dumps(value)[:40]}, no verdict: {ANEW}")
        if self.correct_above is None:
            how = "`correct_above` THRESHOLD says which rewards are correct answers"
            raise FaultyRecord(f"'{key}' is a number: {how}, {ANEW}")
        return value > self.correct_above, f"{key} > {self.correct_above:g}"

    def keep(self, source: str, where: str) -> None:
        """Count a rollout whose verdict is from `source`; `FaultyRecord` if others' are from elsewhere."""
        self.first = self.first or (source, where)
        if source != self.first[0]:
            said, before = (name if name == VERIFIER else f"'{name}'" for name in (source, self.first[0]))
            raise FaultyRecord(
                f"would take its verdict from {said}, {self.first[1]} from {before}: one file needs one kind; "
                "`correct_from` names a field that all have, or verifier"
            )

    @property
    def source(self) -> str:
        """What all verdicts are from."""
        return (self.first or (VERIFIER,))[0].removeprefix("the ")

    def reward(self, fields: dict[str, Any]) -> float | None:
        """What a completion was rewarded with, where one number is known; none goes with a verdict made anew."""
        if self.correct_from == "verifier":
            return None
        named = self._reward_keys(fields) if self.correct_from == "auto" else [self.correct_from]
        found = [fields[key] for key in named if is_finite(fields.get(key))]
        return float(found[0]) if len(found) == 1 else None

    def _is_verdict(self, key: str, value: Any) -> bool:
        """Whether the value of one of `VERDICTS` is one as it stands: true, false, 1 or 0."""
        # With a threshold for it, a number in `correct` is a reward; verl's `acc` is one only where it is asked for.
        is_reward = self.correct_above is not None and (key != "acc" or self.correct_from == key)
        return isinstance(value, bool) or (not is_reward and is_finite(value) and value in (0, 1))

    def _key(self, fields: dict[str, Any]) -> str | None:
        if self.correct_from == "verifier":
            return None
        if self.correct_from != "auto":
            if self.correct_from not in fields:
                raise FaultyRecord(f"`correct_from` {self.correct_from}: key '{self.correct_from}' is missing")
            return self.correct_from
        for key in VERDICTS:
            if self._is_verdict(key, fields.get(key)):
                return key
        rewards = [key for key in self._reward_keys(fields) if type(fields.get(key)) in (int, float)]
        if len(rewards) > 1:
            raise FaultyRecord(f"several rewards; `correct_from` names one of {', '.join(rewards)}, or verifier")
        return rewards[0] if rewards else None

    def _reward_keys(self, fields: dict[str, Any]) -> Sequence[str]:
        if self.format == "trl":
            return [key for key in fields if key not in NO_REWARDS]
        return ("score",) if self.format == "verl" else ("correct", "score", "reward")
