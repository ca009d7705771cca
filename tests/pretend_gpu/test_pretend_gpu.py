"""`checks.py` in a process of its own: a device is made once a process, and torch would take it for a real one."""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("checks.py")


def test_all_that_a_gpu_does_runs_on_a_pretend_one():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rP", CHECKS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2])
    print("\n".join(line for line in ran.stdout.splitlines() if " waits, " in line or "looked up" in line))
    assert ran.returncode == 0, ran.stdout
