"""Exp 1, per bucket: how compressed a bucket's gradients are, how sure that is, and how it compares at equal n.

The participation ratio of any union of whole rollouts hangs on sums per rollout only: with the pairwise sums of
squared dot products T[r, s] = Σ_{i in r, j in s} (g_i · g_j)², it is (Σ_r tr_r)² / Σ_{r,s} T[r, s]. So T is taken
once per bucket (`Sums`), and every interval and subsample costs no more than a small matrix product.

a_i = ‖g_i‖² throughout. Where there is no number, functions return None.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.special import ndtri, stdtrit

from ..analysis.bucket import ROUNDING, Bucket

HALF_DRAWS = 2000
MATCHED_DRAWS = 20
CANT_TELL = "can't tell"
PANEL = 1024
"""Gradients: their dot products with as many others stay in a processor's cache."""
MIN_PROMPTS = 4
"""Fewer prompts have at most 3 ways to be halved: no interval."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Sums:
    """Sums over the gradients of clusters (rollouts, prompts) of one bucket; m clusters.

    Attributes:
        n: [m] number of gradients.
        n_nonzero: [m] number of gradients that are not all zero.
        energy: [m] Σ a.
        energy_squares: [m] Σ a².
        dots: [m, m] Σ_{i in r, j in s} (g_i · g_j)².
        unit_dots: the same for the gradients at unit length; those that are all zero are left out.
        prompt: [m] the prompt of each cluster.
        dim: d.
    """

    n: np.ndarray
    n_nonzero: np.ndarray
    energy: np.ndarray
    energy_squares: np.ndarray
    dots: np.ndarray
    unit_dots: np.ndarray
    prompt: np.ndarray
    dim: int

    def by_prompt(self, among: np.ndarray | None = None) -> "Sums":
        """The same sums over prompts, in ascending order; over those of `among`, if given, alone."""
        prompts = np.unique(self.prompt if among is None else among)
        member = (self.prompt[:, None] == prompts).astype(float)  # [m, prompts]
        dots, unit_dots = (member.T @ of_pairs @ member for of_pairs in (self.dots, self.unit_dots))
        totals = (member.T @ values for values in (self.n, self.n_nonzero, self.energy, self.energy_squares))
        return Sums(*totals, dots, unit_dots, prompts, self.dim)

    def participation_ratios(self, picks: np.ndarray) -> np.ndarray:
        """[draws] (Σa)² / Σ (g_i · g_j)² of the picked clusters. `picks`: [draws, m] 0 or 1. NaN: no number."""
        return _ratio((picks @ self.energy) ** 2, _quadratic(picks, self.dots))

    def unit_norm_participation_ratios(self, picks: np.ndarray) -> np.ndarray:
        """[draws] the participation ratio of the picked gradients, each at unit length. NaN: no number."""
        return _ratio((picks @ self.n_nonzero) ** 2, _quadratic(picks, self.unit_dots))

    def effective_sample_sizes(self, picks: np.ndarray) -> np.ndarray:
        """[draws] ESS = (Σa)² / Σa² (Kish 1965): no participation ratio can exceed it. NaN: no number."""
        return _ratio((picks @ self.energy) ** 2, picks @ self.energy_squares)

    def isotropic_participation_ratios(self, picks: np.ndarray) -> np.ndarray:
        """[draws] PR₀ = (Σa)² / (Σa² + Σ_{i≠j} a_i a_j / d): these norms on isotropic directions. NaN: no number.

        E cos² of two independent isotropic directions is 1/d; PR₀ takes the expectation of the denominator.
        """
        squared_sum, sum_of_squares = (picks @ self.energy) ** 2, picks @ self.energy_squares
        return _ratio(squared_sum, sum_of_squares + np.maximum(squared_sum - sum_of_squares, 0.0) / self.dim)


Measure = Callable[[Sums, np.ndarray], np.ndarray]


def sums_of(bucket: Bucket) -> Sums:
    """The sums per rollout of one bucket, in the order of its rollouts' numbers."""
    order = np.argsort(bucket.rollout, kind="stable")
    _, first, n = np.unique(bucket.rollout[order], return_index=True, return_counts=True)
    a = bucket.squared_norms[order]
    inverse = np.divide(1.0, a, out=np.zeros(len(a)), where=a > 0)
    dots, unit_dots = np.zeros((2, len(first), len(first)))
    panels = list(_panels(len(a), first))
    for index, (clusters, rows) in enumerate(panels):
        ends = np.append(first[clusters], rows.stop) - rows.start
        added, weighted = (
            csr_array((weights, np.arange(len(weights)), ends)) for weights in (np.ones(ends[-1]), inverse[rows])
        )
        for others, columns in panels[index:]:  # T is symmetric
            square = bucket.dots(order[rows], order[columns])
            np.square(square, out=square)
            starts = first[others] - columns.start
            for of_pairs, plain in ((dots, added @ square), (unit_dots, weighted @ square * inverse[columns])):
                of_pairs[clusters, others] = np.add.reduceat(plain, starts, axis=1)
                of_pairs[others, clusters] = of_pairs[clusters, others].T

    def total(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, first) if len(first) else np.zeros(0)

    prompt = bucket.prompt[order[first]]
    return Sums(n, total((a > 0).astype(float)), total(a), total(a**2), dots, unit_dots, prompt, bucket.dim)


