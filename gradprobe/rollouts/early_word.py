"""What rollouts tell before any gradient is taken: above all, whether they can answer anything."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from ..common.errors import InputError
from ..dump.on_policy import OnPolicy
from ..dump.records import Rollout
from ..problems.boxed import last_boxed

FEWEST_TO_TELL = 16
"""Of fewer prompts none may be mixed by chance, where a study of more has some."""
MIN_OF_EACH_KIND = 2
"""Correct and incorrect rollouts of a prompt that Exp 2's ρ needs."""


def n_of_rarer_kind(rollouts: Sequence[Rollout]) -> list[int]:
    """Of each prompt, its correct rollouts or its incorrect ones, whichever are fewer."""
    kinds: dict[tuple[int, ...], Counter] = defaultdict(Counter)
    for rollout in rollouts:
        kinds[tuple(rollout.prompt_ids)][rollout.correct] += 1
    return [min(of_prompt[True], of_prompt[False]) for of_prompt in kinds.values()]


def early_word(rollouts: Sequence[Rollout], end_ids: frozenset[int], on_policy: OnPolicy) -> Iterator[str]:
    """Counts and means over judged and scored rollouts, at least one, a line each."""
    n, of_rarer = len(rollouts), n_of_rarer_kind(rollouts)
    correct, answered = sum(r.correct for r in rollouts), sum(last_boxed(r.response) is not None for r in rollouts)
    yield f"rollouts: {share(correct, n)} correct, {share(answered, n)} with a \\boxed{{}} answer"
    n_mixed, n_for_rho = (sum(k >= least for k in of_rarer) for least in (1, MIN_OF_EACH_KIND))
    use = f"Exp 3 rests on these, Exp 2's ρ on the {n_for_rho} with at least 2 of each"
    use = use if n_mixed else "without any, Exp 2 and 3 can say nothing"
    yield f"prompts: {share(n_mixed, len(of_rarer))} with correct and incorrect rollouts; {use}"
    cut = sum(r.response_ids[-1] not in end_ids for r in rollouts)
    entropies = np.concatenate([r.entropies for r in rollouts])
    z = "" if on_policy.z is None else f" ({on_policy.z:+.1f} standard errors)"
    yield (
        f"tokens: {np.mean([len(r.response_ids) for r in rollouts]):.0f} a rollout, {share(cut, n)} cut off; "
        f"entropy {entropies.mean():.3f} nats, log π + H {on_policy.mean:+.4f} nats{z}"
    )


def share(count: int, total: int) -> str:
    """`12 of 64 (19%)`; all and none are only what is all and none."""
    percent = f"{count / total:.0%}"
    rounded_away = {"0%": "<1%", "100%": ">99%"} if 0 < count < total else {}
    return f"{count} of {total} ({rounded_away.get(percent, percent)})"


def refuse_too_few_mixed(rollouts: Sequence[Rollout], given: int | None, rows_per_prompt: Sequence[int]) -> None:
    """Raise `InputError` where fewer than `given` prompts are mixed; by default 1, where there are enough to tell."""
    can_tell = len(rows_per_prompt) >= FEWEST_TO_TELL and max(rows_per_prompt) > 1
    least, of_rarer = int(can_tell) if given is None else given, n_of_rarer_kind(rollouts)
    n_mixed = sum(k > 0 for k in of_rarer)
    if n_mixed < least:
        correct = share(sum(r.correct for r in rollouts), len(rollouts))
        raise InputError(
            f"`min_mixed_prompts` {least}: {share(n_mixed, len(of_rarer))} prompts have correct and incorrect rollouts "
            f"({correct} are correct), so no gradient is taken; the rollouts are kept, and with `min_mixed_prompts` 0 "
            "the same command goes on"
        )
