"""Intervals for numbers in which prompts are the unit of chance: delete-one jackknife, Fieller for ratios.

A *stack* is a number together with what it is without each prompt: [1 + P, ...] float64, first that of all P prompts,
then P numbers with one prompt left out. Sums, products and ratios of stacks are stacks, so a statistic is written once.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval over prompts; both None where the data don't carry one."""

    value: float | None
    ci95: Interval | None


NO_ESTIMATE = Estimate(None, None)
MIN_PROMPTS = 3
"""Averages over pairs of different prompts need a pair when one is left out; of fewer nothing is told."""
POWER_FACTOR = 2.8
"""Standard errors that a two-sided test at 5% finds with 80% power: 1.96 + 0.84."""
LEAST_Z = 0.5


def stack_of_means(values: np.ndarray) -> np.ndarray:
    """[1 + P, ...] the mean over prompts and the means without each. `values`: [P, ...], P at least 2."""
    total = values.sum(axis=0)
    return np.concatenate([total[None] / len(values), (total - values) / (len(values) - 1)])


def covariance_of(*stacks: np.ndarray) -> np.ndarray:
    """[k, k] jackknife covariance of k numbers, (P - 1)/P Σ_p (θ_-p - mean)(θ_-p - mean)ᵀ. `stacks`: [1 + P] each.

    Of means it is the usual covariance of a mean. Of averages over pairs of prompts it is never too small in
    expectation (Efron & Stein 1981), and up to twice the truth where the prompts have nothing in common.
    """
    deleted = np.stack([stack[1:] for stack in stacks])
    deviations = deleted - deleted.mean(axis=1, keepdims=True)
    n = deleted.shape[1]
    return (n - 1) / n * deviations @ deviations.T


def quantile_of(stack: np.ndarray) -> float:
    """Student's t at 97.5% with P - 1 degrees of freedom."""
    return float(stdtrit(len(stack) - 2, 0.975))


def interval_of(stack: np.ndarray) -> Interval:
    """value ± t standard errors. `stack`: [1 + P]."""
    margin = quantile_of(stack) * float(np.sqrt(covariance_of(stack)[0, 0]))
    return float(stack[0]) - margin, float(stack[0]) + margin


def estimate_of(stack: np.ndarray) -> Estimate:
    """The value with its interval; none with fewer than 3 prompts, or where a number can't be had. `stack`: [1 + P]."""
    is_told = len(stack) > MIN_PROMPTS and bool(np.isfinite(stack).all())
    return Estimate(float(stack[0]), interval_of(stack)) if is_told else NO_ESTIMATE


def z_of(stack: np.ndarray) -> float | None:
    """The value over its standard error; None where it does not vary. `stack`: [1 + P]."""
    error = float(np.sqrt(covariance_of(stack)[0, 0]))
    return float(stack[0]) / error if error > 0 else None


def above_zero(stack: np.ndarray) -> bool:
    """Whether the 95% interval of `stack`, [1 + P], lies above 0."""
    return interval_of(stack)[0] > 0


def ratio_of(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """numerator / denominator with Fieller's (1954) interval; none unless the denominator is above 0 at the 95% level.

    The interval is all r for which numerator - r denominator is within t standard errors of 0; a denominator above 0
    makes it finite.

    Args:
        numerator, denominator: [1 + P] stacks.
    """
    if not above_zero(denominator):
        return NO_ESTIMATE
    scale = denominator[0]
    (a, b), (_, c) = covariance_of(numerator / scale, denominator / scale) * quantile_of(numerator) ** 2
    value = float(numerator[0] / scale)
    half_width = np.sqrt(max(0.0, (value - b) ** 2 - (1 - c) * (value**2 - a)))
    return Estimate(value, (float((value - b - half_width) / (1 - c)), float((value - b + half_width) / (1 - c))))


def cosine_of(product: np.ndarray, first: np.ndarray, second: np.ndarray) -> Estimate:
    """product / sqrt(first · second), all three free of noise; none unless `first` and `second` are above 0.

    Fieller's interval with the denominator linearised in its two parts. Neither value nor interval is clipped to ±1,
    as is usual for cosines corrected for attenuation.

    Args:
        product: [1 + P] stack of ⟨a, b⟩.
        first, second: [1 + P] stacks of ‖a‖² and ‖b‖².
    """
    if not (above_zero(first) and above_zero(second)):
        return NO_ESTIMATE
    length = np.sqrt(first[0]) * np.sqrt(second[0])
    return ratio_of(product / length, (first / first[0] + second / second[0]) / 2)


def prompts_to_tell(n_prompts: int, z: float | None, rate: float = 0.5) -> str:
    """What it would take to tell a number from 0, in words: the prompts that find it with 80% power.

    Args:
        n_prompts: that there are.
        z: of the number; where it is below 0.5, no size can be told from it.
        rate: of n_prompts, at which the standard error falls: 1/2 of a mean over prompts, 1 of an average over pairs
            of different prompts while noise outweighs signal.
    """
    if z is None or z < LEAST_Z:
        return "how many prompts would tell can't be said: it is too near 0"
    needed = float(f"{n_prompts * (POWER_FACTOR / z) ** (1 / rate):.2g}")
    return f"about {needed:,.0f} prompts would tell, if it is as large as it looks"
