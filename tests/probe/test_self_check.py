"""The self-check: no false alarm on right models of any family, and planted faults found."""

from functools import wraps

import accelerate
import pytest
import torch
from architectures import FAMILIES, tiny_of_family
from tiny import tiny_model
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.models.qwen2 import modeling_qwen2

import probe_grad_vectors
from gradprobe.common.errors import InputError
from gradprobe.gradients import blocks, engine
from gradprobe.gradients.targets import ALL_LINEAR, Projection, Target, expand_projected
from gradprobe.probe.self_check import MOST_WEIGHTS, _some, refuse_unfit

DOWN = "mlp.down_proj.weight"
DTYPES = (torch.float32, torch.bfloat16)


def check(model, targets, is_sampled=True):
    refuse_unfit(engine.GradientEngine(model, targets), "m", is_sampled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_model_of_any_family_passes(family, dtype):
    model = tiny_of_family(family, dtype)
    rows = [Target(layer, suffix, row) for layer in (0, 2) for suffix in FAMILIES[family][2] for row in (0, 3)]
    check(model, targets=rows)
    everything = expand_projected(model, "all", ALL_LINEAR, Projection(3, 2, seed=0))
    if family == "mamba":  # multiplies with `dt_proj.weight` by itself, without calling the map
        with pytest.raises(InputError, match="mixer.dt_proj.weight is used without its map"):
            check(model, targets=everything)
    else:
        check(model, targets=everything)
    check(model, rows[:1], is_sampled=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- planted faults: each takes (model, monkeypatch), and says where it is found ----------------------------------


def dropped_layer(model, monkeypatch):
    """By hand one block is passed over."""
    monkeypatch.setattr(blocks, "_are_close", lambda found, expected: True)
    monkeypatch.setattr(blocks.Block, "forward", _but_for_the_second(blocks.Block.forward))


def _but_for_the_second(forward):
    calls = []

    def run(self, x, *args):
        calls.append(self)
        y, saved = forward(self, x, *args)
        return (x if len(calls) % 3 == 2 else y), saved

    return run


def doubled_map(model, monkeypatch):
    """A map that is called twice, of which the engine counts the last call."""
    plain = modeling_qwen2.Qwen2MLP.forward
    monkeypatch.setattr(modeling_qwen2.Qwen2MLP, "forward", lambda self, x: plain(self, x) + plain(self, 0.5 * x))
    keep = engine._RowTap.hook
    monkeypatch.setattr(
        engine._RowTap, "hook", lambda self, *call: (self.inputs.clear(), self.zeros.clear(), keep(self, *call))[-1]
    )


def ignored_cache(model, monkeypatch):
    plain = type(model).forward

    @wraps(plain)  # the same signature, in which a cache stands
    def without(self, **options):
        return plain(self, **{**options, "past_key_values": None})

    monkeypatch.setattr(type(model), "forward", without)


def detached_linear(model, monkeypatch):
    """Its kernel has no backward pass."""
    linear = model.model.layers[2].mlp.up_proj
    linear.forward = lambda x: functional.linear(x.detach(), linear.weight)


def detached_beside(model, monkeypatch):
    """A quarter of what goes through it goes back."""
    linear = model.model.layers[2].mlp.up_proj
    linear.forward = lambda x: functional.linear(0.25 * x + 0.75 * x.detach(), linear.weight)


class _WrongWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, upstream):
        (weight,) = ctx.saved_tensors
        return -3 * upstream @ weight, None


class _NoWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T


def wrong_kernel(model, monkeypatch):
    for layer in model.model.layers[1:]:
        layer.mlp.up_proj.forward = lambda x, linear=layer.mlp.up_proj: _WrongWay.apply(x, linear.weight)


def kernel_without_backward(model, monkeypatch):
    linear = model.model.layers[2].mlp.up_proj
    linear.forward = lambda x: _NoWay.apply(x, linear.weight)


def late_scale(model, monkeypatch):
    """Beyond position 40, and the blocks by hand know nothing of it."""
    monkeypatch.setattr(blocks, "context_length", lambda model: None)
    plain = modeling_qwen2.Qwen2Attention.forward

    def scaled(self, hidden_states, position_embeddings, attention_mask, position_ids=None, **options):
        y, weights = plain(
            self, hidden_states, position_embeddings, attention_mask, position_ids=position_ids, **options
        )
        return y * (1 + (position_ids >= 40)[..., None].to(y)), weights

    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", scaled)


def neighbours(model, monkeypatch):
    """Rows of a batch mix."""
    plain = modeling_qwen2.Qwen2MLP.forward
    monkeypatch.setattr(
        modeling_qwen2.Qwen2MLP, "forward", lambda self, x: plain(self, x) + 0.5 * plain(self, x).mean(0, keepdim=True)
    )


def longest_neighbour(model, monkeypatch):
    """Frequencies hang on the batch's latest position, as longrope's do."""
    plain = modeling_qwen2.Qwen2RotaryEmbedding.forward

    def by_the_longest(self, x, position_ids):
        is_long = int(position_ids.max() >= 40)
        return [(1 + is_long) * part for part in plain(self, x, position_ids * (1 + 3 * is_long))]

    monkeypatch.setattr(modeling_qwen2.Qwen2RotaryEmbedding, "forward", by_the_longest)


def shared_prompt(model, monkeypatch):
    """What lies behind a prompt that is run once for all sees too little of it."""
    plain = DynamicCache.batch_select_indices

    def blurred(self, rows):
        plain(self, rows)
        for layer in self.layers:
            layer.values = 0.5 * layer.values

    monkeypatch.setattr(DynamicCache, "batch_select_indices", blurred)


FAULTS = {
    dropped_layer: "the gradient of L0.mlp.down_proj.weight.r3 differs from autograd's",
    doubled_map: "the gradient of L0.mlp.down_proj.weight.r3 differs from autograd's",
    ignored_cache: "a step behind its cache differs",
    detached_linear: r"a Linear has no backward pass .*: load the model unquantised",
    detached_beside: "log π moves along autograd's gradient otherwise",
    wrong_kernel: "log π moves along autograd's gradient otherwise",
    kernel_without_backward: r"it has no gradient \(a quantised kernel\?\)",
    late_scale: "the gradient of L0.mlp.down_proj.weight.r3 differs from autograd's.* at positions from 48",
    neighbours: "a step behind its cache differs",
    longest_neighbour: "in one batch near positions 0 and 48",
    shared_prompt: "log-probs of rollouts side by side or behind a shared prompt",
}


@pytest.mark.parametrize(
    ("fault", "dtype"),
    # By so little, a slope in bfloat16 may be off by rounding alone.
    [(fault, dtype) for fault in FAULTS for dtype in DTYPES if (fault, dtype) != (detached_beside, torch.bfloat16)],
)
def test_a_planted_fault_is_found(fault, dtype, monkeypatch):
    model, targets = tiny_model(1, dtype), [Target(0, DOWN, 3), Target(1, "self_attn.k_proj.weight", 2)]
    check(model, targets=targets)
    fault(model, monkeypatch)
    with pytest.raises(InputError, match=f"`model_path` m: {FAULTS[fault]}") as refused:
        check(model, targets=targets)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("is_sampled", [True, False])
def test_what_is_not_used_is_not_tried(is_sampled, monkeypatch):
    """Rollouts from elsewhere need no cached step."""
    model, targets = tiny_model(1), [Target(0, DOWN, 3)]
    monkeypatch.setattr("gradprobe.rollouts.sample._next_logits", None)
    if is_sampled:
        with pytest.raises(TypeError):
            check(model, targets, is_sampled)
    else:
        check(model, targets, is_sampled)


class _Int8(nn.Linear):
    """Weights of eighths, which can have no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter((8 * linear.weight).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return functional.linear(x, self.weight.to(x) / 8)


@pytest.mark.parametrize("project", [False, True])
def test_gradients_of_quantised_weights_are_compared_too(project, monkeypatch):
    model = tiny_model(1)
    for layer in model.model.layers:
        layer.mlp.down_proj = _Int8(layer.mlp.down_proj)
    targets = expand_projected(model, "all", DOWN, Projection(3, 2, 0)) if project else [Target(0, DOWN, 3)]
    check(model, targets=targets)
    of = engine.GradientEngine._of_targets
    monkeypatch.setattr(engine.GradientEngine, "_of_targets", lambda self, found: [1.1 * x for x in of(self, found)])
    with pytest.raises(InputError, match="the gradient of L0.mlp.down_proj.weight"):
        check(model, targets=targets)


def test_weights_that_lie_elsewhere_are_compared_too(monkeypatch):
    model = accelerate.cpu_offload(tiny_model(1), torch.device("cpu"))
    assert model.model.layers[0].mlp.down_proj.weight.is_meta
    check(model, targets=[Target(0, DOWN, 3)])
    of = engine.GradientEngine._of_targets
    monkeypatch.setattr(engine.GradientEngine, "_of_targets", lambda self, found: [1.1 * x for x in of(self, found)])
    with pytest.raises(InputError, match="the gradient of L0.mlp.down_proj.weight"):
        check(model, targets=[Target(0, DOWN, 3)])


def test_it_is_refused_in_one_line_before_anything_is_sampled(
    checkpoint_dir, problems_file, tmp_path, monkeypatch, capfd
):
    ignored_cache(tiny_model(1), monkeypatch)
    arguments = ["--output-dir", tmp_path / "out", "--model-path", checkpoint_dir, "--dataset", problems_file]
    few = ["--num-prompts", 2, "--num-samples", 2, "--max-new-tokens", 4, "--device", "cpu"]
    assert probe_grad_vectors.main([str(word) for word in [*arguments, *few]]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "behind its cache" in line]
    assert len(said) == 1
    assert "--model-path" in said[0]
    assert "--sampler openai, or --rollouts" in said[0]
    assert not (tmp_path / "out" / "rollouts.jsonl").exists()


def test_of_many_weights_every_kind_is_looked_at():
    model = tiny_model(1)
    (every,) = expand_projected(model, "all", ALL_LINEAR, Projection(2, 2, seed=0))
    some = _some([every])
    assert len({name for _, name in some}) == len({name for _, name in every.weights}) == 7
    assert {layer for layer, _ in some} == {0, 1, 2}
    rows = [Target(layer, DOWN, row) for layer in range(20) for row in (0, 1)]
    kept = sorted(_some(rows))
    assert len(kept) == MOST_WEIGHTS
    assert (kept[0][0], kept[-1][0]) == (0, 19)
