"""Directories and files that belong to somebody else."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from planted import GOLDEN

import analyze_exp2_direction
import merge_grad_vector_shards
import plot_exp12_intuitive
import probe_grad_vectors
from gradprobe import check

NOBODY = 65534


def as_nobody(call: Callable[[], int], log: Path) -> tuple[int, str]:
    """Call in a child that has given up root's rights, where this process has them; its status and what it said."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            status = call()
            sys.stdout.flush()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    """A directory that anybody can reach, but not write to."""
    path = tmp_path / "place"
    path.mkdir()
    for parent in (path, *path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    yield path
    for directory in [path, *(p for p in path.rglob("*") if p.is_dir() and not p.is_symlink())]:
        directory.chmod(0o755)


def read_only(path: Path) -> Path:
    for file in [*path.rglob("*"), path]:
        file.chmod(0o555 if file.is_dir() else 0o444)
    return path


FORBIDDEN = {
    "a probe's output": lambda p, s, d: (probe_grad_vectors.main, [*s, "--output-dir", read_only(p / "own")]),
    "a probe's new output": lambda p, s, d: (probe_grad_vectors.main, [*s, "--output-dir", read_only(p) / "new"]),
    "an unfinished probe": lambda p, s, d: (
        probe_grad_vectors.main, [*s, "--output-dir", read_only(unmanifested(p, d))],
    ),
    "a merge's output": lambda p, s, d: (merge_grad_vector_shards.main, [read_only(p / "own"), d]),
    "an analysis' output": lambda p, s, d: (
        analyze_exp2_direction.main, [f"a={GOLDEN / 'aligned' / 's0'}", "--output-dir", read_only(p / "own")],
    ),
    "the plots' output": lambda p, s, d: (
        plot_exp12_intuitive.main, [f"a={GOLDEN / 'aligned' / 's0'}", "--output-dir", read_only(p / "own")],
    ),
    "a dump's gradients": lambda p, s, d: (check.main, [unreadable(p, d, "grads.npy")]),
    "a dump's lines": lambda p, s, d: (check.main, [unreadable(p, d, "meta.jsonl")]),
    "a dump's manifest": lambda p, s, d: (
        merge_grad_vector_shards.main, [p / "merged", unreadable(p, d, "manifest.json")],
    ),
    "a dump's rollouts": lambda p, s, d: (check.main, [unreadable(p, d, "rollouts.jsonl")]),
}  # fmt: skip


def unmanifested(place: Path, dump: Path) -> Path:
    copy = Path(shutil.copytree(dump, place / "dump"))
    (copy / "manifest.json").unlink()
    return copy


def unreadable(place: Path, dump: Path, name: str) -> Path:
    copy = Path(shutil.copytree(dump, place / "dump"))
    (copy / name).chmod(0)
    return copy


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_another_user_forbids_is_one_line(place, sampling, finished, tmp_path_factory, what):
    (place / "own").mkdir()
    inputs = place.parent / "inputs"  # that nobody can read
    inputs.mkdir(mode=0o755)
    model = shutil.copytree(sampling[1], inputs / "model")
    data = shutil.copy(sampling[3], inputs)
    dump = shutil.copytree(finished, inputs / "dump")
    for file in inputs.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    main, arguments = FORBIDDEN[what](place, ["--model-path", model, "--dataset", data, *sampling[4:]], dump)
    before = sorted(place.rglob("*"))
    status, said = as_nobody(lambda: main(list(map(str, arguments))), place.parent / "log")
    assert status == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert str(place) in error
    assert "not writable" in error or "ermission" in error, error
    assert sorted(place.rglob("*")) == before
