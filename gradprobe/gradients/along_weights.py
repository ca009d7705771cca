"""Along the step, weight by weight: Σ_t ⟨∇_w log π_t, Δ_w⟩ of whole responses, which add up to Σ_t d_t (`step`).

Forwards it would take a pass for each weight. One backward pass from Σ_t log π_t has the gradients of all of them, of
which each is multiplied with Δ_w and forgotten as soon as it is there: the largest is all the memory that it takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..model.batches import pad_right
from ..model.decoder import decoder_hidden
from ..model.placement import input_device
from ..model.softmax import Softmax
from ..rollouts.score import in_blocks


@torch.enable_grad()
def along_weights(
    model: nn.Module, step: dict[str, torch.Tensor], prompts: list[list[int]], responses: list[list[int]]
) -> Iterator[np.ndarray]:
    """Of each response [weights] float64, in the order of `step`, nats. Arguments as of `step.along_step`."""

    def back(logits: torch.Tensor, ids: torch.Tensor) -> tuple[()]:
        logits.backward(Softmax(logits.detach()).logit_gradient(ids))
        return ()

    for prompt, response in zip(prompts, responses, strict=True):
        with _dotted(model, step) as sums:
            # The token at index q of a sequence is predicted at index q - 1.
            hidden = decoder_hidden(model, pad_right([prompt + response], input_device(model)))[0, len(prompt) - 1 : -1]
            leaf = hidden.detach().requires_grad_()
            in_blocks(model, leaf, torch.tensor(response, dtype=torch.long, device=leaf.device), back)
            hidden.backward(leaf.grad)
        yield torch.stack([*sums.values()]).cpu().numpy()


@contextmanager
def _dotted(model: nn.Module, step: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, each weight's gradient becomes its product with Δ_w, summed by the weight's name; none is kept."""
    sums = {name: torch.zeros((), dtype=torch.float64, device=delta.device) for name, delta in step.items()}

    def dotted(name: str, weight: nn.Parameter) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        sums[name] += (weight.grad.to(wide) * step[name].to(wide)).sum(dtype=torch.float64)
        weight.grad = None

    hooks = [
        weight.requires_grad_().register_post_accumulate_grad_hook(lambda weight, name=name: dotted(name, weight))
        for name, weight in model.named_parameters()
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False).zero_grad()
