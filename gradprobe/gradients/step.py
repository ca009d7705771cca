"""The step between two checkpoints, and along it the exact derivative of log π of every response token.

    d_t = ⟨∇_θ log π_θ(y_t | prefix), Δ⟩ over all parameters, Δ = θ_to − θ_from

by forward-mode differentiation: parameters become dual numbers θ + ε Δ, and one teacher-forced pass gives d_t of every
token of its batch, at about three times the cost of a plain one and no backward pass (Baydin et al. 2018, sec. 3.1).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.errors import InputError, reason_of
from ..model.batches import Budget, on_device
from ..model.placement import input_device, is_spread
from ..model.softmax import Softmax
from ..rollouts.score import each_token, in_blocks
from .blocks import Block, Group, blocks_of, run_below

ATTENTION = "sdpa's plain product"
"""The one of its kernels that has forward derivatives; what was sampled and scored with another differs by rounding."""


def refuse_other_parameters(model: nn.Module, other: nn.Module, what: str) -> None:
    """Raise `InputError` unless both have the same parameters, by name and shape. `what`: which the other is."""
    here, there = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (model, other))
    for name in here | there:
        if here.get(name) != there.get(name):
            shapes = (f"{name} is {list(of[name])}" if name in of else f"has no {name}" for of in (there, here))
            raise InputError(f"{what}: no step lies between them: it {' and the probed model '.join(shapes)}")


@torch.no_grad()
def subtract(end: nn.Module, start: nn.Module, into: nn.Module) -> dict[str, torch.Tensor]:
    """Δ = end − start by the parameters' names, in the place of the weights of `into`, which is one of both.

    It may be another model of that shape, too. A tensor at a time, so that there is no third model.
    """
    ends, starts, step = (dict(model.named_parameters()) for model in (end, start, into))
    for name, place in step.items():
        wide = torch.promote_types(place.dtype, torch.float32)
        place.copy_(ends[name].to(place.device, wide) - starts[name].to(place.device, wide))
    return step


def described(step: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the manifest says of Δ: how many numbers, how many of them stay as they are, and its length."""
    return {
        "parameters": sum(delta.numel() for delta in step.values()),
        "unchanged": sum(int((delta == 0).sum()) for delta in step.values()),
        "unchanged_tensors": [name for name, delta in step.items() if not delta.any()],
        "norm": float(f"{sum(float(delta.double().square().sum()) for delta in step.values()) ** 0.5:.6g}"),
        "attention": ATTENTION,
    }


def along_step(
    model: nn.Module,
    step: dict[str, torch.Tensor],
    prompts: list[list[int]],
    responses: list[list[int]],
    batch_tokens: int | Budget,
) -> Iterator[dict[int, np.ndarray]]:
    """d_t of every response token, nats.

    Args:
        model: at θ.
        step: Δ by parameter, on the model's device.
        prompts, responses, batch_tokens: as of `score.each_token`.

    Yields:
        For one batch: each response's d_t, [n_tokens] float64, by its index.
    """

    @contextmanager
    def dual() -> Iterator[None]:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _dual_parameters(model, step):
            yield

    try:
        with _attention_with_derivatives(model):
            blocks = None if is_spread(model) else blocks_of(model, 0, {})
            states = None if blocks is None else partial(_states_by_hand, blocks)
            for batch in each_token(model, prompts, responses, batch_tokens, _derivatives, dual, states):
                yield {i: of_response for i, (of_response,) in batch.items()}
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error):
            raise
        whose = f"no step can be taken along: {type(model).__name__} runs a kernel without a forward derivative"
        raise InputError(f"{whose} ({reason_of(error)})") from error


@contextmanager
def _attention_with_derivatives(model: nn.Module) -> Iterator[None]:
    """Inside, sdpa or eager attention; flash attention's kernels have no forward derivatives."""
    before = model.config._attn_implementation
    if before in ("eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _derivatives(model: nn.Module, hidden: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of dual hidden states, [n, hidden]: d_t, [n] float64."""

    def of_logits(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, change = forward_ad.unpack_dual(logits)
        if change is None:  # no parameter that the logits hang on moves
            return (torch.zeros_like(ids, dtype=torch.float64),)
        return (Softmax(value).log_prob_along(ids, change),)

    return in_blocks(model, hidden, token_ids, of_logits)


def _states_by_hand(
    blocks: list[Block], model: nn.Module, prompts: list[list[int]], responses: list[list[int]]
) -> list[torch.Tensor]:
    """The last hidden states, dual ones, that predict each response's tokens, [n_tokens, hidden] each.

    A prompt is run once for all of its responses, which are padded to the longest of them.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(tuple(prompt), []).append(i)
    ids: list[int] = []
    positions: list[int] = []
    groups, predicting = [], {}
    for prompt, of_prompt in members.items():
        n = max(0, *(len(responses[i]) - 1 for i in of_prompt))
        groups.append(Group(len(ids), len(prompt), len(of_prompt), n))
        last = len(ids) + len(prompt) - 1
        ids += prompt
        for i in of_prompt:
            behind = range(len(ids), len(ids) + len(responses[i]) - 1)
            predicting[i] = [last, *behind][: len(responses[i])]
            ids += (responses[i] + (responses[i] or [prompt[-1]])[-1:] * n)[:n]
        positions += [*range(len(prompt)), *[*range(len(prompt), len(prompt) + n)] * len(of_prompt)]
    device = input_device(model)
    columns = on_device([ids, positions], device)[..., None]  # as sequences of one token: no mask is made
    hidden, kwargs = run_below(model, 0, columns[0], position_ids=columns[1])
    x, dx = forward_ad.unpack_dual(hidden[:, 0])
    for block in blocks:
        x, dx = block.along(x, dx, groups, kwargs["position_embeddings"])
    at = on_device([place for i in range(len(responses)) for place in predicting[i]], device)
    states = model.base_model.norm(forward_ad.make_dual(x[at], dx[at]))
    return list(states.split(list(map(len, responses))))


@contextmanager
def _dual_parameters(model: nn.Module, step: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside a dual level: the model's parameters with Δ as their tangents; shared ones in all of their places."""
    dual_of = {id(p): forward_ad.make_dual(p.detach(), step[name]) for name, p in model.named_parameters()}
    named = ((module, name, p) for module in model.modules() for name, p in module._parameters.items())
    places = [(module, name, p) for module, name, p in named if p is not None]
    for module, name, parameter in places:
        module._parameters[name] = dual_of[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
