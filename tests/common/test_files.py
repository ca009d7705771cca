"""Files whole or not at all, and the lock of a directory: one holder, named; none that outlives its process."""

import signal
import subprocess
import sys
import time

import pytest

from gradprobe.common.errors import InputError
from gradprobe.common.files import LOCK, locked, write_jsonl

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


def test_the_lock_makes_no_directory(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such directory"), locked(tmp_path / "nowhere"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_faults_inside_are_not_the_locks(tmp_path):
    with pytest.raises(TimeoutError, match="mine"), locked(tmp_path):
        raise TimeoutError("mine")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("there", [None, "before"])
def test_a_file_appears_whole_or_not_at_all(tmp_path, there):
    file = tmp_path / "lines.jsonl"
    if there:
        file.write_text(there)

    def lines():
        yield {"a": 1}
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_jsonl(file, lines())
    assert [found.read_text() for found in tmp_path.iterdir()] == ([there] if there else [])
    write_jsonl(file, [{"a": "π"}])
    assert file.read_bytes() == b'{"a": "\xcf\x80"}\n'
