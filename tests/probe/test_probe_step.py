"""The probe along a step: what is written, resumed at every stage byte for byte, sharded, merged, carried on."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from tiny import tiny_checkpoint, tiny_model
from transformers import AutoModelForCausalLM

import merge_grad_vector_shards
import probe_grad_vectors
from gradprobe.dump.records import iter_rollouts
from gradprobe.gradients.step import along_step, subtract
from gradprobe.probe.output import Progress
from gradprobe.rollouts.score import score_responses

SMALL = "--num-prompts 6 --num-samples 3 --max-new-tokens 8 --device cpu --bins 3 --pos-per-bin-per-rollout 1 -q"
SMALL += " --sample-rows 6 --batch-tokens 60"
FILES = ("grads.npy", "meta.jsonl", "rollouts.jsonl")


def probe(output: Path, *arguments: object) -> int:
    return probe_grad_vectors.main(["--output-dir", str(output), *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(checkpoint_dir, tmp_path_factory) -> Path:
    """The tiny checkpoint after a step of all its weights."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("trained") / "model", seed=0)
    model, generator = tiny_model(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def arguments(checkpoint_dir, problems_file, trained) -> list[object]:
    of_step = ["--step-to", trained, "--step-by-weight"]
    return ["--model-path", checkpoint_dir, "--dataset", problems_file, *of_step, *SMALL.split()]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("step") / "whole"
    assert probe(output, *arguments) == 0
    return output


def manifest_of(dump: Path) -> dict:
    return json.loads((dump / "manifest.json").read_text())


def of_rollouts(dump: Path, name: str) -> dict[tuple, list[float]]:
    return {(r.prompt_idx, r.sample_idx): getattr(r, name) for r in iter_rollouts(dump / "rollouts.jsonl")}


def test_rollouts_tell_of_the_step_and_the_manifest_which_it_was(whole, checkpoint_dir, trained):
    start, end, other = (
        AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
        for path in (checkpoint_dir, trained, trained)
    )
    rollouts = list(iter_rollouts(whole / "rollouts.jsonl"))
    ids = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    scores = {i: s for batch in score_responses(end, *ids, 60) for i, s in batch.items()}
    step = subtract(end, start, end)
    found = {i: d for batch in along_step(start, step, *ids, 60) for i, d in batch.items()}
    for i, rollout in enumerate(rollouts):
        np.testing.assert_allclose(rollout.step, found[i], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(rollout.step_logprobs, scores[i].logprobs, rtol=1e-4, atol=1e-6)
    said = manifest_of(whole)["step"]
    assert (said["from"], said["to"], said["logprobs_of"]) == (str(checkpoint_dir), str(trained), "to")
    assert said["parameters"] == sum(p.numel() for p in other.parameters())
    assert (said["unchanged"], said["unchanged_tensors"]) == (0, [])
    assert said["norm"] == pytest.approx(float(sum(d.square().sum() for d in step.values())) ** 0.5, rel=1e-5)


def test_every_weight_s_sums_add_up_to_the_rollout_s_and_belong_to_a_step(whole, arguments, tmp_path, capsys):
    parts, tokens = of_rollouts(whole, "step_by_weight"), of_rollouts(whole, "step")
    sums = np.array([sum(tokens[key]) for key in parts])
    np.testing.assert_allclose([sum(of) for of in parts.values()], sums, atol=1e-5 * np.abs(sums).max())
    names = manifest_of(whole)["step"]["weights"]
    assert {len(of) for of in parts.values()} == {len(names)}
    assert names == [name for name, _ in tiny_model(0).named_parameters()]
    place = arguments.index("--step-to")
    assert probe(tmp_path, *arguments[:place], *arguments[place + 2 :]) == 2
    assert "--step-by-weight says something of a step only" in capsys.readouterr().err


def test_without_a_step_all_else_is_the_same(arguments, whole, tmp_path):
    place = arguments.index("--step-to")
    assert probe(tmp_path / "plain", *arguments[:place], *arguments[place + 3 :]) == 0
    for name in ("grads.npy", "meta.jsonl"):
        assert (tmp_path / "plain" / name).read_bytes() == (whole / name).read_bytes()
    assert set(map(tuple, of_rollouts(tmp_path / "plain", "step").values())) == {()}


STAGES = {
    "before the first batch": ("add_step", 1),
    "in the middle": ("add_step", 2),
    "before the file is written": ("finish_step", 1),
    "before gradients": ("begin_gradients", 1),
    "among gradients": ("add_gradients", 2),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_continued_it_is_as_never_killed(stage, arguments, whole, tmp_path, monkeypatch):
    method, at_call = STAGES[stage]
    calls, plain = [], getattr(Progress, method)

    def dies(self, *args):
        calls.append(0)
        if len(calls) == at_call:
            raise KeyboardInterrupt
        return plain(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, method, dies)
        assert probe(tmp_path, *arguments) == 130
    assert probe(tmp_path, *arguments) == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    assert manifest_of(tmp_path)["step"] == manifest_of(whole)["step"]
    assert not (tmp_path / "progress.jsonl").exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_around_the_file_s_replacement_nothing_is_sampled_again(
    replaced, arguments, whole, tmp_path, monkeypatch, caplog
):
    from gradprobe.probe import output

    plain = output.replace

    def dies(source: Path, target: Path) -> None:
        is_second = target.name == "rollouts.jsonl" and b'"stepped"' in (tmp_path / "progress.jsonl").read_bytes()
        if is_second and not replaced:
            raise KeyboardInterrupt
        plain(source, target)
        if is_second:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(output, "replace", dies)
        assert probe(tmp_path, *arguments) == 130
    caplog.clear()
    assert probe(tmp_path, *(a for a in arguments if a != "-q")) == 0
    assert "sampled again" not in caplog.text
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_sampling_alone_has_the_step_too_and_is_gone_on_with(arguments, whole, tmp_path):
    assert probe(tmp_path, *arguments, "--sample-only") == 0
    assert (tmp_path / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    assert not (tmp_path / "manifest.json").exists()
    assert probe(tmp_path, *arguments) == 0
    assert (tmp_path / "grads.npy").read_bytes() == (whole / "grads.npy").read_bytes()


def test_shards_merge_into_what_one_probe_has(arguments, whole, tmp_path):
    shards = [tmp_path / f"s{i}" for i in range(2)]
    for i, shard in enumerate(shards):
        assert probe(shard, *arguments, "--num-shards", 2, "--shard-index", i) == 0
    assert merge_grad_vector_shards.main([str(tmp_path / "merged"), *map(str, shards)]) == 0
    assert manifest_of(tmp_path / "merged")["step"] == manifest_of(whole)["step"]
    merged, expected = of_rollouts(tmp_path / "merged", "step"), of_rollouts(whole, "step")
    assert merged.keys() == expected.keys()
    for key, values in merged.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-4, atol=1e-6)
    merged, expected = of_rollouts(tmp_path / "merged", "step_by_weight"), of_rollouts(whole, "step_by_weight")
    assert merged == expected  # a rollout at a time, so no batch rounds otherwise


def test_the_other_end_looks_back_and_a_third_checkpoint_along_both(
    arguments, whole, trained, checkpoint_dir, tmp_path
):
    place = arguments.index("--step-to")
    others = [*arguments[:place], *arguments[place + 2 :]]
    others[1] = trained
    assert probe(tmp_path / "back", *others, "--step-from", checkpoint_dir, "--rollouts", whole / "rollouts.jsonl") == 2
    of_file = ["--model-path", trained, "--rollouts", whole / "rollouts.jsonl", "--device", "cpu", "--bins", 3, "-q"]
    assert probe(tmp_path / "back", *of_file, "--step-from", checkpoint_dir) == 0
    said = manifest_of(tmp_path / "back")["step"]
    assert (said["logprobs_of"], said["norm"]) == ("from", manifest_of(whole)["step"]["norm"])
    for key, values in of_rollouts(tmp_path / "back", "step_logprobs").items():
        np.testing.assert_allclose(values, of_rollouts(whole, "logprobs")[key], rtol=1e-4, atol=1e-6)
    third = tiny_checkpoint(tmp_path / "third", seed=3)
    of_file[1] = third
    assert probe(tmp_path / "third_dump", *of_file, "--step-from", checkpoint_dir, "--step-to", trained) == 0
    assert manifest_of(tmp_path / "third_dump")["step"]["norm"] == said["norm"]


def test_a_step_is_carried_on_to_the_same_model_s_other_dumps_and_to_no_other_s(
    whole, checkpoint_dir, trained, tmp_path
):
    of_file = ["--rollouts", whole, "--device", "cpu", "--bins", 3, "--pool", "bucket", "-q"]
    assert probe(tmp_path / "pooled", "--model-path", checkpoint_dir, *of_file) == 0
    for name in ("step", "step_by_weight"):
        assert of_rollouts(tmp_path / "pooled", name) == of_rollouts(whole, name)
    assert manifest_of(tmp_path / "pooled")["step"] == manifest_of(whole)["step"]
    assert probe(tmp_path / "other", "--model-path", trained, *of_file) == 0
    assert "step" not in manifest_of(tmp_path / "other")
    assert set(map(tuple, of_rollouts(tmp_path / "other", "step").values())) == {()}


def test_no_step_lies_between_other_shapes_nor_between_a_model_and_itself(arguments, checkpoint_dir, tmp_path, capsys):
    wider = tiny_checkpoint(tmp_path / "wider", seed=0)
    tiny_model(0, intermediate_size=32).save_pretrained(wider)
    place = arguments.index("--step-to") + 1
    for other, said in ((wider, "mlp.gate_proj.weight is [32, 16]"), (checkpoint_dir, "are the same weights")):
        assert probe(tmp_path / "dump", *arguments[:place], other, *arguments[place + 1 :]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "--step-to" in error
        assert error.count("\n") == 1


def test_an_adapter_s_step_is_the_merged_one_s(arguments, checkpoint_dir, whole, tmp_path):

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint_dir), config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = tiny_checkpoint(tmp_path / "merged", seed=0)
    adapted.merge_and_unload().save_pretrained(merged)
    place = arguments.index("--step-to")
    others = [*arguments[:place], *arguments[place + 2 :]]
    assert probe(tmp_path / "by_adapter", *others, "--step-to-adapter", tmp_path / "adapter") == 0
    assert probe(tmp_path / "by_merged", *others, "--step-to", merged) == 0
    expected = of_rollouts(tmp_path / "by_merged", "step")
    for key, values in of_rollouts(tmp_path / "by_adapter", "step").items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-4, atol=1e-6)
    said = manifest_of(tmp_path / "by_adapter")["step"]
    assert said["unchanged_tensors"]
    assert said["parameters"] > said["unchanged"] > 0
