"""Folders as trainers leave them: what is no checkpoint is called by its name, and what to do is said."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gradprobe.common.errors import InputError
from gradprobe.model.checkpoint import CheckpointSource, load_checkpoint, load_skeleton

CPU = torch.device("cpu")


@pytest.fixture
def adapter(checkpoint_dir, tmp_path) -> Path:
    """As TRL leaves one, but for its optimizer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir)
    folder = tmp_path / "checkpoint-9"
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(folder)
    return folder


def test_an_adapter_in_the_place_of_a_model_hears_of_the_flag_for_adapters(adapter, checkpoint_dir):
    what_to_do = f"give it as `adapter`, and as `model_path` its base, {checkpoint_dir}"
    for beside in ((), ("config.json",), ("generation_config.json", "tokenizer.json", "tokenizer_config.json")):
        for name in beside:
            shutil.copy(checkpoint_dir / name, adapter)
        with pytest.raises(InputError) as caught:
            load_skeleton(CheckpointSource(str(adapter)))
        assert str(caught.value) == f"`model_path` {adapter}: is an adapter; {what_to_do}"


def test_a_folder_of_checkpoints_says_which_lie_inside(adapter, checkpoint_dir, tmp_path):
    shutil.copytree(checkpoint_dir, tmp_path / "run" / "checkpoint-100")
    shutil.copytree(checkpoint_dir, tmp_path / "run" / "checkpoint-20")
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-9")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        load_skeleton(CheckpointSource(str(tmp_path / "run")))
    inside = "name one of the checkpoints inside: checkpoint-9, checkpoint-20, checkpoint-100"
    assert str(caught.value) == f"`model_path` {tmp_path / 'run'}: no config.json in it; {inside}"
    with pytest.raises(InputError, match=r"`adapter` .*: no adapter_model.safetensors in it; .* inside: checkpoint-9,"):
        load_checkpoint(CheckpointSource(str(checkpoint_dir), adapter=str(tmp_path / "run")), CPU, torch.float32)


def in_front(prefix: str) -> Callable[[str], str]:
    return lambda name: f"{prefix}{name}"


WRAPPED = {
    "torch.compile": in_front("_orig_mod."),
    "a compiled block": lambda name: name.replace("mlp", "mlp._orig_mod"),
    "DDP": in_front("module."),
    "FSDP": in_front("_fsdp_wrapped_module."),
    "an actor": in_front("policy."),
    "PEFT": in_front("base_model.model."),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_saved_inside_a_wrapper_are_called_so(checkpoint_dir, tmp_path, name):
    model = Path(shutil.copytree(checkpoint_dir, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights = {WRAPPED[name](key): weight for key, weight in weights.items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"`model_path` .*: its weights were saved inside a wrapper .*\.weight\)"):
        load_skeleton(CheckpointSource(str(model)))


def test_a_model_that_has_a_part_of_such_a_name_is_none(checkpoint_dir, tmp_path, monkeypatch):
    model = Path(shutil.copytree(checkpoint_dir, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"policy.weight": torch.zeros(2)}, model / "model.safetensors", {"format": "pt"})
    built = AutoModelForCausalLM.from_config

    def with_a_policy(*args: object, **kwargs: object) -> torch.nn.Module:
        skeleton = built(*args, **kwargs)
        skeleton.policy = torch.nn.Linear(2, 1)
        return skeleton

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", with_a_policy)
    assert load_skeleton(CheckpointSource(str(model))).policy is not None
