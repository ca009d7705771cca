"""Adapters: merged they are what they were trained as, with the tokenizer they were trained with, or are refused."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
import transformers.models.auto.auto_factory
from faults.test_bad_input import edit_json
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import IM_END, VOCAB_SIZE, tiny_checkpoint, tiny_model
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from gradprobe.common.errors import InputError
from gradprobe.model.checkpoint import CheckpointSource, load_checkpoint, load_tokenizer
from gradprobe.model.identity import checkpoint_identity, file_states

CPU = torch.device("cpu")
IDS = torch.tensor([[49, 43, 50, 61, 7, 99, 200, 3]])


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A checkpoint whose embedding is its head too."""
    directory = tiny_checkpoint(tmp_path / "tied", seed=0)
    model = tiny_model(0, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(directory)
    return directory


def save_adapter(directory: Path, base: Path, config: Any) -> Path:
    """A random adapter of `base`, which changes it about as much as training does."""
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(directory)
    return directory


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **{"target_modules": ["q_proj"], **options})


def log_probs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits, -1)


def merged(base: Path, adapter: Path | None, **options: Any) -> torch.nn.Module:
    source = CheckpointSource(str(base), adapter=adapter and str(adapter), **options)
    return load_checkpoint(source, CPU, torch.float32).model


ENDS = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding and a layer": {"target_modules": ["embed_tokens", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both as one": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "an embedding of its own": {"modules_to_save": ["embed_tokens"]},
    "some tokens": {"trainable_token_indices": [49, 50]},
}


@pytest.mark.parametrize("options", ENDS.values(), ids=ENDS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_one_end_of_tied_embeddings_changes_that_end_alone(tied, tmp_path, options):
    adapter = save_adapter(tmp_path / "adapter", tied, lora(**options))
    unmerged = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(tied), adapter).eval()
    expected, without = log_probs(unmerged), log_probs(merged(tied, None))
    assert (expected - without).abs().max() > 0.05
    assert (log_probs(merged(tied, adapter)) - expected).abs().max() < 1e-5


# Adapter files beside whole weights


def without_peft(patch: pytest.MonkeyPatch) -> None:
    for module in (transformers.integrations.peft, transformers.models.auto.auto_factory):
        patch.setattr(module, "is_peft_available", lambda *_: False)


@pytest.mark.filterwarnings("ignore")
def test_adapter_files_beside_merged_weights_are_said_and_not_put_on_top(checkpoint_dir, tmp_path, monkeypatch, caplog):
    adapter = save_adapter(tmp_path / "adapter", checkpoint_dir, lora())
    whole = Path(shutil.copytree(checkpoint_dir, tmp_path / "whole"))
    merged(checkpoint_dir, adapter).save_pretrained(whole)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, whole)
    expected = log_probs(merged(checkpoint_dir, adapter))
    with caplog.at_level(logging.WARNING):
        found = merged(whole, None)
    assert torch.equal(log_probs(found), expected)
    assert not any("lora" in name for name, _ in found.named_modules())
    (said,) = (record.message for record in caplog.records if "adapter" in record.message)
    assert "holds whole weights and an adapter beside them, which is left out" in said
    source = CheckpointSource(str(whole))
    identity = checkpoint_identity(source, found)
    without_peft(monkeypatch)
    assert torch.equal(log_probs(merged(whole, None)), expected)
    (whole / "adapter_model.safetensors").unlink()
    assert checkpoint_identity(source, found) == identity


# The adapter's own tokenizer


def tokenizer_of(base: Path, change: Callable[[Any], None]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(base)
    change(tokenizer)
    return tokenizer


def ends_otherwise(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ messages[0].content }}!"


def one_token_more(tokenizer: Any) -> None:
    tokenizer.add_tokens(AddedToken("<pad>", special=True))


def too_many_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCAB_SIZE - IM_END)])


def test_the_tokenizer_that_an_adapter_brings_is_taken_and_said(checkpoint_dir, tmp_path, caplog):
    adapter = save_adapter(tmp_path / "adapter", checkpoint_dir, lora())
    alone = CheckpointSource(str(checkpoint_dir), adapter=str(adapter))
    model = load_checkpoint(alone, CPU, torch.float32).model
    identity_before, states_before = checkpoint_identity(alone, model), file_states(alone)
    assert load_tokenizer(alone).chat_template is None
    assert "tokenizer" not in caplog.text

    tokenizer_of(checkpoint_dir, ends_otherwise).save_pretrained(adapter)
    with caplog.at_level(logging.INFO):
        found = load_checkpoint(alone, CPU, torch.float32)
    assert found.tokenizer.chat_template == "{{ messages[0].content }}!"
    assert found.tokenizer.eos_token == "<|endoftext|>"
    assert f"`adapter` {adapter}: its own tokenizer is taken" in caplog.text
    identity = checkpoint_identity(alone, model)
    assert identity["tokenizer_sha256"] != identity_before["tokenizer_sha256"]
    assert identity["weights_sha256"] == identity_before["weights_sha256"]
    assert identity["adapter"] == identity_before["adapter"]
    assert {Path(state[0]).parent for state in file_states(alone)} == {checkpoint_dir, adapter}
    assert len(file_states(alone)) > len(states_before)

    named = CheckpointSource(str(checkpoint_dir), adapter=str(adapter), tokenizer=str(checkpoint_dir))
    assert load_tokenizer(named).chat_template is None
    assert checkpoint_identity(named, model) == identity_before


