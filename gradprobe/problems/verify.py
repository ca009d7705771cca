"""Was the answer right? By the last \\boxed{...}, by a library, or by a function of one's own."""

import logging
import re
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..common.errors import InputError
from .boxed import is_correct
from .verify_process import BY_LIBRARY, VerifierProcess

log = logging.getLogger(__name__)
BOXED = "boxed"
SECONDS_PER_ANSWER = 10.0
FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


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
    directory or is installed. It is loaded once here, in a process of its own, so that its faults show before
    anything is sampled.

    Raises:
        InputError: there is no such verifier, its library is not installed, or it can't be loaded.
    """
    if name == BOXED:
        return Verifier(name, {"name": name})
    if name not in BY_LIBRARY and not FUNCTION_NAME.fullmatch(name):
        known = ", ".join([BOXED, *BY_LIBRARY])
        raise InputError(f"`verifier` {name}: not one of {known}, nor of the form module:function")
    with VerifierProcess(name, SECONDS_PER_ANSWER) as process:
        pass
    _say_what_is_printed(process)  # when it is imported
    return Verifier(name, process.description)


class RunningVerifier:
    """A verifier that judges one answer after the other; as a context manager, so that its process ends.

    All but `boxed` run in a process of their own, begun with the first answer. It is killed when an
    answer takes longer than `seconds`, and started anew for the next. An answer on which the verifier raises, runs
    out of time, ends its process or returns anything but a bool gets an error, never "incorrect". The beginning of
    what it prints is logged when it ends.
    """

    def __init__(self, verifier: Verifier, seconds: float = SECONDS_PER_ANSWER):
        self.verifier, self.seconds = verifier, seconds
        self._process: VerifierProcess | None = None
        self._has_printed = False

    def __enter__(self) -> "RunningVerifier":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._process is not None:
            self._end(self._process)

    def judge(self, response: str, ground_truth: str) -> Verdict:
        """The verdict on one answer.

        Raises:
            InputError: the verifier can't be loaded (any more), or its source is another than when it was first.
        """
        if self.verifier.name == BOXED:
            return Verdict(is_correct(response, ground_truth))
        if self._process is None or not self._process.is_alive:
            self._process = VerifierProcess(self.verifier.name, self.seconds)
            if self._process.description != self.verifier.description:
                self._end(self._process)
                raise InputError(f"`verifier` {self.verifier.name}: its source has changed since this began")
        verdict = self._process.judge(response, ground_truth)
        if not self._process.is_alive:
            self._end(self._process)
        return Verdict(verdict) if isinstance(verdict, bool) else Verdict(None, verdict)

    def _end(self, process: VerifierProcess) -> None:
        process.end()
        if not self._has_printed:  # once is enough, however often it is started anew
            self._has_printed = _say_what_is_printed(process)


def _say_what_is_printed(process: VerifierProcess) -> bool:
    if process.n_bytes_printed:
        log.info(f"the verifier has printed {process.n_bytes_printed} bytes, the first of them: {process.printed}")
    return bool(process.n_bytes_printed)
