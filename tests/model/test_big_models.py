"""Weights spread over the CPU and the disk change nothing; what is below the target leaves nothing in memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import FAMILIES, VOCAB_SIZE, tiny_of_family
from engine_runs import engine_rows
from tiny import END_OF_TEXT, IM_END, oracle_gradient, relative_error, tiny_checkpoint, tiny_model

from gradprobe.common.errors import InputError
from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.targets import Target, full_name
from gradprobe.model import placement as placement_module
from gradprobe.model.checkpoint import CheckpointSource, load_checkpoint, load_skeleton, resolve_attention
from gradprobe.model.decoder import decoder_hidden, head_logits, layer_list
from gradprobe.model.placement import Placement, input_device, read_placement
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses
from gradprobe.rollouts.score import score_responses

CPU = torch.device("cpu")
DOWN = "mlp.down_proj.weight"
LAYER = 1
SPREAD_FAMILIES = ["qwen2_tied", "qwen3", "gemma2_softcap", "gpt2_conv1d"]


def blocks_of(model: torch.nn.Module) -> dict[str, str]:
    """Everything on the disk but the first layer and the final norm."""
    layers = layer_list(model)[0]
    placed = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        depth = layers.count(".") + 2 if name.startswith(f"{layers}.") else name.count(".")
        module = ".".join(name.split(".")[:depth])
        placed[module] = "cpu" if module == f"{layers}.0" or "norm" in module or "ln_f" in module else "disk"
    return placed


def saved_family(family: str, directory: Path) -> Path:
    """A tiny checkpoint of `family`, with some tokenizer."""
    tiny_checkpoint(directory, seed=0)
    (directory / "model.safetensors").unlink()
    tiny_of_family(family).save_pretrained(directory)
    return directory


def loaded(directory: Path, placement: Placement | None) -> torch.nn.Module:
    """In float64."""
    source = CheckpointSource(str(directory))
    attention = resolve_attention("auto", load_skeleton(source))
    return load_checkpoint(source, CPU, torch.float64, attention, placement).model


def some_rollouts() -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(VOCAB_SIZE, size=n).tolist() for n in (3, 6, 4)]
    responses = [rng.integers(VOCAB_SIZE, size=n).tolist() for n in (5, 4, 7)]
    return prompts, responses


def sampled(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[list[int]]]:
    batches = sample_responses(
        model, prompts, lambda p, s: rollout_uniforms(0, p, s, 9), Sampling(2, 9, 1.0, frozenset({7, 8})), max_rows=6
    )
    return [of_prompt for batch in batches for of_prompt in batch]


@pytest.mark.parametrize("family", SPREAD_FAMILIES)
def test_a_model_on_cpu_and_disk_samples_scores_and_differentiates_as_a_whole_one(family, tmp_path):
    directory = saved_family(family, tmp_path)
    whole = loaded(directory, None)
    spread = loaded(directory, Placement(blocks_of(whole)))
    on_disk = names_on_disk(spread)
    assert len(on_disk) > len(list(spread.parameters())) / 2
    assert input_device(spread) == CPU
    assert spread.device.type == "meta"  # which is why nothing may ask for it

    prompts, responses = some_rollouts()
    of_one_length = [prompt[:3] for prompt in prompts]  # eager attention in float64 gives NaN under padding
    assert sampled(spread, of_one_length) == sampled(whole, of_one_length)  # first: what inference mode leaves may hurt
    for found, expected in zip(
        *(score_responses(model, prompts, responses, 1000) for model in (spread, whole)), strict=True
    ):
        assert found.keys() == expected.keys()
        for i in found:
            assert np.array_equal(found[i], expected[i])

    targets = [Target(LAYER, suffix, row) for suffix in FAMILIES[family][2] for row in (0, 5)]
    positions = [np.arange(len(response)) for response in responses]
    rows = engine_rows(spread, targets, prompts, responses, positions, batch_tokens=40)
    for (t, i, p), row in rows.items():
        tokens, at = prompts[i] + responses[i], len(prompts[i]) + p
        expected = oracle_of(whole, tokens, at, full_name(whole, targets[t].weights[0]), targets[t].row_idx)
        assert relative_error(row, expected) < 1e-10
    assert names_on_disk(spread) == on_disk


def names_on_disk(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}


def oracle_of(model: torch.nn.Module, tokens: list[int], at: int, weight: str, row: int) -> torch.Tensor:
    """The oracle's gradient; GPT-2's `Conv1D` stores (in, out), so that its row is a column."""
    if "c_" not in weight:
        return oracle_gradient(model, tokens, at, weight, row)
    return oracle_gradient(model, tokens, at, weight, slice(None))[:, row]


def test_weights_of_another_checkpoint_on_the_disk_would_show(tmp_path):
    """Negative control: rows of a spread model come from what lies on the disk, not from a copy held elsewhere."""
    directory = saved_family("qwen3", tmp_path)
    whole = loaded(directory, None)
    spread = loaded(directory, Placement(blocks_of(whole)))
    prompts, responses = some_rollouts()
    positions = [np.array([len(response) - 1]) for response in responses]
    targets = [Target(LAYER, DOWN, 0)]
    expected = engine_rows(whole, targets, prompts, responses, positions, 1000)
    last = whole.model.layers[2].mlp.down_proj.weight
    last.mul_(-1)
    whole.save_pretrained(directory)
    found = engine_rows(spread, targets, prompts, responses, positions, 1000)
    assert all(relative_error(found[key], expected[key]) > 0.05 for key in expected)


def test_weights_above_the_target_stay_in_memory_until_the_batch_is_done_and_no_others(tmp_path):
    """What docs/scaling.md says that differentiating through weights on the disk costs."""
    directory = saved_family("qwen3", tmp_path)
    whole = loaded(directory, None)
    spread = loaded(directory, Placement({"model": "disk", "lm_head": "cpu"}))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        engine_rows(spread, [Target(LAYER, DOWN, 0)], [[5, 9]], [[7, 17, 3]], [np.array([2])], 100)
    for i, layer in enumerate(whole.model.layers):
        for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
            weight = linear.weight
            is_kept = any(
                torch.equal(t, weight) or torch.equal(t, weight.T) for t in kept if t.dim() == 2 and not t.is_meta
            )
            assert is_kept == (i > LAYER)


def test_auto_fills_the_memory_it_is_given_and_leaves_the_rest_on_the_disk(tmp_path):
    directory = saved_family("qwen3", tmp_path)
    skeleton = load_skeleton(CheckpointSource(str(directory)))
    everything = loaded(directory, read_placement("auto", None, None, skeleton))
    assert not any(parameter.is_meta for parameter in everything.parameters())
    tight = loaded(directory, read_placement("auto", "cpu=0.05MB", tmp_path / "offload", skeleton))
    assert {"cpu", "disk"} == set(tight.hf_device_map.values())
    prompts, responses = some_rollouts()
    positions = [np.array([1, 3]) for _ in responses]
    targets = [Target(LAYER, DOWN, 0)]
    expected = engine_rows(everything, targets, prompts, responses, positions, 1000)
    found = engine_rows(tight, targets, prompts, responses, positions, 1000)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_head_leaves_a_spread_decoder_as_it_was(tmp_path):
    """accelerate hangs its own forward on modules; taking it away would leave weights on the disk."""
    directory = saved_family("qwen3", tmp_path)
    spread = loaded(directory, Placement({"model": "disk", "lm_head": "cpu"}))
    spread.base_model.forward = spread.base_model.forward  # as a hook on the decoder itself does
    kept = spread.base_model.forward
    ids = torch.tensor([[3, 4, 5]])
    hidden = decoder_hidden(spread, ids)
    logits = head_logits(spread, hidden[0].detach())
    assert spread.base_model.forward is kept
    assert torch.equal(decoder_hidden(spread, ids), hidden)
    assert torch.allclose(spread(input_ids=ids).logits[0], logits, rtol=0, atol=1e-12)
    whole = loaded(directory, None)
    head_logits(whole, decoder_hidden(whole, ids)[0])
    assert "forward" not in vars(whole.base_model)


def saved_bytes(model: torch.nn.Module, layer: int) -> tuple[int, int]:
    """Bytes that autograd saves of one forward pass until the target has run, and in all; weights not counted."""
    prompts, responses = [[5, 9, 20, 31]] * 2, [[7, 17, 3], [8, 2, 11]]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}
    until_target: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.append(tensor)  # so that no address is used twice
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept: list[torch.Tensor] = []
    linear = layer_list(model)[1][layer].mlp.down_proj
    engine = GradientEngine(model, [Target(layer, DOWN, 3)], by_hand=False)
    handle = linear.register_forward_pre_hook(lambda module, args: until_target.append(sum(seen.values())))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (_, _, (rows,)) = next(iter(engine.batches(prompts, responses, [np.array([2])] * 2, 100)))
    handle.remove()
    assert rows.norm() > 0
    return until_target[0], sum(seen.values())


def test_nothing_below_the_target_is_saved_however_deep_it_lies():
    totals = []
    for n_layers in (3, 6, 12):
        below, total = saved_bytes(tiny_model(1, num_hidden_layers=n_layers), layer=n_layers - 2)
        assert below == 0
        totals.append(total)
    assert totals[0] == totals[1] == totals[2] > 0
    shallow_target = saved_bytes(tiny_model(1, num_hidden_layers=12), layer=4)[1]
    assert shallow_target > 3 * totals[0]  # layers above the target are what costs


def test_a_weight_below_the_target_that_asks_for_a_gradient_would_show():
    model = tiny_model(1, num_hidden_layers=6)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    below, _ = saved_bytes(model, layer=4)
    assert below > 0


def test_flags_into_a_placement(tmp_path):
    skeleton = load_skeleton(CheckpointSource(str(tiny_checkpoint(tmp_path, seed=0))))
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"model": "disk", "lm_head": "cpu"}))
    placed = read_placement(str(file), None, tmp_path, skeleton)
    assert placed == Placement({"model": "disk", "lm_head": "cpu"}, None, tmp_path)
    assert placed.main_device == CPU
    limited = read_placement("auto", "cpu=1.5GiB", None, skeleton)
    assert limited.max_memory == {"cpu": "1.5GiB"}
    assert limited.main_device == CPU
    assert Placement({"model": 1, "lm_head": "cpu"}).main_device == torch.device("cuda", 1)


def test_maps_and_limits_that_can_not_be(tmp_path):
    directory = tiny_checkpoint(tmp_path, seed=0)
    skeleton = load_skeleton(CheckpointSource(str(directory)))
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"model": "disk"}))
    with pytest.raises(InputError, match="does not give any device for the following parameters: lm_head.weight"):
        read_placement(str(file), None, None, skeleton)
    with pytest.raises(InputError, match="only `device_map` auto"):
        read_placement(str(file), "cpu=1GB", None, skeleton)
    for words, complaint in (("cpu", "not in a valid format"), ("cpu=3 apples", "3 apples is not in a valid format")):
        with pytest.raises(InputError, match=complaint):
            loaded(directory, read_placement("auto", words, None, skeleton))


def test_no_accelerate_is_said(tmp_path, monkeypatch):
    skeleton = load_skeleton(CheckpointSource(str(tiny_checkpoint(tmp_path, seed=0))))
    monkeypatch.setattr(placement_module, "is_accelerate_available", lambda: False)
    with pytest.raises(InputError, match="install gradprobe\\[accelerate\\]"):
        read_placement("auto", None, None, skeleton)


@pytest.mark.slow
def test_without_accelerate_a_model_loads_as_before(tmp_path):
    """In a process that can't see accelerate: same weights as with it, which reads them straight onto the device."""
    directory = tiny_checkpoint(tmp_path, seed=0)
    program = """
import sys, importlib.util, importlib.metadata
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "accelerate" else find_spec(name, *rest)
import torch
from transformers.utils import is_accelerate_available
from gradprobe.model.checkpoint import load_checkpoint
assert not is_accelerate_available() and "accelerate" not in sys.modules
model = load_checkpoint(sys.argv[1], torch.device("cpu"), torch.float32).model
print(sum(float(p.double().sum()) for p in model.parameters()))
"""
    found = subprocess.run([sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True)
    with_it = load_checkpoint(str(directory), CPU, torch.float32)
    assert float(found.stdout) == sum(float(p.double().sum()) for p in with_it.model.parameters())
    assert with_it.end_ids == {IM_END, END_OF_TEXT}
