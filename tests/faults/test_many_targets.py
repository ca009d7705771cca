"""More targets than a process may have files open: every step works, and writes the bytes that it writes anyway."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import analyze_exp2_direction
import merge_grad_vector_shards
import plot_exp12_intuitive
import probe_grad_vectors
from gradprobe import check
from gradprobe.analysis.inputs import open_dumps
from gradprobe.exp1.measure import sample_rollouts

N_TARGETS = 48
FREE_DESCRIPTORS = 24
SMALL = "--num-prompts 4 --num-samples 2 --max-new-tokens 4 --device cpu --bins 2 --pos-per-bin-per-rollout 1 -q"
SMALL += " --param-suffix mlp.down_proj.weight --layer 0,1,2 --row-idx random:16"


@contextmanager
def few_descriptors() -> Iterator[None]:
    most = len(os.listdir("/proc/self/fd")) + FREE_DESCRIPTORS
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def study(checkpoint_dir, problems_file) -> Callable[[Path], None]:
    """Do every step of a study below a directory."""

    def study(root: Path) -> None:
        sampling = ["--model-path", checkpoint_dir, "--dataset", problems_file, *SMALL.split(), "--num-shards", 2]
        dumps, results = [root / "s0", root / "s1"], root / "results"
        for index, shard in enumerate(dumps):
            run(probe_grad_vectors.main, *sampling, "--shard-index", index, "--output-dir", shard)
        run(merge_grad_vector_shards.main, root / "merged", *dumps)
        run(check.main, root / "merged", *dumps)
        for main in (analyze_exp2_direction.main, plot_exp12_intuitive.main):
            run(main, "--output-dir", results, f"a={dumps[0]}", f"b={root / 'merged'}")

    return study


def run(main: Callable[[list[str]], int], *arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def contents(directory: Path) -> dict[str, bytes]:
    files = [file for name in ("grads.npy", "meta.jsonl", "rollouts.jsonl") for file in directory.rglob(name)]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def undisturbed(study, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("free")
    study(root)
    return root


def test_every_step_of_a_study_in_few_descriptors(study, undisturbed, tmp_path):
    with few_descriptors():
        study(tmp_path)
    assert len(list((tmp_path / "merged").glob("*/grads.npy"))) == N_TARGETS > FREE_DESCRIPTORS
    assert contents(tmp_path) == contents(undisturbed)
    assert (tmp_path / "results" / "exp2_summary.json").is_file()


def test_no_dump_keeps_its_file_open(undisturbed):
    """What Exp 1 and Exp 3 begin with; their numbers of so many targets would take minutes."""
    with few_descriptors():
        (dumps,) = open_dumps({"a": undisturbed / "merged"}).values()
        sampled = list(map(sample_rollouts, dumps))
    assert len(sampled) == N_TARGETS
    assert all(len(dump.grads) == len(dump.row) for dump in sampled)
