"""What of the model lies above the targets, with a backward pass of less work and the same result.

All weights are frozen, so only gradients of inputs are formed; and log π_t hangs on no position behind t, so a backward
pass need not run over those. Autograd knows neither: it saves what weight gradients would need, goes over memory once
for every operator, and multiplies zeros.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Forward = Callable[[torch.Tensor], torch.Tensor]
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Reach:
    """Which positions a backward pass comes to: the first `n` of a [batch, length, ...] tensor."""

    shape: tuple[int, ...] = ()
    n: int = 0

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, n, ...] of x; x itself where its dimensions are not batch and length."""
        return x[:, : self.n] if self._has(x.shape) else x

    def refill(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The opposite, up to `shape`: zeros at the other positions."""
        return functional.pad(x, (0, 0, 0, shape[1] - self.n)) if self._has(shape) and self.n < shape[1] else x

    def _has(self, shape: torch.Size) -> bool:
        return len(shape) == 3 and shape[:2] == self.shape


def _times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight as one product of matrices: of a tensor that was cut torch would make one for each of the batch."""
    return (x.reshape(-1, x.shape[-1]) @ weight).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """W x + b, x [batch, length, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: nn.Linear, reach: Reach) -> torch.Tensor:
        ctx.weight, ctx.reach = linear.weight, reach
        return functional.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.reach.refill(_times(ctx.reach.cut(upstream), ctx.weight), upstream.shape), None, None


class _GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), x [batch, length, in]; of its inner states two are kept instead of three."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mlp: nn.Module, reach: Reach) -> torch.Tensor:
        up = mlp.up_proj(x)
        gate = mlp.gate_proj(x)
        active = functional.silu(gate)
        ctx.mlp, ctx.reach = mlp, reach
        ctx.save_for_backward(active, torch.ops.aten.silu_backward(up, gate))  # silu(gate), silu'(gate) * up
        return mlp.down_proj(up.mul_(active))

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_up, to_gate = (ctx.reach.cut(saved) for saved in ctx.saved_tensors)
        inner = _times(ctx.reach.cut(upstream), ctx.mlp.down_proj.weight)
        found = _times(inner * to_gate, ctx.mlp.gate_proj.weight) + _times(inner.mul_(to_up), ctx.mlp.up_proj.weight)
        return ctx.reach.refill(found, upstream.shape), None, None


class _RmsNorm(torch.autograd.Function):
    """scale * x / sqrt(mean x² + eps) over the last dimension (Zhang & Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        unit = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(unit, inverse, scale)
        return (unit * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        unit, inverse, scale = ctx.saved_tensors
        found = (upstream * scale).to(inverse.dtype)
        along = torch.linalg.vecdot(found, unit.to(inverse.dtype))[..., None].div_(-unit.shape[-1])
        return found.addcmul_(unit, along).mul_(inverse).to(upstream.dtype), None, None


def leaner(blocks: list[nn.Module], tapped: set[nn.Module], reach: Reach) -> dict[nn.Module, Forward]:
    """For the modules of `blocks` that can do with less in their backward pass, a forward that gives the same.

    Whether a module of the right structure is what it seems, silu and all, is tried out on random numbers.

    Args:
        tapped: modules that are hooked, which a block around them must call.
    """
    found: dict[nn.Module, Forward] = {}
    inside: set[nn.Module] = set()
    for module in (m for block in blocks for m in block.modules()):
        forward = None if module in inside or tapped & set(module.children()) else _leaner(module, reach)
        if forward is not None:
            found[module] = forward
            inside |= set(module.children())
    return found


def _leaner(module: nn.Module, reach: Reach) -> Forward | None:
    if "forward" in vars(module):  # somebody's own, which need not do what the class does
        return None
    if _is_linear(module):
        return lambda x: _Linear.apply(x, module, reach)
    if all(_is_linear(getattr(module, name, None)) for name in GATED):
        on_vectors = lambda x: _GatedMlp.apply(x, module, Reach())  # noqa: E731
        if _agree(module, on_vectors, module.gate_proj.weight):
            return lambda x: _GatedMlp.apply(x, module, reach)
    if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        for scale in (module.weight, 1 + module.weight):
            forward = lambda x, scale=scale: _RmsNorm.apply(x, scale, eps)  # noqa: E731
            if eps is not None and _agree(module, forward, module.weight):
                return forward
    return None


def _is_linear(module: nn.Module | None) -> bool:
    """Whether it is a plain linear map, not one whose weight is packed or which adapters have wrapped."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def _agree(module: nn.Module, forward: Forward, weight: torch.Tensor) -> bool:
    """Whether `forward` does what `module` does to a few random vectors, in both directions, up to rounding."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, weight.shape[-1], generator=rng).to(weight).requires_grad_()
    tolerance = 20 * torch.finfo(x.dtype).eps
    with torch.enable_grad():
        expected, found = module(x), forward(x)
        upstream = torch.randn(expected.shape, generator=rng).to(weight)
        pairs = [(found, expected), tuple(torch.autograd.grad(y, x, upstream)[0] for y in (found, expected))]
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in pairs)


@contextmanager
def running(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Inside, the modules run by these."""
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]  # uncovers the class's
