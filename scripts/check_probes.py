"""The commands of probe_grad_vectors.py in FILE.command ..., words ended by NUL; what each says goes to FILE.

Each runs in a process forked from one that has imported the libraries, which takes seconds; as many at once as there
are cores. Where a command line can't be, that is told without them.
"""

import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import probe_grad_vectors
from gradprobe.common.errors import InputError

words_of = {file: file.read_bytes().split(b"\0")[2:-1] for file in map(Path, sys.argv[1:])}
with suppress(SystemExit, InputError):  # which the process of that command tells
    for words in words_of.values():
        probe_grad_vectors.parse_args(list(map(os.fsdecode, words)))
    import gradprobe.probe.run  # noqa: F401

gc.freeze()  # else every process walks through, and so copies, what it shares with the others
for n_started, (file, words) in enumerate(words_of.items()):
    if n_started >= len(os.sched_getaffinity(0)):
        os.wait()
    if os.fork() == 0:
        os.dup2(os.dup2(os.open(file.with_suffix(""), os.O_WRONLY | os.O_CREAT, 0o666), 1), 2)
        sys.exit(probe_grad_vectors.main(list(map(os.fsdecode, words))))
with suppress(ChildProcessError):  # all have ended
    while True:
        os.wait()
