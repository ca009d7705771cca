"""Merging shards: what belongs together, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import merge_grad_vector_shards
from gradprobe.dump.consistency import load_dump

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def merge(*directories: Path) -> int:
    return merge_grad_vector_shards.main([str(directory) for directory in directories])


def edit_manifest(directory: Path, **changes: object) -> None:
    file = directory / "manifest.json"
    file.chmod(0o644)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(GOLDEN / "scrambled" / name, tmp_path / name)) for name in ("s0", "s1")]


def test_rows_keep_their_labels(shards, tmp_path):
    assert merge(tmp_path / "merged", *shards) == 0
    merged = load_dump(tmp_path / "merged")
    start = 0
    for number, shard in enumerate(map(load_dump, shards)):
        rows = slice(start, start + len(shard.grads))
        np.testing.assert_array_equal(merged.grads[rows], shard.grads)
        np.testing.assert_array_equal(merged.entropy[rows], shard.entropy)
        np.testing.assert_array_equal(merged.correct[rows], shard.correct)
        assert [merged.prompt_keys[p] for p in merged.prompt[rows]] == [
            (number, shard.prompt_keys[p]) for p in shard.prompt
        ]
        start += len(shard.grads)
    lines = [json.loads(line) for line in (tmp_path / "merged" / "meta.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(720))


def test_manifest_is_summed_and_prompts_united(shards, tmp_path):
    merge(tmp_path / "merged", *shards)
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    expected = json.loads((GOLDEN / "expected_merged_manifest.json").read_text())
    prompts = expected.pop("prompt_idxs")  # the original kept the first shard's only
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["prompt_idxs"][:6] == [[0, p] for p in prompts]
    assert len(manifest["prompt_idxs"]) == 12
    assert manifest["entropy_edges_over"] == "dumped_positions"


def test_prompts_stay_integers_where_the_data_set_is_known_to_be_one(shards, tmp_path):
    for shard in shards:
        edit_manifest(shard, dataset={"path": str(shard), "sha256": "a" * 64})
    assert merge(tmp_path / "merged", *shards) == 0
    assert all(isinstance(key, int) for key in load_dump(tmp_path / "merged").prompt_keys)


def test_copying_in_small_blocks_changes_nothing(shards, tmp_path, monkeypatch):
    merge(tmp_path / "merged", *shards)
    monkeypatch.setattr("gradprobe.dump.mapped.BLOCK_BYTES", 7 * 64 * 4)
    merge(tmp_path / "blocks", *shards)
    for name in ("grads.npy", "meta.jsonl", "manifest.json"):
        assert (tmp_path / "blocks" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_every_difference_is_named_and_nothing_is_written(shards, tmp_path, capsys):
    edit_manifest(shards[1], target="model.layers.3.mlp.down_proj.weight", temperature=0.6, model_path="other")
    assert merge(tmp_path / "merged", *shards) == 2
    error = capsys.readouterr().err
    for key in ("target", "temperature", "model_path"):
        assert f"{key} is " in error
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("key", ["row_idx", "bins", "row_dim", "dtype", "sampling", "num_samples_per_prompt"])
def test_each_setting_alone_is_enough_to_refuse(shards, tmp_path, capsys, key):
    changes = {"row_idx": 1, "bins": 4, "row_dim": 65, "dtype": "bfloat16", "sampling": {}, "num_samples_per_prompt": 9}
    edit_manifest(shards[1], **{key: changes[key]})
    assert merge(tmp_path / "merged", *shards) == 2
    assert key in capsys.readouterr().err


def test_overlapping_shards_are_refused(shards, tmp_path, capsys):
    for shard in shards:
        edit_manifest(shard, dataset={"sha256": "a" * 64})
    copy = shutil.copytree(shards[0], tmp_path / "copy")
    assert merge(tmp_path / "merged", *shards, copy) == 2
    assert "and again in" in capsys.readouterr().err
    assert merge(tmp_path / "merged", *shards, shards[0]) == 2
    assert "given twice" in capsys.readouterr().err


def test_each_target_is_merged_by_itself(shards, tmp_path, capsys):
    many = []
    for shard in shards:
        for row in (0, 7):
            target = shutil.copytree(shard, tmp_path / f"many_{shard.name}" / f"L14.mlp.down_proj.weight.r{row}")
            edit_manifest(target, row_idx=row)
        many.append(tmp_path / f"many_{shard.name}")
    assert merge(tmp_path / "merged", *many) == 0
    merge(tmp_path / "single", *shards)
    for row in (0, 7):
        merged = tmp_path / "merged" / f"L14.mlp.down_proj.weight.r{row}"
        assert load_dump(merged).manifest["row_idx"] == row
        for name in ("grads.npy", "meta.jsonl"):
            assert (merged / name).read_bytes() == (tmp_path / "single" / name).read_bytes()
    assert merge(tmp_path / "mixed", many[0], shards[1]) == 2
    assert "its targets are" in capsys.readouterr().err


def test_a_merged_dump_of_the_original_is_not_merged_again(shards, tmp_path, capsys):
    merge(tmp_path / "merged", *shards)
    assert merge(tmp_path / "twice", tmp_path / "merged", shards[0]) == 2
    assert "merged already" in capsys.readouterr().err


def test_output_must_not_be_a_shard(shards):
    before = (shards[0] / "grads.npy").read_bytes()
    assert merge(shards[0], *shards) == 2
    assert (shards[0] / "grads.npy").read_bytes() == before
