"""Numbers as people read them: in tables on a terminal, and typeset in figures and the report."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"
MISSING_TYPESET = "–"


def format_number(value: float | int | None, decimals: int = 3) -> str:
    """A number for a table: integers as they are, others with `decimals`, None as `-`."""
    if value is None:
        return MISSING
    return str(value) if isinstance(value, int) else f"{value:.{decimals}f}"


def format_with_interval(value: float | None, interval: Sequence[float] | None, decimals: int = 2) -> str:
    """`-0.63 [-1.33, -0.27]`; `-` for what there is not."""
    if value is None:
        return MISSING
    ends = MISSING if interval is None else ", ".join(format_number(end, decimals) for end in interval)
    return f"{format_number(value, decimals)} [{ends}]"


def format_share(value: float | None, interval: Sequence[float] | None = None) -> str:
    """`66% [46, 86]`; without brackets where there is no interval, `-` for None."""
    if value is None:
        return MISSING
    ends = "" if interval is None else f" [{', '.join(f'{100 * end:.0f}' for end in interval)}]"
    return f"{round(100 * value) + 0:d}%{ends}"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_replication(spreads: Mapping[str, Mapping[str, float | int | None]]) -> str:
    """A table of numbers over targets, see `replication.spread_of`."""
    columns = ("n", "mean", "std", "min", "max")
    return format_table(
        ["over targets", *columns],
        [[name, *(format_number(spread[column]) for column in columns)] for name, spread in spreads.items()],
    )


def format_p_value(p_value: float | None, n: int) -> str:
    """`0.0002 (44)`: p with the number of prompts behind it."""
    return f"{format_number(p_value, 4)} ({n})"


def typeset_number(value: float | int | None, decimals: int = 3) -> str:
    """As `format_number`, with thousands apart, a proper minus, never minus zero, and `–` for None."""
    if value is None:
        return MISSING_TYPESET
    return f"{value:,}" if isinstance(value, int) else f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def typeset_share(value: float | None, interval: Sequence[float] | None = None) -> str:
    """As `format_share`, with a proper minus, never minus zero, and `–` for None."""
    if value is None:
        return MISSING_TYPESET
    ends = "" if interval is None else f" [{', '.join(typeset_number(100 * end, 0) for end in interval)}]"
    return f"{typeset_number(100 * value, 0)}%{ends}"


def typeset_estimate(found: Mapping[str, Any], decimals: int = 2) -> str:
    """A number with its interval, {value, ci95}: `0.93 [0.85, 1.01]`; a number without an interval is not said."""
    if found["value"] is None or found["ci95"] is None:
        return MISSING_TYPESET
    ends = ", ".join(typeset_number(end, decimals) for end in found["ci95"])
    return f"{typeset_number(found['value'], decimals)} [{ends}]"


def typeset_sentence(text: str) -> str:
    """The same with a proper minus before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def typeset_interval(bounds: Sequence[float] | None) -> str:
    """`[−1.33, −0.27]`; says so where there is none."""
    return "[no interval]" if bounds is None else f"[{', '.join(typeset_number(bound, 2) for bound in bounds)}]"
