#!/usr/bin/env python3
"""What `probe_grad_vectors.py` says to several command lines: the libraries, which take seconds, are imported once.

    python scripts/check_probes.py DIRECTORY/NAME.command ...

A file holds a command's words, each ended by NUL. Each runs in a process of its own, as many at once as there are
cores; what it says goes to DIRECTORY/NAME. The launcher has models and data checked so.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import gradprobe.probe.run  # noqa: F401 what is imported before the fork is there in all processes
import probe_grad_vectors


def answer(file: Path) -> int:
    """Run a command, with all that it says in `file` less its suffix; its exit status."""
    with file.with_suffix("").open("wb") as said:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(said.fileno(), stream.fileno())
    _, _, *arguments = map(os.fsdecode, file.read_bytes().split(b"\0")[:-1])  # behind the interpreter and the script
    return probe_grad_vectors.main(arguments)


def main() -> None:
    """Answer every command; a fault of one ends its own process."""
    for n_started, file in enumerate(map(Path, sys.argv[1:])):
        if n_started >= len(os.sched_getaffinity(0)):
            os.wait()
        if os.fork() == 0:
            sys.exit(answer(file))
    while True:
        try:
            os.wait()
        except ChildProcessError:  # all have ended
            return


if __name__ == "__main__":
    main()
