"""The same number over several probed rows and layers: does one row of one weight speak for the others?"""

import statistics
from collections.abc import Sequence
from typing import Any


def spread_of(values: Sequence[float | int | None]) -> dict[str, Any]:
    """A number over targets, for the summaries.

    Args:
        values: one per target, None where it can't be had.

    Returns:
        `values` as given; `n` of them that are numbers; their `mean`, sample standard deviation `std` (None below
        two), `min` and `max` (None without any).
    """
    known = [value for value in values if value is not None]
    return {
        "values": list(values),
        "n": len(known),
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "min": min(known, default=None),
        "max": max(known, default=None),
    }
