"""What docs/scaling.md puts on paper, against the engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_scaling.py"


def tables(*flags: str) -> str:
    return subprocess.run([sys.executable, BENCHMARK, *flags], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_kept_bytes_and_flops_are_those_on_paper():
    found = tables("--check", "--quick", "--device", "cpu")
    exact = re.findall(r"\| 1\.000 \|", found)
    assert len(exact) == 5, found
    assert len(re.findall(r"\| 1\.0000 \|", found)) == 2, found


@pytest.mark.slow
def test_the_tables_on_paper_can_be_made():
    assert "| Qwen3-32B | 16,384 |" in tables("--paper")
