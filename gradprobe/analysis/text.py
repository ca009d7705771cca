"""Numbers and tables as people read them, on a terminal, in figures and on the page: one spelling of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.console import printable

MISSING = "–"
CANT_TELL = "can't tell"
Bounds = Sequence[float] | None


def number(value: float | int | None, decimals: int = 3) -> str:
    """With thousands apart, a proper minus, never minus zero, `–` for None."""
    if value is None:
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "−")


def with_interval(value: float | None, bounds: Bounds, decimals: int = 2) -> str:
    """`14.5 [13.2, 15.9]`; the number alone where it has no interval."""
    if value is None or bounds is None:
        return number(value, decimals)
    return f"{number(value, decimals)} [{', '.join(number(bound, decimals) for bound in bounds)}]"


def share(value: float | None, bounds: Bounds = None, decimals: int = 0) -> str:
    """`66% [46, 86]`."""
    if value is None:
        return MISSING
    ends = "" if bounds is None else f" [{', '.join(number(100 * bound, decimals) for bound in bounds)}]"
    return f"{number(100 * value, decimals)}%{ends}"


def estimate(found: Mapping[str, Any], decimals: int = 2) -> str:
    """A number that is none without its interval, {value, ci95}: `0.93 [0.85, 1.01]` or `–`."""
    return MISSING if found["ci95"] is None else with_interval(found["value"], found["ci95"], decimals)


def share_estimate(found: Mapping[str, Any]) -> str:
    """The same of a share."""
    return MISSING if found["ci95"] is None else share(found["value"], found["ci95"])


def counted(n: int, noun: str) -> str:
    """`1 prompt`, `44 prompts`, `no prompt`."""
    return f"{n:,} {noun}s" if n > 1 else f"{'no' if n == 0 else 1} {noun}"


PAGE_CHARACTERS = 112
"""What of a table's row fits a page of 1,100 pixels."""


@dataclass(frozen=True)
class Table:
    """Ready cells, for the terminal and the page alike.

    Attributes:
        caption: what it is about.
        header: the columns' names.
        rows: as many cells each.
        notes: sentences below.
        is_words: whether cells are words, which wrap, and not numbers.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    is_words: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether its rows, on one line each, are wider than a page."""
        return sum(2 + max(map(len, column)) for column in zip(*self.rows, strict=True)) > PAGE_CHARACTERS

    def text(self) -> str:
        """The caption, aligned columns, the first to the left and the others to the right, and the notes."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [printable(self.caption)]
        for first, *others in [self.header, *self.rows] if self.rows else []:
            cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self.notes])


def replication_table(tag: str, spreads: Mapping[str, Mapping[str, float | int | None]]) -> Table:
    """A table of numbers over targets, see `replication.spread_of`."""
    columns = ("n", "mean", "std", "min", "max")
    rows = [[name, *(number(spread[column]) for column in columns)] for name, spread in spreads.items()]
    return Table(f"{tag}: over targets", ["", *columns], rows)
