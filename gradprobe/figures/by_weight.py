"""Which weights carry the update's signal or the step's gain, in the look of `look`: layers by kinds of weight."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..analysis.summaries import Summary
from ..analysis.text import share_estimate
from ..exp3.by_weight import kind_and_layer
from .look import CONTROL_COLOUR, Subject, new_figure, shortened, styled, subjects_of

BY_WEIGHT = "exp3_weights.png"
COLOURS = {"share": "#0072B2", "noise_share": "#8c8c8c"}
VIEW = (-0.5, 1.5)

Carried = Mapping[str, Any]
"""`by_weight` of `exp3_summary.json`."""


def told_by_weight(summary: Summary) -> list[tuple[Subject, str, Carried]]:
    """Of whom, of what, and what its weights carry: wherever there are several and shares are told."""
    found = [
        (subject, what, of.get("by_weight"))
        for subject, one in zip(subjects_of(summary), summary.values(), strict=True)
        for what, of in (("the step's gain", one.get("step", {})), ("the update's signal", one))
    ]
    return [of for of in found if of[2] and all(one["share"]["ci95"] for one in of[2]["kinds"].values())]


@styled
def draw_by_weight(told: Sequence[tuple[Subject, str, Carried]]) -> Figure:
    """Of each a heat map of its shares, with those of the layers above and those of the kinds beside it."""
    n_columns, n_kinds = min(2, len(told)), max(len(found["kinds"]) for _, _, found in told)
    n_lines = -(-len(told) // n_columns)
    figure = new_figure(max(11.0, 9.5 * n_columns), n_lines * (4.0 + 0.34 * n_kinds) + 1.2)
    parts = np.ravel(figure.subfigures(n_lines, n_columns, squeeze=False))
    for part, (subject, what, found) in zip(parts, told, strict=False):
        kind, most = max(found["kinds"].items(), key=lambda named: named[1]["share"]["value"])
        said, noise = (share_estimate(most[key]) for key in COLOURS)
        said = f"largest share of {what}: {shortened(kind)}, {said}, and {noise} of the noise"
        part.suptitle(f"{subject.label}\n{said}", x=0.02, ha="left", fontsize=11)
        _draw(part, what, found)
    looks = {"linestyle": "", "marker": "o"}
    handles = [
        Line2D([], [], **looks, color=COLOURS["share"], label="share of the signal or gain, with 95% interval"),
        Line2D([], [], **looks, color=COLOURS["noise_share"], label="share of the noise"),
        Line2D([], [], **looks | {"marker": "x"}, color=CONTROL_COLOUR, label="not told apart from 0"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle("Which weights carry it?")
    return figure


def _draw(part: SubFigure, what: str, found: Carried) -> None:
    kinds, layers = list(found["kinds"]), list(found["layers"])
    ratios = {"width_ratios": (2.2, 1.0), "height_ratios": (1.0, 0.4 + 0.16 * len(kinds))}
    (above, corner), (ax, beside) = part.subplots(2, 2, sharex="col", sharey="row", gridspec_kw=ratios)
    corner.set_axis_off()
    values, untold = np.full((len(kinds), len(layers)), np.nan), []
    for name, carried in found["weights"].items():
        kind, layer = kind_and_layer(name)
        if layer is not None:
            place, (low, high) = (kinds.index(kind), layers.index(str(layer))), carried["share"]["ci95"]
            values[place] = carried["share"]["value"]
            untold += [place] if low <= 0 <= high else []
    most = np.nanmax(np.abs(values))
    image = ax.imshow(np.ma.masked_invalid(values), cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
    for width, colour in ((2.6, "white"), (0.9, CONTROL_COLOUR)):
        ax.scatter(*np.reshape(untold, (-1, 2)).T[::-1], marker="x", s=22, linewidth=width, color=colour)
    every = -(-len(layers) // 15)
    ax.set_xticks(range(0, len(layers), every), layers[::every])
    ax.set_yticks(range(len(kinds)), map(shortened, kinds))
    ax.set_xlabel("layer")
    ax.grid(visible=False)
    ax.set_facecolor("#f0f0f0")  # where there is no such weight
    where = {"location": "bottom", "shrink": 0.7, "ticks": MaxNLocator(5), "format": PercentFormatter(1.0)}
    part.colorbar(image, ax=ax, label=f"share of {what}", **where)
    _margin(above, found["layers"], "y")
    _margin(beside, found["kinds"], "x")
    above.set_ylabel("layer's share")
    beside.set_xlabel("kind's share")


def _margin(ax: Axes, carried: Carried, along: str) -> None:
    """Shares with intervals along an axis, cut off at the view."""
    for apart, (key, colour) in zip((-0.14, 0.14), COLOURS.items(), strict=True):
        known = {place: one[key] for place, one in enumerate(carried.values()) if one[key]["ci95"]}
        values, places = np.array([one["value"] for one in known.values()]), np.array([*known]) + apart
        errors = np.abs(np.array([one["ci95"] for one in known.values()]).T - values)
        x, y = (places, values) if along == "y" else (values, places)
        ax.errorbar(x, y, **{f"{along}err": errors}, fmt="o", color=colour, markersize=4.5, linewidth=1.8)
    (ax.axhline if along == "y" else ax.axvline)(0.0, color="black", linewidth=0.8, zorder=1)
    axis = getattr(ax, f"{along}axis")
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    getattr(ax, f"set_{along}lim")(np.clip(axis.get_view_interval(), *VIEW))
