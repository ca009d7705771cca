"""Whether a model is what sampling, scoring and differentiating take it for, tried out before hours are spent.

No list of architectures can know the next one. So four things are looked at on a few random tokens; gradients, and rows
of a batch against each other, near the end of the model's context, where it takes positions: what it does beyond some
bound shows there without a long sequence.

- the sampler's logits, token by token behind its cache, against a full pass over each rollout alone;
- scores of rollouts side by side, padded on the right, and of rollouts behind a shared prompt, against the same;
- the targets' gradients against autograd's of the untouched model, with respect to the weights themselves;
- autograd's gradient against the model itself: how log π changes when its embeddings move along it. A kernel that
  goes back wrongly, or not at all, shows here alone.

Not looked at: what begins beyond so many tokens in a row (a sliding window longer than these rollouts); of many
weights more than `MOST_WEIGHTS`, spread over kinds and layers, whose gradients lie in memory at once; and in bfloat16,
where log π takes steps of its own, a backward pass that is off by less than half; in mixtures of experts, where it
jumps, any that autograd itself gets wrong.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..common.errors import InputError
from ..gradients.chosen import Chosen
from ..gradients.engine import GradientEngine
from ..gradients.targets import AnyTarget, ProjectedTarget, Target, Weight, full_name, linears_of, signs
from ..model.batches import pad_right
from ..model.decoder import context_length, decoder_hidden, decoder_of, head_logits, n_inputs, n_output_rows
from ..model.past import length_limit
from ..model.placement import input_device, is_spread
from ..model.source import faults_as_input
from ..rollouts.sample import Sampling, rollout_uniforms, sample_responses
from ..rollouts.score import score_responses

MOST_WEIGHTS = 8
MOST_TOKENS = 1000
"""In one pass: more than there are."""
LONG_PROMPT, SHORT_PROMPT, RESPONSE = 9, 6, 3
LONGEST = 16
# What is let pass hangs on the weights' rounding, ε: √ε of logits' spread is 3e-4 in float32 and 0.09 in bfloat16.
GRADIENT_MARGIN = 2
"""So many times as much of a gradient, which passes through more roundings."""
SLOPE_MARGIN = 1.5
"""So many times the fourth root of ε of a slope: 3% and 45%."""
NATS_PER_TOLERANCE = 48
MOST_OF_EMBEDDING = 0.005
"""How far log π is moved: 0.02 and 4 nats each way, well above rounding, but by at most so much of the embeddings'
length, where it still is straight."""
QUANTISED = " (a quantised kernel?): load the model unquantised"
Hooks = dict[nn.Module, Callable[..., torch.Tensor | None]]


@dataclass(frozen=True)
class _Rollout:
    prompt: list[int]
    response: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response


def refuse_unfit(engine: GradientEngine, path: str, is_sampled: bool) -> None:
    """Try the engine's model out.

    Args:
        engine: that will take the gradients.
        path: what its model is called in a refusal.
        is_sampled: by the model itself; else the sampler is left out.
    """
    check = _Check(engine, path)
    with torch.no_grad():
        rollouts = check.sampled(check.random()) if is_sampled else check.random()
        check.scores(rollouts)
        late = _last_start(engine.model)
        with check.shifted(torch.tensor(late)):
            check.gradients(rollouts)
        if late:
            check.neighbours(rollouts[0], late)


class _Check:
    def __init__(self, engine: GradientEngine, path: str) -> None:
        self.engine, self.model, self.path, model = engine, engine.model, path, engine.model
        some, linears = _some(engine.targets), linears_of(model, engine.targets)
        self.linears = {weight: linear for weight, linear in linears.items() if weight in some}
        self.device, self.embedding = input_device(model), model.get_input_embeddings()
        # Also under float64 weights transformers computes norms in float32.
        self.tolerance = max(torch.finfo(model.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
        self.where = ""
        self._alone: dict[tuple[str | int, ...], torch.Tensor] = {}  # logits, by where and of which tokens

    @contextmanager
    def shifted(self, by: torch.Tensor) -> Iterator[None]:
        """Inside, all tokens lie so many positions further on; `by`: [], or [rows, 1]."""

        def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            positions = kwargs.get("position_ids")
            if positions is None:
                ids = args[0] if args else kwargs["input_ids"]
                positions = torch.arange(ids.shape[1], device=ids.device)[None]
            return args, kwargs | {"position_ids": positions + by.to(positions.device)}

        if not by.any():  # as the model is called otherwise
            yield
            return
        handle = self.model.base_model.register_forward_pre_hook(shift, with_kwargs=True)
        self.where = f" at positions from {int(by.max())}"
        try:
            yield
        finally:
            handle.remove()
            self.where = ""

    def random(self) -> list[_Rollout]:
        """A longer rollout and a shorter one."""
        rng, size = np.random.default_rng(0), self.model.config.get_text_config().vocab_size
        lengths = (LONG_PROMPT, RESPONSE), (SHORT_PROMPT, RESPONSE)
        return [_Rollout(*(rng.integers(size, size=n).tolist() for n in of_parts)) for of_parts in lengths]

    def sampled(self, rollouts: list[_Rollout]) -> list[_Rollout]:
        """Other responses, sampled by the model out of the same logits as those of a full pass."""
        steps: list[torch.Tensor] = []  # [rollouts, vocab] each
        handle = self.model.register_forward_hook(lambda module, args, output: steps.append(output.logits[:, -1]))
        try:
            prompts = [rollout.prompt for rollout in rollouts]
            uniforms = lambda p, s: rollout_uniforms(0, p, s, RESPONSE)  # noqa: E731
            batches = list(sample_responses(self.model, prompts, uniforms, Sampling(1, RESPONSE)))
        finally:
            handle.remove()
        responses = [samples[0] for batch in batches for samples in batch]
        rollouts = [replace(r, response=response) for r, response in zip(rollouts, responses, strict=True)]
        if len(steps[0]) == len(rollouts):  # side by side, else one after the other
            found = torch.stack(steps[:RESPONSE], dim=1)
        else:
            found = torch.cat(steps).unflatten(0, (len(rollouts), RESPONSE))
        expected = torch.stack([self._logits(r.tokens)[-RESPONSE:] for r in rollouts])
        self._refuse(
            _share(found, expected),
            self.tolerance,
            "a step behind its cache differs from its full pass, in units of the logits' spread",
            "this tool can't sample from it: take `sampler` openai, or `rollouts`",
        )
        return rollouts

    def scores(self, rollouts: list[_Rollout]) -> None:
        """Log-probs and entropies side by side, some of them behind the same prompt, are those of each alone."""
        parts = [(r, replace(r, response=r.response[:n])) for r in rollouts for n in (RESPONSE, RESPONSE - 1)]
        parts += [
            (r, _Rollout(r.tokens[:n], r.tokens[n:])) for r, n in zip(rollouts, (LONG_PROMPT - 2, 2), strict=True)
        ]
        prompts, responses = [part.prompt for _, part in parts], [part.response for _, part in parts]
        batches = score_responses(self.model, prompts, responses, MOST_TOKENS)
        scores = {i: of_part for batch in batches for i, of_part in batch.items()}
        logits = torch.cat([self._logits(rollout.tokens) for rollout in rollouts]).double()
        spread = float(logits.std(dim=-1).square().mean().sqrt())
        shares = []
        for i, (whole, part) in enumerate(parts):
            predicting = self._logits(whole.tokens)[len(part.prompt) - 1 :][: len(part.response)]
            log_probs = predicting.double().log_softmax(-1).cpu()
            logprobs = log_probs.gather(-1, torch.tensor(part.response)[:, None])[:, 0].numpy()
            entropies = -(log_probs.exp() * log_probs).sum(-1).numpy()
            off = np.concatenate([scores[i].logprobs - logprobs, scores[i].entropies - entropies])
            shares.append(float(np.sqrt(np.mean(off**2))) / spread)
        self._refuse(
            float(np.max(shares)),
            self.tolerance,
            "log-probs of rollouts side by side or behind a shared prompt differ from those of each alone, in units of "
            "the logits' spread",
            "this tool can't score with it",
        )

    def neighbours(self, rollout: _Rollout, late: int) -> None:
        """Rows of a batch at early and late positions are what each is alone."""
        starts, ids = torch.tensor([[0], [late]]), pad_right([rollout.tokens], self.device)
        alone = [self._logits(rollout.tokens)]
        with self.shifted(starts[1]):
            alone.append(self._logits(rollout.tokens))
        with self.shifted(starts):
            together = decoder_hidden(self.model, ids.repeat(2, 1))[:, :-1]
        self._refuse(
            _share(head_logits(self.model, together.flatten(0, 1)), torch.cat(alone)),
            self.tolerance,
            f"in one batch near positions 0 and {late} its logits differ from those alone, in units of their spread",
            "a short rollout changes with the longest beside it",
        )

    def gradients(self, rollouts: list[_Rollout]) -> None:
        """The targets' gradients, of log π of a whole response, are autograd's; and autograd's are the model's."""
        expected = self._reference(rollouts[-1])  # of the shorter, which is padded beside the other
        chosen = [Chosen.pooled(np.zeros(RESPONSE, dtype=int)) for _ in rollouts]
        prompts, responses = [r.prompt for r in rollouts], [r.response for r in rollouts]
        with torch.enable_grad():
            batches = list(self.engine.batches(prompts, responses, chosen, MOST_TOKENS))
        for _, rows, gradients in batches:
            for target, found in zip(self.engine.targets, gradients, strict=True):
                self._compare(target, found[rows.tolist().index(len(rollouts) - 1)], expected)

    def _compare(self, target: AnyTarget, found: torch.Tensor, wholes: dict[Weight, torch.Tensor]) -> None:
        compared = [weight for weight in target.weights if weight in wholes]
        if not compared:
            return
        if isinstance(target, Target):
            whole = wholes[target.weights[0]]
            expected = _wide(whole[target.row_idx])
            usual = torch.linalg.vector_norm(whole, dtype=expected.dtype) / len(whole) ** 0.5
        else:
            part_of = dict(zip(target.weights, found.chunk(len(target.weights)), strict=True))
            parts = [self._projected(target, weight, wholes[weight]) for weight in compared]
            for weight, part in zip(compared, parts, strict=True):
                # However small beside the others: Mamba's `dt_proj.weight` is multiplied with, its map not called.
                lost = float(part.norm()) if not part_of[weight].any() else 0.0
                what = f"{full_name(self.model, weight)} is used without its map, and its gradient lost"
                self._refuse(lost, 0.0, what, "name other weights than all")
            found, expected = torch.cat([part_of[weight] for weight in compared]), torch.cat(parts)
            usual = expected.norm()
        off = (found.to(expected) - expected).norm()
        scale = expected.norm() + 0.1 * usual  # a row of next to no gradient is measured by what rows usually have
        self._refuse(
            float(off / scale if scale > 0 else off),
            GRADIENT_MARGIN * self.tolerance,
            f"the gradient of {target.directory} differs from autograd's",
            "this tool can't differentiate it",
        )

    def _projected(self, target: ProjectedTarget, weight: Weight, whole: torch.Tensor) -> torch.Tensor:
        sides = signs(target.projection, full_name(self.model, weight), self.linears[weight])
        left, right = (torch.from_numpy(side).to(_wide(whole)) for side in sides)
        return (left @ _wide(whole) @ right.T).flatten()

    def _reference(self, rollout: _Rollout) -> dict[Weight, torch.Tensor]:
        """∂ log π of a response with respect to whole weights, [out, in], by autograd.

        Where a weight can't have a gradient (quantised, or elsewhere until it is needed), by its map's inputs and
        outputs.
        """
        with_gradient = {} if is_spread(self.model) else self.linears
        weights = {w: x.weight for w, x in with_gradient.items() if x.weight.is_floating_point()}
        calls: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {
            linear: [] for weight, linear in self.linears.items() if weight not in weights
        }
        leaves: list[torch.Tensor] = []

        def cut(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        def look(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            # A router may give a pair; what only ranks tokens is run without gradients by the model itself.
            is_followed = isinstance(output, torch.Tensor) and torch.is_grad_enabled()
            if is_followed and args[0].requires_grad and not output.requires_grad:
                raise InputError(f"{self._its} a {type(module).__name__} has no backward pass{QUANTISED}")
            if module in calls and output.requires_grad:
                calls[module].append((args[0].detach(), output))

        hooks: Hooks = {module: look for module in self.model.modules() if isinstance(module, nn.Linear | Conv1D)}
        try:
            for weight in weights.values():
                weight.requires_grad_()
            with torch.enable_grad(), faults_as_input(f"{self._its} it has no gradient{QUANTISED}", (RuntimeError,)):
                log_prob = self._log_prob(rollout, {**hooks, self.embedding: cut})
                outputs = [output for of_linear in calls.values() for _, output in of_linear]
                slope, *found = torch.autograd.grad(
                    log_prob.sum(), [*leaves, *weights.values(), *outputs], materialize_grads=True
                )
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        if not _chooses_experts(self.model):
            self._climb(rollout, leaves[0].detach(), slope)
        wholes, deltas = {}, iter(found)
        for weight, linear in self.linears.items():
            if weight in weights:
                gradient = next(deltas)
                wholes[weight] = gradient.T if isinstance(linear, Conv1D) else gradient
            else:
                parts = [_wide(next(deltas)).flatten(0, -2).T @ _wide(x).flatten(0, -2) for x, _ in calls[linear]]
                nothing = torch.zeros(n_output_rows(linear), n_inputs(linear), device=self.device)
                wholes[weight] = sum((part.to(nothing.device) for part in parts), nothing)
        return wholes

    def _climb(self, rollout: _Rollout, embedded: torch.Tensor, slope: torch.Tensor) -> None:
        """A step along its gradient changes log π as the gradient says."""
        nats, steepness = NATS_PER_TOLERANCE * self.tolerance, _wide(slope).norm()
        by = (nats / steepness).minimum(MOST_OF_EMBEDDING * _wide(embedded).norm()) / steepness
        up, down = ((_wide(embedded) + t * _wide(slope)).to(embedded) for t in (by, -by))
        # As far as they are apart once rounded: in bfloat16 much of a small step is lost.
        expected = float((_wide(up) - _wide(down)).mul(_wide(slope)).sum())
        above, below = self._log_prob(rollout, {self.embedding: lambda *_: torch.cat([up, down])}, 2).tolist()
        self._refuse(
            abs(above - below - expected) / max(expected, nats / 6),  # less than that may be rounding
            SLOPE_MARGIN * self.tolerance**0.5,
            "log π moves along autograd's gradient otherwise than that says",
            f"part of it goes back wrongly{QUANTISED}",
        )

    def _log_prob(self, rollout: _Rollout, hooks: Hooks, n: int = 1) -> torch.Tensor:
        """[n] log π of the response, in so many rows of a batch."""
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        try:
            ids = pad_right([rollout.tokens] * n, self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -RESPONSE - 1 : -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits.double().log_softmax(-1).gather(-1, ids[:, -RESPONSE:, None]).sum((1, 2))

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        """[tokens - 1, vocab] of a pass over these alone, made once."""
        key = self.where, *tokens
        if key not in self._alone:
            ids = pad_right([tokens], self.device)
            self._alone[key] = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        return self._alone[key]

    def _refuse(self, found: float, most: float, what: str, remedy: str) -> None:
        if not found <= most:  # NaN too
            raise InputError(f"{self._its} {what}: by {found:.2g}{self.where}, {most:.2g} is let pass; {remedy}")

    @property
    def _its(self) -> str:
        return f"`model_path` {self.path}:"


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far logits are off, as a share of their spread over the vocabulary; both [..., vocab]."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def _chooses_experts(model: nn.Module) -> bool:
    """Whether log π jumps where another expert is chosen, so that no step along a gradient tells of it."""
    counts = [n for name, n in model.config.get_text_config().to_dict().items() if "experts" in name]
    return any(isinstance(n, int) and n > 1 for n in counts)


def _last_start(model: nn.Module) -> int:
    if "position_ids" not in inspect.signature(type(decoder_of(model)).forward).parameters:
        return 0
    ends = [end for end in (context_length(model), (length_limit(model) or (None,))[0]) if end is not None]
    return max(0, min(ends, default=0) - LONGEST)


def _some(targets: Sequence[AnyTarget]) -> set[Weight]:
    """At most `MOST_WEIGHTS` of their weights: every kind of them, spread over the layers."""
    kinds: dict[str, list[Weight]] = {}
    for weight in dict.fromkeys(weight for target in targets for weight in target.weights):
        kinds.setdefault(weight[1], []).append(weight)
    of_kinds = list(kinds.values())[:MOST_WEIGHTS]
    n = MOST_WEIGHTS // len(of_kinds) * len(of_kinds)
    weights = [of_kinds[k % len(of_kinds)] for k in range(n)]
    return {of_kind[k * (len(of_kind) - 1) // max(1, n - 1)] for k, of_kind in enumerate(weights)}
