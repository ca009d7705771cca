"""The commands of probe_grad_vectors.py in FILE.command ..., words ended by NUL; what each says goes to FILE.

Each runs in a process forked from one that has imported the libraries, which takes seconds; as many at once as there
are cores.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import gradprobe.probe.run  # noqa: F401 before the fork
import probe_grad_vectors

for n_started, file in enumerate(map(Path, sys.argv[1:])):
    if n_started >= len(os.sched_getaffinity(0)):
        os.wait()
    if os.fork() == 0:
        os.dup2(os.dup2(os.open(file.with_suffix(""), os.O_WRONLY | os.O_CREAT, 0o666), 1), 2)
        sys.exit(probe_grad_vectors.main([os.fsdecode(word) for word in file.read_bytes().split(b"\0")[2:-1]]))
with suppress(ChildProcessError):  # all have ended
    while True:
        os.wait()
