"""Was the answer right? By the last \\boxed{...}, by a library, or by a function of one's own."""

import json
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from .boxed import is_correct
from .verifier_process import BY_LIBRARY

BOXED = "boxed"
SECONDS_PER_ANSWER, SECONDS_TO_START = 10.0, 120.0
FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
MAIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
MAIN += f"from {__package__}.verifier_process import main; main(sys.argv[2])"


@dataclass(frozen=True)
class Verifier:
    """A verifier by name, and what the manifest says of it: with a library its version, with a function its hash."""

    name: str
    description: dict[str, Any]

    def described(self, seconds: float) -> str | dict[str, Any]:
        """What identity and manifest say of it and its time limit."""
        return self.name if self.name == BOXED else {**self.description, "seconds": seconds}


@dataclass(frozen=True)
class Verdict:
    """Of one answer: right or not, or (`correct` is None) the `error` for which nobody can say."""

    correct: bool | None
    error: str = ""


def load_verifier(name: str) -> Verifier:
    """The verifier of a name: `boxed`, `numeric`, `math-verify`, `gym`, or `module:function`.

    A function takes (response, ground_truth), both text, and returns a bool; its module lies in the current
    directory or is installed. It is loaded once here, so that its faults show before anything is sampled.
    """
    if name == BOXED:
        return Verifier(name, {"name": name})
    if name not in BY_LIBRARY and not FUNCTION_NAME.fullmatch(name):
        known = ", ".join([BOXED, *BY_LIBRARY])
        raise InputError(f"`verifier` {name}: not one of {known}, nor of the form module:function")
    process = _Process(name)
    process.end()
    return Verifier(name, process.description)


class RunningVerifier:
    """A verifier that judges one answer after the other; as a context manager, so that its process ends.

    All but `boxed` run in a process of their own, killed when an answer takes longer than `seconds`, and begun anew for
    the next. An answer on which the verifier raises, runs out of time, ends its process or returns anything but a bool
    gets an error, never "incorrect".
    """

    def __init__(self, verifier: Verifier, seconds: float = SECONDS_PER_ANSWER):
        self.verifier, self.seconds = verifier, seconds
        self._process: _Process | None = None

    def __enter__(self) -> "RunningVerifier":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.end()

    def judge(self, response: str, ground_truth: str) -> Verdict:
        """The verdict on one answer; `InputError` where the verifier's source is another than when it was loaded."""
        if self.verifier.name == BOXED:
            return Verdict(is_correct(response, ground_truth))
        if self._process is None or not self._process.is_alive:
            self._process = _Process(self.verifier.name)
            if self._process.description != self.verifier.description:
                raise InputError(f"`verifier` {self.verifier.name}: its source has changed since this began")
        answer = self._process.ask({"response": response, "ground_truth": ground_truth}, self.seconds)
        return Verdict(answer.get("correct"), answer.get("error", ""))


class _Process:
    """`verifier_process` in a process of its own: a line of JSON each question and each answer, by stdin and stdout.

    It is started from nothing: no fork of a process that holds threads and a GPU.

    Attributes:
        description: the verifier's name and what identifies its code.
        is_alive: False once it has been ended, as it is when it does not answer in time.
    """

    def __init__(self, name: str):
        # It finds the modules that this process would, and those of the current directory.
        path = [os.getcwd(), *filter(None, sys.path), str(Path(__file__).parents[2])]
        self._popen = subprocess.Popen(
            [sys.executable, "-c", MAIN, json.dumps(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that what it starts can be ended with it
        )
        self.is_alive = True
        try:
            self.description = self._answer(SECONDS_TO_START)
            if "error" in self.description:
                raise InputError(f"`verifier` {name}: {self.description['error']}")
        except BaseException:
            self.end()
            raise

    def ask(self, question: dict[str, str], seconds: float) -> dict[str, Any]:
        """Its answer, or `{"error": why there is none}`."""
        with suppress(BrokenPipeError):  # it has ended, which its answer says
            self._popen.stdin.write(f"{json.dumps(question)}\n".encode())
            self._popen.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        if not select.select([self._popen.stdout], [], [], seconds)[0]:
            self.end()
            return {"error": f"took longer than {seconds:g} s"}
        line = self._popen.stdout.readline()
        if not line:
            self._popen.wait()  # before it is killed, which would be its exit status
            self.end()
            return {"error": f"its process ended by itself (exit status {self._popen.returncode})"}
        return json.loads(line)

    def end(self) -> None:
        """Kill the process and all that it started; once more does no harm."""
        self.is_alive = False
        with suppress(ProcessLookupError, PermissionError):  # ended already; the second is macOS's word for it
            os.killpg(self._popen.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            self._popen.stdin.close()
        self._popen.stdout.close()
        self._popen.wait()
