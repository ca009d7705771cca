"""With respect to what gradients are taken: rows of weights, or weights seen through random signs."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..common.errors import InputError, raise_if_any
from ..model.decoder import layer_list, linear_weights, n_inputs, n_output_rows

ALL, ALL_LINEAR = "all", "all-linear"

Weight = tuple[int, str]
"""A layer's number, and a weight's name inside it."""


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

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weight it is of."""
        return ((self.layer, self.suffix),)

    def row_dim(self, model: nn.Module) -> int:
        """The length of its gradient."""
        return n_inputs(_linear(model, self.weights[0]))

    def described(self, model: nn.Module) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"target": full_name(model, self.weights[0]), "row_idx": self.row_idx}


@dataclass(frozen=True)
class Projection:
    """P (rows × out) and Q (cols × in) of random signs over √rows and √cols, in whose place a weight's gradient stands.

    ∇_W ≈ P ∇_W Qᵀ: inner products keep their expectation over P and Q. Their scatter, relative to the product of the
    two lengths, is at most √((1 + 2/rows)(1 + 2/cols) - 1), 0.52 at 16 × 16, and 1/√(rows · cols) where the gradients
    have nothing in common.
    """

    rows: int
    cols: int
    seed: int

    @staticmethod
    def of(words: str, seed: int) -> "Projection":
        """`16x16` -> 16 rows, 16 columns."""
        found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", words)
        if found is None:
            raise InputError(f"`project` {words}: must be rows x columns of the projection, like 16x16")
        return Projection(int(found[1]), int(found[2]), seed)

    def __str__(self) -> str:
        return f"p{self.rows}x{self.cols}"


@dataclass(frozen=True)
class ProjectedTarget:
    """Whole weights through a projection, side by side in one gradient; `name` is what they are called together."""

    name: str
    weights: tuple[Weight, ...]
    projection: Projection

    @property
    def directory(self) -> str:
        """The name of this target's dump among those of several targets."""
        return f"{self.name}.{self.projection}"

    def row_dim(self, model: nn.Module) -> int:
        """The length of its gradient."""
        return len(self.weights) * self.projection.rows * self.projection.cols

    def left_out(self, model: nn.Module) -> dict[str, Any]:
        """Of all linear maps together: the matrices of their layers that are no linear map's, such as fused experts.

        Norms and biases, vectors all, aside. Nothing where there are none, and of other targets.
        """
        if not self.name.endswith(ALL_LINEAR):
            return {}
        layers = layer_list(model)[1]
        found = {
            f"{n}.{name}": parameter.numel()
            for n in dict.fromkeys(n for n, _ in self.weights)
            for name, parameter in layers[n].named_parameters()
            if parameter.dim() > 1 and (n, name) not in self.weights
        }
        names = list(dict.fromkeys(name.partition(".")[2] for name in found))
        return {"n_parameters": sum(found.values()), "names": names} if found else {}

    def described(self, model: nn.Module) -> dict[str, Any]:
        """What the manifest says of it; `offset` is where a weight's numbers begin in a gradient, row by row of P."""
        size = self.projection.rows * self.projection.cols
        linears = [(full_name(model, weight), _linear(model, weight)) for weight in self.weights]
        weights = [
            {"name": name, "offset": k * size, "rows": n_output_rows(linear), "cols": n_inputs(linear)}
            for k, (name, linear) in enumerate(linears)
        ]
        projection = {"rows": self.projection.rows, "cols": self.projection.cols, "seed": self.projection.seed}
        target = self.name if len(weights) > 1 else weights[0]["name"]
        left_out = {"left_out": found} if (found := self.left_out(model)) else {}
        return {"target": target, "row_idx": None, "projection": {**projection, "weights": weights}, **left_out}


AnyTarget = Target | ProjectedTarget