def half_sample_interval(sums: Sums, measure: Measure, draws: int = HALF_DRAWS, seed: int = 0) -> Interval | None:
    """A 95% interval for `measure` of a bucket of this size, from halves of its prompts.

    What it covers: the value that such a study (this many prompts and gradients) gives on average over the draw of its
    prompts. Not the value of infinitely many gradients: the participation ratio grows with n.

    A half of P prompts drawn without replacement deviates from the whole like the whole deviates from its expectation
    (variance factor (1 - f) / f, with f the share drawn: 1 at f = 1/2; an odd P is corrected for). The halves' own
    mean is taken out, since at half of n the measure is lower. Deviations are of the logarithm and are put around the
    whole bucket's value, cut off at 1; the interval is widened to hold the value without any one prompt. Resampling
    with replacement would repeat gradients, which lowers participation ratio and rank (Politis, Romano & Wolf 1999;
    Shao & Wu 1989).

    docs/methods.md says how often it covers, measured on planted data.

    Args:
        sums: by rollout or prompt.
        measure: `Sums.participation_ratios` and its like.
        draws: how many halves.
        seed: of the draws.

    Returns:
        (lo, hi); None with fewer than 4 prompts, or where the whole or any half has no number.
    """
    by_prompt = sums.by_prompt()
    if len(by_prompt.n) < MIN_PROMPTS:
        return None
    halves, without_one, (whole,) = _logs_of(by_prompt, measure, draws, seed)
    deviations = _deviation_range(halves, without_one - whole)
    if deviations is None:
        return None
    low, high = np.exp(whole + deviations)
    return max(1.0, float(low)), float(high)


