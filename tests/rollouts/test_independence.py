"""Noise shared between prompts is found in what vLLM wrote with one seed for all, and nowhere else."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import probe_grad_vectors
from gradprobe.dump.consistency import load_dump
from gradprobe.dump.records import Rollout
from gradprobe.rollouts.independence import shared_noise

DATA = Path(__file__).parents[1] / "data" / "rollouts"
DEMO = Path(__file__).parents[2] / "demo"


def rollouts_of(name: str) -> list[Rollout]:
    """Real vLLM's, of the demo's base model: 16 prompts, 8 rollouts each."""
    lines = map(json.loads, (DATA / name).read_text().splitlines())
    return [
        Rollout(number, output["index"], "", line["prompt_token_ids"], output["token_ids"], [], [], "", "", False)
        for number, line in enumerate(lines)
        for output in line["outputs"]
    ]


def test_one_seed_for_all_prompts_is_found_and_said():
    found = shared_noise(rollouts_of("vllm_one_seed.jsonl"))
    assert found.is_shared
    assert found.same > 1.5 * found.other
    assert "sample again, with a seed for each prompt and sample" in found.line()


def test_without_a_seed_rollouts_look_independent():
    found = shared_noise(rollouts_of("vllm_no_seed.jsonl"))
    assert not found.is_shared
    assert found.same == pytest.approx(found.other, abs=0.02)
    assert "look independent" in found.line()


def test_it_is_the_numbers_that_tell():
    """Shuffled within each prompt they tell nothing; agreement over all pairs stays what it was."""
    rollouts, rng = rollouts_of("vllm_one_seed.jsonl"), np.random.default_rng(0)
    shuffled = []
    for prompt in range(16):
        own = [r for r in rollouts if r.prompt_idx == prompt]
        shuffled += [replace(r, sample_idx=int(s)) for r, s in zip(own, rng.permutation(len(own)), strict=True)]
    assert not shared_noise(shuffled).is_shared


@pytest.mark.parametrize("kept", [lambda r: r.prompt_idx == 0, lambda r: r.sample_idx == 0, lambda r: False])
def test_one_prompt_or_one_rollout_each_tells_nothing(kept):
    found = shared_noise(list(filter(kept, rollouts_of("vllm_one_seed.jsonl"))))
    assert (found.same, found.other, found.z) == (None, None, None)
    assert "can't be told" in found.line()


@pytest.mark.parametrize(("name", "is_shared"), [("vllm_one_seed.jsonl", True), ("vllm_no_seed.jsonl", False)])
def test_the_probe_says_so_in_terminal_and_manifest_and_readers_repeat_it(name, is_shared, tmp_path, capsys):
    arguments = "--pos-per-bin-per-rollout 1 --bins 2 --device cpu --min-mixed-prompts 0"
    paths = ["--model-path", DEMO / "base", "--rollouts", DATA / name, "--output-dir", tmp_path / "out"]
    assert probe_grad_vectors.main([*map(str, paths), *arguments.split()]) == 0
    assert ("warning: rollouts of different prompts share their noise" in capsys.readouterr().err) == is_shared
    dump = load_dump(tmp_path / "out")
    assert dump.manifest["rollouts_from"]["shared_noise"]["is_shared"] == is_shared
    assert any("share their noise" in warning for warning in dump.warnings) == is_shared
