"""Which weights carry it: of a number that is a sum over weights, the share of each, of each kind and of each layer."""

import re
from dataclasses import dataclass

import numpy as np

from ..analysis.jackknife import Estimate, ratio_of

IN_A_LAYER = re.compile(r"^.*?\.(\d+)\.(.+?)(?:\.weight)?$")


@dataclass(frozen=True)
class Carried:
    """The shares of the signal, or gain, and of the noise that some of the weights carry, with Fieller's intervals."""

    n_weights: int
    share: Estimate
    noise_share: Estimate


ByWeight = dict[str, dict[str, Carried]]
"""Under `weights` by full name, under `kinds` and `layers` their sums; what lies outside of layers has none."""


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """`model.layers.14.mlp.down_proj.weight` -> `mlp.down_proj`, 14; outside of layers its own name and None."""
    inside = IN_A_LAYER.match(name)
    return (inside[2], int(inside[1])) if inside else (name, None)


def by_weight(names: tuple[str, ...], signal: np.ndarray, noise: np.ndarray) -> ByWeight:
    """Shares of the sum over all weights; of the signal none where that sum is not above 0.

    Args:
        names: in full, of W weights.
        signal, noise: [1 + P, W] stacks, see `analysis.jackknife`.
    """
    members: dict[str, dict[str, list[int]]] = {"kinds": {}, "layers": {}, "weights": {}}
    for place, name in enumerate(names):
        for margin, key in zip(members, (*kind_and_layer(name), name), strict=True):
            if key is not None:
                members[margin].setdefault(str(key), []).append(place)

    def carried(of: list[int]) -> Carried:
        shares = (ratio_of(stack[:, of].sum(axis=1), stack.sum(axis=1)) for stack in (signal, noise))
        return Carried(len(of), *shares)

    return {margin: {key: carried(of) for key, of in groups.items()} for margin, groups in members.items()}
