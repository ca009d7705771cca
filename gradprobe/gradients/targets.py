"""Which rows of which weights: targets by name, found in a model's module tree."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from ..common.errors import raise_if_any
from ..model.decoder import layer_list, linear_weights, n_inputs, n_output_rows

MOST_DIGITS = 10
"""Of a layer's or row's number on the command line; Python refuses to read thousands."""


@dataclass(frozen=True)
class Target:
    """One row of one weight: `suffix` names the weight inside layer `layer`."""

    layer: int
    suffix: str
    row_idx: int

    @property
    def directory(self) -> str:
        """The name of this target's dump among those of several targets."""
        return f"L{self.layer}.{self.suffix}.r{self.row_idx}"


def expand_targets(
    model: nn.Module, layers: str | None, suffixes: str, rows: str, seed: int
) -> tuple[list[Target], list[int]]:
    """Every combination of the layers, weights and rows that comma-separated lists name.

    Args:
        model: gives the number of layers and rows; its weights are not looked at (the meta device will do).
        layers: e.g. `7,14,21`; None is the middle one.
        suffixes: e.g. `mlp.down_proj.weight`.
        rows: numbers, `first`, `mid`, `last` and `random:K` (K rows of each weight, drawn with `seed`).

    Returns:
        The targets and the length of each one's gradient.

    Raises:
        InputError: a word that is none of these, a layer, weight or row the model does not have, or a target
            named twice; all problems are named.
    """
    n_layers = len(layer_list(model)[1])
    problems: list[str] = []
    targets: list[Target] = []
    for layer in [n_layers // 2] if layers is None else _integers(layers, "`layer`", problems):
        for suffix in suffixes.split(","):
            linear = _find_linear(model, layer, suffix, problems)
            if linear is not None:
                targets += [
                    Target(layer, suffix, row) for row in _expand_rows(rows, n_output_rows(linear), seed, problems)
                ]
    problems += [f"{t.directory}: this target is named twice" for t in set(targets) if targets.count(t) > 1]
    raise_if_any(dict.fromkeys(problems))
    layer_modules = layer_list(model)[1]
    return targets, [n_inputs(linear_weights(layer_modules[t.layer])[t.suffix]) for t in targets]


def _integers(words: str, name: str, problems: list[str]) -> list[int]:
    numbers = []
    for word in words.split(","):
        if word.strip().isdecimal() and len(word) < MOST_DIGITS:
            numbers.append(int(word))
        else:
            problems.append(f"{name} {words}: '{word}' is not a number from 0")
    return numbers


def _expand_rows(words: str, n_rows: int, seed: int, problems: list[str]) -> list[int]:
    named = {"first": 0, "mid": n_rows // 2, "last": n_rows - 1}
    rows: list[int] = []
    for word in words.split(","):
        kind, _, count = word.partition(":")
        if kind == "random" and count.isdecimal() and len(count) < MOST_DIGITS and 0 < int(count) <= n_rows:
            rows += sorted(np.random.default_rng(seed).choice(n_rows, int(count), replace=False).tolist())
        elif word in named:
            rows.append(named[word])
        elif word.strip().isdecimal() and len(word) < MOST_DIGITS and int(word) < n_rows:
            rows.append(int(word))
        else:
            problems.append(
                f"`row_idx` {words}: '{word}' is not one of 0 to {n_rows - 1}, first, mid, last or random:K"
            )
    return rows


def _find_linear(model: nn.Module, layer: int, suffix: str, problems: list[str]) -> nn.Module | None:
    layers = layer_list(model)[1]
    if not 0 <= layer < len(layers):
        problems.append(f"`layer` {layer}: the model has layers 0 to {len(layers) - 1}")
        return None
    available = linear_weights(layers[layer])
    if suffix not in available:
        problems.append(f"`param_suffix` {suffix}: can't be a target; these can: {', '.join(available)}")
    return available.get(suffix)


def resolve(model: nn.Module, targets: list[Target]) -> dict[tuple[int, str], tuple[nn.Module, list[int]]]:
    """The linear map and the rows of each distinct weight among `targets`, in the order of first mention."""
    problems: list[str] = [] if targets else ["no target row is asked for"]
    weights: dict[tuple[int, str], tuple[nn.Module, list[int]]] = {}
    for target in targets:
        linear = _find_linear(model, target.layer, target.suffix, problems)
        if linear is None:
            continue
        if not 0 <= target.row_idx < n_output_rows(linear):
            problems.append(f"`row_idx` {target.row_idx}: {target.suffix} has rows 0 to {n_output_rows(linear) - 1}")
        weights.setdefault((target.layer, target.suffix), (linear, []))[1].append(target.row_idx)
    raise_if_any(dict.fromkeys(problems))
    return weights
