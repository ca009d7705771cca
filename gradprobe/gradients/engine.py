"""The engine: exact gradients of log π_t with respect to single rows of linear weights.

For y = W x in one layer, ∇_{W[row, :]} log π_t = Σ_{s ≤ t} δ_s x_s with δ_s = ∂ log π_t / ∂ y_{s, row}: the sum
runs over every earlier position, the prompt's too, because later attention carries the weight's effect at s to
t. So a zero tensor is added to the row's output, log π_t is differentiated with respect to it, and the result is
multiplied with the saved inputs. No weight gradient is formed, and nothing below the target has a graph.
"""

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..model.batches import Budget, pad_right, run_in_batches
from ..model.decoder import (
    decoder_hidden,
    head_logits,
    layer_list,
    n_inputs,
    positions_per_head_block,
)
from ..model.placement import input_device
from .targets import Target, resolve


@dataclass
class _Tap:
    """A linear map under observation: its input, and the zero added to some rows of its output."""

    linear: nn.Module
    rows: list[int]
    inputs: torch.Tensor | None = None  # [batch, length, in]
    zero: torch.Tensor | None = None  # [batch, length, rows]

    def hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self.inputs = args[0].detach().to(output.device)  # elsewhere only where weights are spread over devices
        self.zero = output.new_zeros(*output.shape[:-1], len(self.rows), requires_grad=True)
        return output.index_add(-1, torch.tensor(self.rows, device=output.device), self.zero)


@dataclass(frozen=True)
class _Chosen:
    """The chosen positions of a batch: `at[b, k]` in the sequence for the k-th of rollout b, where `real[b, k]`."""

    at: torch.Tensor  # [batch, passes] int64, 0 where not real
    real: torch.Tensor  # [batch, passes] bool
    token_ids: torch.Tensor  # [batch, passes] the token whose log π is differentiated

    @staticmethod
    def of(where: list[list[int]], token_ids: list[list[int]], device: torch.device) -> "_Chosen":
        n_passes = max(len(w) for w in where)
        real = torch.arange(n_passes) < torch.tensor([len(w) for w in where])[:, None]
        return _Chosen(pad_right(where, device), real.to(device), pad_right(token_ids, device))

    def to(self, device: torch.device) -> "_Chosen":
        """The same on another device."""
        return _Chosen(self.at.to(device), self.real.to(device), self.token_ids.to(device))

    @property
    def rows(self) -> torch.Tensor:
        """[n] which rollout of the batch each real position is of, rollout by rollout."""
        return self.real.nonzero()[:, 0]


