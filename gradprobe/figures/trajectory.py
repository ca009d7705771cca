"""One figure over checkpoints, in the look of `figures`: what training does to the numbers of both experiments."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ..exp1.measure import BucketNumbers
from ..exp2.direction import ORTHOGONAL_WITHIN, Alignment
from .exp2 import ORTHOGONAL_COLOUR, draw_reference, draw_rho, rho_handles, rho_limit
from .look import (
    MAX_NUMBERED_BUCKETS,
    NOTE_COLOUR,
    Subject,
    bucket_colours,
    bucket_ticks,
    heading,
    name_checkpoints,
    new_figure,
    note,
    series_colours,
    styled,
    top_bucket_name,
)


@styled
def draw_trajectory(
    subjects: list[Subject],
    buckets: list[list[BucketNumbers]],
    alignments: list[Alignment],
    correct_shares: Sequence[float | None],
    references: Sequence[float | None] = (),
) -> Figure:
    """Unit-norm participation ratio, rho and the share of correct rollouts of each checkpoint, in the order given.

    Args:
        subjects: the checkpoints, as many as there are.
        buckets: per checkpoint, the numbers of each bucket.
        alignments: per checkpoint, that of the bucket of highest entropy.
        correct_shares: per checkpoint, of its rollouts; None where the manifest does not say.
        references: per checkpoint, what theory fixes rho at; None where it fixes nothing.
    """
    figure = new_figure(max(16.0, 1.6 * len(subjects) + 6.0), 7.0)
    axes = figure.subplots(1, 3)
    _ratios(axes[0], buckets)
    _rhos(axes[1], subjects, alignments, references)
    _shares(axes[2], subjects, correct_shares)
    name_checkpoints(axes, subjects, "checkpoint, in the order given")
    figure.legend(handles=[*_bucket_handles(len(buckets[0])), *rho_handles()], loc="outside lower center", ncols=4)
    figure.suptitle(heading(f"{len(subjects)} checkpoints", subjects))
    return figure


def _ratios(ax: Axes, buckets: list[list[BucketNumbers]]) -> None:
    """A line per bucket, with the interval of each point; what has no number leaves a gap."""
    n_buckets = len(buckets[0])
    offsets = np.linspace(-0.16, 0.16, n_buckets)
    for index, colour in enumerate(bucket_colours(n_buckets)):
        numbers = [of_subject[index] for of_subject in buckets]
        places = np.arange(len(numbers)) + offsets[index]
        values = [one.participation_ratio_unit_norm for one in numbers]
        ax.plot(places, [np.nan if value is None else value for value in values], "o-", color=colour, linewidth=1.6)
        for place, one in zip(places, numbers, strict=True):
            if one.participation_ratio_unit_norm_ci95 is not None:
                ax.plot([place, place], one.participation_ratio_unit_norm_ci95, color=colour, linewidth=2.4, alpha=0.6)
    if all(one.participation_ratio_unit_norm is None for of_subject in buckets for one in of_subject):
        note(ax, "no gradient other than zero")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("participation ratio")
    ax.set_title("PR of unit-norm rows per bucket, 95% interval", loc="left")


def _rhos(ax: Axes, subjects: list[Subject], alignments: list[Alignment], references: Sequence[float | None]) -> None:
    limit = rho_limit([alignments])
    draw_reference(ax, subjects, references)
    ax.axhspan(-ORTHOGONAL_WITHIN, ORTHOGONAL_WITHIN, color=ORTHOGONAL_COLOUR, linewidth=0, zorder=0)
    ax.axhline(0.0, color="black", linewidth=1.0, zorder=1.5)
    n_outside = sum(
        draw_rho(ax, place, 0.5, result, colour, limit)
        for place, (result, colour) in enumerate(zip(alignments, series_colours(subjects), strict=True))
    )
    for place, result in enumerate(alignments):  # away from the point
        is_below = result.rho is not None and result.rho > 0
        ax.annotate(
            f"{result.verdict}, n = {result.n_prompts}", (place, -limit if is_below else limit),
            (0, 4 if is_below else -4), textcoords="offset points", rotation=90, ha="center",
            va="bottom" if is_below else "top", fontsize=9, color=NOTE_COLOUR,
        )  # fmt: skip
    ax.set_ylim(-limit, limit)
    ax.set_ylabel("ρ (+1 same direction, 0 orthogonal, −1 opposed)")
    cut = f"\nview cut at ±{limit:g}: {n_outside} of the intervals or bars run on" if n_outside else ""
    ax.set_title(f"ρ with 95% interval, {top_bucket_name(subjects)}{cut}", loc="left")


def _shares(ax: Axes, subjects: list[Subject], shares: Sequence[float | None]) -> None:
    ax.plot(range(len(shares)), [np.nan if share is None else share for share in shares], color=NOTE_COLOUR, zorder=1)
    for place, (share, colour) in enumerate(zip(shares, series_colours(subjects), strict=True)):
        if share is not None:
            ax.plot(place, share, "o", color=colour, markersize=9)
            ax.annotate(f"{share:.0%}", (place, share), (0, 8), textcoords="offset points", ha="center", fontsize=10)
    if all(share is None for share in shares):
        note(ax, "the manifests don't say")
    ax.set_ylim(0, 1.08)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylabel("share of rollouts")
    ax.set_title("correct rollouts", loc="left")


def _bucket_handles(n_buckets: int) -> list[Line2D]:
    colours = bucket_colours(n_buckets)
    named = range(n_buckets) if n_buckets <= MAX_NUMBERED_BUCKETS else bucket_ticks(n_buckets)
    ends = {0: " (lowest entropy)", n_buckets - 1: " (highest)"}
    return [
        Line2D([], [], color=colours[index], marker="o", linewidth=1.6, label=f"bucket {index}{ends.get(index, '')}")
        for index in named
    ]
