"""Golden shards through our merge and both analyses: the original's numbers from aligned and from scrambled shards."""

import json
import math
from pathlib import Path

import numpy as np
import planted
import pytest

import analyze_exp1_compression
import analyze_exp2_direction
import merge_grad_vector_shards
from gradprobe.analysis.inputs import open_dumps
from gradprobe.exp2.measure import bucket_directions

EXPECTED_EXP1 = json.loads((planted.GOLDEN / "expected_exp1_summary.json").read_text())
EXPECTED_EXP2 = json.loads((planted.GOLDEN / "expected_exp2_summary.json").read_text())
EXPECTED_MANIFEST = json.loads((planted.GOLDEN / "expected_merged_manifest.json").read_text())


@pytest.fixture(scope="module", params=["aligned", "scrambled"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "merged"
    shards = [str(planted.GOLDEN / request.param / shard) for shard in ("s0", "s1")]
    assert merge_grad_vector_shards.main([str(out), *shards]) == 0
    return out


def test_merged_manifest(merged: Path):
    manifest = json.loads((merged / "manifest.json").read_text())
    edges = manifest.pop("entropy_edges")
    assert edges == pytest.approx(EXPECTED_MANIFEST["entropy_edges"], rel=1e-6)
    same = ("model_path", "target", "row_idx", "row_dim", "bins", "num_positions", "num_rollouts", "num_prompts")
    assert {key: manifest[key] for key in same} == {key: EXPECTED_MANIFEST[key] for key in same}
    assert manifest["num_correct_rollouts"] == EXPECTED_MANIFEST["num_correct_rollouts"]


def test_exp1_of_the_merged_dump(merged: Path, tmp_path: Path):
    assert analyze_exp1_compression.main(["--output-dir", str(tmp_path), f"base={merged}"]) == 0
    found = json.loads((tmp_path / "exp1_summary.json").read_text())["base"]
    expected = EXPECTED_EXP1["base"]
    assert {key: found[key] for key in ("n_positions", "row_dim", "target")} == {
        key: expected[key] for key in ("n_positions", "row_dim", "target")
    }
    assert list(found["per_bucket"]) == list(expected["per_bucket"])
    for bucket, numbers in expected["per_bucket"].items():
        assert {key: found["per_bucket"][bucket][key] for key in numbers} == pytest.approx(numbers, rel=1e-6)
    np.testing.assert_allclose(
        found["cross_bucket_top1_cosine"], np.abs(expected["cross_bucket_top1_cosine"]), rtol=1e-6
    )


def test_exp2_of_the_merged_dump(merged: Path, tmp_path: Path):
    assert analyze_exp2_direction.main(["--output-dir", str(tmp_path), str(merged)]) == 0
    found = json.loads((tmp_path / "exp2_summary.json").read_text())
    expected = EXPECTED_EXP2
    for key in ("run_dir", "model", "target", "n_prompts_usable"):
        assert found[key] == expected[key]
    assert found["correct_vs_incorrect"] == pytest.approx(expected["correct_vs_incorrect"], rel=1e-6)
    assert len(found["per_prompt"]) == len(expected["per_prompt"])
    for prompt, expected_prompt in zip(found["per_prompt"], expected["per_prompt"], strict=True):
        assert prompt["prompt_idx"] == expected_prompt["prompt_idx"]
        assert prompt["n_correct_tokens"] == expected_prompt["n_correct_tokens"]
        assert prompt["n_incorrect_tokens"] == expected_prompt["n_incorrect_tokens"]
        assert prompt["cos_correct_vs_incorrect"] == pytest.approx(
            expected_prompt["cos_correct_vs_incorrect"], rel=1e-6
        )


def test_control_of_the_merged_dump_lies_within_its_spread(merged: Path, tmp_path: Path):
    """The half-split hangs on a shuffle, so it is compared by its standard error, here from both sides' draws."""
    dump = open_dumps({None: merged})[None][0]
    control = bucket_directions(dump, dump.bins - 1).directions.control
    expected = EXPECTED_EXP2["control_within_group"]
    assert len(control) == expected["n"]
    assert abs(control.mean() - expected["mean"]) < 3 * control.std() / math.sqrt(len(control))
