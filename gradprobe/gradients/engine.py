"""The engine: exact gradients of log π with respect to rows, or to projections, of linear weights.

For y = W x in one layer, ∇_W log π_t = Σ_{s ≤ t} δ_s ⊗ x_s with δ_s = ∂ log π_t / ∂ y_s: the sum runs over every
earlier position, the prompt's too, because later attention carries the weight's effect at s to t. So log π_t is
differentiated with respect to y, of which a few rows (weight rows), or P δ for a matrix P of random signs (projected
weights), are multiplied with the saved inputs. No weight gradient is formed, and nothing is kept of what is below the
lowest target.

Blocks of Llama's kind are run by hand (`blocks`). Any other decoder is run by autograd, with a zero tensor added to y;
where one forward pass calls a map several times, δ ⊗ x is summed over its calls.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..common.errors import InputError
from ..model.batches import Budget, on_device, pad_right, run_in_batches
from ..model.decoder import decoder_hidden, head_logits, n_inputs, positions_per_head_block
from ..model.past import refuse_lengths
from ..model.placement import input_device, is_spread
from ..model.softmax import Softmax
from .blocks import OUTPUT, Block, Pass, Span, blocks_of, rotary_of, run_below
from .chosen import Chosen
from .targets import AnyTarget, ProjectedTarget, Target, Weight, full_name, linears_of, signs

SLACK = 0.15
"""Gradients of a rollout share their rows' length where the shorter ones reach so much less far at most."""


@dataclass(eq=False)
class _RowTap:
    """A linear map of whose outputs some rows are wanted; its inputs are kept as they are, call by call."""

    linear: nn.Module
    wanted: list[int]
    inputs: list[torch.Tensor] = field(default_factory=list)  # [..., in] of every call in a forward pass
    zeros: list[torch.Tensor] = field(default_factory=list)  # [batch, length, rows]
    _rows: torch.Tensor | None = None  # `wanted`, where it was needed last

    @property
    def shape(self) -> tuple[int, int]:
        """Of a gradient."""
        return len(self.wanted), n_inputs(self.linear)

    def keep(self, inputs: torch.Tensor) -> None:
        self.inputs.append(inputs)

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient[..., self._rows_on(gradient.device)]

    def hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self.keep(args[0].detach().to(output.device))  # elsewhere only where weights are spread over devices
        self.zeros.append(output.new_zeros(*output.shape[:-1], len(self.wanted), requires_grad=True))
        return output.index_add(-1, self._rows_on(output.device), self.zeros[-1])

    def _rows_on(self, device: torch.device) -> torch.Tensor:
        if self._rows is None or self._rows.device != device:
            self._rows = on_device(self.wanted, device)
        return self._rows


@dataclass(eq=False)
class _ProjectedTap:
    """A linear map of whose outputs' gradient P δ is wanted; of its inputs Q x is kept."""

    linear: nn.Module
    out_signs: np.ndarray  # P, [K, out]
    in_signs: np.ndarray  # Q, [L, in]
    inputs: list[torch.Tensor] = field(default_factory=list)  # [..., L] of every call in a forward pass
    zeros: list[torch.Tensor] = field(default_factory=list)  # [batch, length, K]
    _moved: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a gradient."""
        return len(self.out_signs), len(self.in_signs)

    def keep(self, inputs: torch.Tensor) -> None:
        _, in_signs = self._signs(inputs)
        self.inputs.append(inputs.to(in_signs.dtype) @ in_signs.T)

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        out_signs, _ = self._signs(gradient)
        return gradient.to(out_signs.dtype) @ out_signs.T

    def hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self.keep(args[0].detach().to(output.device))
        out_signs, _ = self._signs(output)
        self.zeros.append(out_signs.new_zeros(*output.shape[:-1], len(out_signs), requires_grad=True))
        return output + (self.zeros[-1] @ out_signs).to(output.dtype)

    def _signs(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P and Q where `like` is, float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype)
        if key not in self._moved:
            self._moved[key] = tuple(
                torch.from_numpy(signs).to(like.device, dtype, non_blocking=True)
                for signs in (self.out_signs, self.in_signs)
            )
        return self._moved[key]


_Tap = _RowTap | _ProjectedTap


@dataclass(frozen=True)
class _Gradient:
    """Gradient `row` of all, the k-th of a batch's rollout: of the tokens `ids` at places `at` of its sequence."""

    row: int
    rollout: int
    k: int
    at: list[int]
    ids: list[int]

    @property
    def reach(self) -> int:
        """How many tokens of the sequence it passes."""
        return self.at[-1] + 1


