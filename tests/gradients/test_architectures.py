"""The engine and the sampler on every family of decoders, against the oracle."""

import numpy as np
import pytest
import torch
from architectures import FAMILIES, VOCAB_SIZE, certain_of_family, tiny_of_family
from engine_runs import engine_rows, likeliest_responses
from tiny import plain_log_prob, relative_error
from transformers.pytorch_utils import Conv1D

from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.targets import Target
from gradprobe.model.decoder import layer_list, linear_weights
from gradprobe.model.past import keeps_tokens_apart
from gradprobe.rollouts import score
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_from, sample_responses
from gradprobe.rollouts.score import score_responses

BY_HAND = ("qwen2", "qwen2_tied", "qwen3", "llama")
"""These keep more of earlier tokens than each one's keys and values: no padding, no shared prompts."""
families = pytest.mark.parametrize("family", FAMILIES)


def plain_row_gradient(model, tokens: list[int], at: int, layer: int, suffix: str, row: int) -> torch.Tensor:
    """The oracle, for any decoder: the full weight's gradient, its row picked afterwards."""
    linear = linear_weights(layer_list(model)[1][layer])[suffix]
    linear.weight.requires_grad_(True)
    log_prob = plain_log_prob(model(input_ids=torch.tensor([tokens])).logits[0, at - 1], tokens[at])
    gradient = torch.autograd.grad(log_prob, linear.weight)[0]
    linear.weight.requires_grad_(False)
    return gradient[:, row] if isinstance(linear, Conv1D) else gradient[row]


def rollouts_of(n: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB_SIZE, size=2 + i % 5).tolist() for i in range(n)]
    responses = [rng.integers(3, VOCAB_SIZE, size=4 + (3 * i) % 7).tolist() for i in range(n)]
    return prompts, responses


@families
@pytest.mark.usefixtures("float64_throughout")
def test_every_row_equals_the_oracle(family):
    model = tiny_of_family(family)
    prompts, responses = rollouts_of(5)
    positions = [np.arange(len(response)) for response in responses]
    targets = [Target(layer, suffix, row) for layer in (0, 1) for suffix in FAMILIES[family][2] for row in (0, 3)]
    n_rows = 0
    engine = GradientEngine(model, targets)
    places = [(i, len(prompts[i]) + p) for i, response in enumerate(responses) for p in range(len(response))]
    for _, rows, gradients in engine.batches(prompts, responses, positions, batch_tokens=70):
        for n, row in enumerate(rows):
            for target, found in zip(targets, gradients, strict=True):
                i, at = places[row]
                expected = plain_row_gradient(
                    model, prompts[i] + responses[i], at, target.layer, target.suffix, target.row_idx
                )
                assert relative_error(found[n], expected) < 1e-10
                n_rows += 1
    assert n_rows == len(targets) * sum(map(len, responses))
    assert (engine._blocks is not None) == (family in BY_HAND)


@families
@pytest.mark.usefixtures("float64_throughout")
def test_rows_of_certain_tokens_equal_the_oracle(family):
    """Where 1 − π is far below float32's rounding of π: rows, pooled and projected, each from its own 1 − π."""
    model = certain_of_family(family)
    prompts = rollouts_of(5)[0]
    responses = likeliest_responses(model, prompts, 7)
    positions = [np.arange(7)] * 5
    scores = {i: s for batch in score_responses(model, prompts, responses, 70) for i, s in batch.items()}
    tails = np.concatenate([scores[i].tail_mass for i in range(5)])
    assert tails.min() < 1e-12
    assert np.mean(tails < 1e-6) > 0.2
    suffix = FAMILIES[family][2][0]
    expected = {
        (0, i, p): plain_row_gradient(model, prompts[i] + responses[i], len(prompts[i]) + p, 1, suffix, 3)
        for i in range(5)
        for p in range(7)
    }
    for dtype, median, most in ((torch.float64, 1e-11, 1e-10), (torch.float32, 1e-5, 1e-3)):
        narrow = certain_of_family(family, dtype)
        for by_hand in (True, False):
            found = engine_rows(narrow, [Target(1, suffix, 3)], prompts, responses, positions, 70, by_hand)
            errors = [relative_error(found[key].double(), row) for key, row in expected.items()]
            assert np.median(errors) < median
            assert max(errors) < most
        for batch in score_responses(narrow, prompts, responses, 70):
            for i, of_rollout in batch.items():
                for mine, exact in zip(of_rollout, scores[i], strict=True):
                    np.testing.assert_allclose(mine, exact, rtol=most)


@families
def test_cached_sampling_and_scores_agree_with_the_teacher_forced_model(family):
    """Left padding, cache and rows given up change no token: each is what u draws from the model's own softmax."""
    model = tiny_of_family(family, torch.float32)  # as it is sampled; eager attention can't mask in float64
    prompts, _ = rollouts_of(4)
    n_steps, ends = 12, frozenset(range(3, VOCAB_SIZE, 5))
    sampling = Sampling(3, n_steps, 0.8, ends)
    batches = sample_responses(model, prompts, lambda p, s: rollout_uniforms(1, p, s, n_steps), sampling)
    samples = [samples for batch in batches for samples in batch]
    flat = [(p, s, samples[p][s]) for p in range(4) for s in range(3)]
    assert len({len(response) for _, _, response in flat}) > 1
    scores = {}
    for batch in score_responses(model, [prompts[p] for p, _, _ in flat], [r for _, _, r in flat], 80):
        scores.update(batch)
    for i, (p, s, response) in enumerate(flat):
        tokens = prompts[p] + response
        logits = model(input_ids=torch.tensor([tokens])).logits[0, len(prompts[p]) - 1 : -1]
        u = torch.from_numpy(rollout_uniforms(1, p, s, n_steps)[: len(response)])
        assert sample_from(logits, u, 0.8)[0].tolist() == response
        log_probs = torch.log_softmax(logits, -1)
        np.testing.assert_allclose(scores[i][0], -(log_probs.exp() * log_probs).sum(-1), rtol=1e-4)
        picked = log_probs.gather(-1, torch.tensor(response)[:, None])[:, 0]
        np.testing.assert_allclose(scores[i][1], picked, rtol=1e-4, atol=1e-6)


@families
def test_scores_behind_a_shared_prompt_are_those_of_each_rollout_alone(family, monkeypatch):
    """Also behind prompts longer than a sliding window, of unequal length, and for responses of one token or none."""
    model, rng = tiny_of_family(family, torch.float32), np.random.default_rng(2)
    prompts = [prompt for n in (11, 16) for prompt in [rng.integers(3, VOCAB_SIZE, size=n).tolist()] * 4]
    responses = [rng.integers(3, VOCAB_SIZE, size=n).tolist() for n in (7, 1, 0, 4, 2, 6, 7, 3)]
    n_tokens = []
    hidden = score.decoder_hidden
    monkeypatch.setattr(
        score, "decoder_hidden", lambda m, ids, **b: (n_tokens.append(ids.numel()), hidden(m, ids, **b))[1]
    )
    shared = [of for batch in score_responses(model, prompts, responses, 500) for of in sorted(batch.items())]
    n_apart = sum(map(len, prompts + responses))
    assert sum(n_tokens) == 2 * 16 + 8 * 6 if keeps_tokens_apart(model) else sum(n_tokens) >= n_apart
    monkeypatch.setattr(score, "WORTH_SHARING", 0)
    alone = dict(of for batch in score_responses(model, prompts, responses, 1) for of in batch.items())
    assert len(shared) == len(alone) == len(responses)
    for i, found in shared:
        for mine, expected in zip(found, alone[i], strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-6)
