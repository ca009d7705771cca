"""Figures along RL's step, in the look of `look`: which tokens carry its gain, and what the step itself is like."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ..analysis.summaries import Summary
from ..analysis.text import CANT_TELL, number, share_estimate
from ..exp3.signal import CLAIMED_SHARE
from ..exp3.summary import at
from .look import (
    CONTROL_COLOUR,
    caption,
    new_figure,
    panel_title,
    shortened,
    styled,
    subjects_of,
    text_figure,
    wrapped,
)

STEP = "exp3_step.png"
RULE_COLOURS = {"entropy": "#D55E00", "surprisal": "#0072B2", "‖onehot − π‖": "#009E73", "|Δ log π|": "#CC79A7"}
OTHER_COLOURS = {"position": "#8c8c8c", "random": "#000000"}
OWN_COLOUR = "#E69F00"
ASKED = "Which tokens carry what RL's step gains?"


@styled
def draw_step(summary: Summary) -> Figure:
    """The share of the step's gain over the share of the tokens kept, a line per rule, a panel per tag that is told."""
    steps = {tag: one for tag, one in summary.items() if "step" in one}
    subjects = subjects_of(steps)
    found = [(subject, one["step"]) for subject, one in zip(subjects, steps.values(), strict=True)]
    told = [(subject, step) for subject, step in found if not step["gain"]["reason"]]
    untold = [f"{s.label}: {CANT_TELL}: {step['gain']['reason']}" for s, step in found if step["gain"]["reason"]]
    if not told:
        return text_figure(ASKED, untold)
    n_columns = min(2, len(told))
    figure = new_figure(max(8.0, 7.0 * n_columns), 5.6 * -(-len(told) // n_columns) + 1.6)
    axes = figure.subplots(-(-len(told) // n_columns), n_columns, squeeze=False).ravel()
    for unused in axes[len(told) :]:
        unused.set_axis_off()
    for ax, (subject, step) in zip(axes, told, strict=False):
        _curves(ax, step)
        top = share_estimate(at(step["keep_top"]["entropy"], CLAIMED_SHARE)["share"])
        t = number(step["gain"]["t"], 1)
        said = f"the {CLAIMED_SHARE:.0%} of highest entropy carry {top} of the gain (t = {t})"
        ax.set_title(f"{panel_title(subject, subjects)}\n{wrapped(said)}", loc="left")
    if untold:
        caption(axes[0], "\n".join(map(wrapped, untold)))
    handles = [Line2D([], [], color=_colour(rule), label=rule, linewidth=2.2) for rule in told[0][1]["keep_top"]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, title="kept first by")
    step = told[0][1]
    ends = " ".join(f"{end} {shortened(step[end])}" for end in ("from", "to"))
    figure.suptitle(f"{ASKED}\n{wrapped(ends + ', all parameters, ' + step['objective'])}")
    return figure


def _curves(ax: Axes, step: Mapping[str, Any]) -> None:
    for rule, curve in step["keep_top"].items():
        shares = [0.0, *(part["share_of_tokens"] for part in curve)]
        values = [0.0, *(np.nan if part["share"]["value"] is None else part["share"]["value"] for part in curve)]
        is_main = rule == "entropy"
        ax.plot(shares, values, color=_colour(rule), linewidth=2.8 if is_main else 1.6, zorder=4 if is_main else 3)
        if is_main:
            ends = [(0.0, 0.0), *(part["share"]["ci95"] or (np.nan, np.nan) for part in curve)]
            ax.fill_between(shares, *np.transpose(ends), color=_colour(rule), alpha=0.18, linewidth=0, zorder=2)
    ax.plot([0, 1], [0, 1], color=CONTROL_COLOUR, linestyle=":", linewidth=1.6, zorder=1)
    ax.axvline(CLAIMED_SHARE, color="#b3b3b3", linewidth=1.4, zorder=0.5)
    ax.axhline(0.0, color="black", linewidth=0.8, zorder=1)
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(-0.1, 1.15)
    ax.set_xticks([0.0, CLAIMED_SHARE, 0.4, 0.6, 0.8, 1.0])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("share of the tokens kept")
    ax.set_ylabel("share of the step's gain")


def _colour(rule: str) -> str:
    return {**RULE_COLOURS, **OTHER_COLOURS}.get(rule, OWN_COLOUR)
