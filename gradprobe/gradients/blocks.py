"""Blocks of Llama's kind (Llama, Qwen2, Qwen3, Mistral and others), forward and backward, written out.

Autograd goes back over all that it went forward over. Here many gradients are asked of a rollout, each over the tokens
up to its own position alone. So a batch's tokens lie one behind the other, without padding; in a backward pass every
gradient has rows for the tokens that it reaches and no others; a linear map is one product over all these rows; and
what was saved of a token serves all gradients that pass it. Attention between the linear maps is left to autograd.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional

from ..model.batches import is_out_of_memory, on_device
from ..model.decoder import context_length, decoder_hidden, layer_list, masks_known

DIFFERS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""What running a module of another kind as if it were a block of this one may raise."""
TRIAL_TOKENS = 8
ROTARY_SETTINGS = {
    *("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"),
    *("max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"),
    *("attention_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor"),
}
"""What says how cosine and sine are made, with which blocks are called. Anything else may change attention itself."""
QKV = ("q_proj", "k_proj", "v_proj")
OUTPUT = "mlp.down_proj.weight"
LINEARS = {"self_attn": (*QKV, "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class Tap(Protocol):
    """Wants a linear map's inputs and the gradient of its outputs."""

    def keep(self, inputs: torch.Tensor) -> None:
        """Take the inputs, [tokens, in]."""

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        """[rows, out] -> [rows, wanted], what it wants of the gradient."""


@dataclass(frozen=True)
class Span:
    """Rows `start` to `start` + k n of a backward pass: k gradients, each over n tokens from the batch's `first`."""

    start: int
    k: int
    n: int
    first: int

    @property
    def stop(self) -> int:
        """The first row behind it."""
        return self.start + self.k * self.n

    @property
    def tokens(self) -> slice:
        """The batch's tokens."""
        return slice(self.first, self.first + self.n)

    def rows(self, flat: torch.Tensor) -> torch.Tensor:
        """[k, n, ...] of [rows, ...], a view."""
        return flat[self.start : self.stop].view(self.k, self.n, *flat.shape[1:])


@dataclass
class Pass:
    """A backward pass on its way down.

    Attributes:
        upstream: ∂ log π / ∂ (what the block put out), [rows, hidden]. In the last block, [tokens, hidden]: of those
            tokens whose log π is differentiated, since nothing reads what its feed-forward block does to others.
        spans: what its rows are.
        chosen: these tokens as a span of all chosen ones.
        places: the row of each.
    """

    upstream: torch.Tensor
    spans: list[Span]
    chosen: Span
    places: torch.Tensor

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] of the chosen tokens -> [rows, ...], zeros at the others."""
        return _spread(x, self.places, self.spans[-1].stop)


@dataclass(frozen=True)
class Group:
    """Tokens from `first` on: a prompt of `n_prompt`, then `k` responses of `n` tokens each behind it."""

    first: int
    n_prompt: int
    k: int
    n: int

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, n_prompt, ...] and [k, n, ...] of [tokens, ...], views."""
        behind = self.first + self.n_prompt
        return x[None, self.first : behind], x[behind : behind + self.k * self.n].unflatten(0, (self.k, self.n))


@dataclass
class _Norm:
    """What an RMS norm (Zhang & Sennrich 2019), scale · x / √(mean x² + ε), keeps of x, [tokens, ..., width]."""

    unit: torch.Tensor
    inverse: torch.Tensor  # [tokens, ..., 1] float32 at least
    scale: torch.Tensor  # [width]

    @staticmethod
    def of(x: torch.Tensor, module: nn.Module) -> "_Norm":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(module.variance_epsilon).rsqrt_()[..., None]
        return _Norm((wide * inverse).to(x.dtype), inverse, module.weight)

    @property
    def output(self) -> torch.Tensor:
        """What comes out."""
        return self.unit * self.scale

    def add_backward(self, upstream: torch.Tensor, spans: list[Span], total: torch.Tensor) -> None:
        """Add the gradient of x to `total`, both [rows, ..., width]; `upstream` is used up."""
        upstream *= self.scale
        for span in spans:
            wide = span.rows(upstream).to(self.inverse.dtype)
            unit = self.unit[span.tokens].to(wide.dtype)
            along = torch.linalg.vecdot(wide, unit)[..., None].div_(-unit.shape[-1])
            span.rows(total).addcmul_(wide.addcmul_(unit, along), self.inverse[span.tokens])


@dataclass
class Saved:
    """What going back through a block needs, of all tokens of a batch; of the last block, part of it of some alone."""

    before_attention: _Norm
    of_heads: list[_Norm]  # Qwen3's norms of queries and keys
    qkv: list[torch.Tensor]  # as attention takes them, [tokens, heads, head size] each
    rotary: tuple[torch.Tensor, torch.Tensor]  # cosine and sine, [tokens, 1, head size]
    before_mlp: _Norm
    to_up: torch.Tensor  # silu(gate), [tokens, intermediate]
    to_gate: torch.Tensor  # silu'(gate) · up


class Block:
    """One block x + o(attention(q, k, v of norm x)), then x + down(silu(gate) · up) of norm x.

    Args:
        module: transformers' own, whose weights are used.
    """

    def __init__(self, module: nn.Module) -> None:
        self.taps: dict[str, Tap] = {}  # of its linear maps, by their weights' names
        self._attention, self._mlp = module.self_attn, module.mlp
        self._norms = module.input_layernorm, module.post_attention_layernorm
        self._qkv = [getattr(self._attention, name) for name in QKV]
        self._head_norms = [x for name in ("q_norm", "k_norm") if (x := getattr(self._attention, name, None))]

    def forward(
        self,
        x: torch.Tensor,
        sequences: list[slice],
        rotary: tuple[torch.Tensor, torch.Tensor],
        at: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Saved]:
        """Run it.

        Args:
            x: [tokens, hidden].
            sequences: which tokens belong together.
            rotary: cosine and sine of every token's position, [tokens, 1, head size].
            at: behind attention, run these tokens alone.

        Returns:
            [tokens, hidden], and what going back needs.
        """
        n_tokens = len(x)

        def keep(names: Iterable[str], inputs: torch.Tensor, is_thin: bool = False) -> None:
            for tap in [self.taps[f"{name}.weight"] for name in names if f"{name}.weight" in self.taps]:
                tap.keep(_spread(inputs, at, n_tokens) if is_thin else inputs)

        before_attention = _Norm.of(x, self._norms[0])
        y = before_attention.output
        keep([f"self_attn.{name}" for name in QKV], y)
        of_heads, qkv = self._rotated(
            [linear(y).unflatten(-1, (-1, self._attention.head_dim)) for linear in self._qkv], rotary
        )
        y = torch.cat([self._attend([states[None, tokens] for states in qkv])[0] for tokens in sequences])
        is_thin = at is not None
        if is_thin:
            x, y = x[at], y[at]
        keep(["self_attn.o_proj"], y, is_thin)
        x = x + self._attention.o_proj(y)
        before_mlp = _Norm.of(x, self._norms[1])
        y = before_mlp.output
        keep(["mlp.gate_proj", "mlp.up_proj"], y, is_thin)
        up, gate = self._mlp.up_proj(y), self._mlp.gate_proj(y)
        to_up, to_gate = functional.silu(gate), torch.ops.aten.silu_backward(up, gate)
        y = up.mul_(to_up)
        keep(["mlp.down_proj"], y, is_thin)
        return x + self._mlp.down_proj(y), Saved(before_attention, of_heads, qkv, rotary, before_mlp, to_up, to_gate)

    def backward(self, run: Pass, saved: Saved | None, is_last: bool = False) -> Iterator[tuple[Tap, torch.Tensor]]:
        """Take `run.upstream` from this block's output to its input.

        Args:
            saved: None will do for the tap of `OUTPUT` alone.

        Yields:
            On the way each tap with what it wants, [rows, wanted].
        """
        mlp, upstream = self._mlp, run.upstream
        spans = [run.chosen] if is_last else run.spans

        def tapped(name: str, gradient: torch.Tensor, is_thin: bool = is_last) -> Iterator[tuple[Tap, torch.Tensor]]:
            if f"{name}.weight" in self.taps:
                tap = self.taps[f"{name}.weight"]
                yield tap, run.spread(tap.of(gradient)) if is_thin else tap.of(gradient)

        yield from tapped("mlp.down_proj", upstream)
        up = upstream @ mlp.down_proj.weight
        gate = torch.empty_like(up)
        for span in spans:
            torch.mul(span.rows(up), saved.to_gate[span.tokens], out=span.rows(gate))
            span.rows(up).mul_(saved.to_up[span.tokens])
        yield from tapped("mlp.up_proj", up)
        yield from tapped("mlp.gate_proj", gate)
        total = (gate @ mlp.gate_proj.weight).addmm_(up, mlp.up_proj.weight)
        del up, gate
        saved.before_mlp.add_backward(total, spans, upstream)
        yield from tapped("self_attn.o_proj", upstream)
        attended = upstream @ self._attention.o_proj.weight
        if is_last:
            attended, upstream = run.spread(attended), run.spread(upstream)
        qkv = [states.new_empty(len(upstream), *states.shape[1:]) for states in saved.qkv]
        for span in run.spans:
            self._attend_backward(span, saved, attended, [span.rows(x) for x in qkv])
        for i, norm in enumerate(saved.of_heads):
            total = torch.zeros_like(qkv[i])
            norm.add_backward(qkv[i], run.spans, total)
            qkv[i] = total
        qkv = [x.flatten(1) for x in qkv]
        for name, gradient in zip(QKV, qkv, strict=True):
            yield from tapped(f"self_attn.{name}", gradient, is_thin=False)
        of_query, of_key, of_value = (linear.weight for linear in self._qkv)
        total = (qkv[0] @ of_query).addmm_(qkv[1], of_key).addmm_(qkv[2], of_value)
        saved.before_attention.add_backward(total, run.spans, upstream)
        run.upstream = upstream

    def along(
        self, x: torch.Tensor, dx: torch.Tensor, groups: list[Group], rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run it with its derivative, both [tokens, hidden], while the module's parameters are dual numbers."""
        y = _norm_along(self._norms[0], x, dx)
        qkv = [
            tuple(of.unflatten(-1, (-1, self._attention.head_dim)) for of in _linear_along(linear, *y))
            for linear in self._qkv
        ]
        for i, norm in enumerate(self._head_norms):
            qkv[i] = _norm_along(norm, *qkv[i])
        qkv[:2] = [tuple(_rotate(of, rotary) for of in both) for both in qkv[:2]]
        attended = []
        for group in groups:
            parts = [tuple(zip(*map(group.split, both), strict=True)) for both in qkv]
            attended.append(self._attend_along(*(of_prompt for of_prompt, _ in parts)))
            if group.n:
                query, *seen = (behind for _, behind in parts)
                for i, (of_prompt, _) in enumerate(parts[1:]):
                    seen[i] = tuple(
                        torch.cat([before.expand(group.k, -1, -1, -1), own], dim=1)
                        for before, own in zip(of_prompt, seen[i], strict=True)
                    )
                attended.append(self._attend_along(query, *seen))
        y = _linear_along(self._attention.o_proj, *map(torch.cat, zip(*attended, strict=True)))
        x, dx = x + y[0], dx + y[1]
        y = _norm_along(self._norms[1], x, dx)
        (up, dup), (gate, dgate) = (_linear_along(linear, *y) for linear in (self._mlp.up_proj, self._mlp.gate_proj))
        to_up, to_gate = functional.silu(gate), torch.ops.aten.silu_backward(up, gate)
        y = _linear_along(self._mlp.down_proj, up * to_up, dgate.mul_(to_gate).addcmul_(dup, to_up))
        return x + y[0], dx + y[1]

    def _attend_along(self, *qkv: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch * length, q] and its derivative, of the last `length` queries, [batch, length, heads, head size], and
        keys and values, [batch, seen, groups, head size].
        """
        n_groups, length, dtype = qkv[1][0].shape[2], qkv[0][0].shape[1], qkv[0][0].dtype
        # [batch, groups, heads of a group * tokens, head size]
        (query, dquery), (key, dkey), (value, dvalue) = (
            tuple(
                of.to(torch.promote_types(dtype, torch.float32))
                .unflatten(2, (n_groups, -1))
                .permute(0, 2, 3, 1, 4)
                .flatten(2, 3)
                for of in both
            )
            for both in qkv
        )
        query, dquery = query * self._attention.scaling, dquery * self._attention.scaling
        scores = query @ key.mT
        seen = torch.arange(key.shape[2], device=key.device)
        is_hidden = seen > seen[-length:, None]
        scores.unflatten(2, (-1, length)).masked_fill_(is_hidden, -torch.inf)
        weights = scores.softmax(-1)
        change = (torch.cat([dquery, query], dim=-1) @ torch.cat([key, dkey], dim=-1).mT).mul_(weights)
        change.addcmul_(weights, change.sum(-1, keepdim=True), value=-1)
        found = weights @ value, (change @ value).add_(weights @ dvalue)
        return tuple(
            of.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1).to(dtype) for of in found
        )

    def _rotated(
        self, qkv: list[torch.Tensor], rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[list[_Norm], list[torch.Tensor]]:
        """(norms of queries and keys, what attention takes), out of what the linear maps give."""
        of_heads = [_Norm.of(x, norm) for x, norm in zip(qkv, self._head_norms, strict=False)]
        rotated = [_rotate(x, rotary) for x in [norm.output for norm in of_heads] or qkv[:2]]
        return of_heads, [*rotated, qkv[2]]

    def _attend(self, qkv: list[torch.Tensor]) -> torch.Tensor:
        """[batch, length, q] causal attention; of [batch, length, heads, head size] each."""
        query, key, value = (x.transpose(1, 2) for x in qkv)
        shared_by = query.shape[1] // key.shape[1]
        if shared_by > 1 and not query.is_cpu:  # not all of CUDA's kernels share keys among heads
            key, value = (x.repeat_interleave(shared_by, dim=1) for x in (key, value))
            shared_by = 1
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self._attention.scaling, enable_gqa=shared_by > 1
        )
        return attended.transpose(1, 2).flatten(2)

    def _attend_backward(self, span: Span, saved: Saved, upstream: torch.Tensor, into: list[torch.Tensor]) -> None:
        # For each gradient anew: of one graph for all of them autograd would give the sum.
        leaves = [states[span.tokens].expand(span.k, -1, -1, -1).detach().requires_grad_() for states in saved.qkv]
        with torch.enable_grad():
            attended = self._attend(leaves)
        query, key, value = torch.autograd.grad(attended, leaves, span.rows(upstream))
        cos, sin = (x[span.tokens] for x in saved.rotary)
        half = sin.shape[-1] // 2
        for found, rotated_back in ((query, into[0]), (key, into[1])):
            torch.mul(found, cos, out=rotated_back)
            rotated_back[..., :half].addcmul_(found[..., half:], sin[..., half:])
            rotated_back[..., half:].addcmul_(found[..., :half], sin[..., :half], value=-1)
        into[2].copy_(value)


def _linear_along(linear: nn.Module, x: torch.Tensor, dx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, dweight = unpack_dual(linear.weight)
    bias, dbias = (None, None) if linear.bias is None else unpack_dual(linear.bias)
    return functional.linear(x, weight, bias), functional.linear(dx, weight, dbias).addmm_(x, dweight.T)


def _norm_along(module: nn.Module, x: torch.Tensor, dx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norm, (scale, dscale) = _Norm.of(x, module), unpack_dual(module.weight)
    unit, wide = norm.unit.to(norm.inverse.dtype), dx.to(norm.inverse.dtype)
    along = torch.linalg.vecdot(wide, unit)[..., None].div_(-unit.shape[-1])
    change = torch.addcmul(wide, unit, along).mul_(norm.inverse).to(x.dtype)
    return norm.unit * scale, change.mul_(scale).addcmul_(norm.unit, dscale)


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embeddings (Su et al. 2021) in the layout of GPT-NeoX: x cos + (-b, a) sin of the halves (a, b) of x."""
    (cos, sin), (a, b) = rotary, x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _spread(x: torch.Tensor, places: torch.Tensor, n: int) -> torch.Tensor:
    """[n, ...] with the rows of x at `places`, zeros elsewhere."""
    return x.new_zeros(n, *x.shape[1:]).index_copy_(0, places, x)


# ---- what lies below, and whether blocks are of this kind -------------------------------------------------------


class _ReachedError(Exception):
    """The first block that is run by hand has its input."""


def run_below(
    model: nn.Module, layer: int, input_ids: torch.Tensor, **positions: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What `layer` of the decoder is called with: hidden states, [batch, length, hidden], and its other arguments.

    Args:
        positions: `position_ids`, where they don't begin at 0.
    """
    reached: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        reached.append((args[0], kwargs))
        raise _ReachedError

    handle = layer_list(model)[1][layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with masks_known():
            model.base_model(input_ids=input_ids, use_cache=False, **positions)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return reached[0]


def rotary_of(kwargs: dict[str, Any], sequences: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every token's position, [tokens, 1, head size], out of a block's arguments."""
    cos, sin = kwargs["position_embeddings"]
    positions = on_device([p for tokens in sequences for p in range(tokens.stop - tokens.start)], cos.device)
    return cos[0][positions, None], sin[0][positions, None]


@torch.no_grad()
def blocks_of(model: nn.Module, layer: int, taps: dict[tuple[int, str], Tap]) -> list[Block] | None:
    """The decoder's blocks from `layer` on, or None where they, or what follows them, are of another kind.

    Whether blocks that look right are what they seem is tried out on a few tokens, in both directions, at the first
    positions and at the last that the model has.
    """
    modules = list(layer_list(model)[1][layer:])
    if not (_are_known_settings(model.config.get_text_config()) and all(map(_looks_right, modules))):
        return None
    ids = torch.arange(TRIAL_TOKENS, device=model.device)[None]
    starts = {0, max(0, (context_length(model) or 0) - TRIAL_TOKENS)}
    try:
        blocks = [Block(module) for module in modules]
        for start in starts:
            positions = {"position_ids": start + torch.arange(TRIAL_TOKENS, device=model.device)[None]}
            x, kwargs = run_below(model, layer, ids, **positions)
            for block, module in zip(blocks, modules, strict=True):
                x, is_equal = _tried_out(block, module, x, kwargs)
                if not is_equal:
                    return None
            # What follows the blocks knows no positions.
            if start == 0 and not _are_close(model.base_model.norm(x), decoder_hidden(model, ids)):
                return None
    except DIFFERS as error:
        if is_out_of_memory(error):
            raise
        return None
    for (number, name), tap in taps.items():
        blocks[number - layer].taps[name] = tap
    return blocks


def _are_known_settings(config: Any) -> bool:
    """Whether what a config says of attention is no more than what the blocks do."""
    rotary, window = getattr(config, "rope_parameters", None) or {}, getattr(config, "sliding_window", None)
    return config._attn_implementation == "sdpa" and window is None and set(rotary) <= ROTARY_SETTINGS


def _looks_right(module: nn.Module) -> bool:
    """Whether the parts are there, linear maps are plain (not packed, wrapped by adapters, or run by others)."""
    parts = {name: getattr(module, name, None) for name in LINEARS}
    linears = [getattr(parts[part], name, None) for part, names in LINEARS.items() for name in names]
    is_plain = all(type(linear) is nn.Linear and type(linear.weight) is nn.Parameter for linear in linears)
    return is_plain and not any("forward" in vars(part) for part in (module, *parts.values(), *linears))


def _tried_out(block: Block, module: nn.Module, x: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, bool]:
    """(what the module makes of x, [1, tokens, hidden], whether the block does the same and goes back the same)."""
    n = x.shape[1]
    span = Span(0, 1, n, 0)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        expected = module(leaf, **kwargs)
    upstream = torch.randn(n, x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x)
    found, saved = block.forward(x[0], [span.tokens], rotary_of(kwargs, [span.tokens]))
    run = Pass(upstream.clone(), [span], span, torch.arange(n, device=x.device))
    for _ in block.backward(run, saved):
        pass
    (gradient,) = torch.autograd.grad(expected, leaf, upstream[None])
    is_equal = _are_close(found, expected[0]) and _are_close(run.upstream, gradient[0])
    return expected.detach(), is_equal


def _are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # Rounding differs by up to 5 eps in float32 (width 4,096) and 1 in bfloat16: 54 and 3 are let pass.
    return bool((found - expected).norm() <= torch.finfo(expected.dtype).eps ** 0.75 * expected.norm())
