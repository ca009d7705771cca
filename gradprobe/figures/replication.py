"""One figure over targets, in the look of `look`: do other rows and layers of the weights agree?"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .look import CONTROL_COLOUR, Subject, dodge, new_figure, series_colours, styled, top_bucket_name


@styled
def draw_replication(subjects: list[Subject], exp1: list[dict[str, Any]], exp2: list[dict[str, Any]]) -> Figure:
    """Each headline number over all probed rows and layers: a dot per target, a line at their mean.

    Args:
        subjects: any number.
        exp1: per subject `{measure: {bucket: spread}}`, a spread as `replication.spread_of` gives it.
        exp2: per subject `{measure: spread}`.
    """
    figure = new_figure(13.0, 5.2)
    axes = figure.subplots(1, 3)
    colours = series_colours(subjects)
    for ax, measure in zip(axes, ("participation_ratio", "rank95"), strict=False):
        name = measure.replace("_", " ")
        buckets = list(exp1[0][measure])
        for i, (table, colour) in enumerate(zip(exp1, colours, strict=True)):
            for place, bucket in enumerate(buckets):
                _dots(ax, place + dodge(i, len(subjects)), table[measure][bucket], colour, 0.8 / len(subjects))
        ax.set_xticks(range(len(buckets)), buckets)
        ax.set_ylim(bottom=0)
        ax.set_xlabel(f"entropy bucket (0 lowest, {len(buckets) - 1} highest)")
        ax.set_ylabel(name)
        ax.set_title(f"{name} per bucket", loc="left")
    names = {"mean_cosine": "correct vs incorrect", "control_mean": "control"}
    for i, (table, colour) in enumerate(zip(exp2, colours, strict=True)):
        for place, measure in enumerate(names):
            _dots(axes[2], place + dodge(i, len(subjects)), table[measure], colour, 0.8 / len(subjects))
    axes[2].axhline(0, color="black", linewidth=1.0, zorder=1)
    axes[2].set_xticks(range(len(names)), names.values())
    axes[2].set_xlim(-0.6, len(names) - 0.4)
    axes[2].set_ylabel("mean cosine over prompts")
    axes[2].set_title(top_bucket_name(subjects), loc="left")
    for ax in axes:
        ax.grid(axis="x", visible=False)
    of_series = [
        Line2D([], [], marker="o", linestyle="none", color=colour, label=subject.label)
        for subject, colour in zip(subjects, colours, strict=True)
    ]
    mean = Line2D([], [], color=CONTROL_COLOUR, linewidth=2.5, label="mean over targets")
    figure.legend(handles=[*of_series, mean], loc="outside lower center", ncols=min(4, len(subjects) + 1))
    counts = {len(table["targets"]) for table in (*exp1, *exp2)}
    figure.suptitle(f"Do other rows and layers agree? {' and '.join(map(str, sorted(counts)))} targets of each model")
    return figure


def _dots(ax: Axes, place: float, spread: dict[str, Any], colour: str, width: float) -> None:
    """One dot for each number of a spread, fanned out so that they stay apart, and a line at the mean."""
    values = [value for value in spread["values"] if value is not None]
    if not values:
        ax.annotate("no number", (place, 0), rotation=90, ha="center", va="bottom", color=colour, fontsize=9)
        return
    offsets = np.linspace(-0.33, 0.33, len(values)) * width if len(values) > 1 else [0.0]
    ax.scatter(place + np.asarray(offsets), values, s=16, color=colour, alpha=0.75, linewidths=0, zorder=3)
    ax.plot([place - 0.42 * width, place + 0.42 * width], [spread["mean"]] * 2, color=colour, linewidth=2.5, zorder=2)
