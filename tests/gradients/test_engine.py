"""The engine against the oracle, and the ways it could be wrong."""

import numpy as np
import pytest
import torch
from engine_runs import DOWN, TARGETS, engine_rows, random_rollouts
from tiny import oracle_gradient, relative_error, tiny_model

from gradprobe.common.errors import InputError
from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.suffix import Reach, leaner
from gradprobe.gradients.targets import Target, expand_targets, full_name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_position_equals_the_oracle(dtype, tolerance):
    model = tiny_model(1, dtype)
    prompts, responses = random_rollouts(7, seed=2)
    positions = [np.arange(len(response)) for response in responses]
    found = engine_rows(model, TARGETS, prompts, responses, positions, batch_tokens=60)
    assert len(found) == len(TARGETS) * sum(map(len, responses))
    for (t, i, p), gradient in found.items():
        at = len(prompts[i]) + p
        expected = oracle_gradient(
            model, prompts[i] + responses[i], at, full_name(model, TARGETS[t].weights[0]), TARGETS[t].row_idx
        )
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected) < tolerance


def test_a_position_shifted_by_one_is_another_gradient():
    model = tiny_model(1, torch.float64)
    prompts, responses = random_rollouts(3, seed=3)
    positions = [np.arange(len(response)) for response in responses]
    for (_, i, p), row in engine_rows(model, TARGETS[:1], prompts, responses, positions, 60).items():
        tokens = prompts[i] + responses[i]
        if len(prompts[i]) + p + 1 < len(tokens):
            shifted = oracle_gradient(model, tokens, len(prompts[i]) + p + 1, f"model.layers.0.{DOWN}", 3)
            assert relative_error(row, shifted) > 0.05


def test_the_prompt_s_positions_contribute():
    """Leaving them out is the mistake that looks right: below the last block it gives another vector."""
    model = tiny_model(1, torch.float64)
    prompt, response = [5, 9, 200, 31], [7, 70, 17]
    engine = GradientEngine(model, TARGETS[:1])
    full = next(iter(engine.batches([prompt], [response], [np.array([2])], 60)))[2][0][0]
    (tap,) = engine._taps.values()
    inputs = []
    tap.linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    contributions = []
    original = engine._gradients
    engine._gradients = lambda deltas: (contributions.append(deltas[0]), original(deltas))[1]
    next(iter(engine.batches([prompt], [response], [np.array([2])], 60)))
    without_prompt = (contributions[0][0, len(prompt) :, 0, None] * inputs[0][0, len(prompt) :]).sum(0)
    assert relative_error(without_prompt, full) > 0.05


def test_batching_and_padding_leave_no_trace():
    model = tiny_model(4)
    prompts, responses = random_rollouts(16, seed=5)
    positions = [np.arange(0, len(response), 2) for response in responses]
    alone = engine_rows(model, TARGETS, prompts, responses, positions, batch_tokens=1)
    together = engine_rows(model, TARGETS, prompts, responses, positions, batch_tokens=10_000)
    assert alone.keys() == together.keys()
    assert max(relative_error(together[key], alone[key]) for key in alone) < 1e-5


def test_padding_on_the_left_without_a_mask_would_show(monkeypatch):
    """Negative control: were the padding visible to a row's own tokens, the invariance above would fail."""
    model = tiny_model(4)
    prompts, responses = random_rollouts(16, seed=5)
    positions = [np.array([len(response) - 1]) for response in responses]
    alone = engine_rows(model, TARGETS[:1], prompts, responses, positions, batch_tokens=1)

    def pad_left(sequences, device, length=None):
        longest = max(map(len, sequences))
        return torch.tensor([[0] * (longest - len(s)) + s for s in sequences])

    monkeypatch.setattr("gradprobe.gradients.engine.pad_right", pad_left)
    together = engine_rows(model, TARGETS[:1], prompts, responses, positions, batch_tokens=10_000)
    assert max(relative_error(together[key], alone[key]) for key in alone) > 0.05


def test_a_feed_forward_block_that_mixes_positions_is_found_out(monkeypatch):
    """The shortcut through the last block must not be taken where the block does not take each position by itself."""
    model = tiny_model(1, torch.float64)
    block = model.model.layers[-1].mlp
    plain_forward = block.forward

    def mixing(hidden):
        steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
        return plain_forward(hidden) + hidden.cumsum(1) / steps

    monkeypatch.setattr(block, "forward", mixing)
    prompts, responses = random_rollouts(4, seed=2)
    positions = [np.array([len(response) - 1]) for response in responses]
    for (t, i, p), row in engine_rows(model, TARGETS, prompts, responses, positions, 60).items():
        weight = f"model.layers.{TARGETS[t].layer}.{TARGETS[t].suffix}"
        tokens, at = prompts[i] + responses[i], len(prompts[i]) + p
        assert relative_error(row, oracle_gradient(model, tokens, at, weight, TARGETS[t].row_idx)) < 1e-10


