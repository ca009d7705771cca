"""The launcher, with a stub in the interpreter's place: what it runs, and what it leaves behind when a step fails."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUB = """#!/usr/bin/env bash
# Stands in for Python: notes its call, then does what the scenario of its step says.
set -u
script="$(basename "$1")"; shift
output=""; shard=""
while (($#)); do
    case "$1" in --output-dir) output="$2" ;; --shard-index) shard="$2" ;; esac
    shift
done
step="$script${shard:+:$(basename "$output")}"
printf '%s\\t%s\\t%s\\n' "$step" "${CUDA_VISIBLE_DEVICES-}" "${OMP_NUM_THREADS-}" >>"$STUB_CALLS"
case " $STUB_FAIL " in *" $step "*) printf 'the reason stands here\\n' >&2; exit 7 ;; esac
case " $STUB_HANG " in *" $step "*) sleep 300 & sleep 300 ;; esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    stub = tmp_path / "stub python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if name not in ("GPUS", "DEVICE")},
        "PYTHON": str(stub),
        "OUT_ROOT": str(tmp_path / "out 'root'"),
        "STUB_CALLS": str(tmp_path / "calls"),
        "STUB_FAIL": "",
        "STUB_HANG": "",
        "DEVICE": "cpu",
    }


def launch(environment: dict[str, str], **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "run_exp1_exp2.sh"],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )


def calls(environment: dict[str, str]) -> list[list[str]]:
    return [line.split("\t") for line in Path(environment["STUB_CALLS"]).read_text().splitlines()]


def processes_of(environment: dict[str, str]) -> list[str]:
    """Command lines of living processes that have this test's stub in their environment."""
    marker = environment["STUB_CALLS"].encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and marker in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_the_chain_runs_in_order(environment):
    result = launch(environment)
    assert result.returncode == 0, result.stderr
    steps = [call[0] for call in calls(environment)]
    shards = [f"probe_grad_vectors.py:exp12_{tag}_s{i}" for tag in ("base", "trained") for i in (0, 1)]
    assert sorted(steps[:4]) == shards
    assert steps[4:] == [
        "merge_grad_vector_shards.py",
        "merge_grad_vector_shards.py",
        "analyze_exp1_compression.py",
        "analyze_exp2_direction.py",
        "plot_exp12_intuitive.py",
    ]


def test_one_shard_per_gpu(environment):
    result = launch(environment, DEVICE="auto", GPUS="3,5", SHARDS_PER_MODEL="3")
    assert result.returncode == 0, result.stderr
    probes = [call for call in calls(environment) if call[0].startswith("probe")]
    assert len(probes) == 6
    assert {call[1] for call in probes} == {"3", "5"}


def test_threads_are_divided_on_a_cpu(environment):
    launch(environment)
    n_cores = len(os.sched_getaffinity(0))
    probes = [call for call in calls(environment) if call[0].startswith("probe")]
    assert {call[2] for call in probes} == {str(n_cores // min(n_cores, 4))}


@pytest.mark.parametrize("failing", ["probe_grad_vectors.py:exp12_trained_s0", "analyze_exp2_direction.py"])
def test_a_failing_step_is_named_with_its_log_and_stops_the_run(environment, failing):
    result = launch(environment, STUB_FAIL=failing)
    assert result.returncode == 1
    assert "failed with exit code 7" in result.stderr
    assert "the reason stands here" in result.stderr
    assert "plot_exp12_intuitive.py" not in {call[0] for call in calls(environment)}
    assert processes_of(environment) == []


def test_a_failing_shard_stops_the_others(environment):
    others = "probe_grad_vectors.py:exp12_base_s0"
    started = time.monotonic()
    settings = {"STUB_FAIL": "probe_grad_vectors.py:exp12_base_s1", "STUB_HANG": others, "GPUS": "0,1"}
    result = launch(environment, DEVICE="cuda", **settings)
    assert result.returncode == 1
    assert "probe base shard 1 failed" in result.stderr
    assert time.monotonic() - started < 30
    assert processes_of(environment) == []


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_no_process_behind(environment, signal_number, status):
    hanging = " ".join(f"probe_grad_vectors.py:exp12_{tag}_s{i}" for tag in ("base", "trained") for i in (0, 1))
    launcher = subprocess.Popen(
        ["bash", ROOT / "run_exp1_exp2.sh"],
        env={**environment, "STUB_HANG": hanging},
        stderr=subprocess.PIPE,
        text=True,
        # An ignored SIGINT, as background jobs of a shell inherit it, could not be trapped.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 30
    while len(processes_of(environment)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(processes_of(environment)) >= 4
    launcher.send_signal(signal_number)
    _, error = launcher.communicate(timeout=30)
    assert launcher.returncode == status
    assert "stopping" in error
    assert processes_of(environment) == []


def test_dry_run_prints_the_plan_and_writes_nothing(environment):
    result = launch(environment, DRY_RUN="1", SHARDS_PER_MODEL="3", LAYER="2", SEED="11")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert sum("probe_grad_vectors.py" in line for line in lines) == 6
    assert all("--seed 11" in line and "--layer 2" in line for line in lines if "probe_grad" in line)
    assert re.match(r"# 6 shards, \d+ at once, on cpu", lines[0])
    assert not Path(environment["OUT_ROOT"]).exists()
    assert not Path(environment["STUB_CALLS"]).exists()


def test_settings_come_from_the_file_and_the_environment_wins(environment, tmp_path):
    config = tmp_path / "my study.env"
    config.write_text((ROOT / "config.env").read_text().replace("SEED:=0", "SEED:=8").replace("BINS:=5", "BINS:=4"))
    plan = subprocess.run(
        ["bash", ROOT / "run_exp1_exp2.sh", config],
        env={**environment, "DRY_RUN": "1", "BINS": "7"},
        capture_output=True,
        text=True,
    ).stdout
    assert "--seed 8" in plan
    assert "--bins 7" in plan


@pytest.mark.parametrize(
    "settings", [{"SHARDS_PER_MODEL": "0"}, {"LAUNCHER": "magic"}, {"DEVICE": "tpu"}, {"NUM_PROMPTS": "many"}]
)
def test_bad_settings_are_refused(environment, settings):
    result = launch(environment, **settings)
    assert result.returncode == 2
    (name,) = settings
    assert f"error: {name}={settings[name]}" in result.stderr
    assert not Path(environment["OUT_ROOT"]).exists()
