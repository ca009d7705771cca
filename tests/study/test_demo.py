"""The demo pair is what its README says: real checkpoints that load offline, honest problems, a measured gain."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2ForCausalLM

from gradprobe.model.checkpoint import end_token_ids, load_checkpoint
from gradprobe.problems.boxed import is_correct
from gradprobe.problems.data_set import load_problems, shard_of_study
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses

DEMO = Path(__file__).parents[2] / "demo"
MEGABYTE = 1_000_000
pair = pytest.mark.parametrize("name", ["base", "trained"])


@pytest.fixture(scope="module")
def problems():
    return load_problems(DEMO / "problems.jsonl").problems


@pair
def test_checkpoint_is_small_real_and_in_bfloat16(name):
    checkpoint = load_checkpoint(str(DEMO / name), torch.device("cpu"), torch.float32)
    assert isinstance(checkpoint.model, Qwen2ForCausalLM)
    config = checkpoint.model.config
    assert config.num_hidden_layers >= 8
    assert config.intermediate_size >= 384
    assert sum(file.stat().st_size for file in (DEMO / name).iterdir()) <= 8 * MEGABYTE
    with safe_open(DEMO / name / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    # As of a real checkpoint, its generation config would narrow the softmax if it were heeded.
    assert checkpoint.model.generation_config.top_k == 20
    assert len(end_token_ids(checkpoint.model, checkpoint.tokenizer)) == 2


@pair
def test_tokenizer_survives_the_auto_class(name, problems):
    auto = AutoTokenizer.from_pretrained(DEMO / name)
    file = Tokenizer.from_file(str(DEMO / name / "tokenizer.json"))
    rollouts = [f"First 3*4=12. Then 12-5 is {i}.\nSo \\boxed{{{i}}}. é ß 漢 \t x" for i in range(100)]
    for text in [problem.prompt for problem in problems] + rollouts:
        ids = auto(text, add_special_tokens=False)["input_ids"]
        assert ids == file.encode(text, add_special_tokens=False).ids
        assert auto.decode(ids) == text


def test_problems_are_many_distinct_and_rendered(problems):
    assert len(problems) >= 2000
    assert len({problem.prompt for problem in problems}) == len(problems)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    for line in (DEMO / "problems.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        chat = [{"role": "user", "content": record["meta"]["problem"]}]
        assert record["prompt"] == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_ground_truths_solve_the_problems(problems):
    """Computed from the text alone, by other means than the script that made them."""
    for problem in problems:
        if compute := re.search(r"Compute ([0-9+*()-]+)\.", problem.prompt):
            assert problem.ground_truth == str(eval(compute[1]))  # digits and + - * ( ) only, as just matched
        else:
            left, right = re.search(r"Solve ([0-9x+*()-]+)=([0-9]+)\.", problem.prompt).groups()
            assert eval(left.replace("x", problem.ground_truth)) == int(right)


def test_files_are_those_that_were_measured():
    recorded = json.loads((DEMO / "provenance.json").read_text())["eval"]["sha256"]
    assert {Path(name).name for name in recorded} >= {"problems.jsonl", "model.safetensors", "tokenizer.json"}
    for name, digest in recorded.items():
        assert hashlib.sha256((DEMO / name).read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_training_gained_what_the_readme_says(problems):
    """64 prompts × 4 rollouts of each: the recorded accuracies lie within four standard errors."""
    recorded = json.loads((DEMO / "provenance.json").read_text())["eval"]
    chosen = [problems[i] for i in shard_of_study(len(problems), 64, seed=7)]
    for name in ("base", "trained"):
        checkpoint = load_checkpoint(str(DEMO / name), torch.device("cpu"), torch.float32)
        prompts = [checkpoint.tokenizer(p.prompt, add_special_tokens=False)["input_ids"] for p in chosen]
        batches = sample_responses(
            checkpoint.model,
            prompts,
            lambda p, s: rollout_uniforms(7, p, s, 128),
            Sampling(4, 128, 1.0, checkpoint.end_ids),
        )
        correct, lengths = [], []
        for problem, samples in zip(chosen, [samples for batch in batches for samples in batch], strict=True):
            texts = [checkpoint.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples]
            correct.append(sum(is_correct(text, problem.ground_truth) for text in texts) / 4)
            lengths += [len(ids) for ids in samples]
        accuracy = sum(correct) / len(correct)
        variance = sum((c - accuracy) ** 2 for c in correct) / len(correct) ** 2
        assert abs(accuracy - recorded[name]["accuracy"]) < 4 * variance**0.5
        assert sum(lengths) / len(lengths) >= 25
    assert 0.25 <= recorded["base"]["accuracy"] <= 0.60
    assert recorded["trained"]["accuracy"] >= recorded["base"]["accuracy"] + 0.15
    assert recorded["base"]["share_mixed"] >= 0.5
