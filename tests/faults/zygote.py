"""Runs the scripts in forked children and kills them on time; imports once what takes seconds to import.

Reads one JSON object a line, {"script", "argv", "log", "kill_after", "kill_at", "signal"}, and answers
{"status", "seconds"}: the exit status, or minus the signal that ended the child. The child is killed after so many
seconds, or once the file that `kill_at` names has so many lines.
"""

import importlib
import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

IMPORTED_ONCE = (AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer)
"""Else each child would import them anew, which takes longer than what it does with them."""
SCRIPTS = {
    name: importlib.import_module(name)
    for name in (
        "probe_grad_vectors",
        "merge_grad_vector_shards",
        "analyze_exp1_compression",
        "analyze_exp2_direction",
    )
}


def run(
    script: str, argv: list[str], log: str, kill_after: float | None, kill_at: tuple[str, int] | None, signal: int
) -> dict[str, float]:
    """One script in a child of its own."""

    def is_time() -> bool:
        if kill_at is not None:
            return os.path.exists(kill_at[0]) and open(kill_at[0], "rb").read().count(b"\n") >= kill_at[1]
        return kill_after is not None and time.monotonic() - started >= kill_after

    started = time.monotonic()
    child = os.fork()
    if child == 0:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        status = 1
        try:
            status = SCRIPTS[script].main(argv)
        finally:
            sys.stdout.flush()
            os._exit(status)
    killed = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}
        if not killed and is_time():
            os.kill(child, signal)
            killed = True
        time.sleep(0.001)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
