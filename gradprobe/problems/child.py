"""A process of its own that answers questions, and can be stopped whatever it is doing.

The parent's side is `Child`, the child's `serve`. Between them goes one line a question and one an answer, JSON
through a socket. The child is started from nothing (no fork of a process that holds threads and a GPU), runs what
nobody vouches for, and is killed when an answer takes too long. It dies with its parent, and by a clock of its own if
that fails. What it prints goes to neither terminal nor log but to its parent, which keeps the beginning.

Each question brings a token that its answer must begin with. Whoever runs in the child can find the socket and write
to it, but what is no answer to the question that was asked ends the process, and is nobody's verdict.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import resource
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..common.console import printable
from ..common.errors import one_line

SECONDS_TO_START = 120.0
SECONDS_OF_GRACE = 5.0
SECONDS_BETWEEN_LOOKS = 0.5
MOST_SHOWN = 300
BLOCK_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1
MAIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
MAIN += "from gradprobe.problems.child import serve; serve(*sys.argv[2:])"

Answer = dict[str, Any]
Answering = Callable[[Answer], Answer]


class Child:
    """Parent's side. Use it as a context manager: leaving it ends the process.

    Attributes:
        is_alive: False once it has been ended, as it is by a question that it does not answer in time or in form.
        greeting: what it said when it was ready, or `{"error": why it is not}`.
        n_bytes_printed: how much it has printed.
    """

    def __init__(self, service: str, opening: Answer, seconds: float, most_bytes: int = 1 << 16):
        """Start it.

        Args:
            service: `module:function`; the function takes `opening` and returns (greeting, what answers a question).
            seconds: on its own clock for one answer.
            most_bytes: of an answer.
        """
        self.is_alive = True
        self.most_bytes = most_bytes
        self.n_bytes_printed = 0
        self._printed, self._received = b"", bytearray()
        self._socket, theirs = socket.socketpair()
        self._output, printing = os.pipe()
        os.set_blocking(self._output, False)
        # The child finds the modules that this process would, and those of the current directory.
        path = [os.getcwd(), *(entry for entry in sys.path if entry), str(Path(__file__).parents[2])]
        arguments = [json.dumps(path), service, str(theirs.fileno()), str(os.getpid()), str(seconds)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", MAIN, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=printing,
                stderr=printing,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        os.close(printing)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._output, selectors.EVENT_READ)
        try:
            self.greeting = self.ask(opening, SECONDS_TO_START)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.end()

    @property
    def is_running(self) -> bool:
        """Whether it can be asked again: neither ended nor gone by itself."""
        return self.is_alive and self._process.poll() is None

    @property
    def printed(self) -> str:
        """The beginning of what it has printed, on one line and harmless to a terminal."""
        return printable(one_line(self._printed.decode(errors="replace"), MOST_SHOWN))

    def ask(self, question: Answer, seconds: float) -> Answer:
        """Its answer, or `{"error": why there is none}`, after which `is_alive` is False."""
        deadline = time.monotonic() + seconds
        token = secrets.token_hex(16)
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(f"{token} {json.dumps(question)}\n".encode("ascii"))
            given, _, answer = self._line(deadline).decode("ascii", "replace").partition(" ")
        except TimeoutError:
            self.end()
            return {"error": f"took longer than {seconds:g} s"}
        except (BrokenPipeError, ConnectionResetError):
            return {"error": self._epitaph()}
        except OverflowError:
            self.end()
            return {"error": f"its answer is longer than {self.most_bytes} bytes"}
        with contextlib.suppress(ValueError, RecursionError):
            if secrets.compare_digest(given.encode(), token.encode()) and isinstance(found := json.loads(answer), dict):
                return found
        self.end()
        return {"error": "something else than its answer came through its channel"}

    def end(self) -> None:
        """Kill the process and all that it started; once more does no harm."""
        if self.is_alive:
            self.is_alive = False
            # Ended already: no such process or, on macOS, not permitted.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._hear_out()
            self._selector.close()
            self._socket.close()
            os.close(self._output)

    def _line(self, deadline: float) -> bytes:
        """The next line that comes through the socket; meanwhile what is printed is taken in."""
        while b"\n" not in self._received[-BLOCK_BYTES:]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            ready = {key.fileobj for key, _ in self._selector.select(min(left, SECONDS_BETWEEN_LOOKS))}
            if self._output in ready and not self._hear():
                self._selector.unregister(self._output)
            if self._socket in ready:
                received = self._socket.recv(BLOCK_BYTES)
                if not received:
                    raise ConnectionResetError
                self._received += received
                if len(self._received) > self.most_bytes:
                    raise OverflowError
            elif not ready and self._process.poll() is not None:  # what it has started may hold its end open
                raise ConnectionResetError
        line, _, self._received = self._received.partition(b"\n")
        return bytes(line)

    def _hear(self) -> bool:
        """Take in some of what is printed; False at its end."""
        block = os.read(self._output, BLOCK_BYTES)
        self.n_bytes_printed += len(block)
        self._printed += block[: 4 * MOST_SHOWN - len(self._printed)]
        return bool(block)

    def _hear_out(self) -> None:
        """Take in what is printed already, but not for ever: what it has started may print on."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                if not self._hear():
                    break

    def _epitaph(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_OF_GRACE)  # it hangs up a moment before it has an exit status
        status = self._process.poll()
        self.end()
        how = "closed its channel" if status is None else f"its process ended by itself (exit status {status})"
        return f"{how}, after printing '{self.printed}'" if self.printed else how


# The child's side


def serve(service: str, descriptor: str, parent: str, seconds: str) -> None:
    """Make ready, say so, then answer questions until the parent hangs up."""
    _die_with(int(parent))
    own = os.getpid()
    with socket.socket(fileno=int(descriptor)) as channel, channel.makefile("r", encoding="ascii") as lines:

        def say(token: str, answer: Answer) -> None:
            if os.getpid() != own:  # a copy that was made on the way here and has come back
                os._exit(0)
            channel.sendall(f"{token} {json.dumps(answer)}\n".encode("ascii"))

        token, _, opening = lines.readline().partition(" ")
        module, _, name = service.partition(":")
        greeting, answering = getattr(importlib.import_module(module), name)(json.loads(opening))
        say(token, greeting)
        if answering is None:
            return
        with open(os.devnull, "w") as nowhere:
            for line in lines:
                # A clock in C, which runs on while the interpreter hangs in a call that holds its lock.
                faulthandler.dump_traceback_later(float(seconds) + SECONDS_OF_GRACE, exit=True, file=nowhere)
                token, _, question = line.partition(" ")
                answer = answering(json.loads(question))
                faulthandler.cancel_dump_traceback_later()
                # What has answered may have changed this, and would then be ended by a question that comes late.
                os.set_blocking(channel.fileno(), True)
                say(token, answer)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent has gone")


def limit_memory(n_bytes: int) -> None:
    """Let this process allocate that much at most, where the system keeps count of it (Linux does, macOS doesn't)."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def clipped(text: str, most: int = MOST_SHOWN) -> str:
    """The beginning of a text that may be endless."""
    return text if len(text) <= most else text[:most] + " ..."


def described(error: BaseException) -> str:
    """Kind and message of an exception; its own code may make the message, and may fail at it."""
    try:
        return clipped(f"{type(error).__name__}: {error}")
    except Exception:  # as above
        return type(error).__name__
