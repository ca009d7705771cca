"""The scripts' edge: messages, progress and exit status. stderr has progress, stdout the result.

Library modules log to `gradprobe.*` and name parameters in backticks (`row_idx`); a script says what its reader typed
(--row-idx).
"""

import argparse
import errno
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from .. import __version__
from .errors import InputError, raise_if_any

Item = TypeVar("Item")
log = logging.getLogger("gradprobe")
SECONDS_BETWEEN_LOG_LINES = 10.0
LOG_LINE = "{desc}: {n_fmt}/{total_fmt}{unit}, {elapsed} elapsed, {rate_fmt}, about {remaining} left"
PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)`")
COLOURS = {logging.ERROR: 31, logging.WARNING: 33}
"""ANSI colours of a severity, where NO_COLOR (no-color.org) is not set."""
FIGURE_FORMATS = ("png", "pdf", "svg")
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def printable(text: str) -> str:
    """`text` on one line with control characters escaped: file names and model text never reach a terminal raw."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _StderrHandler(logging.Handler):
    """One plain line for each message, warnings and errors named; on a terminal these have a colour."""

    def emit(self, record: logging.LogRecord) -> None:
        # A library's message in a script's words: `row_idx` becomes --row-idx.
        line = printable(PARAMETER.sub(lambda found: "--" + found[1].replace("_", "-"), record.getMessage()))
        if record.levelno >= logging.WARNING:
            kind, colour = record.levelname.lower(), COLOURS.get(record.levelno)
            is_coloured = colour is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
            line = (f"\x1b[{colour}m{kind}\x1b[0m: " if is_coloured else f"{kind}: ") + line
        with suppress(OSError):  # a log on a full disk must not hide how the script ends
            print(line, file=sys.stderr, flush=True)


class _SetLevel(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        log.setLevel(self.const)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """`--version`, `--quiet` and `--verbose`, which every script has."""
    group = parser.add_argument_group("what is said")
    group.add_argument("--version", action="version", version=f"gradprobe {__version__}")
    how_much: Any = group.add_mutually_exclusive_group()
    for name, level, text in (
        ("quiet", logging.WARNING, "only warnings and errors on stderr"),
        ("verbose", logging.DEBUG, "also what the libraries say"),
    ):
        how_much.add_argument(
            f"-{name[0]}", f"--{name}", action=_SetLevel, nargs=0, const=level, default=argparse.SUPPRESS, help=text
        )


def add_format_flag(parser: argparse.ArgumentParser) -> None:
    """`--figure-format`, which every script that draws has."""
    parser.add_argument(
        "--figure-format",
        type=_formats,
        default=("png",),
        metavar="F,F",
        help="png, with pdf, svg or both for papers; png is always written: the report embeds it (default: png)",
    )


def _formats(text: str) -> tuple[str, ...]:
    asked = text.lower().split(",")
    unknown = [name for name in asked if name not in FIGURE_FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(FIGURE_FORMATS)}; for example png,pdf")
    return tuple(name for name in FIGURE_FORMATS if name == "png" or name in asked)


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return log.isEnabledFor(logging.DEBUG)


def script_main(main: Callable[..., int]) -> Callable[..., int]:
    """Give a script's `main` its exit status, one line on stderr and no traceback.

    2: `InputError`, a full disk, a file that the system refuses. 130 and 143: Ctrl-C and SIGTERM. Anything else that
    escapes is a fault of ours: the interpreter prints it and exits with 1. Only scripts let messages reach stderr.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        log.setLevel(logging.INFO)
        if not log.handlers:
            log.addHandler(_StderrHandler())
        if isinstance(sys.stdout, io.TextIOWrapper):  # of a locale without π: results are on disk already
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with _sigterm_raises():
                status = main(argv)
                _flush_results()
                return status
        except InputError as error:
            log.error("%s", error)
            return 2
        except OSError as error:
            is_full, where = error.errno in DISK_IS_FULL, error.filename2 or error.filename
            if where is None and not is_full:
                raise
            hint = "; make room and run the same command again" if is_full else ""
            log.error("%s: %s%s", where or "writing", error.strerror, hint)
            return 2
        except KeyboardInterrupt as stop:
            is_terminated = signal.SIGTERM in stop.args
            said = "stopped by SIGTERM" if is_terminated else "interrupted"
            log.info(f"{said}; the same command continues or starts over")
            return 143 if is_terminated else 130

    return wrapped


def _flush_results() -> None:
    """Write out what was printed, while it can still be told that there is no room for it, or no reader left."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left would fail once more when the interpreter ends
        raise OSError(error.errno, error.strerror, "standard output") from error


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let files be closed and a line be said when SIGTERM comes; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminated(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _LoggedProgress(tqdm):
    """A bar that logs a line now and then, and one when all is done."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """See tqdm; nothing is said before the first item, and nothing twice."""
        if self.n > getattr(self, "n_said", 0):
            self.n_said = self.n
            log.info("%s", self)


def progress_bar(description: str, total: int, unit: str) -> tqdm:
    """A bar to `update` inside a `with` block: drawn on a terminal, in a log a plain line now and then."""
    common = {"desc": description, "total": total, "unit": f" {unit}", "disable": not log.isEnabledFor(logging.INFO)}
    if sys.stderr.isatty():
        return tqdm(**common, dynamic_ncols=True)
    return _LoggedProgress(**common, file=io.StringIO(), mininterval=SECONDS_BETWEEN_LOG_LINES, bar_format=LOG_LINE)


def progress(
    items: Iterable[Item], description: str, total: int, unit: str, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yield `items`, each worth `size(item)` of `total`, and move a bar."""
    with progress_bar(description, total, unit) as bar:
        for item in items:
            yield item
            bar.update(size(item))


def is_name(tag: str) -> bool:
    """Whether a tag can stand in a table, a figure, a page and a file's name: on one line, and no path."""
    return tag.isprintable() and bool(tag.strip(" .")) and not set(tag) & set("/\\")


def parse_tagged_dumps(arguments: list[str], allow_untagged: bool = False) -> dict[str | None, Path]:
    """`["base=out/a", "trained=out/b"]` -> `{"base": Path, "trained": Path}`, order kept.

    With `allow_untagged`, a single argument that is an existing directory, or has no `=`, is keyed by None.
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
        elif not is_name(tag):
            problems.append(f"tag '{printable(tag)}' is no name: printable characters, none of / and \\")
        else:
            dumps[tag] = Path(path)
    raise_if_any(problems)
    return dumps
