"""What rollouts tell before any gradient is taken: above all, whether they can answer anything."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..common.errors import InputError
from ..dump.on_policy import OnPolicy
from ..dump.records import PromptKey, Rollout
from ..problems.boxed import last_boxed

FEWEST_TO_TELL = 16
"""Of fewer prompts none may be mixed by chance, where a study of more has some."""
MIN_OF_EACH_KIND = 2
"""Correct and incorrect rollouts of a prompt that Exp 2's ρ needs."""


@dataclass(frozen=True)
class EarlyWord:
    """Counts and means over a probe's rollouts.

    Attributes:
        num_mixed_prompts: with correct and incorrect rollouts.
        num_prompts_for_rho: with at least 2 of each.
        num_answered: rollouts with a `\\boxed{}` in them.
        num_cut_off: rollouts that no end-of-sequence token ended.
        mean_tokens: per rollout.
        mean_entropy: nats per token.
    """

    num_rollouts: int
    num_correct: int
    num_prompts: int
    num_mixed_prompts: int
    num_prompts_for_rho: int
    num_answered: int
    num_cut_off: int
    mean_tokens: float
    mean_entropy: float

    @staticmethod
    def of(rollouts: Sequence[Rollout], end_ids: frozenset[int]) -> "EarlyWord":
        """Of judged and scored rollouts, at least one."""
        kinds: dict[PromptKey, Counter] = defaultdict(Counter)
        for rollout in rollouts:
            kinds[rollout.prompt_idx][rollout.correct] += 1
        fewer = [min(of_prompt[True], of_prompt[False]) for of_prompt in kinds.values()]
        return EarlyWord(
            num_rollouts=len(rollouts),
            num_correct=sum(r.correct for r in rollouts),
            num_prompts=len(kinds),
            num_mixed_prompts=sum(n > 0 for n in fewer),
            num_prompts_for_rho=sum(n >= MIN_OF_EACH_KIND for n in fewer),
            num_answered=sum(last_boxed(r.response) is not None for r in rollouts),
            num_cut_off=sum(r.response_ids[-1] not in end_ids for r in rollouts),
            mean_tokens=float(np.mean([len(r.response_ids) for r in rollouts])),
            mean_entropy=float(np.concatenate([r.entropies for r in rollouts]).mean()),
        )

    def lines(self, on_policy: OnPolicy) -> Iterator[str]:
        """For a person, a line each."""
        n = self.num_rollouts
        mixed = share(self.num_mixed_prompts, self.num_prompts)
        yield f"rollouts: {share(self.num_correct, n)} correct, {share(self.num_answered, n)} with a \\boxed{{}} answer"
        yield f"prompts: {mixed} with correct and incorrect rollouts; {self.use}"
        yield (
            f"tokens: {self.mean_tokens:.0f} a rollout, {share(self.num_cut_off, n)} cut off; "
            f"entropy {self.mean_entropy:.3f} nats, log π + H {on_policy.mean:+.4f} nats"
            + ("" if on_policy.z is None else f" ({on_policy.z:+.1f} standard errors)")
        )

    @property
    def use(self) -> str:
        """What the mixed prompts are good for."""
        if self.num_mixed_prompts == 0:
            return "without any, Exp 2 and 3 can say nothing"
        return f"Exp 3 rests on these, Exp 2's ρ on the {self.num_prompts_for_rho} with at least 2 of each"


def share(count: int, total: int) -> str:
    """`12 of 64 (19%)`; all and none are only what is all and none."""
    percent = f"{count / total:.0%}"
    rounded_away = {"0%": "<1%", "100%": ">99%"} if 0 < count < total else {}
    return f"{count} of {total} ({rounded_away.get(percent, percent)})"


def min_mixed_prompts(given: int | None, rows_per_prompt: Sequence[int]) -> int:
    """How many prompts must be mixed: as given, or 1 where there are prompts and rollouts enough to tell."""
    if given is not None:
        return given
    return int(len(rows_per_prompt) >= FEWEST_TO_TELL and max(rows_per_prompt) > 1)


def refuse_too_few_mixed(word: EarlyWord, least: int) -> None:
    """Raise `InputError` where fewer than `least` prompts have correct and incorrect rollouts."""
    if word.num_mixed_prompts < least:
        raise InputError(
            f"`min_mixed_prompts` {least}: {share(word.num_mixed_prompts, word.num_prompts)} prompts have correct and "
            f"incorrect rollouts ({share(word.num_correct, word.num_rollouts)} are correct), so no gradient is taken; "
            "the rollouts are kept, and with `min_mixed_prompts` 0 the same command goes on"
        )