def test_a_backward_pass_that_ends_too_early_would_show(monkeypatch):
    """Negative control: were the last position left out, the oracle would tell."""
    model = tiny_model(1, torch.float64)
    prompts, responses = random_rollouts(4, seed=2)
    positions = [np.arange(len(response)) for response in responses]
    expected = engine_rows(model, TARGETS[:1], prompts, responses, positions, batch_tokens=1)
    for name in ("cut", "refill"):
        whole = getattr(Reach, name)
        early = lambda reach, *args, whole=whole: whole(Reach(reach.shape, reach.n - 1), *args)  # noqa: E731
        monkeypatch.setattr(Reach, name, early)
    found = engine_rows(model, TARGETS[:1], prompts, responses, positions, batch_tokens=1)
    assert min(relative_error(found[key], expected[key]) for key in expected) > 0.05


@pytest.mark.usefixtures("float64_throughout")
def test_what_is_taken_for_a_gated_block_or_a_norm_must_be_one(monkeypatch):
    """Same names and weights, another function: such modules run as they are."""
    blocks = list(tiny_model(1, torch.float64).model.layers)
    taken = {type(module) for module in leaner(blocks, set(), Reach())}
    assert {"Qwen2MLP", "Qwen2RMSNorm", "Linear"} == {kind.__name__ for kind in taken}
    for block in blocks:
        monkeypatch.setattr(block.mlp, "act_fn", torch.nn.GELU())
        block.input_layernorm.variance_epsilon = block.post_attention_layernorm.variance_epsilon = 0.1
        monkeypatch.setattr(type(block.input_layernorm), "forward", lambda self, x: self.weight * x)
    assert {type(module) for module in leaner(blocks, set(), Reach())} == {torch.nn.Linear}


def test_rollouts_without_positions_are_left_out():
    model = tiny_model(4)
    positions = [np.array([], dtype=int), np.array([1])]
    found = engine_rows(model, TARGETS[:1], [[1], [2]], [[3, 4], [5, 6]], positions, 100)
    assert list(found) == [(0, 1, 1)]


def test_the_model_is_left_as_it_was():
    model = tiny_model(4)
    before = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    engine_rows(model, TARGETS, [[1]], [[2, 3]], [np.array([0, 1])], 100)
    assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, before)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_targets_from_words():
    model = tiny_model(0)
    targets = expand_targets(model, None, DOWN, "first,mid,last", seed=0)
    assert targets == [Target(1, DOWN, 0), Target(1, DOWN, 8), Target(1, DOWN, 15)]
    assert [target.row_dim(model) for target in targets] == [24, 24, 24]
    drawn = expand_targets(model, "0,2", DOWN, "random:4", seed=1)
    assert len(drawn) == len(set(drawn)) == 8
    assert drawn == expand_targets(model, "0,2", DOWN, "random:4", seed=1)


@pytest.mark.parametrize(
    ("layer", "suffix", "row", "complaint"),
    [
        ("9", DOWN, "0", "`layer` 9: the model has layers 0 to 2"),
        ("-1", DOWN, "0", "`layer` -1"),
        ("0", "input_layernorm.weight", "0", "these can: self_attn.q_proj.weight"),
        ("0", DOWN, "16", "is not one of 0 to 15"),
        ("0", DOWN, "random:99", "random:99"),
        ("0", DOWN, "0,first", "named twice"),
    ],
)
def test_targets_the_model_does_not_have(layer, suffix, row, complaint):
    with pytest.raises(InputError, match=complaint):
        expand_targets(tiny_model(0), layer, suffix, row, seed=0)


def test_memory_that_runs_out_in_the_trial_of_thinning_is_no_verdict_on_it(monkeypatch):
    """Else the whole run would take the slow way: the trial is made again on the halved batch."""
    model = tiny_model(1)
    engine = GradientEngine(model, TARGETS[:1])
    block, tries = model.model.layers[-1].mlp, []

    def forward(hidden, original=block.forward):
        tries.append(len(hidden))
        if len(hidden) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(hidden)

    monkeypatch.setattr(block, "forward", forward)
    found = list(engine.batches([[1], [2]], [[3, 4], [5, 6]], [np.array([0, 1])] * 2, 100))
    assert sum(len(members) for members, _, _ in found) == 4
    assert max(tries) == 2
    assert engine._can_thin
