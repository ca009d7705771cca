"""Linear maps that see tokens in other shapes than [batch, length], or not all of them."""

import numpy as np
import pytest
import torch
import transformers
from architectures import COMMON, MIXTURE, tiny_of_family
from tiny import relative_error
from torch import nn

from gradprobe.common.errors import InputError
from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.targets import Projection, Target, expand_projected
from gradprobe.model.decoder import layer_list

PROMPTS, RESPONSES = [[5, 9, 4], [7, 3, 8, 20]], [[11, 6], [4, 30, 7]]


class Chosen(nn.Module):
    """A feed-forward block whose linear map `among` sees some tokens alone, as an expert does; `never` sees none."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.among, self.never = mlp, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(x).flatten(0, 1)
        return y.index_add(0, torch.arange(3), self.among(x.flatten(0, 1)[:3])).view_as(x)


def rows_of(model, suffix: str) -> torch.Tensor:
    """In the order of rollouts and positions."""
    engine = GradientEngine(model, [Target(1, suffix, 0)])
    batches = engine.batches(PROMPTS, RESPONSES, [np.arange(len(r)) for r in RESPONSES], 100)
    found = {row: gradient for _, rows, (of,) in batches for row, gradient in zip(rows, of, strict=True)}
    return torch.stack([found[row] for row in range(len(found))])


@pytest.fixture
def model_of_some_tokens():
    torch.manual_seed(0)
    model = tiny_of_family("qwen2", torch.float32)
    layer = layer_list(model)[1][1]
    layer.mlp = Chosen(layer.mlp)
    return model.requires_grad_(False)


def test_a_map_of_some_tokens_alone_is_refused(model_of_some_tokens):
    with pytest.raises(InputError, match="`param_suffix` mlp.among.weight: layer 1 takes 3 tokens of a batch of 2 x 6"):
        rows_of(model_of_some_tokens, "mlp.among.weight")


def test_a_map_that_is_never_called_has_a_gradient_of_zeros(model_of_some_tokens):
    assert not rows_of(model_of_some_tokens, "mlp.never.weight").any()
    assert rows_of(model_of_some_tokens, "mlp.mlp.down_proj.weight").any()


def test_all_linear_says_what_it_leaves_out_of_a_mixture():
    """The experts of one layer lie in two parameters, and the router in one; none of them is a linear map."""
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**COMMON, **MIXTURE}))
    (target,) = expand_projected(model, "all", "all-linear", Projection(2, 2, 0))
    names = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    n_of_layer = 4 * 16 + 4 * (2 * 8) * 16 + 4 * 16 * 8
    left_out = target.described(model)["left_out"]
    assert left_out["n_parameters"] == 3 * n_of_layer
    assert sorted(left_out["names"]) == sorted(names)
    n_taken = sum(weight["rows"] * weight["cols"] for weight in target.described(model)["projection"]["weights"])
    n_matrices = sum(p.numel() for p in layer_list(model)[1].parameters() if p.dim() > 1)
    assert n_taken + left_out["n_parameters"] == n_matrices
    (whole,) = expand_projected(tiny_of_family("qwen2"), "all", "all-linear", Projection(2, 2, 0))
    assert "left_out" not in whole.described(tiny_of_family("qwen2"))


@pytest.mark.usefixtures("float64_throughout")
def test_rows_of_maps_that_see_tokens_in_other_shapes_equal_the_oracle():
    """2-D inputs of a shared expert's gate and 4-D ones of a latent attention's keys, in a padded batch."""
    cases = {"qwen2_moe": "mlp.shared_expert_gate.weight", "deepseek_v3_latent": "self_attn.kv_b_proj.weight"}
    for family, suffix in cases.items():
        model = tiny_of_family(family)
        linear = layer_list(model)[1][1].get_submodule(suffix.removesuffix(".weight"))
        found = rows_of(model, suffix)
        linear.weight.requires_grad_(True)
        expected = []
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            log_probs = torch.log_softmax(model(input_ids=torch.tensor([prompt + response])).logits[0], -1)
            for k, token in enumerate(response):
                picked = log_probs[len(prompt) + k - 1, token]
                expected.append(torch.autograd.grad(picked, linear.weight, retain_graph=True)[0][0])
        assert max(map(relative_error, found, expected)) < 1e-10


class Grouped(nn.Linear):
    """One weight for several small maps side by side, as DeepSeek V4 has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        of_group = self.weight.unflatten(0, (2, -1))[:, :, :8]  # [groups, out, in]
        return torch.einsum("blgi,goi->blgo", x.unflatten(-1, (2, 8)), of_group)


def test_a_linear_map_of_another_shape_than_its_weight_s_is_refused():
    model = tiny_of_family("qwen2", torch.float32)
    mlp = layer_list(model)[1][1].mlp
    mlp.grouped, plain = Grouped(16, 16, bias=False).requires_grad_(False), mlp.forward
    mlp.forward = lambda x: plain(mlp.grouped(x).flatten(2))
    with pytest.raises(InputError, match="`param_suffix` mlp.grouped.weight: layer 1 takes 12 tokens .* gives 24"):
        rows_of(model, "mlp.grouped.weight")


@pytest.mark.parametrize(
    ("kind", "odd", "options"),
    [
        ("Llama4:Llama4ForCausalLM", "feed_forward.router.weight", {"head_dim": 4, "num_local_experts": 2}),
        ("Phimoe:PhimoeForCausalLM", "mlp.router.weight", {"num_local_experts": 2}),
    ],
)
def test_what_a_model_derives_from_a_linear_map_and_is_none_is_no_target(kind, odd, options):
    config, _, name = kind.partition(":")
    config = getattr(transformers, f"{config}TextConfig", None) or getattr(transformers, f"{config}Config")
    model = getattr(transformers, name)(config(**{**COMMON, **options}))
    (target,) = expand_projected(model, "1", "all-linear", Projection(2, 2, 0))
    assert odd in [name for name, _ in layer_list(model)[1][1].named_parameters()]
    assert odd not in [name for _, name in target.weights]
    assert odd in target.left_out(model)["names"]
    assert "self_attn.q_proj.weight" in [name for _, name in target.weights]
