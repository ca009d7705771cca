"""What lies where a file is expected: links, FIFOs, devices, directories. No hang, no traceback, none written through.

Each entry of a table is a place and what is planted there. Whatever a script makes of it (a refusal in one line, or its
work done beside it), the file behind a link keeps its bytes, and with the plant taken away the same command completes.
"""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from planted import write_dump

import analyze_exp1_compression
import analyze_exp2_direction
import merge_grad_vector_shards
import plot_exp12_intuitive
import probe_grad_vectors
from gradprobe import check
from gradprobe.common.console import script_main
from gradprobe.common.files import write_json
from gradprobe.dump.consistency import problems_of

SMALL = "--num-prompts 2 --num-samples 2 --max-new-tokens 4 --device cpu --bins 2 --pos-per-bin-per-rollout 1 -q"
SECONDS = 10
PRECIOUS = "all that I have\n"


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A script that waits for ever, for example for somebody to open a FIFO, fails its test."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def plant_link(place: Path, precious: Path) -> None:
    place.symlink_to(precious)


def plant_hard_link(place: Path, precious: Path) -> None:
    place.hardlink_to(precious)


def plant_dangling_link(place: Path, precious: Path) -> None:
    place.symlink_to(precious.with_name("new"))


def plant_fifo(place: Path, precious: Path) -> None:
    os.mkfifo(place)


def plant_directory(place: Path, precious: Path) -> None:
    place.mkdir()
    (place / "inside").write_text(PRECIOUS)


def plant_device(place: Path, precious: Path) -> None:
    place.symlink_to("/dev/zero")


def plant_circle(place: Path, precious: Path) -> None:
    place.symlink_to(place.name)


