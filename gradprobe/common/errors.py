"""The exceptions that mean "the input is at fault, not the program", and how many faults are said at once."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence

MOST_SHOWN = 20


class InputError(Exception):
    """Bad usage or bad input: the scripts print it on one line and exit with status 2.

    Validators collect every problem they find and raise once. It is no `ValueError`: where code of ours catches one
    from a library, neither must pass for the other.
    """

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("; ".join(problems))


class FaultyRecord(Exception):  # noqa: N818 it is about the record, which whoever reads the file collects
    """One record of a file can't be used; the message says why, whoever reads the file knows where it stands."""


class Unusable(FaultyRecord):
    """A well-formed record without anything to work with: dropped, and counted under the reason given."""


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one `InputError` naming all `problems`, or return if there are none."""
    found = tuple(problems)
    if found:
        raise InputError(*found)


def first_few(problems: Iterable[str], what: str = "problems", most: int = MOST_SHOWN) -> list[str]:
    """The first `most` problems and, where there are others, "and N more" of `what`."""
    found = list(problems)
    return [*found[:most], *([f"and {len(found) - most} more {what}"] if len(found) > most else [])]


def raise_folded(faults: Iterable[tuple[str, str]]) -> None:
    """Raise one `InputError` naming each (place, fault); the same fault in many places is said once, with a count."""
    places_of: dict[str, list[str]] = defaultdict(list)
    for place, fault in faults:
        places_of[fault].append(place)
    said = [
        f"{places[0]}: {fault}" + (f" (and {len(places) - 1} more like it)" if len(places) > 1 else "")
        for fault, places in places_of.items()
    ]
    raise_if_any(first_few(said, "faults"))


def first_of(items: Sequence[object], most: int = 10) -> str:
    """The first few of `items` between commas, "..." where there are others."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def reason_of(error: BaseException, most: int = 300) -> str:
    """What another library's exception says, on one line."""
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return kind + (one_line(str(error), most) or type(error).__name__)


def one_line(text: str, most: int = 300) -> str:
    """Text of others on one line, clipped; its backticks mean no parameter of ours."""
    return textwrap.shorten(text.replace("`", "'"), most, placeholder=" ...")
