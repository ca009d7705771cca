"""A study that grows: further shards hold the prompts behind the old ones, and merge with them."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, stub_environment

import merge_grad_vector_shards
import probe_grad_vectors
from gradprobe.dump.records import iter_rollouts

SMALL = "--num-samples 2 --max-new-tokens 6 --device cpu --bins 2 --pos-per-bin-per-rollout 1 -q"


def probe(output: Path, *arguments: object) -> Path:
    assert probe_grad_vectors.main(["--output-dir", str(output), *map(str, arguments)]) == 0
    return output


def merge(*directories: Path) -> int:
    return merge_grad_vector_shards.main(list(map(str, directories)))


def manifest_of(dump: Path) -> dict:
    return json.loads((dump / "manifest.json").read_text())


@pytest.fixture(scope="module")
def sets(checkpoint_dir, problems_file, tmp_path_factory) -> dict[str, list[Path]]:
    """A study of 4 prompts in two shards, its growth to 10, and one of 10 at once."""
    root = tmp_path_factory.mktemp("growing")
    sampling = ["--model-path", checkpoint_dir, "--dataset", problems_file, *SMALL.split()]
    asked = {
        "old": ("--num-prompts", 4),
        "new": ("--num-prompts", 10, "--skip-prompts", 4),
        "all": ("--num-prompts", 10),
    }
    return {
        name: [probe(root / f"{name}{i}", *sampling, *flags, "--num-shards", 2, "--shard-index", i) for i in range(2)]
        for name, flags in asked.items()
    }


def test_grown_it_has_the_rollouts_of_the_larger_study(sets, tmp_path):
    assert merge(tmp_path / "grown", *sets["old"], *sets["new"]) == 0
    assert merge(tmp_path / "whole", *sets["all"]) == 0
    found, expected = (
        {(r.prompt_idx, r.sample_idx): r for r in iter_rollouts(tmp_path / name / "rollouts.jsonl")}
        for name in ("grown", "whole")
    )
    assert found.keys() == expected.keys()
    for key, rollout in found.items():
        assert (rollout.response_ids, rollout.correct) == (expected[key].response_ids, expected[key].correct)
        np.testing.assert_allclose(rollout.logprobs, expected[key].logprobs, rtol=1e-4, atol=1e-6)
    grown, whole = manifest_of(tmp_path / "grown"), manifest_of(tmp_path / "whole")
    for key in ("num_prompts", "num_rollouts", "prompt_idxs", "prompt_hashes", "prompts_due", "sampling"):
        assert grown[key] == whole[key], key
    assert grown["sampling"]["num_prompts_of_study"] == 10
    np.testing.assert_allclose(grown["entropy_edges"], whole["entropy_edges"], rtol=1e-4, atol=1e-6)


def test_a_set_or_a_shard_that_is_not_there_is_named(sets, tmp_path, capsys):
    assert merge(tmp_path / "merged", *sets["new"]) == 2
    assert "begins behind the study's first 4 prompts, of which 0 are there" in capsys.readouterr().err
    assert merge(tmp_path / "merged", *sets["old"], sets["new"][0]) == 2
    assert "shard 1 of 2 is missing" in capsys.readouterr().err
    assert merge(tmp_path / "merged", *sets["old"], *sets["all"]) == 2
    assert not (tmp_path / "merged").exists()


def test_the_launcher_adds_the_prompts_that_are_missing(tmp_path):
    environment = stub_environment(tmp_path)
    out = Path(environment["OUT_ROOT"])
    for shard in range(2):
        for tag in ("base", "trained"):
            (out / f"exp12_{tag}_s{shard}").mkdir(parents=True)
            (out / f"exp12_{tag}_s{shard}" / "settings.json").write_text('{\n  "num_prompts_of_study": 128\n}\n')

    def planned(n: int) -> list[tuple[str, ...]]:
        result = subprocess.run(
            ["bash", ROOT / "run_exp1_exp2.sh"],
            env={**environment, "DRY_RUN": "1", "NUM_PROMPTS": str(n), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        )
        wanted = r"--num-prompts (\d+) (?:--skip-prompts (\d+) )?.*exp12_base_s(\d) --shard-index (\d)"
        return [found.groups() for line in result.stdout.splitlines() if (found := re.search(wanted, line))]

    of_old = [("128", None, "0", "0"), ("128", None, "1", "1")]
    assert planned(128) == of_old
    assert planned(200) == [*of_old, ("200", "128", "2", "0"), ("200", "128", "3", "1")]