def half_picks(n_prompts: int, draws: int, seed: int) -> np.ndarray:
    """[draws, n_prompts] 0 or 1: halves without replacement; of an odd number, the smaller half."""
    order = np.argsort(np.random.default_rng(seed).random((draws, n_prompts)), axis=1)
    return (order < n_prompts // 2).astype(float)


def _logs_of(by_prompt: Sums, measure: Measure, draws: int, seed: int) -> list[np.ndarray]:
    """log `measure` of halves of the prompts, [draws], of all without each, [P], and of all, [1]. NaN: no number."""
    n_prompts = len(by_prompt.n)
    all_but_one = 1 - np.eye(n_prompts)
    picks = np.concatenate([half_picks(n_prompts, draws, seed), all_but_one, np.ones((1, n_prompts))])
    return np.split(np.log(measure(by_prompt, picks)), [draws, draws + n_prompts])


def _deviation_range(halves: np.ndarray, without_one: np.ndarray) -> np.ndarray | None:
    """[2] the 2.5 and 97.5 percentiles of the halves' deviations from their mean, at the scale of the whole.

    Widened by Student's t over the normal quantile, since percentiles of resampling know nothing of how poorly few
    prompts tell their own spread; and to hold what each single prompt's absence does (`without_one`, relative to the
    whole). The latter is without effect unless one prompt's gradients outweigh the rest: then the whole lies at the
    edge of what the halves show, and nothing around it would be an interval. None where a half has no number.
    """
    if not np.isfinite(halves).all():
        return None
    n_prompts = len(without_one)
    n_picked = n_prompts // 2
    scale = np.sqrt(n_picked / (n_prompts - n_picked)) * stdtrit(n_prompts - 1, 0.975) / ndtri(0.975)
    low, high = scale * np.quantile(halves - halves.mean(), [0.025, 0.975])
    without_one = without_one[np.isfinite(without_one)]
    return np.array([min(low, without_one.min(initial=0.0)), max(high, without_one.max(initial=0.0))])


@dataclass(frozen=True)
class Ratio:
    """One bucket's measure over another's at the same `n`, with a 95% interval over the draw of prompts.

    Attributes:
        ratio: second over first, each the geometric mean over subsamples of `n` gradients.
        ci95: None with fewer than 4 prompts in common.
        n: gradients.
        n_prompts: how many prompts both have.
        verdict: "smaller" or "larger" where the interval lies on one side of 1, else "can't tell".
    """

    ratio: float
    ci95: Interval | None
    n: int
    n_prompts: int
    verdict: str


def compare_buckets(
    first: Sums,
    second: Sums,
    measure: Measure = Sums.unit_norm_participation_ratios,
    *,
    half_draws: int = HALF_DRAWS,
    draws: int = MATCHED_DRAWS,
    seed: int = 0,
) -> Ratio | None:
    """Is the second bucket more compressed than the first? At equal n, and over the same halves of shared prompts.

    Two buckets of one dump share their prompts, and so do two models' dumps: taking the same prompts from both
    removes from the ratio what both owe to the prompts.

    Args:
        first, second: sums per rollout, in which equal `prompt` numbers mean the same prompt.
        measure: what is compared: directions alone, unless told otherwise, since a few huge gradients lower the raw
            participation ratio with no change of direction.
        half_draws: how many halves of the prompts.
        draws: how many subsamples of the larger bucket.
        seed: of both.

    Returns:
        None where either has no number.
    """
    n = int(min(first.n.sum(), second.n.sum()))
    matched = [np.log(measure(sums, matched_picks(sums.n, n, draws, seed))) for sums in (first, second)]
    logs = [values[np.isfinite(values)] for values in matched]
    if min(map(len, logs)) == 0:
        return None
    log_ratio = logs[1].mean() - logs[0].mean()
    shared = np.intersect1d(first.prompt, second.prompt)
    deviations = None
    if len(shared) >= MIN_PROMPTS:
        of_both = (_logs_of(sums.by_prompt(shared), measure, half_draws, seed) for sums in (first, second))
        halves, without_one, whole = (b - a for a, b in zip(*of_both, strict=True))
        deviations = _deviation_range(halves, without_one - whole)
    if deviations is None:
        return Ratio(float(np.exp(log_ratio)), None, n, len(shared), CANT_TELL)
    low, high = log_ratio + deviations
    verdict = "smaller" if high < -ROUNDING else "larger" if low > ROUNDING else CANT_TELL
    return Ratio(float(np.exp(log_ratio)), (float(np.exp(low)), float(np.exp(high))), n, len(shared), verdict)


def matched_picks(n_of_rollout: np.ndarray, n: int, draws: int, seed: int) -> np.ndarray:
    """[draws, rollouts] 0 or 1: random rollouts, without replacement, that hold `n` gradients together.

    Rollouts are taken in random order, each that still fits; so a draw may lack some, fewer than the largest
    rollout has. One draw, of everything, where the bucket has no more than `n`.
    """
    if n_of_rollout.sum() <= n:
        return np.ones((1, len(n_of_rollout)))
    rng = np.random.default_rng(seed)
    picks = np.zeros((draws, len(n_of_rollout)))
    sizes = n_of_rollout.tolist()
    for pick in picks:
        room = n
        for candidate in rng.permutation(len(sizes)).tolist():
            if room == 0:
                break
            if sizes[candidate] <= room:
                pick[candidate] = 1
                room -= sizes[candidate]
    return picks


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def _quadratic(picks: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", picks @ matrix, picks)


def _panels(n: int, first: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Cut gradients that are sorted by cluster into panels of whole clusters: (the clusters, their gradients)."""
    ends = np.append(first[1:], n)
    start = 0
    while start < len(first):
        stop = max(start + 1, int(np.searchsorted(ends, first[start] + PANEL, side="right")))
        yield slice(start, stop), slice(int(first[start]), int(ends[stop - 1]))
        start = stop