def plant_socket(place: Path, precious: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(place.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place.name)
    os.fchdir(here)
    os.close(here)


def take_away(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


OUTPUT_KINDS = (plant_link, plant_hard_link, plant_dangling_link, plant_fifo, plant_directory)
INPUT_KINDS = (plant_fifo, plant_directory, plant_device, plant_circle, plant_socket)


def crossed(places: tuple[str, ...], kinds: tuple[Callable, ...]) -> pytest.MarkDecorator:
    """One test for each place and kind."""
    pairs = [pytest.param(p, k, id=f"{k.__name__.removeprefix('plant_')}-{p}") for p in places for k in kinds]
    return pytest.mark.parametrize(("name", "plant"), pairs)


@pytest.fixture
def call(capsys) -> Callable[..., tuple[int, str]]:
    """Call a script's `main`: its status and its error lines; a refusal is one line."""

    def call(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status in (0, 2)
        assert len(lines) == (status == 2) or (main is check.main and lines), lines
        return status, "\n".join(lines)

    return call


@pytest.fixture
def precious(tmp_path) -> Path:
    """A file of the user's that has nothing to do with it."""
    file = tmp_path / "thesis" / "chapter"
    file.parent.mkdir()
    file.write_text(PRECIOUS)
    return file


def is_untouched(precious: Path) -> bool:
    return precious.read_text() == PRECIOUS and [file.name for file in precious.parent.iterdir()] == [precious.name]


# ---- outputs ---------------------------------------------------------------------------------------------------------

GROWING = ("progress.jsonl", "rollouts.jsonl.partial", "grads.npy.partial", "rollouts.jsonl", "grads.npy")
WHOLE = ("settings.json", "settings.json.partial", "meta.jsonl", "meta.jsonl.partial", "manifest.json")
WHOLE += ("manifest.json.partial", ".lock")
DUMP_FILES = ("grads.npy", "meta.jsonl", "rollouts.jsonl")


@pytest.fixture(scope="module")
def sampling(checkpoint_dir, problems_file) -> list[str]:
    return ["--model-path", str(checkpoint_dir), "--dataset", str(problems_file), *SMALL.split()]


@pytest.fixture(scope="module")
def finished(sampling, tmp_path_factory) -> Path:
    """What an undisturbed probe writes."""
    dump = tmp_path_factory.mktemp("undisturbed") / "dump"
    assert probe_grad_vectors.main([*sampling, "--output-dir", str(dump)]) == 0
    return dump


@crossed((*GROWING, *WHOLE), OUTPUT_KINDS)
def test_where_a_probe_writes(call, sampling, finished, precious, tmp_path, name, plant):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished / "settings.json", out)  # else it is somebody else's dump
    take_away(out / name)
    plant(out / name, precious)
    status, said = call(probe_grad_vectors.main, *sampling, "--output-dir", out)
    assert is_untouched(precious)
    if status == 2:
        assert f"{out / name}" in said or f"{out}: " in said
        take_away(out / name)
        status, said = call(probe_grad_vectors.main, *sampling, "--output-dir", out)
    assert status == 0, said
    assert problems_of(out) == ([], [])
    for file in DUMP_FILES:
        assert (out / file).read_bytes() == (finished / file).read_bytes()
        assert not (out / file).is_symlink()


@pytest.mark.parametrize("part", ["", "output", "target"])
def test_directories_behind_links_are_ordinary(call, sampling, finished, tmp_path, part):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    targets = [out]
    if part == "output":
        out.symlink_to(elsewhere)
    elif part == "target":
        targets = [out / f"L{layer}.mlp.down_proj.weight.r0" for layer in (0, 1)]
        out.mkdir()
        targets[0].symlink_to(elsewhere)
    layers = ["--layer", "0,1"] if part == "target" else []
    assert call(probe_grad_vectors.main, *sampling, "--output-dir", out, *layers)[0] == 0
    assert problems_of(out) == ([], [])
    assert all((target / "grads.npy").is_file() for target in targets)


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    """In the format of the original scripts: 4 prompts of 2 rollouts, 5 buckets."""
    row = np.arange(40)
    path = tmp_path_factory.mktemp("dumps") / "dump"
    grads = np.random.default_rng(0).standard_normal((40, 6))
    return write_dump(path, grads, row % 5, prompt=row // 10, sample=row // 5 % 2, correct=row // 5 % 2 == 0)


@crossed((*(f"{name}.partial" for name in DUMP_FILES), *DUMP_FILES, "manifest.json.partial", ".lock"), OUTPUT_KINDS)
def test_where_a_merge_writes(call, finished, precious, tmp_path, name, plant):
    out = tmp_path / "merged"
    out.mkdir()
    plant(out / name, precious)
    status, said = call(merge_grad_vector_shards.main, out, finished)
    assert is_untouched(precious)
    if status == 2:
        assert f"{out / name}" in said
        take_away(out / name)
        status, said = call(merge_grad_vector_shards.main, out, finished)
    assert status == 0, said
    assert problems_of(out) == ([], [])
    assert (out / "grads.npy").read_bytes() == (finished / "grads.npy").read_bytes()


RESULTS = {
    "exp1": (analyze_exp1_compression.main, ("exp1_summary.json", "exp1_arrays.npz"), (plant_link,)),
    "exp2": (
        analyze_exp2_direction.main,
        ("exp2_summary.json", "exp2_arrays.npz", "exp2_alignment.png"),
        OUTPUT_KINDS,
    ),
}
PLACES = [
    pytest.param(analysis, name + ending, plant, id=f"{plant.__name__.removeprefix('plant_')}-{name}{ending}")
    for analysis, (_, names, kinds) in RESULTS.items()
    for name in names
    for ending in ("", ".partial")
    for plant in kinds
]


@pytest.mark.parametrize(("analysis", "name", "plant"), PLACES)
def test_where_an_analysis_writes(call, dump, precious, tmp_path, analysis, name, plant):
    out, main = tmp_path / "results", RESULTS[analysis][0]
    out.mkdir()
    plant(out / name, precious)
    arguments = [f"base={dump}", "--output-dir", out]
    status, said = call(main, *arguments)
    assert is_untouched(precious)
    if status == 2:
        assert f"{out / name}" in said
        take_away(out / name)
        status, said = call(main, *arguments)
    assert status == 0, said
    assert (out / f"{analysis}_summary.json").is_file()
    assert not list(out.glob("*.partial"))


# ---- inputs ----------------------------------------------------------------------------------------------------------

MODEL_FILES = ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@crossed(MODEL_FILES, INPUT_KINDS)
def test_what_a_probe_reads_of_a_checkpoint(call, sampling, checkpoint_dir, precious, tmp_path, name, plant):
    model = shutil.copytree(checkpoint_dir, tmp_path / "model")
    take_away(model / name)
    plant(model / name, precious)
    status, said = call(probe_grad_vectors.main, *sampling, "--model-path", model, "--output-dir", tmp_path / "out")
    assert status == 2
    assert f"--model-path {model}" in said or f"{model / name}" in said


FILE_FLAGS = ("--dataset", "--prompt-template", "--entropy-edges", "--rollouts")


@crossed(FILE_FLAGS, INPUT_KINDS)
def test_files_named_by_a_flag(call, sampling, precious, tmp_path, name, plant):
    place = tmp_path / "named"
    plant(place, precious)
    others = sampling[:2] if name == "--rollouts" else sampling
    status, said = call(probe_grad_vectors.main, *others, name, place, "--output-dir", tmp_path / "out")
    assert status == 2
    assert f"{place}" in said


READERS = {
    "check": lambda dump, results: (check.main, [dump]),
    "merge": lambda dump, results: (merge_grad_vector_shards.main, [results, dump]),
    "exp1": lambda dump, results: (analyze_exp1_compression.main, [f"base={dump}", "--output-dir", results]),
    "exp2": lambda dump, results: (analyze_exp2_direction.main, [f"base={dump}", "--output-dir", results]),
    "plots": lambda dump, results: (plot_exp12_intuitive.main, [f"base={dump}", "--output-dir", results]),
}


@pytest.mark.parametrize("reader", READERS)
@crossed(("manifest.json", "grads.npy", "meta.jsonl", "rollouts.jsonl"), INPUT_KINDS)
def test_files_of_a_dump(call, finished, precious, tmp_path, reader, name, plant):
    dump = shutil.copytree(finished, tmp_path / "dump")
    take_away(dump / name)
    plant(dump / name, precious)
    main, arguments = READERS[reader](dump, tmp_path / "results")
    status, said = call(main, *arguments)
    assert status == 2
    assert f"{dump}" in said
    assert not list((tmp_path / "results").glob("*"))


@pytest.mark.parametrize("name", DUMP_FILES)
def test_a_finished_dumps_files_may_lie_behind_links(call, sampling, finished, precious, tmp_path, name):
    """As where a large file was moved to another disk: read, and never written through."""
    dump = shutil.copytree(finished, tmp_path / "dump")
    shutil.move(dump / name, tmp_path / name)
    (dump / name).symlink_to(tmp_path / name)
    assert call(check.main, dump)[0] == 0
    assert call(merge_grad_vector_shards.main, tmp_path / "merged", dump)[0] == 0
    assert call(probe_grad_vectors.main, *sampling, "--output-dir", dump)[0] == 0
    before = (tmp_path / name).read_bytes()
    assert call(probe_grad_vectors.main, *sampling, "--output-dir", dump, "--seed", 1, "--overwrite")[0] == 0
    assert (tmp_path / name).read_bytes() == before


@crossed(("exp1_summary.json", "exp2_summary.json", "exp3_summary.json", "exp1_arrays.npz"), INPUT_KINDS)
def test_summaries_that_the_plots_read(call, dump, results, precious, tmp_path, name, plant):
    there = shutil.copytree(results, tmp_path / "results")
    take_away(there / name)
    plant(there / name, precious)
    status, said = call(plot_exp12_intuitive.main, f"base={dump}", "--output-dir", there)
    assert status == 0 or f"{there / name}" in said


@pytest.fixture(scope="module")
def results(dump, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results")
    for main, *_ in RESULTS.values():
        assert main([f"base={dump}", "--output-dir", str(out), "-q"]) == 0
    return out


# ---- the system says no ----------------------------------------------------------------------------------------------


def test_a_file_that_the_system_refuses_is_one_line(call, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json.partial").mkdir()

    @script_main
    def main(argv: list[str]) -> int:
        write_json(tmp_path / "results" / "x.json", {})
        return 0

    status, said = call(main)
    assert status == 2
    assert f"{tmp_path / 'results' / 'x.json.partial'}: Is a directory" in said


def test_a_name_that_is_too_long_is_one_line(call, sampling, dump, tmp_path):
    long = tmp_path / ("x" * 300)
    for main, arguments in (
        (probe_grad_vectors.main, [*sampling, "--output-dir", long]),
        (merge_grad_vector_shards.main, [long, dump]),
        (analyze_exp1_compression.main, [f"base={dump}", "--output-dir", long]),
        (check.main, [long]),
    ):
        status, said = call(main, *arguments)
        assert status == 2
        assert "File name too long" in said
