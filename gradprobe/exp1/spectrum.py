"""Numbers on a spectrum: how many directions a set of gradients spans.

"Energy" is a squared singular value of the gradients X, [n, d] (uncentred, as in the study); `energies` are [r]
float64, descending, those of `Bucket.energies`. Where there is no number (no gradients, or all of them zero),
functions return None.
"""

import numpy as np

from ..analysis.bucket import ROUNDING


def participation_ratio(energies: np.ndarray) -> float | None:
    """(Σσ²)² / Σσ⁴: k if k directions share the energy equally."""
    total = energies.sum()
    if not total > 0:
        return None
    shares = energies / total  # first, so that squares of tiny gradients don't vanish
    return float(1.0 / np.sum(shares**2))


def top1_energy_frac(energies: np.ndarray) -> float | None:
    """σ₁² / Σσ²."""
    total = energies.sum()
    return float(energies[0] / total) if total > 0 else None


def effective_rank(energies: np.ndarray) -> float | None:
    """exp(-Σ p ln p) with p = σ/Σσ (Roy & Vetterli 2007).

    A σ below 1e-7 of the largest can't be told from the rounding of a Gram matrix, and counts as 0: σ is the root of
    an eigenvalue whose error is about 1e-16 of the largest, and thousands of such roots would add up.
    """
    sigma = np.sqrt(energies[energies > 0])
    if len(sigma) == 0:
        return None
    sigma = sigma[sigma > 1e-7 * sigma.max()]
    p = sigma / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def cumulative_energy(energies: np.ndarray) -> np.ndarray | None:
    """[r] share of all energy that the first 1, 2, ... r directions hold."""
    total = energies.sum()
    return np.cumsum(energies) / total if total > 0 else None


def rank_of_share(energies: np.ndarray, share: float) -> int | None:
    """The fewest directions that hold `share` of all energy."""
    cumulative = cumulative_energy(energies)
    if cumulative is None:
        return None
    # The slack: 19 of 20 equal energies are 95% although their float64 sum may fall below 0.95.
    return min(len(energies), int(np.searchsorted(cumulative, share - ROUNDING)) + 1)
