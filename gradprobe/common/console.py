"""The scripts' edge: messages, progress and exit status. stderr has progress, stdout the result."""

import argparse
import enum
import errno
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from .. import __version__
from .errors import InputError, raise_if_any

Item = TypeVar("Item")
SECONDS_BETWEEN_LOG_LINES = 10.0
SURROGATE = re.compile("[\ud800-\udfff]")
"""What stands for bytes of a command line that are not UTF-8."""
COLOURS = {"error": 31, "warning": 33}
"""ANSI colours of the first word of a line, where NO_COLOR (no-color.org) is not set."""
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def printable(text: str) -> str:
    """`text` on one line with control characters escaped: file names and model text never reach a terminal raw."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Verbosity(enum.IntEnum):
    """How much a script says on stderr."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class _Settings:
    """What the flags of `add_common_flags` last set."""

    verbosity = Verbosity.NORMAL


class _SetVerbosity(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        _Settings.verbosity = self.const


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """`--version`, `--quiet` and `--verbose`, which every script has."""
    group = parser.add_argument_group("what is said")
    group.add_argument("--version", action="version", version=f"gradprobe {__version__}")
    how_much = group.add_mutually_exclusive_group()
    for letter, level, text in (
        ("q", Verbosity.QUIET, "only warnings and errors on stderr"),
        ("v", Verbosity.VERBOSE, "also what the libraries say"),
    ):
        how_much.add_argument(
            f"-{letter}", f"--{level.name.lower()}", action=_SetVerbosity, nargs=0, const=level, default=None, help=text
        )


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return _Settings.verbosity == Verbosity.VERBOSE


def say(message: str) -> None:
    """One plain line on stderr; with --quiet only warnings and errors. On a terminal these have a colour."""
    kind = message.partition(":")[0]
    if _Settings.verbosity == Verbosity.QUIET and kind not in COLOURS:
        return
    line = printable(message)
    if kind in COLOURS and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        line = f"\x1b[{COLOURS[kind]}m{kind}\x1b[0m{line[len(kind) :]}"
    print(line, file=sys.stderr, flush=True)


def script_main(main: Callable[..., int]) -> Callable[..., int]:
    """Give a script's `main` its exit status: `InputError` becomes one line on stderr and status 2.

    So does a full disk. Ctrl-C and SIGTERM end it with one line, and 130 or 143. Anything else that escapes is a fault
    of ours: the interpreter prints it and exits with 1.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        _Settings.verbosity = Verbosity.NORMAL
        try:
            _refuse_undecodable(sys.argv[1:] if argv is None else argv)
            with _sigterm_raises():
                return main(argv)
        except InputError as error:
            say(f"error: {error}")
            return 2
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            say(f"error: {error.filename or 'writing'}: {error.strerror}; make room and run the same command again")
            return 2
        except KeyboardInterrupt:
            say("interrupted; the same command continues or starts over")
            return 130
        except _Terminated:
            say("stopped by SIGTERM; the same command continues or starts over")
            return 143

    return wrapped


def _refuse_undecodable(arguments: Iterable[str]) -> None:
    """Raise `InputError` for names that are not UTF-8: no JSON file could hold them."""
    raise_if_any(f"argument '{a}': not UTF-8; rename it" for a in arguments if SURROGATE.search(a))


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let files be closed and a line be said when SIGTERM comes; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminated(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(
    items: Iterable[Item], description: str, total: int, unit: str, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yield `items`, each worth `size(item)` of `total`.

    A terminal sees a tqdm bar, a log a plain line now and then.
    """
    if _Settings.verbosity == Verbosity.QUIET:
        yield from items
        return
    if sys.stderr.isatty():
        with tqdm(desc=description, total=total, unit=f" {unit}", dynamic_ncols=True) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    start = last = time.monotonic()
    n_done = 0
    for item in items:
        yield item
        n_done += size(item)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LOG_LINES or n_done >= total:
            last = now
            elapsed = now - start
            left = elapsed / n_done * (total - n_done)
            rate = n_done / max(elapsed, 1e-9)
            say(
                f"{description}: {n_done}/{total} {unit}, {elapsed:.0f} s, {rate:.3g} {unit}/s, about {left:.0f} s left"
            )


def parse_tagged_dumps(arguments: list[str], allow_untagged: bool = False) -> dict[str | None, Path]:
    """`["base=out/a", "trained=out/b"]` -> `{"base": Path, "trained": Path}`, order kept.

    With `allow_untagged`, a single argument that is an existing directory, or has no `=`, is keyed by None.

    Raises:
        InputError: a tag is missing, empty or given twice.
    """
    if allow_untagged and len(arguments) == 1 and ("=" not in arguments[0] or Path(arguments[0]).is_dir()):
        return {None: Path(arguments[0])}
    problems: list[str] = []
    dumps: dict[str | None, Path] = {}
    for argument in arguments:
        tag, separator, path = argument.partition("=")
        if not separator or not tag or not path:
            problems.append(f"'{argument}' is not TAG=DUMP; give for example base={path or tag or 'DIR'}")
        elif tag in dumps:
            problems.append(f"tag '{tag}' is given twice; each dump needs its own")
        else:
            dumps[tag] = Path(path)
    if problems:
        raise InputError(*problems)
    return dumps
