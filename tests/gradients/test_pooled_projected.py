"""Sums over buckets and projected weights, against sums of token gradients and the whole weight's gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import FAMILIES, certain_of_family, tiny_of_family
from engine_runs import likeliest_responses, random_rollouts
from tiny import plain_log_prob, relative_error, tiny_model
from transformers.pytorch_utils import Conv1D

from gradprobe.common.errors import InputError
from gradprobe.gradients.chosen import Chosen
from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.targets import (
    ProjectedTarget,
    Projection,
    Target,
    expand_projected,
    expand_targets,
    full_name,
    linears_of,
    signs,
)
from gradprobe.rollouts.score import score_responses

DOWN = "mlp.down_proj.weight"
N_BUCKETS = 3


def gradients_of(
    model, targets, prompts, responses, chosen, batch_tokens=90
) -> list[dict[tuple[int, int], torch.Tensor]]:
    """For each target, its gradients by (rollout, k)."""
    found: list[dict[tuple[int, int], torch.Tensor]] = [{} for _ in targets]
    chosen = [of if isinstance(of, Chosen) else Chosen.each(of) for of in chosen]
    places = [(i, k) for i, of in enumerate(chosen) for k in range(of.n_gradients)]
    for _, rows, gradients in GradientEngine(model, targets).batches(prompts, responses, chosen, batch_tokens):
        for of_target, part in zip(found, gradients, strict=True):
            of_target.update(zip([places[row] for row in rows], part, strict=True))
    return found


def rollouts_in_buckets(seed: int) -> tuple[list[list[int]], list[list[int]], list[np.ndarray]]:
    prompts, responses = random_rollouts(6, seed)
    prompts, responses = [[t % 57 + 3 for t in p] for p in prompts], [[t % 57 + 3 for t in r] for r in responses]
    rng = np.random.default_rng(seed)
    return prompts, responses, [rng.integers(N_BUCKETS, size=len(response)) for response in responses]


def whole_gradient(model, weight, tokens: list[int], first: int, positions: np.ndarray) -> torch.Tensor:
    """∇ Σ log π at `positions` of the response with respect to the whole weight, [out, in], by autograd."""
    linear = linears_of(model, [Target(*weight, 0)])[weight]
    linear.weight.requires_grad_(True)
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    log_prob = sum(plain_log_prob(logits[at - 1], tokens[at]) for at in positions + first)
    gradient = torch.autograd.grad(log_prob, linear.weight)[0]
    linear.weight.requires_grad_(False)
    return gradient.T if isinstance(linear, Conv1D) else gradient


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pooled_gradient_is_the_sum_of_its_tokens(family):
    prompts, responses, buckets = rollouts_in_buckets(1)
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = tiny_of_family(family, dtype)
        targets = [Target(layer, suffix, row) for layer in (0, 2) for suffix in FAMILIES[family][2] for row in (0, 3)]
        pooled = gradients_of(model, targets, prompts, responses, list(map(Chosen.pooled, buckets)))
        singly = gradients_of(model, targets, prompts, responses, [np.arange(len(r)) for r in responses])
        for of_target, of_token in zip(pooled, singly, strict=True):
            assert len(of_target) == sum(len(np.unique(b)) for b in buckets)
            for i, of_rollout in enumerate(buckets):
                for k, bucket in enumerate(np.unique(of_rollout)):
                    total = sum(of_token[i, t] for t in np.flatnonzero(of_rollout == bucket))
                    assert total.norm() > 0
                    assert relative_error(of_target[i, k], total) < limit


def all_maps(model, layers: str, projection: Projection) -> ProjectedTarget:
    """All linear maps together, but for Mamba's with whose weight it multiplies without calling the map."""
    (target,) = expand_projected(model, layers, "all-linear", projection)
    return replace(target, weights=tuple(w for w in target.weights if w[1] != "mixer.dt_proj.weight"))


def projected_by_autograd(model, target, tokens: list[int], first: int, positions: np.ndarray) -> torch.Tensor:
    """P ∇_W Qᵀ of every weight of `target`, side by side."""
    parts = []
    for weight, linear in linears_of(model, [target]).items():
        left, right = (torch.from_numpy(s).double() for s in signs(target.projection, full_name(model, weight), linear))
        parts.append((left @ whole_gradient(model, weight, tokens, first, positions) @ right.T).flatten())
    return torch.cat(parts)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_projected_gradient_is_the_whole_weights_projected(family):
    model = tiny_of_family(family)
    prompts, responses, buckets = rollouts_in_buckets(2)
    target = all_maps(model, "all", Projection(3, 2, seed=5))
    (found,) = gradients_of(model, [target], prompts, responses, list(map(Chosen.pooled, buckets)))
    assert target.row_dim(model) == 6 * len(target.weights)
    for (i, k), gradient in found.items():
        positions = np.flatnonzero(buckets[i] == np.unique(buckets[i])[k])
        expected = projected_by_autograd(model, target, prompts[i] + responses[i], len(prompts[i]), positions)
        assert relative_error(gradient, expected) < 1e-10


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_and_projected_gradients_of_certain_tokens(family):
    """Buckets of tokens with 1 − π below 1e-6, whose gradients float32 would lose in the rounding of π."""
    model = certain_of_family(family)
    prompts = rollouts_in_buckets(6)[0][:3]
    responses = likeliest_responses(model, prompts, 6)
    scores = {i: of for batch in score_responses(model, prompts, responses, 90) for i, of in batch.items()}
    buckets = [np.searchsorted([1e-9, 1e-6], scores[i].tail_mass) for i in range(3)]
    assert sum(map(len, buckets)) > sum(np.count_nonzero(b == 2) for b in buckets)
    target = all_maps(model, "1", Projection(3, 2, seed=5))
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        narrow = certain_of_family(family, dtype)
        (found,) = gradients_of(narrow, [target], prompts, responses, list(map(Chosen.pooled, buckets)))
        for (i, k), gradient in found.items():
            positions = np.flatnonzero(buckets[i] == np.unique(buckets[i])[k])
            expected = projected_by_autograd(model, target, prompts[i] + responses[i], len(prompts[i]), positions)
            assert relative_error(gradient.double(), expected) < limit


