"""One figure over targets, in the look of `look`: do other rows and layers of the weights agree?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .look import (
    CONTROL_COLOUR,
    NOTE_COLOUR,
    Subject,
    bucket_axis,
    bucket_places,
    dodge,
    heading,
    new_figure,
    series_colours,
    styled,
    top_bucket_name,
)

REPLICATION = "exp12_replication.png"
Spread = Mapping[str, Any]
"""As `replication.spread_of` gives it."""


@styled
def draw_replication(
    subjects: list[Subject], exp1: Sequence[Mapping[str, Any]], exp2: Sequence[Mapping[str, Any]]
) -> Figure:
    """Unit-norm participation ratio per bucket and ρ of the highest over all probed rows and layers: a dot each.

    Args:
        subjects: any number.
        exp1: per subject `{measure: {bucket: spread}}`.
        exp2: per subject `{measure: spread}`.
    """
    figure = new_figure(12.0, 5.2)
    of_buckets, of_rho = figure.subplots(1, 2, width_ratios=(2, 1))
    colours = series_colours(subjects)
    n_buckets = max(subject.top_bucket for subject in subjects) + 1
    for i, (ratios, rhos, colour) in enumerate(zip(exp1, exp2, colours, strict=True)):
        for place, spread in zip(
            bucket_places(n_buckets), ratios["participation_ratio_unit_norm"].values(), strict=False
        ):
            _dots(of_buckets, place + dodge(i, len(subjects)), spread, colour, 0.8 / len(subjects))
        _dots(of_rho, i, rhos["rho"], colour, 0.8)
    bucket_axis(of_buckets, n_buckets)
    of_buckets.set_ylim(bottom=0)
    of_buckets.set_title("directions: PR of unit-norm rows", loc="left")
    of_rho.axhline(0, color="black", linewidth=1.0, zorder=1)
    of_rho.set_xticks(range(len(subjects)), [subject.tag or subject.label for subject in subjects])
    of_rho.set_xlim(-0.6, len(subjects) - 0.4)
    of_rho.grid(axis="x", visible=False)
    of_rho.set_title(f"ρ, {top_bucket_name(subjects)}", loc="left")
    handles = [
        Line2D([], [], marker="o", linestyle="none", color=colour, label=subject.label)
        for subject, colour in zip(subjects, colours, strict=True)
    ]
    handles.append(Line2D([], [], color=CONTROL_COLOUR, linewidth=2.5, label="mean over targets"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    counts = sorted({len(table["targets"]) for table in (*exp1, *exp2)})
    targets = f"{' and '.join(map(str, counts))} targets of each model"
    figure.suptitle(heading(f"Do other rows and layers agree? {targets}", subjects))
    return figure


def _dots(ax: Axes, place: float, spread: Spread, colour: str, width: float) -> None:
    """One dot for each number of a spread, fanned out so that they stay apart, and a line at the mean."""
    values = [value for value in spread["values"] if value is not None]
    if not values:
        ax.annotate("no number", (place, 0), rotation=90, ha="center", va="bottom", color=NOTE_COLOUR, fontsize=9)
        return
    offsets = np.linspace(-0.33, 0.33, len(values)) * width if len(values) > 1 else [0.0]
    ax.scatter(place + np.asarray(offsets), values, s=16, color=colour, alpha=0.75, linewidths=0, zorder=3)
    ax.plot([place - 0.42 * width, place + 0.42 * width], [spread["mean"]] * 2, color=colour, linewidth=2.5, zorder=2)
