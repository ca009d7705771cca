"""Numbers over checkpoints, in the look of `look`: a panel each, a point with its interval for every checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..analysis.text import CANT_TELL, number, share
from .look import (
    NOTE_COLOUR,
    Subject,
    heading,
    name_checkpoints,
    new_figure,
    series_colours,
    styled,
    top_bucket_name,
)

MIN_OF_TRAJECTORY = 3
EXP12_TRAJECTORY = "exp12_trajectory.png"


@dataclass(frozen=True)
class Panel:
    """One number over checkpoints.

    Attributes:
        title: what it is.
        found: of each checkpoint {value, ci95}, None where it can't be told.
        is_share: whether it is a share.
        decimals: of a number that is none.
        lines: levels that mean something, with what they mean.
    """

    title: str
    found: Sequence[Mapping[str, Any]]
    is_share: bool = False
    decimals: int = 2
    lines: Mapping[float, str] | None = None


@styled
def draw_checkpoints(subjects: list[Subject], asked: str, panels: Sequence[Panel]) -> Figure:
    """The panels beside each other, checkpoints in the order given."""
    figure = new_figure(max(5.0, 0.6 * len(subjects) + 2.0) * len(panels), 5.4)
    axes = figure.subplots(1, len(panels))
    colours = series_colours(subjects)
    for ax, panel in zip(axes, panels, strict=True):
        ax.set_title(panel.title, loc="left")
        for level, meaning in (panel.lines or {}).items():
            ax.axhline(level, color="black", linewidth=1.0, linestyle="--", zorder=1)
            ax.annotate(meaning, (0.0, level), (4, 3), xycoords=("axes fraction", "data"),
                        textcoords="offset points", fontsize=9, color=NOTE_COLOUR)  # fmt: skip
        said = share if panel.is_share else lambda value, panel=panel: number(value, panel.decimals)
        _draw_points(ax, panel.found, colours, said)
        if panel.is_share:
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    name_checkpoints(axes, subjects, "checkpoint, with 95% interval")
    figure.suptitle(heading(asked, subjects))
    return figure


def _draw_points(
    ax: Axes, found: Sequence[Mapping[str, Any]], colours: Sequence[str], said: Callable[[float], str]
) -> None:
    """A point with its interval for each, joined; one that can't be told says so in its place."""
    values = [np.nan if one["value"] is None else one["value"] for one in found]
    ax.plot(range(len(values)), values, color=NOTE_COLOUR, linewidth=1.0, zorder=1)
    for place, (one, colour) in enumerate(zip(found, colours, strict=True)):
        if one["value"] is None:
            ax.annotate(CANT_TELL, (place, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="center",
                        va="center", color=NOTE_COLOUR)  # fmt: skip
            continue
        if one["ci95"] is not None:
            ax.plot([place, place], one["ci95"], color=colour, linewidth=2.4, zorder=2)
        ax.plot(place, one["value"], "o", color=colour, markersize=9, markeredgecolor="white", zorder=3)
        ax.annotate(said(one["value"]), (place, one["value"]), (9, 0), textcoords="offset points", va="center",
                    fontsize=10, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip


def draw_trajectory(
    subjects: list[Subject],
    exp1: Sequence[Mapping[str, Any]],
    exp2: Sequence[Mapping[str, Any]],
    correct: Sequence[float | None],
) -> Figure:
    """Unit-norm participation ratio and ρ of the bucket of highest entropy, and the share of correct rollouts.

    Args:
        subjects: the checkpoints.
        exp1, exp2: of each, its part of the summary.
        correct: of each, the share of its rollouts; None where the manifest does not say.
    """
    tops = [list(one["per_bucket"].values())[-1] for one in exp1]
    ratios = [
        {"value": top["participation_ratio_unit_norm"], "ci95": top["participation_ratio_unit_norm_ci95"]}
        for top in tops
    ]
    rhos = [told(one["alignment"]["rho"], one["alignment"]["ci95"]) for one in exp2]
    fixed = {one["reference"] for one in exp2} == {-1.0}
    asked = f"What does training change in {top_bucket_name(subjects)}?"
    panels = [
        Panel("directions: PR of unit-norm rows", ratios, decimals=1),
        Panel("ρ: +1 same direction, −1 opposed", rhos, lines={-1.0: "theory, on-policy"} if fixed else {0.0: ""}),
        Panel("correct rollouts", [{"value": value, "ci95": None} for value in correct], is_share=True),
    ]
    return draw_checkpoints(subjects, asked, panels)


def told(value: float | None, ci95: Sequence[float] | None) -> dict[str, Any]:
    """A number that is none without its interval."""
    return {"value": None if ci95 is None else value, "ci95": ci95}
