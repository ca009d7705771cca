"""What the calibrations' tables have in common."""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

COVERAGE_BAND = (0.90, 0.99)
OUTSIDE = "**NO**"


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """For a table; a dash where there is none."""
    if value is None or np.isnan(value):
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def percent(share: float) -> str:
    """0.055 -> 5.5%."""
    return f"{100 * share:.1f}%"


def mean_of(values: list[float | None]) -> float | None:
    """Of those there are."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def in_band(value: float, band: tuple[float, float]) -> str:
    """A word for the table; the loud one stands out."""
    return "yes" if band[0] <= value <= band[1] else OUTSIDE


def markdown(table: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but words are right-aligned by the renderer."""
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return [lines[0], "|" + " ---: |" * len(table[0]), *lines[1:]]


def tables_of(
    pool: ProcessPoolExecutor, parts: list[tuple], seed: int, draw_row: Callable, row_of: Callable
) -> dict[str, list[list[str]]]:
    """Title -> table. `parts`: title, what is planted in each row, draws of each, settings of `draw_row`, its table."""
    found, first = {}, 0
    for title, rows, n_draws, settings, table in parts:
        drawn = []
        for number_of_row, planted in enumerate(rows, first):
            tasks = [(number_of_row, draw, planted, seed, *settings) for draw in range(n_draws)]
            draws = list(pool.map(draw_row, tasks, chunksize=max(1, n_draws // 16)))
            drawn.append(row_of(number_of_row, planted, draws))
        found[title] = table(drawn)
        first += len(rows)
        print(title, file=sys.stderr, flush=True)
    return found
