"""The launcher is ended at random moments by random signals; no process stays, and the same command completes.

CI ends it 5 times; more:  LAUNCHER_KILLS=200 python -m pytest -s tests/faults/test_launcher_faults.py
"""

import os
import random
import signal
from pathlib import Path

import pytest
from launching import POOLED_PROBES, PROBES, calls, launch, processes_of, start_launcher, stub_environment, wait_until

N_KILLS = int(os.environ.get("LAUNCHER_KILLS", "5"))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
WHOLE_RUN_SECONDS = 2.7
"""About what a run takes, checks and all, with steps of STUB_SLEEP: kills are spread over it."""


@pytest.mark.slow
def test_ended_at_random_moments_it_leaves_no_orphan_and_completes_when_run_again(tmp_path):
    rng = random.Random(10)
    outcomes = []
    for kill in range(N_KILLS):
        directory = tmp_path / str(kill)
        directory.mkdir()
        moment, signal_number = rng.uniform(0, WHOLE_RUN_SECONDS), rng.choice(SIGNALS)
        outcomes.append(end_and_run_again({**stub_environment(directory), "STUB_SLEEP": "0.2"}, moment, signal_number))
    n_cut_short = sum(cut_short for cut_short, _ in outcomes)
    print(f"{N_KILLS} kills, {n_cut_short} in the middle, {sum(n for _, n in outcomes)} shards finished before them")
    assert n_cut_short >= N_KILLS // 2, "most kills must come before the run's end"


def end_and_run_again(environment: dict[str, str], moment: float, signal_number: int) -> tuple[bool, int]:
    """Returns: was the launcher still at work at `moment` (seconds), and how many shards had been finished."""
    launcher = start_launcher(environment)
    cut_short = not wait_until(lambda: launcher.poll() is not None, moment)
    launcher.send_signal(signal_number)
    launcher.communicate(timeout=30)
    where = f"{signal.Signals(signal_number).name} after {moment:.2f} s"
    patience = 5 if signal_number == signal.SIGKILL else 0.5
    assert wait_until(lambda: processes_of(environment) == [], patience), f"{where}: {processes_of(environment)}"

    finished_before = len(calls(environment, ".finished"))
    result = launch(environment)
    assert result.returncode == 0, f"{where}: {result.stderr}"
    finished = [call[0] for call in calls(environment, ".finished")]
    assert len(finished) == len(set(finished)), f"{where}: a finished shard was computed again"
    dumps = {manifest.parent.name for manifest in Path(environment["OUT_ROOT"]).glob("*/manifest.json")}
    assert dumps == {probe.partition(":")[2] for probe in (*PROBES, *POOLED_PROBES)}, where
    return cut_short, finished_before
