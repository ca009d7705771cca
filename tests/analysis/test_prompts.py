"""Prompts are paired by what they are; what tags differ in is said; other targets are refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import planted
import pytest

import analyze_exp1_compression
import analyze_exp2_direction
import analyze_exp3_signal
import plot_exp12_intuitive
from gradprobe.analysis.differences import say_differences
from gradprobe.analysis.inputs import pooled_of
from gradprobe.analysis.prompts import BY_DATA_SET, BY_HASH, BY_INDEX, number_prompts, with_prompts_once
from gradprobe.dump.consistency import load_dump
from gradprobe.dump.records import prompt_hash

N_PROMPTS = 8


def write(path: Path, problems: list[int] | None = None, n_dims: int = 24, **manifest) -> Path:
    """3 rollouts a prompt and 2 positions a bucket, in `n_dims` of 24 dimensions, of the problems named."""
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((N_PROMPTS, 3, 2, 2)))
    rng = np.random.default_rng(n_dims)
    grads = np.zeros((len(prompt), 24))
    grads[:, :n_dims] = rng.standard_normal((len(prompt), n_dims))
    correct = sample % 2 == 0
    hashes = {} if problems is None else {"prompt_hashes": [prompt_hash([7, problem]) for problem in problems]}
    return planted.write_dump(
        path, grads, bucket, prompt=prompt, sample=sample, correct=correct, bins=2, **hashes, **manifest
    )


def numbers_of(first: Path, other: Path) -> tuple[list[int], list[int], str, int]:
    numbers, pairs = number_prompts({"a": load_dump(first), "b": load_dump(other)})
    return numbers["a"].tolist(), numbers["b"].tolist(), pairs["b"].by, pairs["b"].n_prompts


PAIRED = {  # problems and manifest keys of both dumps; how they are paired; which of the first each of the other is
    "the same file": (range(8), range(8), {}, {}, BY_HASH, list(range(8))),
    "shuffled": (range(8), range(7, -1, -1), {}, {}, BY_HASH, list(range(7, -1, -1))),
    "disjoint": (range(8), range(8, 16), {}, {}, BY_HASH, [None] * 8),
    "half of it": (range(8), range(4, 12), {}, {}, BY_HASH, [4, 5, 6, 7, *[None] * 4]),
    "no ids, one data set": (None, None, {"dataset": {"sha256": "a"}}, {"dataset": {"sha256": "a"}}, BY_DATA_SET,
                             list(range(8))),
    "no ids, other data sets": (None, None, {"dataset": {"sha256": "a"}}, {"dataset": {"sha256": "b"}}, BY_DATA_SET,
                                [None] * 8),
    "no ids, one unknown": (None, None, {"dataset": {"sha256": "a"}}, {}, BY_INDEX, list(range(8))),
    "nothing known": (None, None, {}, {"dataset": {"sha256": ""}}, BY_INDEX, list(range(8))),
    "ids of one only": (range(8), None, {}, {}, BY_INDEX, list(range(8))),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRED)
def test_prompts_are_paired_by_what_they_are(case: str, tmp_path: Path):
    first, other, of_first, of_other, by, matches = PAIRED[case]
    dumps = [
        write(tmp_path / name, None if problems is None else list(problems), **manifest)
        for name, problems, manifest in (("a", first, of_first), ("b", other, of_other))
    ]
    here, there, told_by, n_prompts = numbers_of(*dumps)
    assert (told_by, n_prompts) == (by, sum(match is not None for match in matches))
    assert len(set(here)) == len(set(there)) == N_PROMPTS
    for number, match in zip(there, matches, strict=True):
        assert number == here[match] if match is not None else number not in here


def test_a_dump_without_hashes_has_them_from_its_rollouts(tmp_path: Path):
    first = write(tmp_path / "a", list(range(8)))
    other = write(tmp_path / "b")
    lines = [
        {"prompt_idx": prompt, "sample_idx": sample, "problem_id": "", "prompt_ids": [7, 7 - prompt],
         "correct": sample % 2 == 0,
         "response_ids": [], "entropies": [], "logprobs": [], "response": "", "ground_truth": ""}
        for prompt, sample in np.ndindex(N_PROMPTS, 3)
    ]  # fmt: skip
    (other / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # A token a rollout that `load_dump` would miss is not what is tested here.
    here, there, by, n_prompts = numbers_of(first, other)
    assert (by, n_prompts) == (BY_HASH, 8)
    assert there == here[::-1]


def test_namespaced_keys_of_merged_shards_are_paired_too(tmp_path: Path):
    dumps = [write(tmp_path / name, list(range(8))) for name in ("a", "b")]
    text = (dumps[1] / "meta.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [line | {"prompt_idx": [line["prompt_idx"] % 2, line["prompt_idx"]]} for line in lines]
    (dumps[1] / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads((dumps[1] / "manifest.json").read_text())
    manifest["prompt_idxs"] = [[idx % 2, idx] for idx in manifest["prompt_idxs"]]
    (dumps[1] / "manifest.json").write_text(json.dumps(manifest))
    here, there, by, n_prompts = numbers_of(*dumps)
    assert (by, n_prompts) == (BY_HASH, 8)
    assert there == [here[key[1]] for key in load_dump(dumps[1]).prompt_keys]


@pytest.mark.parametrize("script", [analyze_exp1_compression, analyze_exp2_direction])
def test_one_prompt_under_many_numbers_counts_once(script, tmp_path: Path, capsys):
    """The numbers of a dump don't hang on whether a prompt's rollouts stand under one prompt_idx or under several."""
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((N_PROMPTS, 8, 2, 2)))
    grads = np.random.default_rng(0).standard_normal((len(prompt), 24)) + np.eye(24)[prompt]
    correct = sample % 4 < 2
    split = prompt * 2 + sample // 4  # 16 numbers of 8 prompts
    summaries = {}
    for name, numbers, samples, problems in (
        ("once", prompt * 2, sample, range(0, 16, 2)),
        ("twice", split, sample % 4, range(16)),
    ):
        hashes = [prompt_hash([7, problem // 2]) for problem in problems]
        path = planted.write_dump(
            tmp_path / name / "dump", grads, bucket, prompt=numbers, sample=samples, correct=correct, bins=2,
            prompt_hashes=hashes,
        )  # fmt: skip
        summaries[name] = analyse(tmp_path / name, script, base=path)["base"]
    assert "8 prompts stand under several prompt_idx" in capsys.readouterr().err
    for summary in summaries.values():
        del summary["manifest_sha256"]
    assert summaries["once"] == summaries["twice"]


def test_one_prompt_under_many_numbers_counts_once_in_exp_3(tmp_path: Path):
    path = planted.write_planted_signal(tmp_path / "a", np.array([0.0, 1.0]), n_prompts=6, dim=8)
    lines = [json.loads(line) for line in (path / "rollouts.jsonl").read_text().splitlines()]
    lines = [line | {"prompt_ids": [line["prompt_idx"] // 2]} for line in lines]
    (path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    raw, once = load_dump(path), with_prompts_once(load_dump(path))
    pooled = pooled_of(once)
    assert len(set(raw.prompt.tolist())) == 6
    assert len(set(pooled.prompt.tolist())) == len(set(pooled.rollout_prompt.tolist())) == 3
    pairs = set(zip(pooled.rollout_prompt.tolist(), pooled.rollout_sample.tolist(), strict=True))
    assert len(pairs) == len(lines)  # none is taken for another
    assert set(zip(pooled.prompt.tolist(), pooled.sample.tolist(), strict=True)) <= pairs


def analyse(tmp_path: Path, script=analyze_exp1_compression, **dumps: Path) -> dict:
    arguments = ["--output-dir", str(tmp_path / "out"), *(f"{tag}={path}" for tag, path in dumps.items())]
    assert script.main(arguments) == 0
    (file,) = (tmp_path / "out").glob("*_summary.json")
    return json.loads(file.read_text())


def test_where_no_prompt_is_common_there_is_no_verdict(tmp_path: Path, capsys):
    base, trained = write(tmp_path / "a", list(range(8))), write(tmp_path / "b", list(range(8, 16)), n_dims=6)
    found = analyse(tmp_path, base=base, trained=trained)["trained"]
    assert found["compared_with"] == {"base": None}
    reason = "no prompt is common to both, by token ids"
    assert found["paired_with"] == {"base": {"by": "token ids", "n_prompts": 0, "reason": reason}}
    said = capsys.readouterr()
    assert f"not compared: {reason}" in said.out
    assert "smaller" not in said.out
    assert "warning: base and trained have no prompt in common" in said.err
    assert any("no prompt in common" in line for line in found["differences"])


def test_pairs_of_a_shuffled_file_have_the_verdict_of_the_file_in_order(tmp_path: Path, capsys):
    base, trained = write(tmp_path / "a", list(range(8))), write(tmp_path / "b", list(range(8)), n_dims=6)
    found = analyse(tmp_path, base=base, trained=trained)["trained"]
    assert "over the 8 prompts of both, paired by token ids" in capsys.readouterr().out
    assert found["differences"] == []
    assert {one["verdict"] for one in found["compared_with"]["base"].values()} == {"smaller"}


def test_a_pairing_by_index_alone_is_said_in_words(tmp_path: Path, capsys):
    found = analyse(tmp_path, base=write(tmp_path / "a"), trained=write(tmp_path / "b"))["trained"]
    assert "warning: base and trained are paired by prompt_idx alone" in capsys.readouterr().err
    assert any("paired by prompt_idx alone" in line for line in found["differences"])


VERSIONS = {"torch": "2.13.0", "transformers": "5.15.0"}
TOLD = {
    "dataset": {"path": "/secret/a.jsonl", "sha256": "a" * 64},
    "prompts": {"template": "x"},
    "temperature": 1.0,
    "max_new_tokens": 64,
    "num_samples_per_prompt": 3,
    "dtype": "float32",
    "attention": "sdpa",
    "device": "cpu (x86_64)",
    "end_ids": [1, 2],
    "sampling": {"distribution": "full softmax", "method": "inverse CDF", "verifier": "boxed"},
    "entropy_edges_over": "response_tokens",
    "pos_per_bin_per_rollout": 4,
    "model_identity": {"weights_sha256": "a", "tokenizer_sha256": "b"},
    "versions": VERSIONS,
}
DIFFERENCES = {  # what the second tag says instead, and the start of what is said of it
    "data set": (
        {"dataset": {"path": "/secret/b.jsonl", "sha256": "b" * 64}},
        "a.jsonl (aaaaaaaaaaaa) and b.jsonl (bb",
    ),
    "rendering of prompts": ({"prompts": {"template": "y"}}, '{"template": "x"} and {"template": "y"}'),
    "temperature": ({"temperature": 0.7}, "1.0 and 0.7"),
    "max_new_tokens": ({"max_new_tokens": 65}, "64 and 65"),
    "num_samples_per_prompt": ({"num_samples_per_prompt": 4}, "3 and 4"),
    "dtype": ({"dtype": "bfloat16"}, "float32 and bfloat16"),
    "attention": ({"attention": "eager"}, "sdpa and eager"),
    "device": ({"device": "NVIDIA H100"}, "CPU and GPU"),
    "end_ids": ({"end_ids": [1]}, "[1, 2] and [1]"),
    "distribution sampled from": ({"sampling": TOLD["sampling"] | {"distribution": "top-p"}}, "full softmax and top-p"),
    "sampling method": ({"sampling": TOLD["sampling"] | {"method": "server"}}, "inverse CDF and server"),
    "sampler": ({"sampling": TOLD["sampling"] | {"server": "v"}}, '{} and {"server": "v"}'),
    "verifier": ({"sampling": TOLD["sampling"] | {"verifier": "numeric"}}, "boxed and numeric"),
    "source of rollouts": (
        {"rollouts_from": {"path": "/secret", "format": "trl"}},
        'sampled by the probe and {"format"',
    ),
    "tokenizer": ({"model_identity": {"weights_sha256": "a", "tokenizer_sha256": "c"}}, "b and c"),
    "entropy_edges_over": ({"entropy_edges_over": "dumped_positions"}, "response_tokens and dumped_positions"),
    "entropy_edges given": ({"entropy_edges_from": "0,1,2"}, "no and yes"),
    "pos_per_bin_per_rollout": ({"pos_per_bin_per_rollout": 2}, "4 and 2"),
    "version of torch": ({"versions": VERSIONS | {"torch": "2.10.0"}}, "2.13.0 and 2.10.0"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_what_tags_differ_in_is_a_line_each_on_the_terminal_and_in_the_summary(case: str, tmp_path: Path, capsys):
    changed, said = DIFFERENCES[case]
    ids = list(range(8))
    base = write(tmp_path / "a", ids, **TOLD)
    trained = write(tmp_path / "b", ids, **(TOLD | changed))
    summary = analyse(tmp_path, analyze_exp2_direction, base=base, trained=trained)
    assert summary["base"]["differences"] == []
    (line,) = summary["trained"]["differences"]
    assert line.startswith(f"base and trained differ in {case}: {said}")
    assert "secret" not in line
    assert capsys.readouterr().err.count(f"warning: {line}\n") == 1


def test_what_an_older_manifest_does_not_tell_is_one_line(tmp_path: Path, capsys):
    base, trained = write(tmp_path / "a"), write(tmp_path / "b", **TOLD)
    (line, *_) = analyse(tmp_path, analyze_exp2_direction, base=base, trained=trained)["trained"]["differences"][-1:]
    assert line.startswith("base doesn't tell what trained does: data set, ")
    assert "version of torch" in line


def test_one_dump_under_two_names_is_said(tmp_path: Path, capsys):
    dump = write(tmp_path / "a", list(range(8)))
    summary = analyse(tmp_path, analyze_exp2_direction, base=dump, trained=dump)
    assert "have the same weights and the same rollouts" in summary["trained"]["differences"][0]


SAME = {"model_identity": {"weights_sha256": "a"}, "checksums": {"rollouts.jsonl": "c"}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ["a and b have the same weights and the same rollouts: one dump, two names"]),
        ({"model_identity": {"weights_sha256": "b"}}, []),
        (
            {"checksums": {"rollouts.jsonl": "d"}},
            ["a and b have the same weights and other rollouts: no training lies between them"],
        ),
        ({"checksums": {}}, []),
        ({"bucket_by": "position"}, []),  # the rules of Exp 3 side by side are meant
    ],
)
def test_the_same_weights_under_two_names_are_said(changed, said, tmp_path: Path):
    dumps = {
        tag: [SimpleNamespace(path=tmp_path / tag, manifest=manifest)]
        for tag, manifest in (("a", SAME), ("b", SAME | changed), ("c", {}))
    }
    found = say_differences(dumps)
    assert [line for line in found["b"] if "the same weights" in line] == said
    assert found["a"] == []
    assert not any("the same weights" in line for line in found["c"])


OTHER_TARGETS = {
    "another row": ({"row_idx": 7}, "weight[0] of 24 numbers", "weight[7] of 24"),
    "another layer": ({"target": "model.layers.2.mlp.down_proj.weight"}, "layers.1.mlp", "layers.2.mlp"),
    "a projection": (
        {"row_idx": None, "projection": {"rows": 4, "cols": 6, "seed": 0, "weights": []}}, "weight[0]", "weight (4x6)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_TARGETS)
@pytest.mark.parametrize("script", [analyze_exp1_compression, analyze_exp2_direction, plot_exp12_intuitive])
def test_other_targets_are_refused_by_both_names(script, case: str, tmp_path: Path, capsys):
    changed, *said = OTHER_TARGETS[case]
    dumps = [f"base={write(tmp_path / 'a')}", f"trained={write(tmp_path / 'b', **changed)}"]
    assert script.main(["--output-dir", str(tmp_path / "out"), *dumps]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: base and trained are of different targets, which can't be compared: ")
    assert error.count("\n") == 1
    assert all(part in error for part in said)
    assert not (tmp_path / "out").exists()


def test_other_projections_are_refused_in_exp_3(tmp_path: Path, capsys):
    strength = np.zeros(2)
    first = planted.write_planted_signal(tmp_path / "a", strength, n_prompts=4, dim=16)
    signs = {"rows": 4, "cols": 4, "seed": 1, "weights": []}
    other = planted.write_planted_signal(tmp_path / "b", strength, n_prompts=4, dim=16, projection=signs)
    arguments = ["--output-dir", str(tmp_path / "out"), f"a={first}", f"b={other}"]
    assert analyze_exp3_signal.main(arguments) == 2
    assert "seed 0 in" in capsys.readouterr().err
