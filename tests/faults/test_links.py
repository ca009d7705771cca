"""Large files and directories are often moved elsewhere, with a link in their place: read, and not written through."""

import shutil
from collections.abc import Callable

import pytest

import analyze_exp2_direction
import merge_grad_vector_shards
import probe_grad_vectors
from gradprobe import check
from gradprobe.dump.consistency import problems_of

DUMP_FILES = ("grads.npy", "meta.jsonl", "rollouts.jsonl")


def run(main: Callable[[list[str]], int], *arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("part", ["output", "target"])
def test_directories_behind_links_are_ordinary(sampling, tmp_path, part):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    targets = [out]
    if part == "output":
        out.symlink_to(elsewhere)
    else:
        targets = [out / f"L{layer}.mlp.down_proj.weight.r0" for layer in (0, 1)]
        out.mkdir()
        targets[0].symlink_to(elsewhere)
    layers = ["--layer", "0,1"] if part == "target" else []
    assert run(probe_grad_vectors.main, *sampling, "--output-dir", out, *layers) == 0
    assert problems_of(out) == ([], [])
    assert all((target / "grads.npy").is_file() for target in targets)


@pytest.mark.parametrize("name", DUMP_FILES)
def test_a_finished_dumps_files_may_lie_behind_links(sampling, finished, tmp_path, name):
    dump = shutil.copytree(finished, tmp_path / "dump")
    shutil.move(dump / name, tmp_path / name)
    (dump / name).symlink_to(tmp_path / name)
    assert run(check.main, dump) == 0
    assert run(merge_grad_vector_shards.main, tmp_path / "merged", dump) == 0
    assert run(probe_grad_vectors.main, *sampling, "--output-dir", dump) == 0
    before = (tmp_path / name).read_bytes()
    assert run(probe_grad_vectors.main, *sampling, "--output-dir", dump, "--seed", 1, "--overwrite") == 0
    assert (tmp_path / name).read_bytes() == before


def test_what_the_system_refuses_is_one_line(sampling, finished, tmp_path, capsys):
    long = tmp_path / ("x" * 300)
    for main, *arguments in (
        (probe_grad_vectors.main, *sampling, "--output-dir", long),
        (merge_grad_vector_shards.main, long, finished),
        (analyze_exp2_direction.main, f"base={finished}", "--output-dir", long),
        (check.main, long),
    ):
        assert run(main, *arguments) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "File name too long" in error
