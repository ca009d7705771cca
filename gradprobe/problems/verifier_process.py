"""What a verifier's process does: it loads the verifier, says what identifies its code, and judges answers."""

import ctypes
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.extras import library
from .boxed import is_correct, last_boxed
from .gym import GYM_VERIFIER, load_gym_verifier

BLANKS = re.compile("[ \\t]{2,}")
MEMORY_SHARE = 0.5
"""Of the machine's memory, what a verifier may allocate."""
PR_SET_PDEATHSIG = 1
NEAR = 1e-4
"""Of a number, by how much another may differ that math-verify, which rounds to 6 decimals, calls equal."""
INSTALLED = {"site-packages", "dist-packages"}
"""Directories of this name hold libraries, which have versions."""

Judge = Callable[[str, str], bool]


def main(name: str) -> None:
    """Describe the verifier of a name, then judge answers until nobody asks any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with its parent, whatever it is doing
    with suppress(ValueError, OSError):  # a lower limit is set already
        most = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a verifier prints is no answer
    try:
        judge, said = BY_LIBRARY[name]() if name in BY_LIBRARY else _load_function(name)
    except InputError as error:
        judge, said = None, {"error": str(error)}
    print(json.dumps(said), file=answers, flush=True)
    for line in sys.stdin if judge else ():
        print(json.dumps(_answer(judge, **json.loads(line))), file=answers, flush=True)


def _answer(judge: Judge, response: str, ground_truth: str) -> dict[str, Any]:
    try:
        correct = judge(response, ground_truth)
    # Anybody's code runs here and may raise anything; whatever it is, it is reported as this answer's error.
    except Exception as error:
        return {"error": f"raised {type(error).__name__}: {error}"}
    if not isinstance(correct, bool):
        return {"error": f"returned {type(correct).__name__}, not bool"}
    return {"correct": correct}


def _load_function(name: str) -> tuple[Judge, dict[str, Any]]:
    module_name, _, path = name.partition(":")
    before = set(sys.modules)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if (module_name + ".").startswith(f"{error.name}."):
            said = f"there is no module '{error.name}', neither in the current directory nor installed"
            raise InputError(said) from error
        raise InputError(f"its module can't be imported ({error})") from error
    except Exception as error:  # as in _answer
        raise InputError(f"its module, when imported, raised {type(error).__name__}: {error}") from error
    function: Any = module
    for part in path.split("."):
        if not hasattr(function, part):
            raise InputError(f"'{module_name}' has no '{path}'")
        function = getattr(function, part)
    if not callable(function):
        raise InputError(f"'{path}' is of type {type(function).__name__}, not a function")
    try:
        with suppress(ValueError):  # a function in C may have no signature to check
            inspect.signature(function).bind("response", "ground_truth")
    except TypeError as error:
        raise InputError(f"can't be called with (response, ground_truth): {error}") from error
    return function, {"name": name, **_identity_of(module_name, before)}


def _identity_of(module: str, loaded_before: Collection[str]) -> dict[str, Any]:
    """The hash of a module and all that importing it has loaded from the user's own directories; of several, the names.

    Of a single file `source_sha256` is that of its bytes. What is imported only when a function runs is not seen.
    """
    libraries = [Path(sysconfig.get_path(which)) for which in ("stdlib", "platstdlib")] + [Path(__file__).parents[1]]
    hashes = {}
    for name in sorted({module, *sys.modules} - set(loaded_before)):
        file = Path(getattr(sys.modules[name], "__file__", None) or os.devnull).absolute()
        is_own = not INSTALLED & set(file.parts) and not any(map(file.is_relative_to, libraries))
        if file.is_file() and (is_own or name == module):
            hashes[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    if len(hashes) == 1:
        return {"source_sha256": next(iter(hashes.values()))}
    listed = "".join(f"{name} {sha256}\n" for name, sha256 in hashes.items())
    return {"source_sha256": hashlib.sha256(listed.encode()).hexdigest(), "modules": list(hashes)}


def _load_numeric() -> tuple[Judge, dict[str, Any]]:
    """The box's text or, failing that, math-verify; what is no mathematics equals nothing but its own text."""
    same_mathematics, said = _load_math_verify(raises=False)
    return lambda *of: is_correct(*of) or same_mathematics(*of), said | {"name": "numeric"}


def _load_math_verify(raises: bool = True) -> tuple[Judge, dict[str, Any]]:
    """Math-verify's judgement of the last box; with `raises` what it can't judge is an error, else it is wrong.

    A response without a box has no answer. The library would take its last number for one: right or wrong by chance,
    above all where a response was cut off.
    """
    library("math_verify", "math", "it")
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # It warns that its time limits are off (ours isn't), and of each answer that it can't read.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str) -> list[Any]:
        # Its patterns take minutes for a hundred thousand blanks.
        boxed = f"\\boxed{{{BLANKS.sub(' ', text)}}}"
        return parse(boxed, extraction, parsing_timeout=None, raise_on_error=raises)

    def judge(response: str, ground_truth: str) -> bool:
        gold, answer = read(last_boxed(ground_truth) or ground_truth), last_boxed(response)
        if raises and not gold:
            raise ValueError(f"no mathematics in the ground truth {ground_truth!r}")
        if answer is None:
            return False
        found = read(answer)
        return bool(verify(gold, found, timeout_seconds=None, raise_on_error=raises)) and _are_near(gold, found)

    # What it reads was once the whole response: dumps of both kinds are not of one verifier.
    return judge, {"name": "math-verify", "version": importlib.metadata.version("math-verify"), "reads": "last box"}


def _are_near(gold: list[Any], found: list[Any]) -> bool:
    """Whether two readings, if numbers, agree in their leading digits; the library rounds 2^-98 and 2^-99 to 0.

    A percentage may stand for its number, as it does for the library.
    """
    if not all(of and getattr(of[0], "is_number", False) for of in (gold, found)):
        return True
    a, b = (of[0].doit().evalf(30) for of in (gold, found))
    return any(bool(abs(x - y) <= NEAR * max(abs(x), abs(y))) for x, y in ((a, b), (100 * a, b), (a, 100 * b)))


BY_LIBRARY: dict[str, Callable[[], tuple[Judge, dict[str, Any]]]] = {
    "numeric": _load_numeric,
    "math-verify": _load_math_verify,
    GYM_VERIFIER: load_gym_verifier,
}
