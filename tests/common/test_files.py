"""The lock of a directory: one holder, named; none that outlives its process."""

import signal
import subprocess
import sys
import time

import pytest

from gradprobe.common.errors import InputError
from gradprobe.common.files import LOCK, locked

HOLDER = """
import sys, time
from pathlib import Path
from gradprobe.common.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(directory, seconds: float) -> subprocess.Popen:
    """A process that has locked the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_ends_with_a_killed_process(tmp_path):
    with holder(tmp_path, 60) as process:
        with pytest.raises(InputError, match=f"in use by another process .process {process.pid} on "), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path):
            assert str(process.pid) not in (tmp_path / LOCK).read_text()


def test_patience_outlasts_a_holder_that_is_about_to_end(tmp_path):
    with holder(tmp_path, 2):
        start = time.monotonic()
        with locked(tmp_path, patience=60):
            assert 0.5 < time.monotonic() - start < 30


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("all I have")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="can't be locked"), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "all I have"


def test_faults_inside_are_not_the_locks(tmp_path):
    with pytest.raises(TimeoutError, match="mine"), locked(tmp_path):
        raise TimeoutError("mine")
    with locked(tmp_path):
        pass
