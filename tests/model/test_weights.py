"""Weights that are not the model's: cut, of other shapes, too few or too many; each is named, or is fine."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.test_bad_input import edit_json
from safetensors.torch import load_file, save_file

from gradprobe.common.errors import InputError
from gradprobe.model.checkpoint import CheckpointSource, load_checkpoint, load_skeleton

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"
Weights = dict[str, torch.Tensor]
Spoil = Callable[[Path], object]


def config(**changes: object) -> Spoil:
    return lambda checkpoint: edit_json(checkpoint / "config.json", **changes)


def weights(change: Callable[[Weights], object]) -> Spoil:
    def spoil(checkpoint: Path) -> None:
        found = load_file(checkpoint / "model.safetensors")
        change(found)
        save_file(found, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return spoil


def more(*names: str) -> Spoil:
    return weights(lambda found: found.update({name: found[DOWN].clone() for name in names}))


def cast(dtype: torch.dtype) -> Spoil:
    return weights(lambda found: found.update({name: weight.to(dtype) for name, weight in found.items()}))


def cut(n_bytes: int) -> Spoil:
    return lambda checkpoint: os.truncate(checkpoint / "model.safetensors", n_bytes)


def in_parts(checkpoint: Path, n_written: int = 2) -> None:
    """Two files and their index, of which the first `n_written` are there."""
    found = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + (name == DOWN)}-of-00002.safetensors" for name in found}
    for file in sorted(set(parts.values()))[:n_written]:
        of_file = {name: weight for name, weight in found.items() if parts[name] == file}
        save_file(of_file, checkpoint / file, metadata={"format": "pt"})
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))


def lost(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("nowhere")


UNREADABLE = {
    "cut": (cut(5000), "model.safetensors: can't be loaded: .*header"),
    "empty": (cut(0), "model.safetensors: can't be loaded: .*header too small"),
    "a part is missing": (lambda path: in_parts(path, 1), "No such file.*model-00002-of-00002.safetensors"),
    "a link to nothing": (lost, "no model.safetensors in it, nor its index"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_hold_no_weights_are_refused_before_any_are_loaded(checkpoint_dir, tmp_path, name):
    spoil, says = UNREADABLE[name]
    spoil(Path(shutil.copytree(checkpoint_dir, tmp_path / "model")))
    with pytest.raises(InputError, match=f"`model_path` .*{says}") as caught:
        load_skeleton(CheckpointSource(str(tmp_path / "model")))
    assert "\n" not in str(caught.value)


OF_ANOTHER_MODEL = {
    "more layers than the file": (config(num_hidden_layers=5, layer_types=None), "lacks weights .*layers.3"),
    "fewer layers than the file": (config(num_hidden_layers=2, layer_types=None), "no place for: model.layers.2"),
    "hidden size": (config(hidden_size=32), "other shapes"),
    "vocabulary": (config(vocab_size=300), "other shapes"),
    "intermediate size": (config(intermediate_size=48), "other shapes .*mlp"),
    "shape turned": (weights(lambda found: found.update({DOWN: found[DOWN].T.contiguous()})), f"shapes .*: {DOWN}$"),
    "a weight lost": (weights(lambda found: found.pop(DOWN)), f"lacks weights of its architecture: {DOWN}$"),
    "layers of another depth": (more("model.layers.3.mlp.down_proj.weight"), "no place for: .*layers.3.mlp.down_proj"),
    "a bias": (more("model.layers.1.mlp.down_proj.bias"), "no place for: .*layers.1.mlp.down_proj.bias"),
    "norms": (more("model.layers.1.self_attn.q_norm.weight"), "no place for: .*self_attn.q_norm"),
    "a head's bias": (more("lm_head.bias"), "no place for: lm_head.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ANOTHER_MODEL)
def test_weights_of_another_model_are_refused_by_name(checkpoint_dir, tmp_path, name):
    spoil, says = OF_ANOTHER_MODEL[name]
    spoil(Path(shutil.copytree(checkpoint_dir, tmp_path / "model")))
    with pytest.raises(InputError, match=f"`model_path` .*{says}") as caught:
        load_checkpoint(str(tmp_path / "model"), CPU, torch.float32)
    assert "\n" not in str(caught.value)


FINE = {
    "in two files": (in_parts, ""),
    "float64": (cast(torch.float64), ""),
    "bfloat16": (cast(torch.bfloat16), ""),
    "a value head": (more("v_head.summary.weight", "score.weight"), "left out: score.weight, v_head.summary.weight"),
    "rotary frequencies": (more("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"), ""),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_no_part_of_the_model_is_left_out_and_said(checkpoint_dir, tmp_path, caplog, name):
    spoil, says = FINE[name]
    spoil(Path(shutil.copytree(checkpoint_dir, tmp_path / "model")))
    source = CheckpointSource(str(tmp_path / "model"))
    load_skeleton(source)
    found, expected = (load_checkpoint(of, CPU, torch.float32).model for of in (source, str(checkpoint_dir)))
    assert says in caplog.text
    tolerance = 0.01 if name == "bfloat16" else 0.0
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=tolerance, atol=0)
