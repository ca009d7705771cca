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
    """Each of several scores against the truth, with delete-one jackknife intervals over prompts.

    Args:
        truth: [n].
        scores: [n] each.
        prompt: [n] int codes.
    """
    prompt = np.unique(prompt, return_inverse=True)[1]
    if prompt.max(initial=-1) + 1 < MIN_PROMPTS:
        return [Agreement(NO_ESTIMATE, NO_ESTIMATE) for _ in scores]
    codes = [np.unique(values, return_inverse=True)[1] for values in (truth, *scores)]
    correlations = _rank_correlations(codes, prompt)
    overlaps = [_top_overlap(codes[0], own, prompt) for own in codes[1:]]
    return [
        Agreement(estimate_of(one), estimate_of(other)) for one, other in zip(correlations.T, overlaps, strict=True)
    ]


def _rank_correlations(codes: Sequence[np.ndarray], prompt: np.ndarray) -> np.ndarray:
    """[1 + P, k] stack of Spearman's ρ of each column but the first with that.

    Without a prompt all are ranked anew, by counting and not by sorting: this is the jackknife, not its linear part.

    Args:
        codes: [n] each, 0, 1, ... in the order of the values.
        prompt: [n] 0, 1, ...
    """
    order = np.argsort(prompt, kind="stable")
    codes = [code[order] for code in codes]
    counts = [np.bincount(code) for code in codes]
    ends = np.cumsum(np.bincount(prompt))
    stack = []
    for left_out in (slice(0), *map(slice, [0, *ends[:-1]], ends)):
        ranks = []
        for code, count in zip(codes, counts, strict=True):
            rest = count - np.bincount(code[left_out], minlength=len(count))
            ranks.append(_ranks(rest)[np.delete(code, left_out)])
        truth, *own = ranks
        with np.errstate(invalid="ignore"):  # a constant has no ρ
            stack.append([truth @ one / np.sqrt((truth @ truth) * (one @ one)) for one in own])
    return np.array(stack)


def _ranks(count: np.ndarray) -> np.ndarray:
    """[u] of distinct values that come up `count` times each, their mean rank less the mean of all."""
    up_to = np.cumsum(count)
    return up_to - (count + up_to[-1]) / 2


def _top_overlap(truth: np.ndarray, own: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """[1 + P] stack of the share of the highest fifth by `truth` that is in that by `own`; [n] codes and prompts.

    Without a prompt the edges of both fifths move, by so many places that the overlap would jump. What a place costs is
    taken from all rows near the edge instead: the influence function of the overlap, smoothed.
    """
    (top, is_near), (own_top, is_near_own) = map(_highest, (truth, own))
    if not (is_near.any() and is_near_own.any()):
        return np.array([np.nan])
    moved = top[is_near_own].mean() * (own_top - TOP_SHARE) + own_top[is_near].mean() * (top - TOP_SHARE)
    sums = np.bincount(prompt, np.minimum(top, own_top) - moved)
    return stack_of_means(sums) / stack_of_means(TOP_SHARE * np.bincount(prompt))


def _highest(code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] how far each row is in the highest fifth, 0 to 1; and whether it is near the edge."""
    count, edge = np.bincount(code), (1 - TOP_SHARE) * len(code)
    up_to = np.cumsum(count)
    is_near = np.abs(up_to - count / 2 - edge) < TOP_SHARE / 2 * len(code)
    return np.clip((up_to - edge) / count, 0.0, 1.0)[code], is_near[code]
