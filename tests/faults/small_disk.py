"""Runs the scripts on a disk that is full, then has room again; prints what came of it, one JSON object a line.

    small_disk.py DIRECTORY tmpfs|limit

Where mounting is allowed (`unshare --mount`) a tmpfs is the disk; else a limit on the size of files stands in for it.
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import analyze_exp1_compression
import analyze_exp2_direction
import merge_grad_vector_shards
import plot_exp12_intuitive

DISK_BYTES = 24 << 20
CASES = ((True, 0), (False, 0), (False, 16 << 10))
"""Without earlier results, or over them; bytes left: for no file, for some."""


class Disk:
    """A place whose room can be taken and given back."""

    def __init__(self, path: Path, is_mounted: bool):
        self.path, self.is_mounted = path, is_mounted
        if is_mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "small", path], check=True)

    @contextlib.contextmanager
    def full(self, room: int):
        """Inside there is no more than `room` bytes."""
        if not self.is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            yield
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return
        filler = self.path / "filler"
        with filler.open("wb") as stream:
            free = os.statvfs(self.path)
            stream.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))
        yield
        filler.unlink()


def run(main, arguments: list[object]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(argument) for argument in arguments])
    return status, said.getvalue()


def hashes(directory: Path) -> dict[str, str]:
    """By name; manifests hold times and no hash tells anything of them."""
    files = [f for f in sorted(directory.rglob("*")) if f.is_file() and f.name not in (".lock", "filler")]
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main(directory: Path, is_mounted: bool) -> None:
    disk = Disk(directory / "disk", is_mounted)
    shards = [Path(shutil.copytree(directory / name, disk.path / name)) for name in ("s0", "s1")]
    merged, results = disk.path / "merged", disk.path / "results"
    into = ["--output-dir", results, f"base={merged}"]
    steps = {
        "merge": (merge_grad_vector_shards.main, [merged, *shards], "merged"),
        "exp1": (analyze_exp1_compression.main, into, "results"),
        "exp2": (analyze_exp2_direction.main, into, "results"),
        "plots": (plot_exp12_intuitive.main, into, "results"),
    }
    for main, arguments, _ in steps.values():
        assert run(main, arguments)[0] == 0
    undisturbed = hashes(disk.path)
    for name, (main, arguments, output) in steps.items():
        for is_new, room in CASES[1:2] if name == "exp1" else CASES:  # the slowest
            if is_new and output == "merged":
                shutil.rmtree(merged)
            elif is_new:
                (results / ("report.html" if name == "plots" else f"{name}_summary.json")).unlink()
            before = hashes(disk.path)
            with disk.full(room):
                status, said = run(main, arguments)
            after = hashes(disk.path)
            changed = [f for f in {**before, **after} if before.get(f) != after.get(f)]
            again, said_again = run(main, arguments)
            outcome = {
                "step": name, "room": room, "is_new": is_new, "status": status, "output": output,
                "errors": [line for line in said.splitlines() if line.startswith("error: ")],
                "changed": [f for f in changed if f in after and after[f] != undisturbed.get(f)],
                "gone": [f for f in before if f not in after],
                "again": again, "said_again": said_again,
                "as_undisturbed": hashes(disk.path) == undisturbed,
            }  # fmt: skip
            print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "tmpfs")