def signs(projection: Projection, weight: str, linear: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """P, [rows, out], and Q, [cols, in], float32: pure functions of the seed, the weight's full name and the side."""
    sides = (("out", projection.rows, n_output_rows(linear)), ("in", projection.cols, n_inputs(linear)))
    found = []
    for side, n, length in sides:
        digest = hashlib.sha256(f"{projection.seed}\n{weight}\n{side}".encode()).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        found.append((rng.integers(0, 2, (n, length)) * 2 - 1).astype(np.float32) / np.float32(np.sqrt(n)))
    return found[0], found[1]


def full_name(model: nn.Module, weight: Weight) -> str:
    """E.g. `model.layers.14.mlp.down_proj.weight`."""
    return f"{layer_list(model)[0]}.{weight[0]}.{weight[1]}"


def _linear(model: nn.Module, weight: Weight) -> nn.Module:
    return linear_weights(layer_list(model)[1][weight[0]])[weight[1]]


def expand_targets(model: nn.Module, layers: str | None, suffixes: str, rows: str, seed: int) -> list[Target]:
    """Every combination of the layers, weights and rows that comma-separated lists name.

    Args:
        model: gives the number of layers and rows; its weights are not looked at (the meta device will do).
        layers: e.g. `7,14,21`; None is the middle one.
        suffixes: e.g. `mlp.down_proj.weight`.
        rows: numbers, `first`, `mid`, `last` and `random:K` (K rows of each weight, drawn with `seed`).
    """
    if layers == ALL or ALL_LINEAR in suffixes.split(","):
        raise InputError("`layer` all and `param_suffix` all-linear go with `project` only")
    problems: list[str] = []
    targets = [
        Target(*weight, row)
        for weight in _weights_named(model, _layer_numbers(model, layers, problems), suffixes.split(","), problems)
        for row in _expand_rows(rows, n_output_rows(_linear(model, weight)), seed, problems)
    ]
    return _distinct(targets, problems)


def expand_projected(
    model: nn.Module, layers: str | None, suffixes: str, projection: Projection
) -> list[ProjectedTarget]:
    """One target for each weight that layers and suffixes name; `all-linear` is one of all linear weights together.

    Args:
        model, layers, suffixes: as for `expand_targets`; also `all` layers, and the suffix `all-linear`.
        projection: of each weight.
    """
    problems: list[str] = []
    numbers = _layer_numbers(model, layers, problems)
    targets = []
    for suffix in suffixes.split(","):
        if suffix == ALL_LINEAR:
            weights = tuple((n, name) for n in numbers for name in linear_weights(layer_list(model)[1][n]))
            of_layers = "" if layers == ALL else "L" + "+".join(map(str, numbers)) + "."
            targets.append(ProjectedTarget(of_layers + ALL_LINEAR, weights, projection))
        else:
            weights = _weights_named(model, numbers, [suffix], problems)
            targets += [ProjectedTarget(f"L{weight[0]}.{suffix}", (weight,), projection) for weight in weights]
    return _distinct(targets, problems)


def _distinct(targets: list[AnyTarget], problems: list[str]) -> list[Any]:
    twice = [f"{t.directory}: this target is named twice" for t in set(targets) if targets.count(t) > 1]
    raise_if_any(dict.fromkeys(problems + twice))
    return targets


def _layer_numbers(model: nn.Module, words: str | None, problems: list[str]) -> list[int]:
    numbers = list(range(len(layer_list(model)[1])))
    if words is None:
        return [len(numbers) // 2]
    if words == ALL:
        return numbers
    known = {str(number) for number in numbers}
    others = [word for word in words.split(",") if word.strip() not in known]
    problems += [f"`layer` {words}: '{word}' is not one of 0 to {numbers[-1]}" for word in others]
    return [int(word) for word in words.split(",") if word not in others]


def _weights_named(model: nn.Module, layers: list[int], suffixes: list[str], problems: list[str]) -> list[Weight]:
    weights = []
    for layer in layers:
        available = linear_weights(layer_list(model)[1][layer])
        others, known = [suffix for suffix in suffixes if suffix not in available], ", ".join(available)
        problems += [f"`param_suffix` {suffix}: can't be a target; these can: {known}" for suffix in others]
        weights += [(layer, suffix) for suffix in suffixes if suffix in available]
    return weights


def _expand_rows(words: str, n_rows: int, seed: int, problems: list[str]) -> list[int]:
    named = {"first": 0, "mid": n_rows // 2, "last": n_rows - 1}
    rows: list[int] = []
    for word in words.split(","):
        kind, _, count = word.partition(":")
        if kind == "random" and count.isdecimal() and 0 < int(count) <= n_rows:
            rows += sorted(np.random.default_rng(seed).choice(n_rows, int(count), replace=False).tolist())
        elif word in named:
            rows.append(named[word])
        elif word.strip().isdecimal() and int(word) < n_rows:
            rows.append(int(word))
        else:
            known = f"0 to {n_rows - 1}, first, mid, last or random:K"
            problems.append(f"`row_idx` {words}: '{word}' is not one of {known}")
    return rows


def linears_of(model: nn.Module, targets: Sequence[AnyTarget]) -> dict[Weight, nn.Module]:
    """The linear map of each distinct weight among `targets`, in the order of first mention."""
    return {weight: _linear(model, weight) for target in targets for weight in target.weights}
