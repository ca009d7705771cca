"""The probe's rollouts from anywhere: data sets and templates, verifiers, files of other tools, adapters, tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import probe_grad_vectors
from gradprobe.dump.consistency import load_dump, problems_of
from gradprobe.dump.format import model_of
from gradprobe.dump.records import iter_rollouts
from gradprobe.probe.plan import make_plan

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
DATA = Path(__file__).parents[1] / "data"
SMALL = "--num-samples 2 --max-new-tokens 8 --device cpu --bins 2 --pos-per-bin-per-rollout 2".split()
VERIFIERS = """
import time

def has_even_length(response, ground_truth):
    return len(response) % 2 == 0

def fails_on_some(response, ground_truth):
    if len(response) % 2:
        raise RuntimeError("odd lengths are beyond me")
    return True

def fails(response, ground_truth):
    raise RuntimeError("never")

def hangs(response, ground_truth):
    time.sleep(60)
"""


def probe(output: Path, *arguments: object) -> int:
    return probe_grad_vectors.main(["--output-dir", str(output), *map(str, arguments)])


def manifest_of(output: Path) -> dict:
    return json.loads((output / "manifest.json").read_text())


@pytest.fixture
def verifiers(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_verifiers.py").write_text(VERIFIERS)
    monkeypatch.chdir(tmp_path)


def test_parquet_with_a_template_of_ones_own(tmp_path, checkpoint_dir, capsys):
    arguments = ["--model-path", checkpoint_dir, "--dataset", DATA / "problems" / "gsm8k.parquet", "--num-prompts", 2]
    template = ["--prompt-template", "Q: {problem}\nA:", "--verifier", "numeric"]
    assert probe(tmp_path / "out", *arguments, *SMALL, *template) == 0
    said = capsys.readouterr().err
    assert "5 rows" in said
    assert "Q: " in said
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    for rollout in iter_rollouts(tmp_path / "out" / "rollouts.jsonl"):
        text = tokenizer.decode(rollout.prompt_ids)
        assert text.startswith("Q: ")
        assert text.endswith("\nA:")
        assert rollout.ground_truth.isdigit()
    manifest = manifest_of(tmp_path / "out")
    assert manifest["prompts"]["prompt_template"] == "Q: {problem}\nA:"
    assert manifest["sampling"]["verifier"]["name"] == "numeric"
    assert manifest["dataset"]["columns"] == {"problem": "question", "answer": "answer", "id": "none"}
    assert probe(tmp_path / "out", *arguments, *SMALL, "--prompt-template", "{problem}", "--verifier", "numeric") == 2
    assert "prompts.prompt_template" in capsys.readouterr().err


def test_problems_of_reasoning_gym_judged_by_its_own_scorer(tmp_path, checkpoint_dir):
    equations = "gym:simple_equations:size=20"
    arguments = ["--model-path", checkpoint_dir, "--dataset", equations, "--verifier", "gym", "--num-prompts", 2]
    assert probe(tmp_path / "out", *arguments, *SMALL) == 0
    rollouts = list(iter_rollouts(tmp_path / "out" / "rollouts.jsonl"))
    assert {json.loads(rollout.ground_truth)["name"] for rollout in rollouts} == {"simple_equations"}
    manifest = manifest_of(tmp_path / "out")
    assert manifest["sampling"]["verifier"]["name"] == "gym"
    assert manifest["dataset"]["columns"] == {"problem": "question", "answer": "entry", "id": "id"}


def test_the_tokenizers_chat_template_renders_what_the_demo_has_rendered(tmp_path):
    records = [json.loads(line) for line in (ROOT / "demo" / "problems.jsonl").read_text().splitlines()[:4]]
    bare = tmp_path / "bare.jsonl"
    bare.write_text(
        "".join(json.dumps({"problem": r["meta"]["problem"], "answer": r["ground_truth"]}) + "\n" for r in records)
    )
    arguments = ["--model-path", ROOT / "demo" / "base", "--dataset", bare, "--num-prompts", 4, *SMALL]
    assert probe(tmp_path / "out", *arguments, "--chat-template") == 0
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "base")
    for rollout in iter_rollouts(tmp_path / "out" / "rollouts.jsonl"):
        assert tokenizer.decode(rollout.prompt_ids) == records[rollout.prompt_idx]["prompt"]


def test_only_the_studys_problems_are_rendered_and_shards_agree(checkpoint_dir, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr("gradprobe.problems.templates.in_chat", lambda messages, *_: texts.append(messages) or "1+2=")
    flags = ["--model-path", DEMO / "base", "--chat-template", "--problem-key", "meta.problem", "--num-prompts", 6]
    of_shards = []
    for shard in (0, 1):
        of_shard = ["--shard-index", shard, "--num-shards", 2, "--output-dir", tmp_path, "--device", "cpu"]
        plan = make_plan(probe_grad_vectors.parse_args(list(map(str, [*flags, *of_shard]))))
        assert len(plan.source.prompts) == 3
        of_shards.append(plan.identity["prompts"])
    assert len(texts) == 2 * 6
    assert of_shards[0] == of_shards[1]


def test_a_verifier_of_ones_own_is_asked_and_named(tmp_path, verifiers, checkpoint_dir, problems_file):
    arguments = ["--model-path", checkpoint_dir, "--dataset", problems_file, "--num-prompts", 6, *SMALL]
    assert probe(tmp_path / "out", *arguments, "--verifier", "my_verifiers:has_even_length") == 0
    rollouts = list(iter_rollouts(tmp_path / "out" / "rollouts.jsonl"))
    assert {r.correct for r in rollouts} == {True, False}
    assert all(r.correct == (len(r.response) % 2 == 0) for r in rollouts)
    described = manifest_of(tmp_path / "out")["sampling"]["verifier"]
    assert described["name"] == "my_verifiers:has_even_length"
    assert len(described["source_sha256"]) == 64


def test_rollouts_on_which_the_verifier_fails_are_left_out_and_counted(
    tmp_path, verifiers, checkpoint_dir, problems_file, capsys
):
    arguments = ["--model-path", checkpoint_dir, "--dataset", problems_file, "--num-prompts", 6, *SMALL]
    assert probe(tmp_path / "out", *arguments, "--verifier", "my_verifiers:fails_on_some") == 0
    rollouts = list(iter_rollouts(tmp_path / "out" / "rollouts.jsonl"))
    assert 0 < len(rollouts) < 12
    assert all(r.correct for r in rollouts)
    manifest = manifest_of(tmp_path / "out")
    assert manifest["num_unverified_rollouts"] == 12 - len(rollouts)
    assert manifest["num_rollouts"] == len(rollouts)
    assert "odd lengths are beyond me" in capsys.readouterr().err
    assert problems_of(tmp_path / "out")[0] == []
    for broken, word in (("fails", "never"), ("hangs", "took longer than 0.5 s")):
        status = probe(tmp_path / broken, *arguments, "--verifier", f"my_verifiers:{broken}", "--verifier-seconds", 0.5)
        assert status == 2
        error = capsys.readouterr().err
        assert "failed on every answer" in error
        assert word in error


@pytest.mark.parametrize("name", ["vllm.jsonl", "vllm_server.jsonl", "trl.parquet", "llama_cpp.jsonl"])
def test_rollouts_of_other_tools_are_probed(tmp_path, name, capsys):
    flags = ["--correct-above", 0.5] if name == "trl.parquet" else []
    if name != "trl.parquet":
        flags = ["--dataset", ROOT / "demo" / "problems.jsonl"]
    arguments = ["--model-path", ROOT / "demo" / "base", "--rollouts", DATA / "rollouts" / name, *SMALL[4:], *flags]
    assert probe(tmp_path / "out", *arguments) == 0, capsys.readouterr().err
    assert problems_of(tmp_path / "out")[0] == []
    dump = load_dump(tmp_path / "out")
    assert np.isfinite(dump.grads[:]).all()
    assert len(dump.grads) > 0
    assert manifest_of(tmp_path / "out")["rollouts_from"]["sha256"]


def test_rollouts_of_a_dump_that_have_changed_since_are_refused(tmp_path, checkpoint_dir, problems_file, capsys):
    model = ["--model-path", checkpoint_dir]
    assert probe(tmp_path / "out", *model, "--dataset", problems_file, "--num-prompts", 4, *SMALL) == 0
    rollouts = tmp_path / "out" / "rollouts.jsonl"
    text = rollouts.read_text()
    for given in (tmp_path / "out", rollouts):
        rollouts.write_text(text.replace('"correct": false', '"correct": true', 1))
        assert probe(tmp_path / "again", *model, "--rollouts", given, *SMALL[4:]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: --rollouts {rollouts}: has changed since its dump was written")
        assert not (tmp_path / "again").exists()
        rollouts.write_text(text)
        assert probe(tmp_path / f"sound{given.suffix}", *model, "--rollouts", given, *SMALL[4:]) == 0


def test_an_adapter_probed_is_the_merged_checkpoint_probed(tmp_path, checkpoint_dir, problems_file):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint_dir), config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    arguments = ["--dataset", problems_file, "--num-prompts", 4, *SMALL]
    assert probe(tmp_path / "a", "--model-path", checkpoint_dir, "--adapter", tmp_path / "adapter", *arguments) == 0
    assert probe(tmp_path / "m", "--model-path", tmp_path / "merged", *arguments) == 0
    assert probe(tmp_path / "b", "--model-path", checkpoint_dir, *arguments) == 0
    with_adapter, from_merged, without = ((tmp_path / name / "grads.npy").read_bytes() for name in "amb")
    assert with_adapter == from_merged != without
    assert manifest_of(tmp_path / "a")["model_identity"].keys() == {"weights_sha256", "tokenizer_sha256", "adapter"}
    assert model_of(manifest_of(tmp_path / "a")).endswith("adapter")


def test_weights_on_the_disk_give_the_same_dump(tmp_path, checkpoint_dir, problems_file):
    arguments = ["--model-path", checkpoint_dir, "--dataset", problems_file, "--num-prompts", 4, *SMALL]
    assert probe(tmp_path / "whole", *arguments) == 0
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    (tmp_path / "places.json").write_text(json.dumps(places))
    spread = [argument for argument in arguments if argument not in ("--device", "cpu")]
    assert probe(tmp_path / "spread", *spread, "--device-map", tmp_path / "places.json") == 0
    for name in ("meta.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "spread" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Weights that are fetched when needed run their modules' own backward pass, which rounds otherwise.
    spread_grads, whole_grads = (np.load(tmp_path / name / "grads.npy") for name in ("spread", "whole"))
    assert np.linalg.norm(spread_grads - whole_grads) < 1e-6 * np.linalg.norm(whole_grads)
    assert manifest_of(tmp_path / "spread")["device_map"]["model.layers.2"] == "disk"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, "out")),
        ({"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}, (1, 3, "out_s1")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, "out")),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}, (2, 4, "out_s2")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, "out")),  # a batch script, not a task of srun
    ],
)
def test_tasks_take_their_shard_from_the_environment(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = probe_grad_vectors.parse_args(["--model-path", "m", "--output-dir", "some/out"])
    assert (args.shard_index, args.num_shards, args.output_dir.name) == expected
    flags = ["--model-path", "m", "--output-dir", "some/out", "--shard-index", "1", "--num-shards", "2"]
    args = probe_grad_vectors.parse_args(flags)
    assert (args.shard_index, args.num_shards, args.output_dir.name) == (1, 2, "out")


@pytest.mark.slow
def test_torchrun_gives_the_shards_that_flags_give(tmp_path, checkpoint_dir, problems_file):
    arguments = ["--model-path", checkpoint_dir, "--dataset", problems_file, "--num-prompts", 4, *SMALL]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += [ROOT / "probe_grad_vectors.py", "--output-dir", tmp_path / "out", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True, timeout=300)
    for i in range(2):
        assert probe(tmp_path / f"flags{i}", *arguments, "--shard-index", i, "--num-shards", 2) == 0
        for name in ("grads.npy", "meta.jsonl", "rollouts.jsonl"):
            assert (tmp_path / f"out_s{i}" / name).read_bytes() == (tmp_path / f"flags{i}" / name).read_bytes()


def test_responses_end_where_the_tokenizer_of_the_adapter_says(tmp_path, checkpoint_dir, problems_file):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter, tokenizer = tmp_path / "adapter", AutoTokenizer.from_pretrained(checkpoint_dir)
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint_dir), config).save_pretrained(adapter)
    probed = ["--model-path", checkpoint_dir, "--adapter", adapter, "--dataset", problems_file, "--num-prompts", 4]
    assert probe(tmp_path / "before", *probed, *SMALL) == 0
    drawn = [rollout.response_ids for rollout in iter_rollouts(tmp_path / "before" / "rollouts.jsonl")]
    end = next(ids[1] for ids in drawn if len(ids) > 3 and ids[1] < 256)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(adapter)
    assert probe(tmp_path / "after", *probed, *SMALL) == 0
    after = [rollout.response_ids for rollout in iter_rollouts(tmp_path / "after" / "rollouts.jsonl")]
    assert sum(end in ids for ids in after) > 0
    assert not any(end in ids[:-1] for ids in after)
    manifests = [manifest_of(tmp_path / name) for name in ("before", "after")]
    assert [end in manifest["end_ids"] for manifest in manifests] == [False, True]
    assert [manifest.get("tokenizer_path") for manifest in manifests] == [None, str(adapter)]


def test_tokens_that_the_model_did_not_sample_are_said_to_be_others(tmp_path, capsys):
    """A server's response without its reasoning, a wrong chat template, another checkpoint: all show here."""
    ids = np.random.default_rng(0).integers(200, 300, (4, 2, 30)).tolist()
    lines = [
        {"prompt": f"{p}+2", "prompt_token_ids": [p + 10], "outputs": [{"token_ids": of} for of in samples]}
        for p, samples in enumerate(ids)
    ]
    lines = [line | {"ground_truth": "3"} for line in lines]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--model-path", DEMO / "base", "--rollouts", tmp_path / "a.jsonl", "--device", "cpu", "--sample-only"]
    assert probe(tmp_path / "out", *arguments, "--min-mixed-prompts", 0) == 0
    assert "warning: log π + H is -" in capsys.readouterr().err
