"""The engine: exact gradients of log π with respect to rows, or to projections, of linear weights.

For y = W x in one layer, ∇_W log π_t = Σ_{s ≤ t} δ_s ⊗ x_s with δ_s = ∂ log π_t / ∂ y_s: the sum runs over every
earlier position, the prompt's too, because later attention carries the weight's effect at s to t. So a zero tensor is
added to y, log π_t is differentiated with respect to it, and the result is multiplied with the saved inputs. The zero
enters through a few rows of y (weight rows), or through a matrix P of random signs (projected weights: its gradient is
then P δ). No weight gradient is formed, and nothing below the lowest target has a graph.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..model.batches import Budget, is_out_of_memory, pad_right, run_in_batches
from ..model.decoder import decoder_hidden, head_logits, layer_list, positions_per_head_block
from ..model.placement import input_device, is_spread
from .chosen import Chosen
from .suffix import Forward, Reach, leaner, running
from .targets import AnyTarget, ProjectedTarget, Target, Weight, full_name, linears_of, signs

CANT_BE_THINNED = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)
"""What a block raises that takes or returns something else than one tensor."""


@dataclass
class _RowTap:
    """A linear map whose chosen output rows get a zero added; its inputs are kept as they are."""

    linear: nn.Module
    rows: list[int]
    inputs: torch.Tensor | None = None  # [batch, length, in]
    zero: torch.Tensor | None = None  # [batch, length, rows]

    def hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self.inputs = args[0].detach().to(output.device)  # elsewhere only where weights are spread over devices
        self.zero = output.new_zeros(*output.shape[:-1], len(self.rows), requires_grad=True)
        return output.index_add(-1, torch.tensor(self.rows, device=output.device), self.zero)


@dataclass
class _ProjectedTap:
    """A linear map all of whose outputs get P applied to a zero added; of its inputs Q x is kept."""

    linear: nn.Module
    out_signs: np.ndarray  # P, [K, out]
    in_signs: np.ndarray  # Q, [L, in]
    inputs: torch.Tensor | None = None  # [batch, length, L]
    zero: torch.Tensor | None = None  # [batch, length, K]
    _moved: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(output.dtype, torch.float32)
        key = (output.device, dtype)
        if key not in self._moved:
            self._moved[key] = tuple(
                torch.from_numpy(signs).to(output.device, dtype) for signs in (self.out_signs, self.in_signs)
            )
        out_signs, in_signs = self._moved[key]
        self.inputs = args[0].detach().to(output.device, dtype) @ in_signs.T
        self.zero = torch.zeros(
            *output.shape[:-1], len(out_signs), dtype=dtype, device=output.device, requires_grad=True
        )
        return output + (self.zero @ out_signs).to(output.dtype)


_Tap = _RowTap | _ProjectedTap


@dataclass(frozen=True)
class _Tokens:
    """The chosen tokens of a batch: `at[b, j]` in the sequence for the j-th of rollout b, where `pass_[b, j]` ≥ 0.

    The backward pass that a token belongs to serves all tokens whose gradients are summed with its own.
    """

    at: torch.Tensor  # [batch, tokens] int64, 0 at padding
    ids: torch.Tensor  # [batch, tokens] the token whose log π is differentiated
    pass_: torch.Tensor  # [batch, tokens] int64, -1 at padding

    @staticmethod
    def of(at: list[list[int]], ids: list[list[int]], passes: list[list[int]], device: torch.device) -> "_Tokens":
        one_more = [[k + 1 for k in of_rollout] for of_rollout in passes]  # padding becomes -1
        return _Tokens(pad_right(at, device), pad_right(ids, device), pad_right(one_more, device) - 1)

    def to(self, device: torch.device) -> "_Tokens":
        """The same on another device."""
        return _Tokens(self.at.to(device), self.ids.to(device), self.pass_.to(device))

    @property
    def real(self) -> torch.Tensor:
        """[batch, tokens] False at padding."""
        return self.pass_ >= 0

    @property
    def rollouts(self) -> torch.Tensor:
        """[n] which rollout of the batch each real token is of, rollout by rollout."""
        return self.real.nonzero()[:, 0]


@dataclass
class GradientEngine:
    """Differentiates log π with respect to `targets`, many rollouts at a time.

    Args:
        model: a frozen causal language model in eval mode.
        targets: weight rows, or projected weights, one or several.
        gradients_per_item: after so many single tokens a rollout is run again, see `work_items`.

    Raises:
        InputError: a layer, weight or row that the model does not have.
    """

    model: nn.Module
    targets: list[AnyTarget]
    gradients_per_item: int = 10
    _taps: dict[Weight, _Tap] = field(init=False)
    _can_thin: bool | None = field(init=False, default=None)
    _reach: Reach = field(init=False, default_factory=Reach)
    _leaner: dict[nn.Module, Forward] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._taps = {}
        for weight, linear in linears_of(self.model, self.targets).items():
            projections = [t.projection for t in self.targets if isinstance(t, ProjectedTarget)]
            if projections:
                name = full_name(self.model, weight)
                self._taps[weight] = _ProjectedTap(linear, *signs(projections[0], name, linear))
            else:
                rows = [t.row_idx for t in self.targets if (t.layer, t.suffix) == weight]
                self._taps[weight] = _RowTap(linear, rows)

    def batches(
        self,
        prompts: list[list[int]],
        responses: list[list[int]],
        chosen: Sequence[Chosen | np.ndarray],
        batch_tokens: int | Budget,
        done: Collection[int] = (),
    ) -> Iterator[tuple[np.ndarray, np.ndarray, list[torch.Tensor]]]:
        """Differentiate log π at the chosen tokens of each rollout, rollouts of similar length together.

        Args:
            prompts, responses: token ids of each rollout.
            chosen: for each rollout, which response tokens, and which of them are summed; an array: each by itself.
            batch_tokens: padded tokens in one forward pass; memory grows with it.
            done: numbers of the `work_items` of an earlier call's first batches, to be left out.

        Yields:
            For one batch, whole work items, (rollout [n], k [n], gradients): gradient i is the k[i]-th of rollout[i];
            one [n, dim] tensor per target, float32 (float64 under a float64 model).
        """
        chosen = [of if isinstance(of, Chosen) else Chosen.each(of) for of in chosen]
        items = self.work_items(chosen)
        if not items:
            return
        parts = [chosen[i].part(ks) for i, ks in items]
        # Tokens behind an item's last position contribute nothing.
        inputs = [
            (prompts[i] + responses[i])[: len(prompts[i]) + int(part.positions[-1])]
            for (i, _), part in zip(items, parts, strict=True)
        ]
        # log π of the token at index q of a sequence comes out of index q - 1.
        places = [(i, part.positions.tolist()) for (i, _), part in zip(items, parts, strict=True)]
        where = [[len(prompts[i]) + p - 1 for p in positions] for i, positions in places]
        token_ids = [[responses[i][p] for p in positions] for i, positions in places]
        rollout_of_item = np.array([i for i, _ in items])
        first_k_of_item = np.array([ks.start for _, ks in items])

        def run(batch: list[int]) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
            return self._batch(
                [inputs[j] for j in batch],
                [where[j] for j in batch],
                [token_ids[j] for j in batch],
                [parts[j].gradient.tolist() for j in batch],
            )

        for batch, (members, passes, gradients) in run_in_batches([len(x) for x in inputs], batch_tokens, run, done):
            item = np.array(batch)[members]
            yield rollout_of_item[item], first_k_of_item[item] + passes, gradients

    def work_items(self, chosen: list[Chosen]) -> list[tuple[int, range]]:
        """(rollout, which of its gradients) of every batch's parts: early tokens apart from late ones.

        A backward pass runs over the whole input, so a rollout is run again, cut short, for its early tokens; where
        tokens from anywhere are summed that would save nothing.
        """
        items = []
        for i, of_rollout in enumerate(chosen):
            n = of_rollout.n_gradients
            n_items = -(-n // self.gradients_per_item) if of_rollout.are_single else min(n, 1)
            cuts = np.linspace(0, n, n_items + 1).astype(int).tolist() if n_items else [0]
            items += [(i, range(start, stop)) for start, stop in itertools.pairwise(cuts)]
        return items

    def _batch(
        self, inputs: list[list[int]], where: list[list[int]], token_ids: list[list[int]], passes: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
        """One forward pass; then backward pass k serves the k-th gradient of every rollout in the batch."""
        device = input_device(self.model)
        input_ids = pad_right(inputs, device)
        tokens = _Tokens.of(where, token_ids, passes, device)
        self._reach.shape = input_ids.shape
        with _hooked(self._taps.values()), self._lean(), self._thinned(input_ids, tokens):
            hidden = decoder_hidden(self.model, input_ids)  # [batch, length, hidden]
        head_gradients = self._head_gradients(hidden.detach(), tokens)
        zeros = [tap.zero for tap in self._taps.values()]
        members_of_pass: list[torch.Tensor] = []
        gradients: list[list[torch.Tensor]] = [[] for _ in self.targets]
        n_passes = 1 + max(max(of_rollout) for of_rollout in passes)
        for k in range(n_passes):
            is_served = tokens.pass_ == k  # [batch, tokens]
            self._reach.n = int(tokens.at[is_served].max()) + 1
            upstream = torch.zeros_like(hidden)
            upstream[is_served.nonzero()[:, 0], tokens.at[is_served]] = head_gradients[is_served]
            deltas = torch.autograd.grad(hidden, zeros, upstream, retain_graph=k + 1 < n_passes)
            members = is_served.any(dim=1).nonzero()[:, 0]
            members_of_pass.append(members.cpu())
            for collected, gradient in zip(gradients, self._gradients(deltas), strict=True):
                collected.append(gradient[members.to(gradient.device)])
        for tap in self._taps.values():
            tap.inputs = tap.zero = None
        pass_of = np.repeat(np.arange(n_passes), [len(members) for members in members_of_pass])
        return torch.cat(members_of_pass).numpy(), pass_of, [torch.cat(collected) for collected in gradients]

    def _head_gradients(self, hidden: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
        """∂ log π_t / ∂ (last hidden state at t) of every chosen token, once through the vocabulary.

        Returns:
            [batch, most tokens, hidden]; zeros where a rollout has fewer.
        """
        states = hidden[tokens.rollouts, tokens.at[tokens.real]]  # [n, hidden]
        token_ids = tokens.ids[tokens.real]
        step = positions_per_head_block(self.model)
        blocks = []
        for start in range(0, len(states), step):
            leaf = states[start : start + step].requires_grad_()
            log_probs = torch.log_softmax(head_logits(self.model, leaf), dim=-1)
            picked = log_probs.gather(-1, token_ids[start : start + step, None])
            blocks.append(torch.autograd.grad(picked.sum(), leaf)[0])
        gradients = hidden.new_zeros(*tokens.real.shape, hidden.shape[-1])
        gradients[tokens.real] = torch.cat(blocks)
        return gradients

    @contextmanager
    def _lean(self) -> Iterator[None]:
        """Run what is above the targets by forwards that make the backward pass cheaper, see `suffix`."""
        if self._leaner is None:
            blocks = layer_list(self.model)[1][min(layer for layer, _ in self._taps) :]
            tapped = {tap.linear for tap in self._taps.values()}
            self._leaner = {} if is_spread(self.model) else leaner(list(blocks), tapped, self._reach)
        with running(self._leaner):
            yield

    @contextmanager
    def _thinned(self, input_ids: torch.Tensor, tokens: _Tokens) -> Iterator[None]:
        """Run the last layer's feed-forward block at the chosen tokens only.

        Nothing else reads its output, and it takes each position by itself, so the other positions' share of every
        backward pass would be spent on zeros. Whether a model keeps to this is tried out on the first batch.
        """
        block = getattr(layer_list(self.model)[1][-1], "mlp", None)
        if self._can_thin is None:
            self._can_thin = block is not None and self._thinning_changes_nothing(block, input_ids, tokens)
        with _at_tokens(block, tokens) if self._can_thin else nullcontext():
            yield

    def _thinning_changes_nothing(self, block: nn.Module, input_ids: torch.Tensor, tokens: _Tokens) -> bool:
        at = (tokens.rollouts, tokens.at[tokens.real])
        with torch.no_grad():
            expected = decoder_hidden(self.model, input_ids)[at]
            try:
                with _at_tokens(block, tokens):
                    found = decoder_hidden(self.model, input_ids)[at]
            except CANT_BE_THINNED as error:
                if is_out_of_memory(error):
                    raise  # the batch is halved, and thinning tried again
                return False
        tolerance = 20 * torch.finfo(expected.dtype).eps  # rounding; a block that mixes positions is off by far more
        return bool((found - expected).norm() <= tolerance * expected.norm())

    def _gradients(self, deltas: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Σ_s δ_s ⊗ x_s for every target: [batch, dim] each."""
        of_weight = {}
        for (weight, tap), delta in zip(self._taps.items(), deltas, strict=True):
            dtype = torch.promote_types(delta.dtype, torch.float32)
            of_weight[weight] = delta.to(dtype).transpose(1, 2) @ tap.inputs.to(dtype)  # [batch, rows or K, in or L]
        found = []
        for target in self.targets:
            if isinstance(target, Target):
                weight = (target.layer, target.suffix)
                found.append(of_weight[weight][:, self._taps[weight].rows.index(target.row_idx)])
            else:
                first = of_weight[target.weights[0]].device
                found.append(torch.cat([of_weight[w].flatten(1).to(first) for w in target.weights], dim=1))
        return found


@contextmanager
def _hooked(taps: Iterable[_Tap]) -> Iterator[None]:
    handles = [tap.linear.register_forward_hook(tap.hook) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _at_tokens(block: nn.Module, tokens: _Tokens) -> Iterator[None]:
    """`block` sees, of its [batch, length, hidden] input, the chosen tokens; its output is 0 at the others."""
    length = 0

    def gather(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal length
        length = args[0].shape[1]
        rollouts = torch.arange(len(tokens.at), device=args[0].device)[:, None]
        return (args[0][rollouts, tokens.at.to(args[0].device)], *args[1:])

    def scatter(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        full = output.new_zeros(len(output), length, output.shape[-1])
        here = tokens.to(output.device)
        return full.index_put((here.rollouts, here.at[here.real]), output[here.real])

    handles = [block.register_forward_pre_hook(gather), block.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
