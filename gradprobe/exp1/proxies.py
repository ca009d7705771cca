"""Do proxies rank tokens as the length of their gradient does? Spearman's ρ, and what the highest fifths share.

Every dumped row counts once: as many of each bucket and rollout as were picked. Ties share their mean rank, and where
the highest fifth ends among equals, they share the places that are left.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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
        top_overlap: which share of the fifth with the largest norms is in the fifth by proxy; by chance 0.2.
    """

    rank_correlation: Estimate
    top_overlap: Estimate


def audit(dump: Dump, squared_norms: np.ndarray, sum_p2: np.ndarray | None) -> dict[str, Any]:
    """Of each proxy its agreement over all rows and inside each bucket; None where the dump lacks what it takes.

    Args:
        dump: of tokens.
        squared_norms: [n] of its rows.
        sum_p2: [n] Σ π² at their tokens; None where it is not known.
    """
    proxies = {
        SURPRISAL: None if dump.logprob is None else -dump.logprob,  # ranks as 1 − π does
        LOGIT_NORM: None if dump.logprob is None or sum_p2 is None else logit_norm(dump.logprob, sum_p2),
        ENTROPY: dump.entropy,
    }
    groups = {ALL: np.arange(len(dump.row)), **{str(index): dump.rows_of_bucket(index) for index in range(dump.bins)}}

    def within(rows: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        return asdict(agreement(squared_norms[rows], scores[rows], dump.prompt[rows]))

    return {
        name: None if scores is None else {group: within(rows, scores) for group, rows in groups.items()}
        for name, scores in proxies.items()
    }


def agreement(truth: np.ndarray, score: np.ndarray, prompt: np.ndarray) -> Agreement:
    """Of a score with the truth, [n] each; `prompt`: [n] int codes.

    Intervals come from the linear part of the jackknife: nothing is ranked anew without a prompt.
    """
    prompt = np.unique(prompt, return_inverse=True)[1]
    if prompt.max(initial=-1) + 1 < MIN_PROMPTS:
        return Agreement(NO_ESTIMATE, NO_ESTIMATE)
    pair = _ranked(truth), _ranked(score)
    return Agreement(estimate_of(_rank_correlation(*pair, prompt)), estimate_of(_top_overlap(*pair, prompt)))


class _Ranked(NamedTuple):
    """Numbers by their order, [n] each."""

    code: np.ndarray
    """Of the distinct values, 0, 1, ..."""
    rank: np.ndarray
    """Of equals the mean, less the mean of all: Σ_j k(i, j), with k = ½, 0, −½ where i is above, equal, below."""
    top: np.ndarray
    """How far it is in the highest fifth, 0 to 1."""
    is_near: np.ndarray
    """Whether it is near the edge of that."""


def _ranked(values: np.ndarray) -> _Ranked:
    code, count = np.unique(values, return_inverse=True, return_counts=True)[1:]
    up_to, edge = np.cumsum(count), (1 - TOP_SHARE) * len(code)
    place = up_to - count / 2
    is_near = np.abs(place - edge) < TOP_SHARE / 2 * len(code)
    return _Ranked(code, (place - len(code) / 2)[code], np.clip((up_to - edge) / count, 0, 1)[code], is_near[code])


def _rank_correlation(truth: _Ranked, own: _Ranked, prompt: np.ndarray) -> np.ndarray:
    """[1 + P] stack of Spearman's ρ. `prompt`: [n] 0, 1, ..."""
    product, *squares = (_products(*pair, prompt) for pair in ((truth, own), (truth, truth), (own, own)))
    with np.errstate(invalid="ignore"):  # a constant has no ρ
        return product / np.sqrt(squares[0] * squares[1])


def _products(first: _Ranked, second: _Ranked, prompt: np.ndarray) -> np.ndarray:
    """[1 + P] stack of Σ_i r_i s_i = Σ_ijl k(i, j) k'(i, l), in which a row stands as i, as j and as l.

    What a prompt adds by its size alone, thrice the mean of each of its rows, goes out of ρ and so is left out here.
    """
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
