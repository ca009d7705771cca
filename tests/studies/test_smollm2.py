"""The SmolLM2 study: files are what their script makes, held-out problems are held out, adapters are small."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gradprobe.analysis.inputs import open_dumps
from gradprobe.problems.boxed import last_boxed
from gradprobe.problems.data_set import load_problems
from gradprobe.problems.templates import fill, read_template

STUDY = Path(__file__).parents[2] / "studies" / "smollm2"
FILES = ("supervised.parquet", "training.parquet", "problems.parquet")
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
pytest.importorskip("pyarrow")


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def maker():
    yield from script("make_problems")


@pytest.fixture(scope="module")
def claims():
    yield from script("claims")


@pytest.mark.parametrize("shard", ["s0", "s1"])
def test_labels_by_line_are_those_that_readers_of_the_original_saw(claims, shard):
    (dump,) = open_dumps({None: GOLDEN / "aligned" / shard})[None]
    lines = (GOLDEN / "scrambled" / shard / "meta.jsonl").read_text().splitlines()
    assert claims.labels_by_line(dump, dump.row).tolist() == [json.loads(line)["bin"] for line in lines]


@pytest.fixture(scope="module")
def rows(maker):
    return maker.make_files()


def test_files_are_what_the_script_makes(rows):
    import pyarrow.parquet as pq

    assert {file: pq.read_table(STUDY / file).to_pylist() for file in FILES} == rows


def numbers_of(row):
    """The kind and the numbers asked about, in any order: mirrored problems are the same here."""
    return (row["kind"], *sorted(map(int, re.findall(r"\d+", row["problem"]))))


def test_no_problem_stands_in_two_files(rows):
    asked = {file: {row["problem"] for row in rows[file]} for file in FILES}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())) == sum(map(len, rows.values()))
    mirrored = {file: {numbers_of(row) for row in rows[file] if row["kind"] in ("sum", "product")} for file in FILES}
    assert sum(map(len, mirrored.values())) == len(set().union(*mirrored.values()))


def test_answers_and_solutions_are_right(rows):
    """Computed from the text alone, by other means than the script that made it."""
    for row in rows["supervised.parquet"]:
        assert last_boxed(row["solution"]) == row["answer"]
        for expression, value in re.findall(r"([\d+*-]+)=(\d+)", row["solution"]):
            assert eval(expression) == int(value)  # digits and + - * only, as just matched
    for row in [row for file in FILES for row in rows[file]]:
        if asked := re.search(r"What is ([\d +*-]+)\?", row["problem"]):
            assert eval(asked[1]) == int(row["answer"])


def test_the_toolkit_reads_problems_and_template():
    problems = load_problems(STUDY / "problems.parquet").problems
    assert len(problems) >= 256
    prompt = fill(read_template(str(STUDY / "template.txt")), problems[0].prompt)
    assert prompt == f"<|im_start|>user\n{problems[0].prompt}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["base_adapter", "trained_adapter"])
def test_adapters_are_small_and_name_no_folder(name):
    assert (STUDY / name / "adapter_model.safetensors").stat().st_size <= 8_000_000
    assert '"SmolLM2-135M-Instruct"' in (STUDY / name / "adapter_config.json").read_text()


def test_training_moved_the_adapter():
    both = [safe_open(STUDY / name / "adapter_model.safetensors", "pt") for name in ("base_adapter", "trained_adapter")]
    base, trained = [{key: file.get_tensor(key) for key in file.keys()} for file in both]  # noqa: SIM118
    assert base.keys() == trained.keys()
    assert not any(torch.equal(base[key], trained[key]) for key in base)
