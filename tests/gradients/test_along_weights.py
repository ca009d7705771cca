"""Along a step, weight by weight: against autograd's gradient of each weight, and the sums of all tokens' d_t."""

import numpy as np
import pytest
import torch
from architectures import FAMILIES, tiny_of_family
from test_along_step import derivatives, moved, rollouts_of
from tiny import plain_log_prob

from gradprobe.gradients.along_weights import along_weights
from gradprobe.gradients.step import subtract
from gradprobe.model import decoder


def by_autograd(model, step, prompt: list[int], response: list[int]) -> np.ndarray:
    """The oracle: [weights] autograd's gradient of the whole response's log-prob times Δ."""
    weights = dict(model.named_parameters())
    for weight in weights.values():
        weight.requires_grad_(True)
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    log_prob = torch.stack([plain_log_prob(of, y) for of, y in zip(logits, response, strict=True)]).sum()
    gradients = torch.autograd.grad(log_prob, list(weights.values()), allow_unused=True)
    model.requires_grad_(False)
    return np.array([
        0.0 if g is None else float((g * step[name]).sum()) for name, g in zip(weights, gradients, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("float64_throughout")
def test_every_weight_s_part_equals_autograd_s_and_all_of_them_the_tokens_sum(family, monkeypatch):
    model = tiny_of_family(family)
    step = subtract(end := moved(model), model, end)
    prompts, responses = rollouts_of(3)
    found = list(along_weights(model, step, prompts, responses))
    of_tokens = derivatives(model, step, prompts, responses)
    for prompt, response, mine, d in zip(prompts, responses, found, of_tokens, strict=True):
        expected = by_autograd(model, step, prompt, response)
        assert np.abs(mine - expected).max() / np.abs(expected).max() < 1e-10
        assert abs(mine.sum() - d.sum()) / np.abs(mine).sum() < 1e-12
        assert np.count_nonzero(mine) > len(mine) / 2
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())
    monkeypatch.setattr(decoder, "LOGITS_PER_BLOCK", 1)  # a token at a time through the head
    for apart, mine in zip(along_weights(model, step, prompts, responses), found, strict=True):
        np.testing.assert_allclose(apart, mine, rtol=1e-9, atol=1e-12 * np.abs(mine).max())
    assert not next(along_weights(model, step, [[5, 6]], [[]])).any()
