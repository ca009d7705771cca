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
from ..model.decoder import decoder_hidden, head_logits, positions_per_head_block
from ..model.placement import input_device
from ..model.softmax import Softmax


@torch.enable_grad()
def along_weights(
    model: nn.Module, step: dict[str, torch.Tensor], prompts: list[list[int]], responses: list[list[int]]
) -> Iterator[np.ndarray]:
    """Σ_t ⟨∇_w log π_t, Δ_w⟩ over each response's tokens, of every weight w, nats; one response at a time.

    Args:
        model, step: as of `step.along_step`.
        prompts, responses: token ids; prompts not empty.

    Yields:
        [weights] float64 of each response, in the order of `step`.
    """
    device, at_once = input_device(model), positions_per_head_block(model)
    for prompt, response in zip(prompts, responses, strict=True):
        with _dotted(model, step) as sums:
            # The token at index q of a sequence is predicted at index q - 1.
            hidden = decoder_hidden(model, pad_right([prompt + response], device))[0, len(prompt) - 1 : -1]
            leaf, ids = hidden.detach().requires_grad_(), torch.tensor(response, dtype=torch.long, device=device)
            for tokens in (slice(start, start + at_once) for start in range(0, len(response), at_once)):
                logits = head_logits(model, leaf[tokens])
                logits.backward(Softmax(logits.detach()).logit_gradient(ids[tokens]))
            if response:
                hidden.backward(leaf.grad)
        yield torch.stack([*sums.values()]).cpu().numpy()


@contextmanager
def _dotted(model: nn.Module, step: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, each weight's gradient becomes its product with Δ_w, summed by the weight's name; none is kept."""
    sums = {name: torch.zeros((), dtype=torch.float64, device=delta.device) for name, delta in step.items()}

    def dotted(name: str, weight: nn.Parameter) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        gradient, delta = (of.detach().to(wide) for of in (weight.grad, step[name]))
        sums[name] += (gradient * delta).sum(dtype=torch.float64)
        weight.grad = None

    weights = dict(model.named_parameters())
    hooks = [
        weight.requires_grad_().register_post_accumulate_grad_hook(lambda weight, name=name: dotted(name, weight))
        for name, weight in weights.items()
    ]
    try:
        yield sums
    finally:
        for hook, weight in zip(hooks, weights.values(), strict=True):
            hook.remove()
            weight.requires_grad_(False)
            weight.grad = None
