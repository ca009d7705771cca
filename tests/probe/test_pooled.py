"""Pooled and projected dumps through the probe: what token dumps promise holds for them too."""

import json

import numpy as np
import pytest

import analyze_exp1_compression
import merge_grad_vector_shards
import probe_grad_vectors
from gradprobe.dump.consistency import load_dump, problems_of
from gradprobe.dump.format import target_directories
from gradprobe.dump.records import iter_rollouts

SMALL = ["--num-samples", 3, "--max-new-tokens", 9, "--device", "cpu", "--bins", 3, "--verifier", "numeric"]


def probe(directory, model, *arguments) -> int:
    return probe_grad_vectors.main(list(map(str, ["--model-path", model, "--output-dir", directory, *arguments])))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, checkpoint_dir, problems_file):
    """A token dump of every token of 6 prompts, whose rollouts are pooled below."""
    directory = tmp_path_factory.mktemp("sampled") / "dump"
    flags = ["--dataset", problems_file, "--num-prompts", 6, *SMALL, "--pos-per-bin-per-rollout", 0]
    assert probe(directory, checkpoint_dir, *flags) == 0
    return directory


def pooled(directory, model, sampled, *arguments) -> int:
    return probe(
        directory, model, "--rollouts", sampled, "--pool", "bucket", "--bins", 3, "--device", "cpu", *arguments
    )


def test_a_pooled_dump_sums_what_a_token_dump_has(tmp_path, checkpoint_dir, sampled):
    assert pooled(tmp_path / "pooled", checkpoint_dir, sampled) == 0
    assert problems_of(tmp_path / "pooled") == ([], [])
    tokens, sums = load_dump(sampled), load_dump(tmp_path / "pooled")
    assert sums.is_pooled
    assert sums.manifest["bucket_by"] == "entropy"
    assert sums.n_tokens.sum() == len(tokens.grads) == tokens.manifest["num_response_tokens"]
    for row in range(len(sums.grads)):
        key = sums.prompt_keys[sums.prompt[row]], sums.sample_idx[row], sums.bin[row]
        labels = zip(tokens.prompt, tokens.sample_idx, tokens.bin, strict=True)
        same = [(tokens.prompt_keys[p], s, b) == key for p, s, b in labels]
        np.testing.assert_allclose(sums.grads[row], tokens.grads[np.flatnonzero(same)].sum(axis=0), atol=2e-6)
        np.testing.assert_allclose(sums.rare[row], tokens.tail_mass[same].sum())
        np.testing.assert_allclose(sums.entropy[row], tokens.entropy[same].mean())


def test_shards_of_pooled_rollouts_merge_to_one(tmp_path, checkpoint_dir, sampled):
    flags = ["--project", "4x4", "--layer", "all", "--param-suffix", "all-linear"]
    assert pooled(tmp_path / "whole", checkpoint_dir, sampled, *flags) == 0
    shards = [tmp_path / f"s{i}" for i in range(2)]
    for i, shard in enumerate(shards):
        assert pooled(shard, checkpoint_dir, sampled, *flags, "--shard-index", i, "--num-shards", 2) == 0
    assert merge_grad_vector_shards.main(list(map(str, [tmp_path / "merged", *shards]))) == 0
    whole, merged = load_dump(tmp_path / "whole"), load_dump(tmp_path / "merged")
    assert problems_of(tmp_path / "merged") == ([], [])
    assert merged.manifest["entropy_edges"] == whole.manifest["entropy_edges"]
    assert merged.manifest["projection"] == whole.manifest["projection"]
    assert merged.manifest["row_idx"] is None
    np.testing.assert_array_equal(merged.bin, whole.bin)
    np.testing.assert_allclose(merged.grads, whole.grads, rtol=1e-3, atol=1e-5)
    assert merged.manifest["on_policy"]["mean"] == pytest.approx(whole.manifest["on_policy"]["mean"], rel=1e-4)


def test_pooled_shards_with_other_edges_are_refused(tmp_path, checkpoint_dir, sampled, problems_file, capsys):
    flags = ["--dataset", problems_file, "--num-prompts", 6, *SMALL, "--pool", "bucket"]
    shards = [tmp_path / f"s{i}" for i in range(2)]
    for i, shard in enumerate(shards):
        assert probe(shard, checkpoint_dir, *flags, "--shard-index", i, "--num-shards", 2) == 0
    assert merge_grad_vector_shards.main(list(map(str, [tmp_path / "merged", *shards]))) == 2
    assert "pooled by other edges" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["surprisal", "logit-norm", "position", "random", "score:mine"])
