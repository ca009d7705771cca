"""Along a step: the exact derivative of log π, against autograd, central differences and merged adapters."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from architectures import FAMILIES, VOCAB_SIZE, certain_of_family, tiny_of_family
from engine_runs import likeliest_responses
from planted import REPOSITORY
from tiny import plain_log_prob
from torch.autograd import forward_ad

import gradprobe.gradients.blocks
import gradprobe.gradients.step
from gradprobe.gradients.step import along_step, subtract
from gradprobe.model.checkpoint import load_checkpoint
from gradprobe.problems.data_set import load_problems
from gradprobe.rollouts import score
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses
from gradprobe.rollouts.score import score_responses

CPU = torch.device("cpu")
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


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_blocks_by_hand_give_what_dual_modules_give(family, monkeypatch):
    model = tiny_of_family(family)
    step, rollouts = subtract(end := moved(model), model, end), rollouts_of(4)
    by_hand, plain = derivatives(model, step, *rollouts), gradprobe.gradients.blocks.Block.along
    monkeypatch.setattr(gradprobe.gradients.blocks.Block, "along", lambda *args: [2 * of for of in plain(*args)])
    assert np.abs(np.concatenate(derivatives(model, step, *rollouts)) - np.concatenate(by_hand)).max() > 1e-3
    monkeypatch.setattr(gradprobe.gradients.step, "blocks_of", lambda *args: None)
    for mine, expected in zip(by_hand, derivatives(model, step, *rollouts), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-10, atol=1e-12)


def log_prob_of_response(model, prompt: list[int], response: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return sum(float(plain_log_prob(of_token, y)) for of_token, y in zip(logits, response, strict=True))


def at_distance(model, step, by: float) -> torch.nn.Module:
    """A copy of the model at θ + by Δ."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(by * step[name])
    return other


@pytest.mark.parametrize("family", ["qwen2_tied", "gemma3", "lfm2_hybrid"])
@pytest.mark.usefixtures("float64_throughout")
def test_the_sum_over_a_response_is_the_slope_of_its_log_prob_along_the_step(family):
    """By central differences at two distances, whose error falls as the square."""
    model = tiny_of_family(family)
    step = subtract(end := moved(model), model, end)
    prompts, responses = rollouts_of(3)
    found = derivatives(model, step, prompts, responses)
    for prompt, response, mine in zip(prompts, responses, found, strict=True):
        errors = []
        for h in (4e-3, 2e-3):
            ahead, behind = (log_prob_of_response(at_distance(model, step, by), prompt, response) for by in (h, -h))
            errors.append(abs((ahead - behind) / (2 * h) - mine.sum()) / abs(mine.sum()))
        assert errors[1] < 1e-3
        assert 3 < errors[0] / errors[1] < 5


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2_softcap"])
@pytest.mark.usefixtures("float64_throughout")
def test_derivatives_of_certain_tokens_are_exact_too(family):
    """Where 1 − π is far below float32's rounding of π."""
    model = certain_of_family(family)
    step = subtract(end := moved(model), model, end)
    prompts = rollouts_of(4)[0]
    responses = likeliest_responses(model, prompts, 5)
    tails = [s.tail_mass for batch in score_responses(model, prompts, responses, 70) for s in batch.values()]
    assert np.concatenate(tails).min() < 1e-12
    expected = np.concatenate([by_autograd(model, step, *of) for of in zip(prompts, responses, strict=True)])
    for dtype, median in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        in_dtype = {name: delta.to(dtype) for name, delta in step.items()}
        found = np.concatenate(derivatives(certain_of_family(family, dtype), in_dtype, prompts, responses))
        assert np.median(np.abs(found - expected) / np.abs(expected)) < median
        assert np.abs(found - expected).max() / np.abs(expected).max() < 10 * median


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.usefixtures("float64_throughout")
def test_neither_shared_prompts_nor_batches_change_a_number(family, monkeypatch):
    model = tiny_of_family(family)
    step = subtract(end := moved(model), model, end)
    prompts, responses = rollouts_of(5)
    plain = np.concatenate(derivatives(model, step, prompts, responses))
    for worth_sharing, batch_tokens in ((0.0, 1), (0.0, 1000), (10.0, 1), (10.0, 1000)):
        monkeypatch.setattr(score, "WORTH_SHARING", worth_sharing)
        found = np.concatenate(derivatives(model, step, prompts, responses, batch_tokens))
        np.testing.assert_allclose(found, plain, rtol=1e-9, atol=1e-12 * np.abs(plain).max())
    order = [3, 0, 4, 2, 1]
    turned = derivatives(model, step, [prompts[i] for i in order], [responses[i] for i in order])
    back = np.concatenate([turned[order.index(i)] for i in range(5)])
    np.testing.assert_allclose(back, plain, rtol=1e-9, atol=1e-12 * np.abs(plain).max())


