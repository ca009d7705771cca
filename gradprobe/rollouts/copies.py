"""Copies among rollouts: a prompt's responses that are the same where independent samples would not be.

A file that was written twice, or a server that answers every seed alike, halves an interval and can turn a verdict. A
short and certain answer is repeated by chance; how likely that is, its log-prob says.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.special import pdtrc

from ..dump.records import Rollout

LARGEST_CHANCE = 1e-6
"""How often independent samples may be taken for copies."""
LIKELIEST_WITHIN = 1e-4
"""Nats below the likeliest token up to which one counts as it; float32 does not tell them apart for certain."""


def problem_of_copies(rollouts: Sequence[Rollout], sampled_at: float | None, is_off_policy: bool) -> str | None:
    """What shows that not all rollouts are independent samples, or None where chance explains what repeats.

    With n rollouts of a prompt, a response of probability p that is there once comes at least m - 1 times more with a
    chance of at most C(n - 1, m - 1) p^(m - 1). Three things are refused where their chance is below `LARGEST_CHANCE`:
    one response that stands so often (its chance times the number of rollouts); so many repeats in all, where
    Σ p (n - 1) / 2 are expected (Poisson); and that every response of every prompt stands k times, 2k, 3k, ... for a
    k > 1 (by p at temperature 1).

    Args:
        rollouts: scored; of whole prompts.
        sampled_at: the temperature, where they are known to be from the full softmax; else None.
        is_off_policy: the probed model's log-probs don't say what was likely: only the last of the three is refused.
    """
    n_of_prompt = Counter(tuple(rollout.prompt_ids) for rollout in rollouts)
    alike: dict[tuple[tuple[int, ...], ...], list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        alike[tuple(rollout.prompt_ids), tuple(rollout.response_ids)].append(rollout)
    groups = [(n_of_prompt[prompt], group) for (prompt, _), group in alike.items()]
    n_repeats = len(rollouts) - len(groups)
    if n_repeats == 0:
        return None
    log_p = [log_chance(group[0], sampled_at) for _, group in groups]
    expected = sum(len(group) * math.exp(p) * (n - 1) / 2 for p, (n, group) in zip(log_p, groups, strict=True))
    chances = [_log_chance_of_repeats(n, len(group), p) for p, (n, group) in zip(log_p, groups, strict=True)]
    shown = groups[int(np.argmin(chances))][1]
    said = (
        f"{n_repeats} of {len(rollouts)} responses repeat another one of their prompt, such as prompt "
        f"{shown[0].prompt_idx} samples {shown[0].sample_idx} and {shown[-1].sample_idx}, {len(shown[0].response_ids)} "
        f"tokens of log-prob {sum(shown[0].logprobs):.1f}"
    )
    if not is_off_policy:
        is_rare = min(chances) < math.log(LARGEST_CHANCE / len(rollouts))
        if is_rare or pdtrc(n_repeats - 1, expected) < LARGEST_CHANCE:
            return f"{said}, where chance gives {expected:.2g} repeats: not independent samples"
    k = math.gcd(*(len(group) for _, group in groups))
    at_1 = sum(_log_chance_of_repeats(n, len(group), log_chance(group[0], 1.0)) for n, group in groups)
    if k > 1 and at_1 < math.log(LARGEST_CHANCE):
        how = f"every response stands {k} times, or a multiple of that"
        return f"{said}, and {how}: not independent samples, but copies or a sampler at temperature 0"
    return None


def log_chance(rollout: Rollout, sampled_at: float | None) -> float:
    """Log of a response's probability, or of the most that it can have been; nats.

    At temperature 1 that is Σ log π. At any other up to 1, and with whatever top-k, top-p or min-p, a token that is not
    the likeliest has at most the odds π(y)^(1/T) : max π^(1/T), with T = 1 where T is unknown; the likeliest can be
    certain.
    """
    logprobs = np.asarray(rollout.logprobs, dtype=np.float64)
    if sampled_at == 1:
        return min(float(logprobs.sum()), 0.0)
    below = np.log1p(-np.asarray(rollout.tail_mass, dtype=np.float64)) - logprobs
    return -float(np.logaddexp(0, below / (sampled_at or 1.0))[below > LIKELIEST_WITHIN].sum())


def _log_chance_of_repeats(n: int, m: int, log_p: float) -> float:
    """Log of at most how likely it is that of n samples one of probability p, which is there, stands m times."""
    return math.log(math.comb(n - 1, m - 1)) + (m - 1) * log_p
