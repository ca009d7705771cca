"""Along a step: the exact derivative of log π, against autograd, central differences and merged adapters."""

import copy

import numpy as np
import pytest
import torch
from architectures import FAMILIES, VOCAB_SIZE, tiny_of_family
from tiny import plain_log_prob

from gradprobe.gradients.step import along_step, subtract

families = pytest.mark.parametrize("family", FAMILIES)


def moved(model: torch.nn.Module, by: float = 0.02) -> torch.nn.Module:
    """The same model after a random step of all its parameters but the first."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in list(other.parameters())[1:]:
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))
    return other


def rollouts_of(n: int) -> tuple[list[list[int]], list[list[int]]]:
    """Two share a prompt that is long enough to be run once."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB_SIZE, size=2 + 3 * i).tolist() for i in range(n - 1)]
    responses = [rng.integers(3, VOCAB_SIZE, size=3 + (2 * i) % 5).tolist() for i in range(n)]
    return [*prompts, prompts[-1]], responses


def derivatives(model, step, prompts, responses, batch_tokens: int = 70) -> list[np.ndarray]:
    found = {}
    for batch in along_step(model, step, prompts, responses, batch_tokens):
        found.update(batch)
    return [found[i] for i in range(len(prompts))]


def by_autograd(model, step, prompt: list[int], response: list[int]) -> list[float]:
    """The oracle: Σ over all parameters of autograd's gradient times Δ, a token at a time."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    found = []
    for p in range(len(response)):
        tokens = prompt + response[: p + 1]
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(tokens) - 2]
        log_prob = plain_log_prob(logits, tokens[-1])
        gradients = torch.autograd.grad(log_prob, list(parameters.values()), allow_unused=True)
        found.append(
            sum(float((g * step[name]).sum()) for name, g in zip(parameters, gradients, strict=True) if g is not None)
        )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return found


@families
@pytest.mark.usefixtures("float64_throughout")
def test_every_token_s_derivative_equals_the_sum_over_all_parameters(family):
    model = tiny_of_family(family)
    step = subtract(end := moved(model), model, end)
    prompts, responses = rollouts_of(4)
    found = derivatives(model, step, prompts, responses)
    for prompt, response, mine in zip(prompts, responses, found, strict=True):
        expected = np.array(by_autograd(model, step, prompt, response))
        assert np.abs(mine - expected).max() / np.abs(expected).max() < 1e-10
