"""A disk that fills up under the merge, the analyses, the plots and the report; one that is full where output goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from planted import GOLDEN, REPOSITORY, write_dump

DRIVER = Path(__file__).with_name("small_disk.py")
TRY_TO_MOUNT = ["unshare", "--mount", "mount", "-t", "tmpfs", "try", "/mnt"]
STEPS = ("merge", "exp1", "exp2", "plots")
REASONS = ("No space left on device", "File too large")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """Of each step, once with nothing there and once over earlier results, for each amount of room."""
    directory = tmp_path_factory.mktemp("full")
    (directory / "disk").mkdir()
    row = np.arange(120)
    for shard in range(2):
        grads = np.random.default_rng(shard).standard_normal((120, 32))
        sample = row // 5 % 4
        write_dump(
            directory / f"s{shard}",
            grads,
            row % 5,
            prompt=row // 20,
            sample=sample,
            correct=sample % 2 == 0,
            seed=shard,
        )
    try:
        can_mount = subprocess.run(TRY_TO_MOUNT, capture_output=True).returncode == 0
    except FileNotFoundError:
        can_mount = False
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    result = subprocess.run(
        [*TRY_TO_MOUNT[:2], sys.executable, DRIVER, directory, "tmpfs"] if can_mount
        else [sys.executable, DRIVER, directory, "limit"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("step", STEPS)
def test_no_room_is_one_line_and_the_same_command_completes(outcomes, step):
    found = [outcome for outcome in outcomes if outcome["step"] == step]
    assert len(found) == (1 if step == "exp1" else 3)
    assert any(outcome["status"] == 2 for outcome in found)
    for outcome in found:
        if outcome["status"] == 2:
            (error,) = outcome["errors"]
            assert any(reason in error for reason in REASONS), outcome
            assert f"disk/{outcome['output']}" in error
            assert "make room and run the same command again" in error
        else:
            assert outcome["status"] == 0, outcome
        assert outcome["again"] == 0, outcome
        assert outcome["as_undisturbed"], outcome


def test_earlier_results_stay_or_are_replaced_whole(outcomes):
    for outcome in outcomes:
        spoiled, gone = (
            [file for file in outcome[what] if not file.startswith("merged/") or outcome["step"] != "merge"]
            for what in ("changed", "gone")
        )
        assert not spoiled, outcome
        # an analysis takes its earlier summary away first, as what that names would be of two runs
        assert set(gone) <= {f"results/{outcome['step']}_summary.json"}, outcome


@pytest.mark.parametrize(("stream", "status"), [("stdout", 2), ("stderr", 0)])
def test_a_full_disk_under_the_output(stream, status):
    """As where a log lies on it."""
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: full}
        result = subprocess.run(
            [sys.executable, "-m", "gradprobe.check", GOLDEN / "aligned" / "s0"], cwd=REPOSITORY, text=True, **streams
        )
    assert result.returncode == status, result.stderr
    if stream == "stdout":
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert "No space left on device; make room" in error
