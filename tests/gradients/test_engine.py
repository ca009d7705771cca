"""The engine against the oracle, and the ways it could be wrong."""

import numpy as np
import pytest
import torch
from engine_runs import DOWN, TARGETS, engine_rows, random_rollouts
from tiny import oracle_gradient, relative_error, tiny_model
from transformers.models.qwen2 import modeling_qwen2

from gradprobe.common.errors import InputError
from gradprobe.gradients import engine as engine_module
from gradprobe.gradients.blocks import blocks_of
from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.targets import Target, expand_targets, full_name

both_ways = pytest.mark.parametrize("by_hand", [True, False])


@both_ways
@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_position_equals_the_oracle(dtype, tolerance, by_hand):
    model = tiny_model(1, dtype)
    prompts, responses = random_rollouts(7, seed=2)
    positions = [np.arange(len(response)) for response in responses]
    found = engine_rows(model, TARGETS, prompts, responses, positions, 60, by_hand)
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


@pytest.mark.parametrize("left_out", [slice(0, 4), slice(6, 7)], ids=["the prompt", "the last position"])
def test_every_position_contributes(left_out, monkeypatch):
    """Leaving some out is the mistake that looks right: below the last block it gives another vector."""
    model, rollout = tiny_model(1), ([[5, 9, 200, 31]], [[7, 70, 17, 4]], [np.array([3])])
    whole = engine_rows(model, TARGETS[:1], *rollout, 60)
    summed = engine_module._summed

    def without(delta, inputs, spans):
        kept = delta.clone()
        kept[left_out] = 0
        return summed(kept, inputs, spans)

    monkeypatch.setattr(engine_module, "_summed", without)
    found = engine_rows(model, TARGETS[:1], *rollout, 60)
    assert all(relative_error(found[key], whole[key]) > 0.05 for key in whole)


@both_ways
def test_batching_and_padding_leave_no_trace(by_hand):
    model = tiny_model(4)
    prompts, responses = random_rollouts(16, seed=5)
    positions = [np.arange(0, len(response), 2) for response in responses]
    alone = engine_rows(model, TARGETS, prompts, responses, positions, 1, by_hand)
    together = engine_rows(model, TARGETS, prompts, responses, positions, 10_000, by_hand)
    assert alone.keys() == together.keys()
    assert max(relative_error(together[key], alone[key]) for key in alone) < 1e-5


@both_ways
def test_padding_on_the_left_without_a_mask_would_show(by_hand, monkeypatch):
    """Negative control: were the padding visible to a row's own tokens, the invariance above would fail."""
    model = tiny_model(4)
    prompts, responses = random_rollouts(16, seed=5)
    positions = [np.array([len(response) - 1]) for response in responses]
    alone = engine_rows(model, TARGETS[:1], prompts, responses, positions, 1, by_hand)

    def pad_left(sequences, device, length=None):
        longest = max(map(len, sequences))
        return torch.tensor([[0] * (longest - len(s)) + s for s in sequences])

    monkeypatch.setattr("gradprobe.gradients.engine.pad_right", pad_left)
    together = engine_rows(model, TARGETS[:1], prompts, responses, positions, 10_000, by_hand)
    assert max(relative_error(together[key], alone[key]) for key in alone) > 0.05


@pytest.mark.usefixtures("float64_throughout")
def test_a_feed_forward_block_that_mixes_positions_is_found_out(monkeypatch):
    """By hand the last block's runs at the chosen tokens alone."""
    model = tiny_model(1, torch.float64)
    kind = type(model.model.layers[-1].mlp)
    plain_forward = kind.forward

    def mixing(self, hidden):
        steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
        return plain_forward(self, hidden) + hidden.cumsum(1) / steps

    monkeypatch.setattr(kind, "forward", mixing)
    prompts, responses = random_rollouts(4, seed=2)
    positions = [np.array([len(response) - 1]) for response in responses]
    for (t, i, p), row in engine_rows(model, TARGETS, prompts, responses, positions, 60).items():
        weight = f"model.layers.{TARGETS[t].layer}.{TARGETS[t].suffix}"
        tokens, at = prompts[i] + responses[i], len(prompts[i]) + p
        assert relative_error(row, oracle_gradient(model, tokens, at, weight, TARGETS[t].row_idx)) < 1e-10


def another_norm(model, monkeypatch):
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: self.weight * x)


