"""The probe from the command line: what it writes, and that sharding, batching and repeating leave no trace."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import oracle_gradient, relative_error, tiny_checkpoint
from transformers import AutoModelForCausalLM

import analyze_exp1_compression
import analyze_exp2_direction
import merge_grad_vector_shards
import plot_exp12_intuitive
import probe_grad_vectors
from gradprobe.dump.consistency import load_dump
from gradprobe.dump.records import iter_rollouts

SMALL = ["--num-prompts", "6", "--num-samples", "3", "--max-new-tokens", "12", "--device", "cpu", "--bins", "3"]
SMALL += ["--pos-per-bin-per-rollout", "2"]


def probe(output: Path, *arguments: object) -> int:
    return probe_grad_vectors.main(["--output-dir", str(output), *map(str, arguments)])


@pytest.fixture(scope="module")
def sampling(checkpoint_dir, problems_file) -> list[object]:
    return ["--model-path", checkpoint_dir, "--dataset", problems_file, *SMALL]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sampling) -> Path:
    output = tmp_path_factory.mktemp("probe") / "whole"
    assert probe(output, *sampling) == 0
    return output


def rows_by_position(dump_dir: Path) -> dict[tuple, np.ndarray]:
    dump = load_dump(dump_dir)
    keys = zip(dump.prompt, dump.sample_idx, dump.pos, strict=True)
    return {(dump.prompt_keys[p], int(s), int(t)): g for (p, s, t), g in zip(keys, dump.grads, strict=True)}


def rollouts_by_sample(dump_dir: Path) -> dict[tuple, tuple]:
    return {
        (r.prompt_idx, r.sample_idx): (r.problem_id, r.prompt_ids, r.response_ids, r.response, r.correct)
        for r in iter_rollouts(dump_dir / "rollouts.jsonl")
    }


def test_every_dumped_row_equals_the_oracle(whole, checkpoint_dir):
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float64).eval()
    rollouts = {(r.prompt_idx, r.sample_idx): r for r in iter_rollouts(whole / "rollouts.jsonl")}
    manifest = json.loads((whole / "manifest.json").read_text())
    rows = rows_by_position(whole)
    assert len(rows) > 80
    shifted_differs = 0
    for (prompt_idx, sample_idx, pos), row in rows.items():
        rollout = rollouts[prompt_idx, sample_idx]
        tokens = rollout.prompt_ids + rollout.response_ids
        at = len(rollout.prompt_ids) + pos
        expected = oracle_gradient(model, tokens, at, manifest["target"], manifest["row_idx"])
        assert relative_error(torch.from_numpy(row.astype(np.float64)), expected) < 1e-5
        before = oracle_gradient(model, tokens, at - 1, manifest["target"], manifest["row_idx"])
        shifted_differs += relative_error(torch.from_numpy(row.astype(np.float64)), before) > 1e-2
    assert shifted_differs == len(rows)


def test_dump_is_as_the_contract_says(whole, checkpoint_dir):
    dump, manifest = load_dump(whole), json.loads((whole / "manifest.json").read_text())
    lines = [json.loads(line) for line in (whole / "meta.jsonl").read_text().splitlines()]
    original_keys = """model_path target row_idx row_dim num_prompts num_samples_per_prompt num_rollouts num_positions
        entropy_edges bins pos_per_bin_per_rollout seed max_new_tokens temperature num_correct_rollouts prompt_idxs"""
    assert set(original_keys.split()) <= manifest.keys()
    assert [line["row"] for line in lines] == list(range(len(dump.grads)))
    assert set(lines[0]) == set("row prompt_idx sample_idx pos bin entropy correct token_id logprob tail_mass".split())
    assert manifest["target"] == "model.layers.1.mlp.down_proj.weight"  # the middle one of three
    assert manifest["entropy_edges_over"] == "response_tokens"
    assert set(manifest["seconds"]) == {"load", "sample", "score", "gradients", "total"}
    assert dump.grads.dtype == np.float32
    rollouts = list(iter_rollouts(whole / "rollouts.jsonl"))
    entropies = np.concatenate([r.entropies for r in rollouts])
    np.testing.assert_allclose(manifest["entropy_edges"], np.quantile(entropies, [0, 1 / 3, 2 / 3, 1]))
    of_rollout = {(r.prompt_idx, r.sample_idx): r for r in rollouts}
    for line in lines:
        rollout = of_rollout[line["prompt_idx"], line["sample_idx"]]
        pos = line["pos"]
        assert line["entropy"] == rollout.entropies[pos]
        assert line["logprob"] == rollout.logprobs[pos]
        assert line["tail_mass"] == rollout.tail_mass[pos]
        assert line["token_id"] == rollout.response_ids[pos]


def test_one_shard_equals_three_merged(whole, sampling, tmp_path):
    shards = [tmp_path / f"s{i}" for i in range(3)]
    for i, shard in enumerate(shards):
        assert probe(shard, *sampling, "--shard-index", i, "--num-shards", 3, "--entropy-edges", whole) == 0
    prompts = [set(load_dump(shard).prompt_keys) for shard in shards]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 6
    assert merge_grad_vector_shards.main([str(tmp_path / "merged"), *map(str, shards)]) == 0
    assert rollouts_by_sample(tmp_path / "merged") == rollouts_by_sample(whole)
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    # A quantile may be a token's very entropy; which side of it that token is on hangs on rounding, in other batches.
    inner = np.array(manifest["entropy_edges"][1:-1])
    on_edge = {
        (r.prompt_idx, r.sample_idx)
        for r in iter_rollouts(whole / "rollouts.jsonl")
        if np.abs(np.subtract.outer(np.array(r.entropies), inner) / inner).min() < 1e-5
    }
    merged, single = rows_by_position(tmp_path / "merged"), rows_by_position(whole)
    assert {key for key in merged if key[:2] not in on_edge} == {key for key in single if key[:2] not in on_edge}
    common = merged.keys() & single.keys()
    assert len(common) > 0.95 * len(single)
    for key in common:
        assert relative_error(torch.tensor(merged[key]), torch.tensor(single[key])) < 1e-5
    assert manifest["entropy_edges"] == json.loads((whole / "manifest.json").read_text())["entropy_edges"]


def test_shards_with_edges_of_their_own_merge_to_the_same_buckets(whole, sampling, tmp_path):
    shards = [tmp_path / f"s{i}" for i in range(2)]
    for i, shard in enumerate(shards):
        probe(shard, *sampling, "--shard-index", i, "--num-shards", 2)
    merge_grad_vector_shards.main([str(tmp_path / "merged"), *map(str, shards)])
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    expected = json.loads((whole / "manifest.json").read_text())
    np.testing.assert_allclose(manifest["entropy_edges"], expected["entropy_edges"], rtol=1e-5)
    for key in (
        "num_prompts",
        "num_rollouts",
        "num_correct_rollouts",
        "prompt_idxs",
        "prompt_hashes",
        "num_response_tokens",
    ):
        assert manifest[key] == expected[key]


def test_a_dump_probed_again_from_its_rollouts_is_the_same_dump(whole, checkpoint_dir, tmp_path):
    arguments = ["--model-path", checkpoint_dir, "--rollouts", whole, "--device", "cpu", "--bins", "3"]
    assert probe(tmp_path / "again", *arguments, "--pos-per-bin-per-rollout", "2") == 0
    for name in ("grads.npy", "meta.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_another_model_on_the_same_tokens(whole, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", seed=9)
    assert probe(tmp_path / "out", "--model-path", other, "--rollouts", whole / "rollouts.jsonl", "--bins", "3") == 0
    before, after = (list(iter_rollouts(d / "rollouts.jsonl")) for d in (whole, tmp_path / "out"))
    assert [r.response_ids for r in before] == [r.response_ids for r in after]
    assert [r.logprobs for r in before] != [r.logprobs for r in after]


def test_batch_sizes_leave_no_trace(whole, sampling, tmp_path):
    assert probe(tmp_path / "small", *sampling, "--batch-tokens", "1", "--sample-rows", "1") == 0
    assert rollouts_by_sample(tmp_path / "small") == rollouts_by_sample(whole)
    small, big = rows_by_position(tmp_path / "small"), rows_by_position(whole)
    assert small.keys() == big.keys()
    assert max(relative_error(torch.tensor(small[k]), torch.tensor(big[k])) for k in big) < 1e-5


def test_several_targets_come_out_as_single_ones(whole, sampling, tmp_path):
    assert probe(tmp_path / "many", *sampling, "--layer", "0,1", "--row-idx", "0,7") == 0
    names = sorted(d.name for d in (tmp_path / "many").iterdir() if d.is_dir())
    assert names == [f"L{layer}.mlp.down_proj.weight.r{row}" for layer in (0, 1) for row in (0, 7)]
    one = rows_by_position(tmp_path / "many" / "L1.mlp.down_proj.weight.r0")
    expected = rows_by_position(whole)
    assert one.keys() == expected.keys()
    assert max(relative_error(torch.tensor(one[k]), torch.tensor(expected[k])) for k in one) < 1e-5
    assert (tmp_path / "many" / "rollouts.jsonl").exists()


def test_every_response_token(whole, checkpoint_dir, tmp_path):
    arguments = ["--model-path", checkpoint_dir, "--rollouts", whole, "--pos-per-bin-per-rollout", "0"]
    assert probe(tmp_path / "all", *arguments) == 0
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert manifest["num_positions"] == manifest["num_response_tokens"] == len(load_dump(tmp_path / "all").grads)


def test_a_finished_dump_is_left_alone_and_other_settings_are_refused(sampling, tmp_path, capsys):
    output = tmp_path / "out"
    probe(output, *sampling)

    def files() -> dict[str, tuple]:
        found = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in output.iterdir()}
        return {name: content for name, content in found.items() if name != ".lock"}

    before = files()
    capsys.readouterr()
    assert probe(output, *sampling) == 0
    assert "finished already" in capsys.readouterr().err
    assert probe(output, *sampling, "--seed", "5", "--row-idx", "3") == 2
    error = capsys.readouterr().err
    assert "seed: 0, now 5" in error
    assert "r0" in error
    assert "r3" in error
    assert before == files()
    assert probe(output, *sampling, "--seed", "5", "--overwrite") == 0
    assert json.loads((output / "manifest.json").read_text())["seed"] == 5


def test_several_targets_through_merge_analyses_and_plots(checkpoint_dir, sampling, tmp_path):
    targets = ["--layer", "0,1", "--row-idx", "0,random:2"]
    for tag in ("base", "trained"):
        for i in range(2):
            shard = tmp_path / f"{tag}_s{i}"
            assert probe(shard, *sampling, *targets, "--shard-index", i, "--num-shards", 2) == 0
        shards = [str(tmp_path / f"{tag}_s{i}") for i in range(2)]
        assert merge_grad_vector_shards.main([str(tmp_path / tag), *shards]) == 0
    tagged = [f"{tag}={tmp_path / tag}" for tag in ("base", "trained")]
    figures = tmp_path / "figures"
    plot = ["--base", str(tmp_path / "base"), "--trained", str(tmp_path / "trained"), "--output-dir", str(figures)]
    assert analyze_exp1_compression.main(["--output-dir", str(figures), *tagged]) == 0
    assert analyze_exp2_direction.main(["--output-dir", str(figures), *tagged]) == 0
    assert plot_exp12_intuitive.main(plot) == 0
    assert (figures / "exp12_replication.png").read_bytes().startswith(b"\x89PNG")
    page = (figures / "report.html").read_text()
    assert page.count('class="rollout"') == 4  # two of each model, from the file that its targets share
    assert '<span class="picked"' in page
    exp1, exp2 = (json.loads((figures / f"exp{i}_summary.json").read_text()) for i in (1, 2))
    names = sorted(d.name for d in (tmp_path / "base").iterdir() if d.is_dir())
    for tag in ("base", "trained"):
        assert sorted(exp1[tag]["replication"]["targets"]) == names
        spread = exp1[tag]["replication"]["participation_ratio"]["2"]
        assert spread["n"] == len(spread["values"]) == 6
        assert spread["values"][0] == exp1[tag]["per_bucket"]["2"]["participation_ratio"]
        assert spread["min"] <= spread["mean"] <= spread["max"]
        assert exp2[tag]["replication"]["control_mean"]["n"] <= 6
    (tmp_path / "base" / names[0] / "manifest.json").unlink()
    assert analyze_exp1_compression.main(["--output-dir", str(figures), *tagged]) == 2
