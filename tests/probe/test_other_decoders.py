"""Decoders of other kinds through the probe: refused before a weight is loaded or a token drawn, or run to the end."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from architectures import COMMON, FAMILIES, LONGROPE
from tiny import VOCAB_SIZE

import probe_grad_vectors
from gradprobe.probe import run

SMALL = ["--num-prompts", 4, "--num-samples", 2, "--max-new-tokens", 6, "--bins", 2, "--device", "cpu"]
RECORD = {"prompt_idx": 0, "problem_id": "a", "prompt_ids": [5, 6, 7], "response": "", "ground_truth": ""}


@pytest.fixture
def checkpoint_of(tmp_path, checkpoint_dir):
    def save(kind: str, **options: object) -> Path:
        directory = tmp_path / kind
        shutil.copytree(checkpoint_dir, directory, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
        config = getattr(transformers, f"{kind}Config")(**{**COMMON, **options, "vocab_size": VOCAB_SIZE})
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(directory)
        for file in checkpoint_dir.glob("tokenizer*"):
            shutil.copy(file, directory)
        return directory

    return save


def probe(output: Path, model: Path, *arguments: object) -> int:
    flags = ["--model-path", model, "--output-dir", output, *SMALL, *arguments]
    return probe_grad_vectors.main(list(map(str, flags)))


def test_a_decoder_without_a_cache_is_refused_before_its_weights_are_loaded(
    tmp_path, checkpoint_of, problems_file, capsys, monkeypatch
):
    model = checkpoint_of("Rwkv", attention_hidden_size=16, context_length=64)
    monkeypatch.setattr(run, "load_checkpoint", lambda *_: pytest.fail("weights were loaded"))
    assert probe(tmp_path / "out", model, "--dataset", problems_file, "--param-suffix", "attention.key.weight") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "RwkvForCausalLM hands on no cache" in line
    assert "--sampler openai" in line
    assert "--rollouts" in line


def test_longrope_is_refused_where_prompt_and_response_could_pass_its_length(
    tmp_path, checkpoint_of, problems_file, capsys
):
    model, out = checkpoint_of("Phi3", **LONGROPE), tmp_path / "out"
    assert probe(out, model, "--dataset", problems_file, "--max-new-tokens", 20) == 2
    assert "--max-new-tokens 20: up to 32 tokens with the prompt, and beyond 26" in capsys.readouterr().err
    assert not (out / "rollouts.jsonl").exists()
    assert probe(tmp_path / "short", model, "--dataset", problems_file, "--max-new-tokens", 14) == 0
    records = [
        {**RECORD, "sample_idx": n, "response_ids": [8] * n, "correct": True}
        | dict.fromkeys(("entropies", "logprobs"), [0.0] * n)
        for n in (4, 24)
    ]
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--model-path", model, "--output-dir", tmp_path / "given", "--rollouts", file, "--bins", 2]
    assert probe_grad_vectors.main(list(map(str, flags))) == 2
    assert f"--rollouts {file}: up to 27 tokens with the prompt, and beyond 26" in capsys.readouterr().err


def test_a_hybrid_mixture_is_probed_to_the_end_and_what_it_leaves_out_is_said(
    tmp_path, checkpoint_of, problems_file, capsys
):
    model, out = checkpoint_of("Qwen3Next", **FAMILIES["qwen3_next_hybrid"][1]), tmp_path / "out"
    flags = ["--dataset", problems_file, "--project", "2x2", "--layer", "all", "--param-suffix", "all-linear"]
    assert probe(out, model, *flags) == 0
    n_left_out = 3 * (4 * 16 + 4 * 16 * 16 + 4 * 16 * 8) + 2 * 48 * 4  # routers and experts; two convolutions
    assert f"all-linear takes no part of {n_left_out} parameters that lie in no linear map" in capsys.readouterr().err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["left_out"]["n_parameters"] == n_left_out
    assert manifest["num_zero_rows"] == 0
