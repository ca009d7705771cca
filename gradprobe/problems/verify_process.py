"""A verifier in a process of its own, which can be stopped whatever it is doing.

The parent's side is `VerifierProcess`, the child's `serve`; between them goes one JSON object a line through a
socket. The child is started from nothing (no fork of a process that holds threads and a GPU), runs what the user
names, and is killed when an answer takes too long. It dies with its parent, and by a clock of its own if that fails.
"""

import contextlib
import ctypes
import faulthandler
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..common.errors import InputError
from .boxed import is_correct

BLANKS = re.compile("[ \\t]{2,}")
SECONDS_TO_START = 120.0
SECONDS_OF_GRACE = 5.0
MAX_ERROR_CHARACTERS = 300
PR_SET_PDEATHSIG = 1
CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
CHILD += "from gradprobe.problems.verify_process import serve; serve(sys.argv[2], *map(float, sys.argv[3:]))"

Judge = Callable[[str, str], bool]


class VerifierProcess:
    """Parent's side: one running verifier. Use it as a context manager: leaving it ends the process.

    Attributes:
        description: the verifier's name and what identifies its code.

    Raises:
        InputError: the verifier can't be loaded.
    """

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds = name, seconds
        self.is_alive = True
        self._received = b""
        self._socket, theirs = socket.socketpair()
        # The child finds the modules that this process would, and those of the current directory.
        path = [os.getcwd(), *(entry for entry in sys.path if entry), str(Path(__file__).parents[2])]
        arguments = [json.dumps(path), name, str(theirs.fileno()), str(os.getpid()), str(seconds)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CHILD, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a verifier prints is no result of ours
                start_new_session=True,  # so that what it starts can be ended with it
            )
        try:
            greeting = self._exchange(None, SECONDS_TO_START)
        except BaseException:
            self.end()
            raise
        if "description" not in greeting:
            self.end()
            raise InputError(f"`verifier` {name}: {greeting['error']}")
        self.description: dict[str, str] = greeting["description"]

    def __enter__(self) -> "VerifierProcess":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.end()

    def ask(self, response: str, ground_truth: str) -> dict[str, Any]:
        """`{"correct": bool}`, or `{"error": why there is no verdict}`; after a time-out `is_alive` is False."""
        return self._exchange({"response": response, "ground_truth": ground_truth}, self.seconds)

    def end(self) -> None:
        """Kill the process and all that it started; once more does no harm."""
        if self.is_alive:
            self.is_alive = False
            # Ended already: no such process or, on macOS, not permitted.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._socket.close()

    def _exchange(self, question: dict[str, str] | None, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        try:
            if question is not None:
                self._socket.settimeout(seconds)
                self._socket.sendall(json.dumps(question).encode("ascii") + b"\n")
            while b"\n" not in self._received:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                received = self._socket.recv(1 << 16)
                if not received:
                    raise ConnectionResetError
                self._received += received
        except TimeoutError:
            self.end()
            return {"error": f"took longer than {seconds:g} s"}
        except (BrokenPipeError, ConnectionResetError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SECONDS_OF_GRACE)  # it hangs up a moment before it has an exit status
            self.end()
            return {"error": f"its process ended by itself (exit status {self._process.returncode})"}
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


# The child's side


def serve(name: str, descriptor: float, parent: float, seconds: float) -> None:
    """Load the verifier, say so, then answer questions until the parent hangs up."""
    _die_with(int(parent))
    with socket.socket(fileno=int(descriptor)) as channel, channel.makefile("rw", encoding="ascii") as lines:

        def say(answer: dict[str, Any]) -> None:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

        try:
            judge, description = _load(name)
        except InputError as error:
            say({"error": str(error)})
            return
        say({"description": description})
        with open(os.devnull, "w") as nowhere:
            for line in lines:
                # A clock in C, which runs on while the interpreter hangs in a call that holds its lock.
                faulthandler.dump_traceback_later(seconds + SECONDS_OF_GRACE, exit=True, file=nowhere)
                answer = _answer(judge, **json.loads(line))
                faulthandler.cancel_dump_traceback_later()
                say(answer)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the verifier's parent has gone")


def _answer(judge: Judge, response: str, ground_truth: str) -> dict[str, Any]:
    try:
        correct = judge(response, ground_truth)
    # Anybody's code runs here and may raise anything; whatever it is, it is reported as this answer's error.
    except Exception as error:
        return {"error": _clipped(f"raised {type(error).__name__}: {error}")}
    if not isinstance(correct, bool):
        return {"error": f"returned {type(correct).__name__}, not bool"}
    return {"correct": correct}


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS] + " ..."


def _load(name: str) -> tuple[Judge, dict[str, str]]:
    return BY_LIBRARY[name]() if name in BY_LIBRARY else _load_function(name)


def _load_function(name: str) -> tuple[Judge, dict[str, str]]:
    module_name, _, path = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise InputError(
                f"there is no module '{error.name}', neither in the current directory nor installed"
            ) from error
        raise InputError(f"its module can't be imported ({error})") from error
    except Exception as error:  # as in _answer
        raise InputError(_clipped(f"its module raised {type(error).__name__} when imported: {error}")) from error
    function: Any = module
    for part in path.split("."):
        if not hasattr(function, part):
            raise InputError(f"'{module_name}' has no '{path}'")
        function = getattr(function, part)
    if not callable(function):
        raise InputError(f"'{path}' is of type {type(function).__name__}, not a function")
    _check_arguments(function)
    return function, {"name": name, "source_sha256": _sha256_of_source(module)}


def _check_arguments(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a function in C may have no signature to check
    try:
        signature.bind("response", "ground_truth")
    except TypeError as error:
        raise InputError(f"can't be called with (response, ground_truth): {error}") from error


def _sha256_of_source(module: Any) -> str:
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "no file"


def _load_numeric() -> tuple[Judge, dict[str, str]]:
    """The box's text or, failing that, math-verify; what is no mathematics equals nothing but its own text."""
    same_mathematics, library = _load_math_verify(raises=False)

    def judge(response: str, ground_truth: str) -> bool:
        return is_correct(response, ground_truth) or same_mathematics(response, ground_truth)

    return judge, library | {"name": "numeric"}


def _load_math_verify(raises: bool = True) -> tuple[Judge, dict[str, str]]:
    """Math-verify's judgement; with `raises` what it can't judge is an error, else it is wrong."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise InputError("takes the library 'math-verify'; pip install 'gradprobe[math]'") from error
    # It warns that its time limits are off (ours isn't), and of each answer that it can't read.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # A box goes before any other mathematics in the response; without one the library looks for the answer.
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def judge(response: str, ground_truth: str) -> bool:
        boxed = ground_truth if "\\boxed" in ground_truth else f"\\boxed{{{ground_truth}}}"
        gold = parse(boxed, extraction, parsing_timeout=None, raise_on_error=raises)
        if raises and not gold:
            raise ValueError(f"no mathematics in the ground truth {ground_truth!r}")
        # Its patterns take minutes for a hundred thousand blanks.
        answer = parse(BLANKS.sub(" ", response), extraction, parsing_timeout=None, raise_on_error=raises)
        return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=raises))

    return judge, {"name": "math-verify", "version": importlib.metadata.version("math-verify")}


BY_LIBRARY: dict[str, Callable[[], tuple[Judge, dict[str, str]]]] = {
    "numeric": _load_numeric,
    "math-verify": _load_math_verify,
}