def test_inner_products_keep_their_expectation_over_seeds():
    model = tiny_model(3, torch.float64)
    prompts, responses, buckets = rollouts_in_buckets(3)
    weight, (a, b) = (1, DOWN), (0, 1)
    whole = [
        whole_gradient(model, weight, prompts[i] + responses[i], len(prompts[i]), np.flatnonzero(buckets[i] == 0))
        for i in (a, b)
    ]
    truth, n_rows, n_cols = float((whole[0] * whole[1]).sum()), 4, 4
    found = []
    for seed in range(64):
        target = ProjectedTarget("w", (weight,), Projection(n_rows, n_cols, seed))
        linear = linears_of(model, [target])[weight]
        sides = signs(target.projection, full_name(model, weight), linear)
        left, right = (torch.from_numpy(side).double() for side in sides)
        x, y = (left @ w @ right.T for w in whole)
        found.append(float((x * y).sum()))
    # Of products of random signs: Var <PXQ', PYQ'> <= (1 + 1/K)(1 + 1/L) - 1 times what |X|² |Y|² + <X, Y>² bound.
    scale = float(whole[0].norm() * whole[1].norm())
    bound = np.sqrt((1 + 2 / n_rows) * (1 + 2 / n_cols) - 1) * scale
    assert abs(np.mean(found) - truth) < 4 * bound / np.sqrt(64)
    assert 0.05 * bound < np.std(found) <= 1.3 * bound


def test_signs_hang_on_seed_weight_and_side_alone():
    model, other = tiny_model(1), tiny_model(2)
    weight = (1, "self_attn.o_proj.weight")  # square: its sides can only differ by name
    linears = [linears_of(m, [Target(*weight, 0)])[weight] for m in (model, other)]
    name = full_name(model, weight)
    left, right = signs(Projection(4, 4, seed=0), name, linears[0])
    for mine, theirs in zip((left, right), signs(Projection(4, 4, seed=0), name, linears[1]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not np.array_equal(left, right)
    assert not np.array_equal(left, signs(Projection(4, 4, seed=1), name, linears[0])[0])
    assert not np.array_equal(left, signs(Projection(4, 4, seed=0), name + "x", linears[0])[0])
    np.testing.assert_allclose(np.abs(left), 0.5)


def test_a_bucket_left_out_or_shifted_is_another_gradient():
    model = tiny_model(4, torch.float64)
    prompts, responses, buckets = rollouts_in_buckets(4)
    target = [Target(1, DOWN, 3)]
    (found,) = gradients_of(model, target, prompts, responses, list(map(Chosen.pooled, buckets)))
    shifted = [np.roll(b, 1) for b in buckets]
    (other,) = gradients_of(model, target, prompts, responses, list(map(Chosen.pooled, shifted)))
    differing = [relative_error(other[key], found[key]) for key in found if key in other]
    assert np.median(differing) > 0.05


def test_results_do_not_hang_on_the_batch():
    model = tiny_model(5)
    prompts, responses, buckets = rollouts_in_buckets(5)
    (target,) = expand_projected(model, "1", "all-linear", Projection(2, 2, seed=0))
    assert target.directory == "L1.all-linear.p2x2"
    chosen = list(map(Chosen.pooled, buckets))
    (alone,) = gradients_of(model, [target], prompts, responses, chosen, batch_tokens=1)
    (together,) = gradients_of(model, [target], prompts, responses, chosen, batch_tokens=10_000)
    for key, gradient in alone.items():
        assert relative_error(together[key], gradient) < 1e-5


@pytest.mark.parametrize(
    ("layers", "suffix", "names"),
    [
        ("all", "all-linear", ["all-linear.p2x3"]),
        ("0,2", "all-linear", ["L0+2.all-linear.p2x3"]),
        ("1", DOWN, [f"L1.{DOWN}.p2x3"]),
        (None, f"{DOWN},mlp.up_proj.weight", [f"L1.{DOWN}.p2x3", "L1.mlp.up_proj.weight.p2x3"]),
        ("all", DOWN, [f"L{n}.{DOWN}.p2x3" for n in range(3)]),
    ],
)
def test_projected_targets_from_words(layers, suffix, names):
    targets = expand_projected(tiny_model(0), layers, suffix, Projection.of("2x3", 0))
    assert [target.directory for target in targets] == names


def test_targets_that_can_not_be():
    with pytest.raises(InputError, match="`project` 16"):
        Projection.of("16", 0)
    with pytest.raises(InputError, match="go with `project` only"):
        expand_targets(tiny_model(0), "all", DOWN, "0", 0)
    with pytest.raises(InputError, match="`param_suffix` nix"):
        expand_projected(tiny_model(0), "all", "nix", Projection(1, 1, 0))