def test_buckets_by_other_rules(tmp_path, checkpoint_dir, sampled, rule):
    rollouts = list(iter_rollouts(sampled / "rollouts.jsonl"))
    file = tmp_path / "own.jsonl"
    with file.open("w") as stream:
        for rollout in rollouts:
            print(json.dumps(rollout.to_record() | {"mine": [float(len(t) - k) for t in [rollout.response_ids]
                                                             for k in range(len(t))]}), file=stream)  # fmt: skip
    assert pooled(tmp_path / "dump", checkpoint_dir, file, "--bucket-by", rule) == 0
    assert problems_of(tmp_path / "dump") == ([], [])
    dump = load_dump(tmp_path / "dump")
    assert dump.manifest["bucket_by"] == rule
    counts = np.bincount(dump.bin, dump.n_tokens, 3)
    assert counts.sum() == sum(len(r.response_ids) for r in rollouts)
    assert counts.min() > 0


def test_lines_of_vllm_bring_scores_of_ones_own_and_no_reward_once_judged_anew(tmp_path, checkpoint_dir, sampled):
    lines = [
        {
            "prompt_token_ids": rollout.prompt_ids,
            "outputs": [{"token_ids": rollout.response_ids}],
            "ground_truth": rollout.ground_truth,
            "mine": [float(k % 4) for k in range(len(rollout.response_ids))],
            "reward": 0.5,
        }
        for rollout in iter_rollouts(sampled / "rollouts.jsonl")
    ]
    file = tmp_path / "vllm.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--bucket-by", "score:mine", "--correct-from", "verifier"]
    assert pooled(tmp_path / "dump", checkpoint_dir, file, *flags) == 0
    found = list(iter_rollouts(tmp_path / "dump" / "rollouts.jsonl"))
    assert all(r.bucket_scores == [float(k % 4) for k in range(len(r.response_ids))] for r in found)
    assert {r.reward for r in found} == {None}
    assert load_dump(tmp_path / "dump").reward is None


def test_several_projected_targets_get_a_dump_each(tmp_path, checkpoint_dir, sampled):
    flags = ["--project", "2x3", "--layer", "0,2", "--param-suffix", "mlp.down_proj.weight"]
    assert pooled(tmp_path / "several", checkpoint_dir, sampled, *flags) == 0
    found = target_directories(tmp_path / "several")
    assert [path.name for path in found] == [f"L{n}.mlp.down_proj.weight.p2x3" for n in (0, 2)]
    assert all(load_dump(path).row_dim == 6 for path in found)


def test_shards_take_edges_and_origin_from_a_dump_of_several_targets(tmp_path, checkpoint_dir, problems_file):
    flags = ["--dataset", problems_file, "--num-prompts", 6, *SMALL, "--row-idx", "0,1"]
    assert probe(tmp_path / "rows", checkpoint_dir, *flags) == 0
    assert not (tmp_path / "rows" / "manifest.json").exists()
    shards = [tmp_path / f"s{i}" for i in range(2)]
    for i, shard in enumerate(shards):
        flags = ["--project", "2x2", "--shard-index", i, "--num-shards", 2]
        assert pooled(shard, checkpoint_dir, tmp_path / "rows", *flags) == 0
    assert merge_grad_vector_shards.main(list(map(str, [tmp_path / "merged", *shards]))) == 0
    manifest, origin = (
        json.loads((file / "manifest.json").read_text())
        for file in (tmp_path / "merged", tmp_path / "rows" / "L1.mlp.down_proj.weight.r0")
    )
    assert manifest["entropy_edges"] == origin["entropy_edges"]
    assert manifest["dataset"] == origin["dataset"]
    assert manifest["prompt_idxs"] == origin["prompt_idxs"]
    assert manifest["rollouts_from"]["identity"] == origin["model_identity"]


def test_exp1_reads_token_dumps_only(tmp_path, checkpoint_dir, sampled, capsys):
    assert pooled(tmp_path / "pooled", checkpoint_dir, sampled) == 0
    assert analyze_exp1_compression.main(["--output-dir", str(tmp_path / "out"), f"a={tmp_path / 'pooled'}"]) == 2
    assert "pooled" in capsys.readouterr().err