@dataclass
class GradientEngine:
    """Differentiates log π with respect to `targets`, many rollouts at a time.

    Args:
        model: a frozen causal language model in eval mode.
        targets: weight rows, or projected weights, one or several.
        by_hand: False leaves every model to autograd.
    """

    model: nn.Module
    targets: list[AnyTarget]
    by_hand: bool = True
    _taps: dict[Weight, _Tap] = field(init=False, default_factory=dict)
    _blocks: list[Block] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        for weight, linear in linears_of(self.model, self.targets).items():
            projections = [t.projection for t in self.targets if isinstance(t, ProjectedTarget)]
            if projections:
                name = full_name(self.model, weight)
                self._taps[weight] = _ProjectedTap(linear, *signs(projections[0], name, linear))
            else:
                rows = [t.row_idx for t in self.targets if (t.layer, t.suffix) == weight]
                self._taps[weight] = _RowTap(linear, rows)
        self._lowest = min(layer for layer, _ in self._taps)
        if self.by_hand and not is_spread(self.model):
            self._blocks = blocks_of(self.model, self._lowest, self._taps)

    def batches(
        self,
        prompts: list[list[int]],
        responses: list[list[int]],
        chosen: Sequence[Chosen | np.ndarray],
        batch_tokens: int | Budget,
        done: Collection[int] = (),
    ) -> Iterator[tuple[list[int], np.ndarray, list[torch.Tensor]]]:
        """Differentiate log π at the chosen tokens of each rollout, rollouts of similar length together.

        Args:
            prompts, responses: token ids of each rollout.
            chosen: for each rollout, which response tokens, and which of them are summed; an array: each by itself.
            batch_tokens: padded tokens in one forward pass, rows in one backward pass; memory grows with it.
            done: rollouts of an earlier call's first batches, to be left out.

        Yields:
            For one batch, (numbers of its rollouts, rows [n], gradients): gradient i is rows[i] of all, counted
            rollout by rollout; one [n, dim] tensor per target, float32 (float64 under a float64 model).
        """
        chosen = [of if isinstance(of, Chosen) else Chosen.each(of) for of in chosen]
        first_rows = list(itertools.accumulate((of.n_gradients for of in chosen), initial=0))
        done = {*done, *(i for i, of in enumerate(chosen) if of.n_gradients == 0)}
        budget = batch_tokens if isinstance(batch_tokens, Budget) else Budget(batch_tokens)
        # Tokens behind the last chosen position contribute nothing; log π of the token at q comes out of q - 1.
        n_used = [len(p) + int(of.positions.max(initial=0)) for p, of in zip(prompts, chosen, strict=True)]
        refuse_lengths(self.model, max(n_used, default=0), "`rollouts`")

        def run(batch: list[int]) -> tuple[list[_Gradient], list[torch.Tensor]]:
            gradients = []
            for number, i in enumerate(batch):
                for k in range(chosen[i].n_gradients):
                    positions = chosen[i].positions[chosen[i].gradient == k].tolist()
                    at, ids = [len(prompts[i]) + p - 1 for p in positions], [responses[i][p] for p in positions]
                    gradients.append(_Gradient(first_rows[i] + k, number, k, at, ids))
            inputs = [(prompts[i] + responses[i])[: n_used[i]] for i in batch]
            if self._blocks is None:
                return self._by_autograd(inputs, gradients)
            return self._by_hand(inputs, gradients, budget.tokens)

        for batch, (found, gradients) in run_in_batches(n_used, budget, run, done):
            yield batch, np.array([gradient.row for gradient in found]), gradients

    # ---- blocks of Llama's kind -----------------------------------------------------------------------------

    @torch.no_grad()
    def _by_hand(
        self, inputs: list[list[int]], gradients: list[_Gradient], most_rows: int
    ) -> tuple[list[_Gradient], list[torch.Tensor]]:
        """One forward pass, then backward passes of so many rows; the gradients come in another order."""
        gradients = sorted(gradients, key=lambda g: (g.rollout, -g.reach))
        input_ids = pad_right(inputs, input_device(self.model))
        padded, kwargs = run_below(self.model, self._lowest, input_ids)
        ends = list(itertools.accumulate(map(len, inputs)))
        sequences = [slice(end - len(x), end) for x, end in zip(inputs, ends, strict=True)]
        at = [sequences[g.rollout].start + place for g in gradients for place in g.at]
        x = torch.cat([padded[i, : len(ids)] for i, ids in enumerate(inputs)])
        rotary, lowest, last = rotary_of(kwargs, sequences), self._blocks[0], self._blocks[-1]
        tape = []
        self._forget()
        for block in self._blocks:
            x, saved = block.forward(x, sequences, rotary, on_device(at, x.device) if block is last else None)
            # Of the lowest block the feed-forward block's output alone may be asked for, which needs nothing of it.
            is_needed = block is not lowest or set(block.taps) != {OUTPUT}
            tape.append((block, saved if is_needed else None))
        ids = on_device([token for g in gradients for token in g.ids], x.device)
        upstream = self._head_gradients(x, ids, self.model.base_model.norm)
        n_before = 0
        found: dict[_Tap, list[torch.Tensor]] = {tap: [] for tap in self._taps.values()}
        for spans, of_pass in _passes(gradients, sequences, most_rows):
            n_tokens = sum(len(g.at) for g in of_pass)
            starts = [span.start + j * span.n for span in spans for j in range(span.k)]
            places = [start + place for start, g in zip(starts, of_pass, strict=True) for place in g.at]
            chosen = Span(0, 1, n_tokens, n_before)
            run = Pass(upstream[n_before : n_before + n_tokens].clone(), spans, chosen, on_device(places, x.device))
            n_before += n_tokens
            for block, saved in reversed(tape):
                deltas = block.backward(run, saved, is_last=block is last)
                if block is lowest:  # below the last of its taps nothing is a target
                    deltas = itertools.islice(deltas, len(block.taps))
                for tap, delta in deltas:
                    found[tap].append(_summed(delta, tap.inputs[0], spans))
        self._forget()
        return gradients, self._of_targets([torch.cat(collected) for collected in found.values()])

    # ---- any decoder ----------------------------------------------------------------------------------------

    def _by_autograd(
        self, inputs: list[list[int]], gradients: list[_Gradient]
    ) -> tuple[list[_Gradient], list[torch.Tensor]]:
        """One forward pass; then backward pass k serves the k-th gradient of every rollout in the batch."""
        gradients = sorted(gradients, key=lambda g: g.k)
        self._forget()
        handles = [tap.linear.register_forward_hook(tap.hook) for tap in self._taps.values()]
        try:
            hidden = decoder_hidden(self.model, pad_right(inputs, input_device(self.model)))  # [batch, length, hidden]
        finally:
            for handle in handles:
                handle.remove()
        rollouts = on_device([g.rollout for g in gradients for _ in g.at], hidden.device)
        at = on_device([place for g in gradients for place in g.at], hidden.device)
        ids = on_device([token for g in gradients for token in g.ids], hidden.device)
        head_gradients = self._head_gradients(hidden.detach()[rollouts, at], ids)
        zeros = [zero for tap in self._taps.values() for zero in tap.zeros]
        n_before = 0
        found: list[list[torch.Tensor]] = [[] for _ in self._taps]
        for k, group in itertools.groupby(gradients, key=lambda g: g.k):
            of_pass = list(group)
            tokens = slice(n_before, n_before + sum(len(g.at) for g in of_pass))
            n_before = tokens.stop
            upstream = torch.zeros_like(hidden)
            upstream[rollouts[tokens], at[tokens]] = head_gradients[tokens]
            again = k < gradients[-1].k
            # A call on which nothing hangs has zeros for its gradient, and so has a map that is not called.
            deltas = iter(torch.autograd.grad(hidden, zeros, upstream, again, materialize_grads=True) if zeros else ())
            members = on_device([g.rollout for g in of_pass], hidden.device)
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            for collected, (weight, tap) in zip(found, self._taps.items(), strict=True):
                total = hidden.new_zeros(len(hidden), *tap.shape, dtype=dtype)
                for inputs, delta in zip(tap.inputs, deltas, strict=False):
                    delta, x = _by_rollout(delta.to(dtype), inputs.to(dtype), hidden, weight)
                    total = total.to(delta.device).baddbmm(delta.transpose(1, 2), x)
                collected.append(total[members.to(total.device)])
        self._forget()
        return gradients, self._of_targets([torch.cat(collected) for collected in found])

    def _forget(self) -> None:
        for tap in self._taps.values():
            tap.inputs.clear()
            tap.zeros.clear()

    def _head_gradients(self, states: torch.Tensor, ids: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """∂ log π / ∂ (what comes out of the decoder, before `norm` if it is given) of every chosen token.

        Args:
            states: [n, hidden].
            ids: [n] the tokens.

        Returns:
            [n, hidden].
        """
        step = positions_per_head_block(self.model)
        blocks = []
        for start in range(0, len(states), step):
            leaf = states[start : start + step].detach().requires_grad_()
            with torch.enable_grad():
                logits = head_logits(self.model, norm(leaf) if norm else leaf)
            upstream = Softmax(logits.detach()).logit_gradient(ids[start : start + step])
            blocks.append(torch.autograd.grad(logits, leaf, upstream)[0])
        return torch.cat(blocks)

    def _of_targets(self, found: list[torch.Tensor]) -> list[torch.Tensor]:
        """[n, dim] for every target, out of [n, rows or K, in or L] for every tap."""
        of_weight = dict(zip(self._taps, found, strict=True))
        of_targets = []
        for target in self.targets:
            if isinstance(target, Target):
                weight = (target.layer, target.suffix)
                of_targets.append(of_weight[weight][:, self._taps[weight].wanted.index(target.row_idx)])
            else:
                first = of_weight[target.weights[0]].device
                of_targets.append(torch.cat([of_weight[w].flatten(1).to(first) for w in target.weights], dim=1))
        return of_targets


def _passes(
    gradients: list[_Gradient], sequences: list[slice], most_rows: int
) -> Iterator[tuple[list[Span], list[_Gradient]]]:
    """Yield gradients that go back together: of one rollout those that reach about as far share a span."""
    spans: list[Span] = []
    n_rows = n_taken = n_given = 0
    while n_taken < len(gradients):
        first = gradients[n_taken]
        n, k = first.reach, 1
        most = max(1, most_rows // n)
        for other in gradients[n_taken + 1 : n_taken + most]:
            if other.rollout != first.rollout or other.reach < (1 - SLACK) * n:
                break
            k += 1
        if spans and n_rows + k * n > most_rows:
            yield spans, gradients[n_given:n_taken]
            spans, n_rows, n_given = [], 0, n_taken
        spans.append(Span(n_rows, k, n, sequences[first.rollout].start))
        n_rows += k * n
        n_taken += k
    yield spans, gradients[n_given:]


def _summed(delta: torch.Tensor, inputs: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """Σ_s δ_s ⊗ x_s of every gradient, [n, rows or K, in or L]."""
    dtype = torch.promote_types(delta.dtype, torch.float32)
    delta, inputs = delta.to(dtype), inputs.to(dtype)
    return torch.cat([span.rows(delta).transpose(1, 2) @ inputs[span.tokens] for span in spans])


def _by_rollout(
    delta: torch.Tensor, inputs: torch.Tensor, hidden: torch.Tensor, weight: Weight
) -> tuple[torch.Tensor, torch.Tensor]:
    """δ and x of a linear map as [batch, places, width] each: of all tokens in order, in whatever shape they came.

    A router's or a shared expert's are [batch · length, width], a latent attention's have heads. The map of one expert
    among others sees some tokens alone, of which nothing tells whose they are.
    """
    n_rows, length = hidden.shape[:2]
    places = [part[..., 0].numel() for part in (delta, inputs)]
    if places[0] != places[1] or places[0] % (n_rows * length):
        raise InputError(
            f"`param_suffix` {weight[1]}: layer {weight[0]} takes {places[1]} tokens of a batch of {n_rows} x {length} "
            f"and gives {places[0]}: it can't be a target"
        )
    return delta.reshape(n_rows, -1, delta.shape[-1]), inputs.reshape(n_rows, -1, inputs.shape[-1])
