"""Do proxies rank tokens as the length of their gradient does? Spearman's ρ, and what the highest fifths share.

    audit(dump, squared_norms, sum_p2)["entropy"]["4"]["rank_correlation"]

Every dumped row counts once: as many of each bucket and rollout as were picked. Ties share their mean rank, and where
the highest fifth ends among equals, they share the places that are left.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..analysis.jackknife import MIN_PROMPTS, NO_ESTIMATE, Estimate, estimate_of, stack_of_means
from ..analysis.tokens import logit_norm
from ..dump.format import Dump

SURPRISAL, LOGIT_NORM, ENTROPY = "1 − π, −log π", "‖onehot − π‖", "entropy"
NEEDED = f"needs `logprob` in meta.jsonl ({LOGIT_NORM} also `sum_p2` in rollouts.jsonl), which older dumps lack"
ALL = "all"
TOP_SHARE = 0.2


@dataclass(frozen=True)
class Agreement:
    """Of a proxy with the gradient norm, over some rows.

    Attributes:
        rank_correlation: Spearman's.
        top_overlap: which share of the fifth with the largest norms is in the fifth with the highest proxy; by chance
            0.2.
    """

    rank_correlation: Estimate
    top_overlap: Estimate


def proxies_of(dump: Dump, sum_p2: np.ndarray | None) -> dict[str, np.ndarray | None]:
    """What people choose tokens by, [n] each; None where the dump lacks what it takes. `sum_p2`: [n] Σ π²."""
    has_all = dump.logprob is not None and sum_p2 is not None
    return {
        SURPRISAL: None if dump.logprob is None else -dump.logprob,  # ranks as 1 − π does
        LOGIT_NORM: logit_norm(dump.logprob, sum_p2) if has_all else None,
        ENTROPY: dump.entropy,
    }


def audit(dump: Dump, squared_norms: np.ndarray, sum_p2: np.ndarray | None) -> dict[str, Any]:
    """Of each proxy its agreement with the norms over all rows and inside each bucket; None where it is not known.

    Args:
        dump: of tokens.
        squared_norms: [n] of its rows.
        sum_p2: [n] Σ π² of their tokens.
    """
    proxies = proxies_of(dump, sum_p2)
    known = {name: scores for name, scores in proxies.items() if scores is not None}
    found: dict[str, Any] = {name: None if scores is None else {} for name, scores in proxies.items()}
    for group, rows in _groups(dump):
        scores = [one[rows] for one in known.values()]
        for name, agreement in zip(known, agreements(squared_norms[rows], scores, dump.prompt[rows]), strict=True):
            found[name][group] = asdict(agreement)
    return found


def _groups(dump: Dump) -> list[tuple[str, np.ndarray]]:
    everything = np.arange(len(dump.row))
    return [(ALL, everything), *((str(bucket), dump.rows_of_bucket(bucket)) for bucket in range(dump.bins))]


def agreements(truth: np.ndarray, scores: Sequence[np.ndarray], prompt: np.ndarray) -> list[Agreement]:
    """Each of several scores against the truth, with intervals over prompts; [n] each, `prompt` int codes.

    The jackknife is the linear part of the one that leaves out a prompt at a time: nothing is ranked anew.
    """
    prompt = np.unique(prompt, return_inverse=True)[1]
    if prompt.max(initial=-1) + 1 < MIN_PROMPTS:
        return [Agreement(NO_ESTIMATE, NO_ESTIMATE) for _ in scores]
    ranked, *others = (_Ranked.of(values) for values in (truth, *scores))
    return [
        Agreement(*(estimate_of(stack(ranked, own, prompt)) for stack in (_rank_correlation, _top_overlap)))
        for own in others
    ]


@dataclass(frozen=True)
class _Ranked:
    """Numbers by their order; [n] each.

    Attributes:
        code: 0, 1, ... of the distinct values, ascending.
        rank: of equals the mean, less the mean of all: Σ_j k(i, j), with k = ½, 0, −½ where i is above, equal, below.
        top: how far it is in the highest fifth, 0 to 1.
        is_near: whether it is near that one's edge.
    """

    code: np.ndarray
    rank: np.ndarray
    top: np.ndarray
    is_near: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "_Ranked":
        code = np.unique(values, return_inverse=True)[1]
        count, n = np.bincount(code), len(code)
        up_to, edge = np.cumsum(count), (1 - TOP_SHARE) * n
        place = up_to - count / 2
        top, is_near = np.clip((up_to - edge) / count, 0.0, 1.0), np.abs(place - edge) < TOP_SHARE / 2 * n
        return cls(code, (place - n / 2)[code], top[code], is_near[code])


def _rank_correlation(truth: _Ranked, own: _Ranked, prompt: np.ndarray) -> np.ndarray:
    """[1 + P] stack of Spearman's ρ. `prompt`: [n] 0, 1, ..."""
    products = [_products(one, other, prompt) for one, other in ((truth, own), (truth, truth), (own, own))]
    with np.errstate(invalid="ignore"):  # a constant has no ρ
        return products[0] / np.sqrt(products[1] * products[2])


def _products(first: _Ranked, second: _Ranked, prompt: np.ndarray) -> np.ndarray:
    """[1 + P] stack of Σ_i r_i s_i = Σ_ijl k(i, j) k'(i, l): a row counts as i, as j and as l, and so thrice in all."""
    own = first.rank * second.rank
    part = own + _pushed(first.code, second.rank) + _pushed(second.code, first.rank)
    beyond_size = np.bincount(prompt, part - 3 * own.mean())
    return stack_of_means(len(beyond_size) * beyond_size + own.sum())


def _pushed(code: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """[n] of each j Σ_i k(i, j) rank_i."""
    of_value = np.bincount(code, rank)
    return (of_value / 2 - np.cumsum(of_value))[code]


def _top_overlap(truth: _Ranked, own: _Ranked, prompt: np.ndarray) -> np.ndarray:
    """[1 + P] stack of the share of the highest fifth by `truth` that is in that by `own`.

    Without a prompt both edges move, and the overlap would jump. What a place costs is told by all rows near the edge.
    """
    if not (truth.is_near.any() and own.is_near.any()):
        return np.full(1, np.nan)
    moved = truth.top[own.is_near].mean() * (own.top - TOP_SHARE)
    moved += own.top[truth.is_near].mean() * (truth.top - TOP_SHARE)
    sums = np.bincount(prompt, np.minimum(truth.top, own.top) - moved)
    return stack_of_means(sums) / stack_of_means(TOP_SHARE * np.bincount(prompt))
