"""Was the answer right? By the last \\boxed{...}, by value, by math-verify, or by a function of one's own."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from ..common.errors import InputError
from .numeric import last_number, read_number, same_value
from .verify_process import MATH_VERIFY, VerifierProcess

BOX = "\\boxed{"
SECONDS_PER_ANSWER = 10.0
FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def last_boxed(text: str) -> str | None:
    """The content of the last balanced `\\boxed{...}` of `text`, or None where there is none.

    Escaped braces (`\\{`, `\\}`) do not count towards the balance.
    """
    # A box that never closes leaves those around it open too: they close before it begins, or not at all. So each
    # character is looked at once, however often a response repeats an open box.
    start, end = text.rfind(BOX), len(text)
    while start != -1:
        content = _balanced_content(text, start + len(BOX), end)
        if content is not None:
            return content
        start, end = text.rfind(BOX, 0, start), start
    return None


def _balanced_content(text: str, start: int, end: int) -> str | None:
    depth, i = 1, start
    while i < end:
        if text[i] == "\\":
            i += 2  # the next character is escaped, or part of a command's name
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
        i += 1
    return None


def fold_whitespace(text: str) -> str:
    """`text` without outer white space and with every inner run of it as one blank."""
    return " ".join(text.split())


def is_correct(response: str, ground_truth: str) -> bool:
    """Whether the last balanced box of `response` equals `ground_truth`, white space folded."""
    answer = last_boxed(response)
    return answer is not None and fold_whitespace(answer) == fold_whitespace(ground_truth)


def is_correct_number(response: str, ground_truth: str) -> bool:
    """Whether `response` answers with the value of `ground_truth`; whatever `is_correct` accepts is right here too.

    The answer is the last balanced box or, in a response without any, its last number. Both sides are read as exact
    rationals (see numeric.py); what is not a number equals nothing but its own text in a box.
    """
    if is_correct(response, ground_truth):
        return True
    box = last_boxed(response)
    answer = last_number(response) if box is None else read_number(box)
    truth = read_number(ground_truth)
    return answer is not None and truth is not None and same_value(answer, truth)


IN_THIS_PROCESS: dict[str, Callable[[str, str], bool]] = {"boxed": is_correct, "numeric": is_correct_number}


@dataclass(frozen=True)
class Verifier:
    """A verifier by name, and what the manifest says of it: with a library its version, with a function its hash."""

    name: str
    description: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """Of one answer: right or not, or (`correct` is None) the `error` for which nobody can say."""

    correct: bool | None
    error: str = ""


def load_verifier(name: str) -> Verifier:
    """The verifier of a name: `boxed`, `numeric`, `math-verify`, or `module:function`.

    A function takes (response, ground_truth), both text, and returns a bool; its module lies in the current
    directory or is installed. It is loaded once here, in a process of its own, so that its faults show before
    anything is sampled.

    Raises:
        InputError: there is no such verifier, its library is not installed, or it can't be loaded.
    """
    if name in IN_THIS_PROCESS:
        return Verifier(name, {"name": name})
    if name != MATH_VERIFY and not FUNCTION_NAME.fullmatch(name):
        known = ", ".join([*IN_THIS_PROCESS, MATH_VERIFY])
        raise InputError(f"`verifier` {name}: not one of {known}, nor of the form module:function")
    with VerifierProcess(name, SECONDS_PER_ANSWER) as process:
        return Verifier(name, process.description)


class RunningVerifier:
    """A verifier that judges one answer after the other; as a context manager, so that its process ends.

    All but `boxed` and `numeric` run in a process of their own, begun with the first answer. It is killed when an
    answer takes longer than `seconds`, and started anew for the next. An answer on which the verifier raises, runs
    out of time, ends its process or returns anything but a bool gets an error, never "incorrect".
    """

    def __init__(self, verifier: Verifier, seconds: float = SECONDS_PER_ANSWER):
        self.verifier, self.seconds = verifier, seconds
        self._process: VerifierProcess | None = None

    def __enter__(self) -> "RunningVerifier":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._process is not None:
            self._process.end()

    def judge(self, response: str, ground_truth: str) -> Verdict:
        """The verdict on one answer.

        Raises:
            InputError: the verifier can't be loaded (any more).
        """
        if self.verifier.name in IN_THIS_PROCESS:
            return Verdict(IN_THIS_PROCESS[self.verifier.name](response, ground_truth))
        if self._process is None or not self._process.is_alive:
            self._process = VerifierProcess(self.verifier.name, self.seconds)
        answer = self._process.ask(response, ground_truth)
        return Verdict(answer.get("correct"), answer.get("error", ""))


def verify_each(
    verifier: Verifier, pairs: Iterable[tuple[str, str]], seconds: float = SECONDS_PER_ANSWER
) -> Iterator[Verdict]:
    """Yield the verdict on each (response, ground_truth), in order; see `RunningVerifier`."""
    with RunningVerifier(verifier, seconds) as running:
        for response, ground_truth in pairs:
            yield running.judge(response, ground_truth)


def verify_all(
    verifier: Verifier, pairs: Iterable[tuple[str, str]], seconds: float = SECONDS_PER_ANSWER
) -> list[Verdict]:
    """The verdicts of `verify_each`, all at once."""
    return list(verify_each(verifier, pairs, seconds))
