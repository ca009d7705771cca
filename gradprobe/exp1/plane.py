"""Gradients in the plane of their first two principal components, for the headline figure."""

import numpy as np

from ..analysis.bucket import ROUNDING, Bucket

MAX_POINTS = 2000


def project_to_plane(bucket: Bucket, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project gradients, centred, on their first two principal components, found over all of them.

    Args:
        bucket: the n gradients.
        seed: of the search for the components, and of the sample where there are more than 2,000.

    Returns:
        points: [m, 2] float64; of all gradients, the one farthest from 0 along each axis is on the positive side.
        shown: [m] which of the n they are.
        explained: [2] float64, each component's share of the variance; 0 where the gradients do not vary.
    """
    n, explained = bucket.n, np.zeros(2)
    points, shown = np.zeros((n, 2)), np.arange(n)
    if n > MAX_POINTS:
        shown = np.sort(np.random.default_rng(seed).choice(n, MAX_POINTS, replace=False))
    if n > 0:
        centred = bucket.centred()
        variance = centred.total_energy
        energies, components = centred.leading_directions(2, seed)
        # Gradients that are all equal leave only rounding.
        n_found = int(np.sum(energies > ROUNDING * bucket.squared_norms.sum()))
        if n_found > 0:
            points[:, :n_found] = centred.times(components[:, :n_found])
            explained[:n_found] = energies[:n_found] / variance
            farthest = points[np.argmax(np.abs(points), axis=0), [0, 1]]
            points *= np.where(farthest < 0, -1.0, 1.0)
    return points[shown], shown, explained
