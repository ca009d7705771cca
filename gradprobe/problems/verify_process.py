"""What a verifier's process does: it loads the verifier, says what identifies its code, and judges answers."""

import importlib
import importlib.metadata
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from ..common.errors import InputError
from .boxed import is_correct
from .child import Answer, Answering, Child, described, limit_memory
from .gym import GYM_VERIFIER, load_gym_verifier
from .own_modules import identity_of

BLANKS = re.compile("[ \\t]{2,}")
MEMORY_SHARE = 0.5
"""Of the machine's memory, what a verifier may allocate."""

Judge = Callable[[str, str], bool]


class VerifierProcess(Child):
    """Parent's side: one running verifier. Use it as a context manager: leaving it ends the process.

    Attributes:
        description: the verifier's name and what identifies its code.

    Raises:
        InputError: the verifier can't be loaded.
    """

    def __init__(self, name: str, seconds: float):
        super().__init__(f"{__name__}:serve_verdicts", {"name": name}, seconds)
        self.seconds = seconds
        self.description: dict[str, Any] = self.greeting.get("description", {})
        if not self.description:
            self.end()
            raise InputError(f"`verifier` {name}: {self.greeting.get('error')}")

    def judge(self, response: str, ground_truth: str) -> bool | str:
        """The verdict, or why there is none; after a time-out `is_alive` is False."""
        answer = self.ask({"response": response, "ground_truth": ground_truth}, self.seconds)
        if isinstance(answer.get("correct"), bool):
            return answer["correct"]
        if "error" not in answer:
            self.end()
        return str(answer.get("error", "its answer is neither a verdict nor an error"))


# The child's side


def serve_verdicts(opening: Answer) -> tuple[Answer, Answering | None]:
    """What `child.serve` asks for: the verifier's description, and its verdict on each question."""
    limit_memory(int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE))
    try:
        judge, description = _load(opening["name"])
    except InputError as error:
        return {"error": str(error)}, None
    return {"description": description}, lambda question: _answer(judge, **question)


def _answer(judge: Judge, response: str, ground_truth: str) -> Answer:
    try:
        correct = judge(response, ground_truth)
    # Anybody's code runs here and may raise anything; whatever it is, it is reported as this answer's error.
    except Exception as error:
        return {"error": f"raised {described(error)}"}
    if not isinstance(correct, bool):
        return {"error": f"returned {type(correct).__name__}, not bool"}
    return {"correct": correct}


def _load(name: str) -> tuple[Judge, dict[str, Any]]:
    return BY_LIBRARY[name]() if name in BY_LIBRARY else _load_function(name)


def _load_function(name: str) -> tuple[Judge, dict[str, Any]]:
    module_name, _, path = name.partition(":")
    before = set(sys.modules)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise InputError(
                f"there is no module '{error.name}', neither in the current directory nor installed"
            ) from error
        raise InputError(f"its module can't be imported ({error})") from error
    except Exception as error:  # as in _answer
        raise InputError(f"its module, when imported, raised {described(error)}") from error
    function: Any = module
    for part in path.split("."):
        if not hasattr(function, part):
            raise InputError(f"'{module_name}' has no '{path}'")
        function = getattr(function, part)
    if not callable(function):
        raise InputError(f"'{path}' is of type {type(function).__name__}, not a function")
    _check_arguments(function)
    return function, {"name": name, **identity_of(module_name, before)}


def _check_arguments(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a function in C may have no signature to check
    try:
        signature.bind("response", "ground_truth")
    except TypeError as error:
        raise InputError(f"can't be called with (response, ground_truth): {error}") from error


def _load_numeric() -> tuple[Judge, dict[str, Any]]:
    """The box's text or, failing that, math-verify; what is no mathematics equals nothing but its own text."""
    same_mathematics, library = _load_math_verify(raises=False)

    def judge(response: str, ground_truth: str) -> bool:
        return is_correct(response, ground_truth) or same_mathematics(response, ground_truth)

    return judge, library | {"name": "numeric"}


def _load_math_verify(raises: bool = True) -> tuple[Judge, dict[str, Any]]:
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


BY_LIBRARY: dict[str, Callable[[], tuple[Judge, dict[str, Any]]]] = {
    "numeric": _load_numeric,
    "math-verify": _load_math_verify,
    GYM_VERIFIER: load_gym_verifier,
}