@contextmanager
def once_only(model, step):
    """The fault: a weight that stands in two places gets its tangent in the first of them alone."""
    parameters = dict(model.named_parameters())  # names each once
    plain = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in parameters}
    for name, (module, own) in plain.items():
        module._parameters[own] = forward_ad.make_dual(parameters[name].detach(), step[name])
    try:
        yield
    finally:
        for name, (module, own) in plain.items():
            module._parameters[own] = parameters[name]


@pytest.mark.usefixtures("float64_throughout")
def test_a_tied_weight_moved_in_one_place_only_would_be_found_out(monkeypatch):
    for family, is_found in (("qwen2_tied", True), ("qwen2", False)):
        model = tiny_of_family(family)
        step = subtract(end := moved(model, by=0.02), model, end)
        step["model.embed_tokens.weight"].fill_(0.01).view(-1)[::3] = 0.05
        prompts, responses = rollouts_of(2)
        expected = np.concatenate([by_autograd(model, step, *of) for of in zip(prompts, responses, strict=True)])
        with monkeypatch.context() as patched:
            patched.setattr(gradprobe.gradients.step, "_dual_parameters", once_only)
            found = np.concatenate(derivatives(model, step, prompts, responses))
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert (error > 1e-3) == is_found


@pytest.mark.usefixtures("float64_throughout")
def test_every_parameter_left_out_of_the_step_would_be_found_out():
    model = tiny_of_family("qwen2")
    step = subtract(end := moved(model), model, end)
    prompts, responses = rollouts_of(2)
    whole = np.concatenate(derivatives(model, step, prompts, responses))
    for name in list(step)[1:]:  # the first is not moved
        without = step | {name: torch.zeros_like(step[name])}
        found = np.concatenate(derivatives(model, without, prompts, responses))
        assert np.abs(found - whole).max() / np.abs(whole).max() > 1e-6, name


@pytest.mark.slow
def test_on_the_demo_s_own_rollouts_narrow_numbers_are_close_to_wide_ones(capsys):
    """float32 and bfloat16 against float64 of the very same weights, as they are in the narrow type."""
    start, end = (load_checkpoint(REPOSITORY / "demo" / name, CPU, torch.float32) for name in ("base", "trained"))
    problems = load_problems(REPOSITORY / "demo" / "problems.jsonl").problems[:8]
    prompts = start.tokenizer([one.prompt for one in problems], add_special_tokens=False)["input_ids"]
    how = Sampling(8, 128, 1.0, start.end_ids)
    drawn = sample_responses(start.model, prompts, lambda p, s: rollout_uniforms(0, p, s, 128), how)
    responses = [response for batch in drawn for samples in batch for response in samples]
    prompts = [prompt for prompt in prompts for _ in range(8)]
    for dtype, median in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        models = [copy.deepcopy(of.model).to(dtype) for of in (start, end)]
        step = subtract(models[1], models[0], models[1])
        wide = {name: delta.double() for name, delta in step.items()}
        found = np.concatenate(derivatives(models[0], step, prompts, responses, 2048))
        exact = np.concatenate(derivatives(models[0].double(), wide, prompts, responses, 2048))
        errors = np.abs(found - exact) / np.abs(exact)
        in_all = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        with capsys.disabled():
            print(f"\n{dtype}: of {len(errors)} tokens' d the median error {np.median(errors):.1e}, ", end="")
            print(f"the 99th percentile {np.quantile(errors, 0.99):.1e}; ‖error‖ / ‖d‖ {in_all:.1e}")
        assert np.median(errors) < median
        assert in_all < median
