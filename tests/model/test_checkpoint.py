"""What is said of a checkpoint that can't be loaded: bad input where its files are at fault, else a traceback."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from faults.test_bad_input import edit_json
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, BartForCausalLM

from gradprobe.common.errors import InputError
from gradprobe.model import checkpoint
from gradprobe.model.checkpoint import CheckpointSource, load_checkpoint, load_skeleton, load_tokenizer

CPU = torch.device("cpu")
OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


def raising(error: Exception):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


LOADERS = {
    "weights": (AutoModelForCausalLM, "from_pretrained"),
    "tokenizer": (AutoTokenizer, "from_pretrained"),
    "skeleton": (AutoModelForCausalLM, "from_config"),
}


def skeleton_and_all(path: Path) -> None:
    load_skeleton(CheckpointSource(str(path)))
    load_checkpoint(str(path), CPU, torch.float32)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("loader", LOADERS)
def test_memory_that_runs_out_is_no_bad_input(checkpoint_dir, monkeypatch, error, loader):
    monkeypatch.setattr(*LOADERS[loader], raising(error))
    with pytest.raises(type(error)):
        skeleton_and_all(checkpoint_dir)


@pytest.mark.parametrize("error", [AttributeError("x"), TypeError("x"), KeyError("x"), ValueError("x"), OSError("x")])
@pytest.mark.parametrize("name", ["refuse_other_weights", "end_token_ids"])
def test_bugs_of_ours_come_through(checkpoint_dir, monkeypatch, name, error):
    monkeypatch.setattr(checkpoint, name, raising(error))
    with pytest.raises(type(error)):
        load_checkpoint(str(checkpoint_dir), CPU, torch.float32)


@pytest.mark.parametrize("error", [AttributeError("x"), TypeError("x"), RuntimeError("x")])
def test_faults_of_the_library_while_it_reads_weights_come_through(checkpoint_dir, monkeypatch, error):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raising(error))
    with pytest.raises(type(error)):
        load_checkpoint(str(checkpoint_dir), CPU, torch.float32)


ILL_EDITED = [
    *({"num_hidden_layers": "3"}, {"num_hidden_layers": 5}, {"rms_norm_eps": "1e-6"}, {"hidden_act": "zzz"}),
    *({"layer_types": ["x"]}, {"rope_scaling": {"type": "spiral", "factor": 2.0}, "rope_parameters": None}),
    *({"model_type": "t5"}, {"model_type": "vit"}),
]


@pytest.mark.parametrize("changes", ILL_EDITED, ids=str)
def test_configs_edited_by_mistake_are_bad_input(checkpoint_dir, tmp_path, changes):
    model = Path(shutil.copytree(checkpoint_dir, tmp_path / "model"))
    edit_json(model / "config.json", **changes)
    with pytest.raises(InputError, match="`model_path` .*can't be loaded: ") as caught:
        load_skeleton(CheckpointSource(str(model)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("`") == 2  # transformers' own would pass for parameters


@pytest.mark.parametrize("content", ["", '{"version": "1.0",', "{}"])
def test_tokenizers_that_were_cut_are_bad_input(checkpoint_dir, tmp_path, content):
    model = Path(shutil.copytree(checkpoint_dir, tmp_path / "model"))
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="can't be loaded"):
        load_tokenizer(CheckpointSource(str(model)))


def test_a_decoder_that_counts_positions_by_itself_is_refused_before_anything_is_sampled(checkpoint_dir, tmp_path):
    model = Path(shutil.copytree(checkpoint_dir, tmp_path / "model"))
    sizes = {"vocab_size": 260, "d_model": 16, "decoder_ffn_dim": 24, "decoder_layers": 3, "encoder_layers": 3}
    heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4}
    BartForCausalLM(BartConfig(**sizes, **heads, max_position_embeddings=64)).save_pretrained(model)
    with pytest.raises(InputError, match="BartForCausalLM: BartDecoder takes no position ids"):
        load_skeleton(CheckpointSource(str(model)))
