"""Gradients in the plane of their first two principal components, for the headline figure."""

from dataclasses import dataclass

import numpy as np

from ..analysis.bucket import ROUNDING, Bucket

MAX_POINTS = 5000


@dataclass(frozen=True)
class Projection:
    """Gradients projected on their first two principal components.

    Attributes:
        rows: [m] which gradients are given as points; all of them, or a random sample of 5,000.
        coordinates: [m, 2] float64; of all gradients, the one farthest from 0 along each axis is on the positive side.
        explained: [2] float64, each component's share of the variance; None where the gradients do not vary.
        n_rows: how many gradients there were: the components are those of all.
    """

    rows: np.ndarray
    coordinates: np.ndarray
    explained: np.ndarray | None
    n_rows: int


def project_to_plane(bucket: Bucket, seed: int = 0) -> Projection:
    """Project gradients, centred, on their first two principal components, found over all of them.

    Args:
        bucket: the gradients. With more than 5,000, a random sample of 5,000 is returned as points.
        seed: of the sample, and of the search for the components.
    """
    n, rows = bucket.n, bucket.rows
    if n == 0:
        return Projection(rows, np.zeros((0, 2)), None, 0)
    centred = bucket.centred()
    shown = np.arange(n)
    if n > MAX_POINTS:
        shown = np.sort(np.random.default_rng(seed).choice(n, MAX_POINTS, replace=False))
    variance = centred.total_energy
    energies, components = centred.leading_directions(2, seed)
    is_kept = energies > ROUNDING * bucket.squared_norms.sum()  # gradients that are all equal leave only rounding
    if not is_kept.any():
        return Projection(rows[shown], np.zeros((len(shown), 2)), None, n)
    coordinates, explained = np.zeros((n, 2)), np.zeros(2)
    n_found = int(is_kept.sum())
    coordinates[:, :n_found] = centred.times(components[:, :n_found])
    explained[:n_found] = energies[:n_found] / variance
    farthest = coordinates[np.argmax(np.abs(coordinates), axis=0), [0, 1]]
    return Projection(rows[shown], coordinates[shown] * np.where(farthest < 0, -1.0, 1.0), explained, n)
