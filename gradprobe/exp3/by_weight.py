"""Which weights carry it: of a number that is a sum over weights, the share of each, of each kind and of each layer."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..analysis.jackknife import Estimate, ratio_of

IN_A_LAYER = re.compile(r"^.*?\.(\d+)\.(.+?)(?:\.weight)?$")


@dataclass(frozen=True)
class Carried:
    """The share of the signal, or gain, and of the noise that some of the weights carry, with Fieller's intervals."""

    n_weights: int
    share: Estimate
    noise_share: Estimate


@dataclass(frozen=True)
class ByWeight:
    """Shares of weights by name, of kinds, which add up to 1 as well, and of layers, beside what lies outside them."""

    kinds: dict[str, Carried]
    layers: dict[str, Carried]
    weights: dict[str, Carried]


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """`model.layers.14.mlp.down_proj.weight` -> `mlp.down_proj`, 14; outside of layers its own name and None."""
    inside = IN_A_LAYER.match(name)
    return (inside[2], int(inside[1])) if inside else (name, None)


def by_weight(names: tuple[str, ...], signal: np.ndarray, noise: np.ndarray) -> ByWeight | None:
    """Every weight's share of the sum over weights; of the signal none where that sum is not above 0. None of none.

    Args:
        names: in full, of W weights.
        signal, noise: [1 + P, W] stacks, see `analysis.jackknife`.
    """
    if not names:
        return None
    wholes = signal.sum(axis=1), noise.sum(axis=1)

    def carried(of: list[int]) -> Carried:
        shares = (ratio_of(s[:, of].sum(axis=1), whole) for s, whole in zip((signal, noise), wholes, strict=True))
        return Carried(len(of), *shares)

    def grouped(key: Callable[[str], str | None]) -> Mapping[str, Carried]:
        groups: dict[str | None, list[int]] = {}
        for place, name in enumerate(names):
            groups.setdefault(key(name), []).append(place)
        return {group: carried(of) for group, of in groups.items() if group is not None}

    def layer(name: str) -> str | None:
        number = kind_and_layer(name)[1]
        return None if number is None else str(number)

    return ByWeight(grouped(lambda name: kind_and_layer(name)[0]), grouped(layer), grouped(lambda name: name))