def test_an_adapter_on_the_hub_brings_its_tokenizer_too(monkeypatch):
    source, asked = CheckpointSource("org/base", adapter="org/adapter"), []
    answers = [None, EntryNotFoundError("none there"), LocalEntryNotFoundError("no network")]

    def download(*asked_for: str, revision: str | None) -> None:
        asked.append(asked_for)
        if error := answers[len(asked) - 1]:
            raise error

    monkeypatch.setattr("gradprobe.model.source.hf_hub_download", download)
    assert source.tokenizer_place == ("adapter", "org/adapter")
    assert source.tokenizer_place == ("model_path", "org/base")
    with pytest.raises(InputError, match="`adapter` org/adapter: no such directory, and .* the Hub: no network"):
        _ = source.tokenizer_place
    assert asked == [("org/adapter", "tokenizer_config.json")] * 3


@pytest.mark.parametrize("parameter", ["adapter", "tokenizer"])
def test_a_tokenizer_whose_ids_mean_something_else_is_refused(checkpoint_dir, tmp_path, parameter):
    folder = save_adapter(tmp_path / "folder", checkpoint_dir, lora())
    source = CheckpointSource(str(checkpoint_dir), **{parameter: str(folder)})
    tokenizer_of(checkpoint_dir, one_token_more).save_pretrained(folder)
    assert len(load_tokenizer(source)) == IM_END + 2
    tokenizer_of(checkpoint_dir, too_many_tokens).save_pretrained(folder)
    with pytest.raises(InputError, match=rf"`{parameter}` .*: its tokenizer has ids up to 260, the model's voc"):
        load_tokenizer(source)
    tokenizer_of(checkpoint_dir, ends_otherwise).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"`{parameter}` .*: its tokenizer gives 2 tokens other ids than .*: 1, 2"):
        load_tokenizer(source)


def test_a_checkpoint_without_tokenizer_takes_the_one_that_is_named(checkpoint_dir, tmp_path):
    bare = Path(shutil.copytree(checkpoint_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("token*")))
    with pytest.raises(InputError, match="`model_path` .*: no tokenizer in it; name one by `tokenizer`"):
        load_tokenizer(CheckpointSource(str(bare)))
    source = CheckpointSource(str(bare), tokenizer=str(checkpoint_dir))
    found = load_checkpoint(source, CPU, torch.float32)
    assert len(found.tokenizer) == IM_END + 1
    original = CheckpointSource(str(checkpoint_dir))
    identity = checkpoint_identity(source, found.model)
    assert identity["tokenizer_sha256"] == checkpoint_identity(original, found.model)["tokenizer_sha256"]
    for named, says in ((tmp_path / "nowhere", "no such directory"), (bare, "no tokenizer in it")):
        with pytest.raises(InputError, match=f"`tokenizer` {named}: {says}"):
            load_tokenizer(CheckpointSource(str(checkpoint_dir), tokenizer=str(named)))


# Adapters that can't be merged, or are another model's


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_base_is_said(checkpoint_dir, tmp_path, caplog):
    adapter = save_adapter(tmp_path / "adapter", checkpoint_dir, lora())
    for named, is_said in (
        ("model", False), ("Org/model", False), ("/elsewhere/models--Org--Model/snapshots/0a1b", False),
        (None, False), ("", False), ("Org/other", True),
    ):  # fmt: skip
        caplog.clear()
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)
        merged(checkpoint_dir, adapter)
        assert ("was trained on Org/other" in caplog.text) == is_said, named


OTHER_BASES = {
    "wider": ({"hidden_size": 32}, "size mismatch"),
    "deeper": ({"num_hidden_layers": 4}, "of which the model has no part"),
    "shallower": ({"num_hidden_layers": 2}, "lacks"),
}


@pytest.mark.parametrize("name", OTHER_BASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_base_of_other_sizes_is_refused(checkpoint_dir, tmp_path, name):
    changes, says = OTHER_BASES[name]
    other = Path(shutil.copytree(checkpoint_dir, tmp_path / "other"))
    config = Qwen2ForCausalLM.from_pretrained(checkpoint_dir).config
    for key, value in changes.items():
        setattr(config, key, value)
    config.layer_types = None
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    Qwen2ForCausalLM(config).save_pretrained(other)
    adapter = save_adapter(tmp_path / "adapter", other, lora())
    with pytest.raises(InputError, match=f"`adapter` .*{says}") as caught:
        merged(checkpoint_dir, adapter)
    assert "\n" not in str(caught.value)