def another_behind_the_last_norm(model, monkeypatch):
    forward = type(model.model).forward

    def doubled(self, **options):
        output = forward(self, **options)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    monkeypatch.setattr(type(model.model), "forward", doubled)


def another_activation(model, monkeypatch):
    monkeypatch.setattr(model.model.layers[1].mlp, "act_fn", torch.nn.GELU())


def another_residual(model, monkeypatch):
    block = type(model.model.layers[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, **options: forward(self, x, **options) + 0.1 * x)


def another_rotary(model, monkeypatch):
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", lambda query, key, cos, sin: (query * cos, key * cos))


def another_window(model, monkeypatch):
    model.config.sliding_window = 5


def another_attention(model, monkeypatch):
    model.set_attn_implementation("eager")


def another_adapter(model, monkeypatch):
    linear = model.model.layers[2].self_attn.q_proj
    model.model.layers[2].self_attn.q_proj = torch.nn.Sequential(linear)


def another_scale_at_late_positions(model, monkeypatch):
    """As Ministral 3's of its queries, and no setting tells of it."""
    plain = modeling_qwen2.Qwen2Attention.forward

    def scaled(self, hidden_states, position_ids, **options):
        output, weights = plain(self, hidden_states, position_ids=position_ids, **options)
        return output * (1 + (position_ids >= 32)[..., None].to(output)), weights

    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", scaled)


def another_setting(model, monkeypatch):
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.1


OTHERS = [
    another_scale_at_late_positions,
    another_setting,
    another_norm,
    another_behind_the_last_norm,
    another_activation,
    another_residual,
    another_rotary,
    another_window,
    another_attention,
    another_adapter,
]


@pytest.mark.parametrize("change", OTHERS)
def test_what_is_taken_for_a_block_of_this_kind_must_be_one(change, monkeypatch):
    """Same names and weights, another function: such models are left to autograd."""
    model = tiny_model(1)
    assert len(blocks_of(model, 1, {})) == 2
    change(model, monkeypatch)
    assert blocks_of(model, 1, {}) is None


@both_ways
def test_rows_are_numbered_rollout_by_rollout_and_what_is_done_is_left_out(by_hand):
    prompts, responses = random_rollouts(7, seed=2)
    positions = [np.arange(len(response)) for response in responses]
    positions[3] = positions[3][:0]
    engine = GradientEngine(tiny_model(4), TARGETS[:1], by_hand)
    batches = list(engine.batches(prompts, responses, positions, 40))
    assert len(batches) > 2
    assert sorted(i for rollouts, _, _ in batches for i in rollouts) == [0, 1, 2, 4, 5, 6]
    ends = np.cumsum(list(map(len, positions)))
    for rollouts, rows, _ in batches:
        assert sorted(rows) == sorted(row for i in rollouts for row in range(ends[i] - len(positions[i]), ends[i]))
    rest = list(engine.batches(prompts, responses, positions, 40, done=batches[0][0]))
    assert [rollouts for rollouts, _, _ in rest] == [rollouts for rollouts, _, _ in batches[1:]]
    assert all(torch.equal(one[2][0], other[2][0]) for one, other in zip(rest, batches[1:], strict=True))


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
        ("9", DOWN, "0", "`layer` 9: '9' is not one of 0 to 2"),
        ("-1", DOWN, "0", "`layer` -1"),
        ("top", DOWN, "0", "'top' is not one of"),
        ("0", DOWN, "best", "'best' is not one of"),
        ("0", "input_layernorm.weight", "0", "these can: self_attn.q_proj.weight"),
        ("0", DOWN, "16", "is not one of 0 to 15"),
        ("0", DOWN, "random:99", "random:99"),
        ("0", DOWN, "0,first", "named twice"),
    ],
)
def test_targets_the_model_does_not_have(layer, suffix, row, complaint):
    with pytest.raises(InputError, match=complaint):
        expand_targets(tiny_model(0), layer, suffix, row, seed=0)


def test_a_row_that_underflows_is_zero_and_no_noise():
    """So it counts among the manifest's zero rows, which analyses leave out."""
    model = tiny_model(1)
    sharp = model.model.norm.register_forward_hook(lambda module, args, output: 1000 * output)
    prompt, word = [5, 6], int(model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].argmax())
    (row,) = engine_rows(model, TARGETS[:1], [prompt], [[word]], [np.array([0])], 100).values()
    assert not row.any()
    sharp.remove()
    (row,) = engine_rows(model, TARGETS[:1], [prompt], [[word]], [np.array([0])], 100).values()
    assert row.any()
