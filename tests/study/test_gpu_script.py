"""benchmarks/gpu.sh where a step fails or time runs out; on the CPU its whole path takes minutes."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import bench_probe  # noqa: E402
import bench_step  # noqa: E402


def gpu(out: Path, python: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", out],
        env={**os.environ, "PYTHON": str(python), "DEVICE": "cpu", "SHAPE": "small", **environment},
        capture_output=True,
        text=True,
    )


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def stub(directory: Path, body: str) -> Path:
    """A python that does something else; its first argument is the benchmark."""
    file = directory / "python"
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)
    return file


def test_a_check_that_fails_is_named_and_the_rest_still_runs(tmp_path):
    python = stub(tmp_path, 'echo "| row |"; echo "{}"; [[ "$1" != *gpu_checks.py ]]')
    ran = gpu(tmp_path / "out", python)
    assert ran.returncode == 1
    assert ran.stderr == "failed: Checks\n"
    assert [step["status"] for step in results(tmp_path / "out")] == [1, 0, 0, 0, 0]
    assert (tmp_path / "out" / "gpu.md").read_text().count("| row |") == 5


def test_time_that_runs_out_keeps_what_there_is_and_is_no_failure(tmp_path):
    python = stub(tmp_path, 'echo "| row |"; [[ "$1" == *gpu_checks.py ]] || exec sleep 60')
    ran = gpu(tmp_path / "out", python, LIMIT_S="6")
    assert ran.returncode == 0, ran.stderr
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert table.count("| row |") == 2
    assert table.count("cut off by the time limit") == 1
    assert table.count("not reached") == 3


@pytest.mark.parametrize(("largest", "status"), [(None, 0), (1e-9, 1)])
def test_the_step_is_held_against_float64(largest, status, monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "RESPONSE", 40)
    if largest is not None:
        monkeypatch.setitem(bench_step.LARGEST, torch.float32, largest)
    assert bench_step.main(["--shape", "small", "--device", "cpu"]) == status
    out = capsys.readouterr().out
    assert out.count("| NO |") == status
    assert set(json.loads(out.splitlines()[-1])) == {"shape", "float32", "bfloat16"}


def test_a_gpu_s_clock_and_memory_are_torch_s(monkeypatch):
    """bench_probe's and bench_scaling's, by stand-ins."""
    asked = []
    for name, answer in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 7)):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, answer=answer: (asked.append(name), answer)[1])
    model = torch.nn.Module()
    model.device = torch.device("cuda")
    bench = bench_probe.Bench(model, [], frozenset(), argparse.Namespace())
    assert bench.seconds("nothing", lambda: "done")[1] == "done"
    assert bench.peak_bytes == {"nothing": 7}
    assert asked == ["reset_peak_memory_stats", "synchronize", "max_memory_allocated"]
