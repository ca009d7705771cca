"""A small probe, and its dump, for what faults are done to."""

from pathlib import Path

import pytest

import probe_grad_vectors

SMALL = "--num-prompts 4 --num-samples 2 --max-new-tokens 4 --device cpu --bins 2 --pos-per-bin-per-rollout 1 -q"
SMALL += " --sample-rows 2 --batch-tokens 40"


@pytest.fixture(scope="module")
def sampling(checkpoint_dir, problems_file) -> list[str]:
    return ["--model-path", str(checkpoint_dir), "--dataset", str(problems_file), *SMALL.split()]


@pytest.fixture(scope="module")
def finished(sampling, tmp_path_factory) -> Path:
    dump = tmp_path_factory.mktemp("undisturbed") / "dump"
    assert probe_grad_vectors.main([*sampling, "--output-dir", str(dump)]) == 0
    return dump