@dataclass
class RowGradients:
    """Differentiates log π_t on the rows of `targets`, many rollouts at a time.

    Args:
        model: a frozen causal language model in eval mode.
        targets: one or several rows; of one or several weights.
        positions_per_item: after so many positions a rollout is run again, see `work_items`.

    Raises:
        InputError: a layer, weight or row that the model does not have.
    """

    model: nn.Module
    targets: list[Target]
    positions_per_item: int = 10
    _taps: dict[tuple[int, str], _Tap] = field(init=False)
    _can_thin: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._taps = {key: _Tap(linear, rows) for key, (linear, rows) in resolve(self.model, self.targets).items()}

    @property
    def row_dims(self) -> list[int]:
        """The length of each target's gradient."""
        return [n_inputs(self._taps[t.layer, t.suffix].linear) for t in self.targets]

    def weight_name(self, target: Target) -> str:
        """The full name of a target's weight, e.g. `model.layers.14.mlp.down_proj.weight`."""
        return f"{layer_list(self.model)[0]}.{target.layer}.{target.suffix}"

    def batches(
        self,
        prompts: list[list[int]],
        responses: list[list[int]],
        positions: list[np.ndarray],
        batch_tokens: int | Budget,
        done: Collection[int] = (),
    ) -> Iterator[tuple[np.ndarray, np.ndarray, list[torch.Tensor]]]:
        """Differentiate log π at `positions` of each rollout, rollouts of similar length together.

        Args:
            prompts, responses: token ids of each rollout.
            positions: for each rollout, ascending, which response tokens, counted from 0.
            batch_tokens: padded tokens in one forward pass; memory grows with it.
            done: numbers of the `work_items` of an earlier call's first batches, to be left out.

        Yields:
            For one batch, whole work items, (rollout [n], k [n], rows): row i is the gradient at
            `positions[rollout[i]][k[i]]`; `rows` has one [n, in] tensor per target, float32 (float64 under a float64
            model).
        """
        items = self.work_items(positions)
        if not items:
            return
        # Tokens behind an item's last position contribute nothing.
        inputs = [(prompts[i] + responses[i])[: len(prompts[i]) + int(positions[i][ks.stop - 1])] for i, ks in items]
        # log π of the token at index q of a sequence comes out of index q - 1.
        where = [[len(prompts[i]) + int(positions[i][k]) - 1 for k in ks] for i, ks in items]
        token_ids = [[responses[i][positions[i][k]] for k in ks] for i, ks in items]
        rollout_of_item = np.array([i for i, _ in items])
        first_k_of_item = np.array([ks.start for _, ks in items])

        def run(batch: list[int]) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
            return self._batch([inputs[j] for j in batch], [where[j] for j in batch], [token_ids[j] for j in batch])

        for batch, (members, passes, rows) in run_in_batches([len(x) for x in inputs], batch_tokens, run, done):
            item = np.array(batch)[members]
            yield rollout_of_item[item], first_k_of_item[item] + passes, rows

    def work_items(self, positions: list[np.ndarray]) -> list[tuple[int, range]]:
        """(rollout, which of its positions) of every batch's parts: early positions apart from late ones.

        A backward pass runs over the whole input, so a rollout is run again, cut short, for its early positions.
        """
        items = []
        for i, wanted in enumerate(positions):
            n_items = -(-len(wanted) // self.positions_per_item)
            cuts = np.linspace(0, len(wanted), n_items + 1).astype(int).tolist() if n_items else [0]
            items += [(i, range(start, stop)) for start, stop in itertools.pairwise(cuts)]
        return items

    def _batch(
        self, inputs: list[list[int]], where: list[list[int]], token_ids: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
        """One forward pass; then backward pass k serves the k-th position of every rollout in the batch."""
        device = input_device(self.model)
        input_ids = pad_right(inputs, device)
        chosen = _Chosen.of(where, token_ids, device)
        with _hooked(self._taps.values()), self._thinned(input_ids, chosen):
            hidden = decoder_hidden(self.model, input_ids)  # [batch, length, hidden]
        head_gradients = self._head_gradients(hidden.detach(), chosen)
        zeros = [tap.zero for tap in self._taps.values()]
        members_of_pass: list[torch.Tensor] = []
        rows: list[list[torch.Tensor]] = [[] for _ in self.targets]
        n_passes = chosen.real.shape[1]
        for k in range(n_passes):
            members = chosen.real[:, k].nonzero()[:, 0]
            upstream = torch.zeros_like(hidden)
            upstream[members, chosen.at[members, k]] = head_gradients[members, k]
            deltas = torch.autograd.grad(hidden, zeros, upstream, retain_graph=k + 1 < n_passes)
            members_of_pass.append(members.cpu())
            for collected, row in zip(rows, self._rows(deltas), strict=True):
                collected.append(row[members.to(row.device)])
        for tap in self._taps.values():
            tap.inputs = tap.zero = None
        passes = np.repeat(np.arange(n_passes), [len(members) for members in members_of_pass])
        return torch.cat(members_of_pass).numpy(), passes, [torch.cat(collected) for collected in rows]

    def _head_gradients(self, hidden: torch.Tensor, chosen: _Chosen) -> torch.Tensor:
        """∂ log π_t / ∂ (last hidden state at t) of every chosen position, once through the vocabulary.

        Returns:
            [batch, most positions, hidden]; zeros where a rollout has fewer positions.
        """
        states = hidden[chosen.rows, chosen.at[chosen.real]]  # [n, hidden]
        token_ids = chosen.token_ids[chosen.real]
        step = positions_per_head_block(self.model)
        blocks = []
        for start in range(0, len(states), step):
            leaf = states[start : start + step].requires_grad_()
            log_probs = torch.log_softmax(head_logits(self.model, leaf), dim=-1)
            picked = log_probs.gather(-1, token_ids[start : start + step, None])
            blocks.append(torch.autograd.grad(picked.sum(), leaf)[0])
        gradients = hidden.new_zeros(*chosen.real.shape, hidden.shape[-1])
        gradients[chosen.real] = torch.cat(blocks)
        return gradients

    @contextmanager
    def _thinned(self, input_ids: torch.Tensor, chosen: _Chosen) -> Iterator[None]:
        """Run the last layer's feed-forward block at the chosen positions only.

        Nothing else reads its output, and it takes each position by itself, so the other positions' share of every
        backward pass would be spent on zeros. Whether a model keeps to this is tried out on the first batch.
        """
        block = getattr(layer_list(self.model)[1][-1], "mlp", None)
        if self._can_thin is None:
            self._can_thin = block is not None and self._thinning_changes_nothing(block, input_ids, chosen)
        with _at_positions(block, chosen) if self._can_thin else nullcontext():
            yield

    def _thinning_changes_nothing(self, block: nn.Module, input_ids: torch.Tensor, chosen: _Chosen) -> bool:
        at = (chosen.rows, chosen.at[chosen.real])
        with torch.no_grad():
            expected = decoder_hidden(self.model, input_ids)[at]
            try:
                with _at_positions(block, chosen):
                    found = decoder_hidden(self.model, input_ids)[at]
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                return False  # the block takes or returns something else than one tensor
        tolerance = 20 * torch.finfo(expected.dtype).eps  # rounding; a block that mixes positions is off by far more
        return bool((found - expected).norm() <= tolerance * expected.norm())

    def _rows(self, deltas: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Σ_s δ_s x_s for every target: [batch, in] each."""
        of_tap = {}
        for key, tap, delta in zip(self._taps, self._taps.values(), deltas, strict=True):
            dtype = torch.promote_types(delta.dtype, torch.float32)
            of_tap[key] = delta.to(dtype).transpose(1, 2) @ tap.inputs.to(dtype)  # [batch, rows, in]
        return [of_tap[t.layer, t.suffix][:, self._taps[t.layer, t.suffix].rows.index(t.row_idx)] for t in self.targets]


@contextmanager
def _hooked(taps: Iterator[_Tap]) -> Iterator[None]:
    handles = [tap.linear.register_forward_hook(tap.hook) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _at_positions(block: nn.Module, chosen: _Chosen) -> Iterator[None]:
    """`block` sees, of its [batch, length, hidden] input, the chosen positions; its output is 0 at the others."""
    length = 0

    def gather(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal length
        length = args[0].shape[1]
        members = torch.arange(len(chosen.at), device=args[0].device)[:, None]
        return (args[0][members, chosen.at.to(args[0].device)], *args[1:])

    def scatter(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        full = output.new_zeros(len(output), length, output.shape[-1])
        here = chosen.to(output.device)
        return full.index_put((here.rows, here.at[here.real]), output[here.real])

    handles = [block.register_forward_pre_hook(gather), block.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
