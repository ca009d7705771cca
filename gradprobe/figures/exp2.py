"""Exp 2's figures, in the look of `look`: what the prompts' cosines are, and rho with what it can tell."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..analysis.text import typeset_interval, typeset_number
from ..dump.format import Dump
from ..exp2.direction import (
    ALIGNED,
    MIN_RARE_TOKENS,
    MIN_ROLLOUTS_OF_EACH_KIND,
    MIN_TOKENS_OF_EACH_KIND,
    MIN_TOKENS_TO_SPLIT,
    OPPOSED,
    ORTHOGONAL,
    ORTHOGONAL_WITHIN,
    UNDERPOWERED,
    UNSAMPLED,
    Alignment,
)
from ..exp2.measure import BucketDirections
from .look import (
    CONTROL_COLOUR,
    NOTE_COLOUR,
    Subject,
    bucket_ticks,
    caption,
    dodge,
    grid,
    heading,
    new_figure,
    note,
    panel_title,
    panels,
    series_colours,
    shortened,
    styled,
    subjects_of,
    top_bucket_name,
)

HISTOGRAM = "exp2_direction_cosine_hist.png"
ALIGNMENT = "exp2_alignment.png"
HISTOGRAM_ALPHA = 0.65
DETECTABLE_COLOUR = "#bdbdbd"
ORTHOGONAL_COLOUR = "#eaf3ea"
FURTHEST_RHO = 1.5
MAX_BUCKETS_IN_WORDS = 7
MAX_ABREAST = 3
MAX_BARS = 300
MARKERS = {ALIGNED: "^", OPPOSED: "v", ORTHOGONAL: "s", UNDERPOWERED: "o", UNSAMPLED: "X"}
MEANINGS = {
    ALIGNED: "interval above 0",
    OPPOSED: "interval below 0",
    ORTHOGONAL: f"holds 0, inside ±{ORTHOGONAL_WITHIN}",
    UNDERPOWERED: "can't tell",
    UNSAMPLED: f"fewer than {MIN_RARE_TOKENS} rare tokens expected",
}
HOLLOW = (UNDERPOWERED, UNSAMPLED)
UNSAMPLED_COLOUR = "#8c8c8c"
POINT_ALONE = {"linestyle": "none", "markersize": 7, "markerfacecolor": "white", "markeredgewidth": 1.2, "zorder": 2.5}
"""How a rho without an interval is drawn."""
REFERENCE_WORDS = "−1: fixed by theory on-policy"


def draw_analysis(dumps: Mapping[str | None, Dump], results: list[list[BucketDirections]]) -> dict[str, Figure]:
    """Both figures of the analysis by file name. `results`: per dump, per bucket."""
    subjects = subjects_of(dumps)
    return {
        ALIGNMENT: draw_alignment(
            subjects,
            [[bucket.alignment for bucket in buckets] for buckets in results],
            references=[buckets[-1].reference for buckets in results],
        ),
        HISTOGRAM: draw_direction_histogram(subjects, [buckets[-1] for buckets in results]),
    }


@styled
def draw_direction_histogram(subjects: list[Subject], directions: list[BucketDirections]) -> Figure:
    """Per-prompt cosines of correct and incorrect mean gradients with the controls', one axes per subject."""
    figure, axes = panels(len(subjects), width=6.4, height=4.0, sharey=True)
    _draw_cosine_histograms(axes, directions, series_colours(subjects))
    for subject, result, ax in zip(subjects, directions, axes, strict=True):
        ax.set_title(f"{panel_title(subject, subjects)}\n{_mean_sentence(result)}", loc="left")
        caption(ax, _control_sentence(result))
    _histogram_legend(figure, subjects)
    figure.suptitle(heading(f"Correct against incorrect gradients, {top_bucket_name(subjects)}", subjects))
    return figure


@styled
def draw_direction_headline(subjects: list[Subject], directions: list[BucketDirections]) -> Figure:
    """Exp 2 at a glance: rho and its verdict in words over the prompts' cosines, sorted, and the controls' bands."""
    n_columns = min(MAX_ABREAST, len(subjects))
    n_lines = -(-len(subjects) // n_columns)
    figure = new_figure(max(7.5, 7.0 * n_columns), 5.6 * n_lines + 1.4)
    axes = grid(figure, len(subjects), n_columns)[:, 0]
    for subject, result, ax, colour in zip(subjects, directions, axes, series_colours(subjects), strict=True):
        ax.set_title(f"{panel_title(subject, subjects)}\n{_rho_sentence(result)}", loc="left")
        _sorted_bars(ax, result, colour)
    _share_sorted_limits(axes, directions)
    band = Patch(color=CONTROL_COLOUR, alpha=0.2, label="central 95% of the control by tokens")
    dashed = Line2D(
        [], [], color="black", linewidth=1.6, linestyle="--", label="central 95% of the control by rollouts"
    )
    figure.legend(handles=[band, dashed], loc="outside lower center", ncols=2 if n_columns > 1 else 1)
    figure.suptitle(heading(f"Correct against incorrect gradients, {top_bucket_name(subjects)}", subjects))
    return figure


@styled
def draw_alignment(
    subjects: list[Subject], alignments: list[list[Alignment]], references: Sequence[float | None] = ()
) -> Figure:
    """rho per bucket and subject with its 95% interval, its verdict, and the |rho| that could be detected.

    Args:
        subjects: any number.
        alignments: per subject, per bucket.
        references: per subject, what theory fixes rho at, -1 of on-policy rollouts; None where it fixes nothing.
    """
    n_buckets = max(map(len, alignments))
    in_words = n_buckets <= MAX_BUCKETS_IN_WORDS
    figure = new_figure(max(9.0, 2.0 * n_buckets + 1.4) if in_words else 14.0, 6.2 + 0.25 * len(subjects))
    ax = figure.subplots()
    limit = rho_limit(alignments)
    n_outside = 0
    draw_reference(ax, subjects, references)
    ax.axhspan(-ORTHOGONAL_WITHIN, ORTHOGONAL_WITHIN, color=ORTHOGONAL_COLOUR, linewidth=0, zorder=0)
    ax.axhline(0.0, color="black", linewidth=1.0, zorder=1.5)
    for i, (colour, buckets) in enumerate(zip(series_colours(subjects), alignments, strict=True)):
        for bucket, result in enumerate(buckets):
            place = bucket + dodge(i, len(subjects))
            n_outside += draw_rho(ax, place, 0.5 / len(subjects), result, colour, limit)
            if in_words:
                ax.annotate(
                    f"{result.verdict}, n = {result.n_prompts}", (bucket, 0), (0, -22 - 16 * i),
                    xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="top",
                    color=UNSAMPLED_COLOUR if result.verdict == UNSAMPLED else colour, annotation_clip=False,
                )  # fmt: skip
    ax.set_xlim(-0.5, n_buckets - 0.5)
    ax.set_ylim(-limit, limit)
    ax.set_xticks(bucket_ticks(n_buckets))
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    for edge in np.arange(n_buckets - 1) + 0.5:
        ax.axvline(edge, color="#d0d0d0", linewidth=0.8, zorder=0.5)
    words = f"verdict, n prompts with {MIN_ROLLOUTS_OF_EACH_KIND} rollouts of each kind; " if in_words else ""
    order = f" (0 lowest, {n_buckets - 1} highest)" if len({len(buckets) for buckets in alignments}) == 1 else ""
    ax.set_xlabel(f"{words}entropy bucket{order}", labelpad=6 + 16 * len(subjects) if in_words else 4)
    ax.set_ylabel("ρ (+1 same direction, 0 orthogonal, −1 opposed)")
    without = sum(r.ci95 is None and r.n_prompts > 0 for buckets in alignments for r in buckets)
    ax.set_title("ρ with 95% interval: cosine with the noise removed", loc="left")
    if without:
        caption(ax, f"{without} without a finite interval: a signal is not above 0 at the 95% level, and ρ no number")
    if n_outside:
        caption(ax, f"view cut at ±{limit:.2g}: {n_outside} of the points, intervals or bars run on (arrows)")
    _alignment_legend(figure, subjects)
    figure.suptitle(heading("Do correct and incorrect rollouts share a direction?", subjects))
    return figure


def rho_limit(alignments: list[list[Alignment]]) -> float:
    """The view's reach: every point, interval and detectable bar as far as ±1.5, and ±1.1 at least."""
    reach = [1.05]
    for result in (result for buckets in alignments for result in buckets):
        known = (result.rho, *(result.ci95 or ()), result.min_detectable)
        reach.extend(abs(value) for value in known if value is not None)
    return min(FURTHEST_RHO, 1.1 * max(reach))


def draw_rho(ax: Axes, place: float, width: float, result: Alignment, colour: str, limit: float) -> bool:
    """One rho with its interval over its detectable bar, or why there is none; True where the view cuts it off.

    Without an interval rho is no number: a small hollow point, at the edge with an arrow where it lies outside.
    """
    colour = UNSAMPLED_COLOUR if result.verdict == UNSAMPLED else colour
    if result.ci95 is None:
        if result.rho is None:
            why = "n = 0 prompts" if result.n_prompts == 0 else "no ρ: no signal"
            ax.text(
                place, 0, why, rotation=90, ha="center", va="center", color=colour, fontsize=10,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.85}, zorder=3,
            )  # fmt: skip
            return False
        edge, is_outside = 0.96 * limit, abs(result.rho) > limit
        marker = "o" if not is_outside else "^" if result.rho > 0 else "v"
        inside = float(np.clip(result.rho, -edge, edge)) if is_outside else result.rho
        ax.plot(place, inside, marker, **POINT_ALONE, markeredgecolor=colour)
        return is_outside
    low, high = result.ci95
    detectable = result.min_detectable
    ax.bar(place, 2 * detectable, width, -detectable, color=DETECTABLE_COLOUR, alpha=0.7, linewidth=0, zorder=1)
    shown = np.clip([low, high], -limit, limit)
    ax.plot([place, place], shown, color=colour, linewidth=2.4, solid_capstyle="butt", zorder=3)
    for end, inside in zip((low, high), shown, strict=True):
        cap = "_" if end == inside else ("^" if end > 0 else "v")
        ax.plot(place, inside, cap, color=colour, markersize=9, markeredgewidth=2.0, clip_on=False, zorder=3)
    if abs(result.rho) <= limit:
        hollow = result.verdict in HOLLOW
        ax.plot(
            place, result.rho, MARKERS[result.verdict], markersize=13, markerfacecolor="white" if hollow else colour,
            markeredgecolor=colour if hollow else "white", markeredgewidth=2.0 if hollow else 1.0, zorder=4,
        )  # fmt: skip
    return max(abs(result.rho), abs(low), abs(high), detectable) > limit


def draw_reference(ax: Axes, subjects: Sequence[Subject], references: Sequence[float | None]) -> None:
    """A dashed line at what theory fixes rho at, and for whom where not for all."""
    known = [reference for reference in references if reference is not None]
    for value in sorted(set(known)):
        ax.axhline(value, color="black", linewidth=1.3, linestyle=(0, (5, 3)), zorder=1.6)
        named = [one.tag or one.label for one, found in zip(subjects, references, strict=True) if found == value]
        whose = "" if len(named) == len(subjects) else f" ({shortened(', '.join(named), 30)} only)"
        ax.annotate(
            f"{REFERENCE_WORDS}{whose}", (0.0, value), (4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="left", va="bottom", fontsize=9, color="black",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}, zorder=5,
        )  # fmt: skip


def _alignment_legend(figure: Figure, subjects: list[Subject]) -> None:
    handles: list[Any] = [
        Line2D([], [], color=colour, linewidth=2.4, label=subject.label)
        for subject, colour in zip(subjects, series_colours(subjects), strict=True)
    ]
    figure.legend(handles=[*handles, *rho_handles()], loc="outside lower center", ncols=2)


def rho_handles() -> list[Any]:
    """The legend's entries for what `draw_rho` draws."""
    handles: list[Any] = []
    style = {"color": NOTE_COLOUR, "linestyle": "none", "markersize": 9}
    for verdict, marker in MARKERS.items():
        face = "white" if verdict in HOLLOW else NOTE_COLOUR
        label = f"{verdict}: {MEANINGS[verdict]}"
        handles.append(Line2D([], [], marker=marker, markerfacecolor=face, label=label, **style))
    alone = {**POINT_ALONE, "zorder": 2}
    label = "no interval: ρ is no number (arrow: outside the view)"
    handles.append(Line2D([], [], marker="o", markeredgecolor=NOTE_COLOUR, label=label, **alone))
    handles.append(Patch(color=DETECTABLE_COLOUR, alpha=0.7, label="|ρ| too small to be detected (80% power)"))
    handles.append(
        Patch(facecolor=ORTHOGONAL_COLOUR, edgecolor="#c4d8c4", label=f"±{ORTHOGONAL_WITHIN}: the limits of orthogonal")
    )
    return handles


def _no_prompt_note(result: BucketDirections) -> str:
    directions = result.directions
    return (
        f"no usable prompt ({len(directions.per_prompt)} of {directions.n_prompts} prompts have\n"
        f"{MIN_TOKENS_OF_EACH_KIND} top-bin tokens of both kinds)"
        if not directions.per_prompt
        else f"no cosine: a mean gradient is zero\nin all {len(directions.per_prompt)} usable prompts"
    )


def _rho_sentence(found: BucketDirections) -> str:
    """rho, its interval, n and verdict, and what theory fixes it at."""
    result = found.alignment
    if result.n_prompts == 0:
        return f"no ρ, no prompt has {MIN_ROLLOUTS_OF_EACH_KIND} rollouts of each kind: {result.verdict}"
    if result.rho is None:
        rho = "no ρ, signal not above 0"
    elif result.ci95 is None:
        rho = "no ρ, no finite interval"
    else:
        rho = f"ρ = {typeset_number(result.rho, 2)} {typeset_interval(result.ci95)}"
    fixed = "" if found.reference is None else f" (theory: {typeset_number(found.reference, 0)})"
    return f"{rho}, n = {result.n_prompts} prompts: {result.verdict}{fixed}"


def _mean_sentence(result: BucketDirections) -> str:
    cosines = result.directions.cosines
    if len(cosines) == 0:
        return "no mean cos"
    return f"mean cos = {typeset_number(np.mean(cosines), 2)} (n = {len(cosines)} prompts)"


def _control_sentence(result: BucketDirections) -> str:
    controls = {"tokens": result.directions.control_cosines, "rollouts": result.control_by_rollout_cosines}
    floors = [f"by {unit} {typeset_number(np.mean(v), 2)} (n = {len(v)})" for unit, v in controls.items() if len(v)]
    return "mean control " + ", ".join(floors) if floors else "no control"


def _draw_cosine_histograms(axes: Iterable[Axes], directions: list[BucketDirections], colours: list[str]) -> None:
    """Histograms of the same bins and the same height, so that axes can be compared, means marked above them.

    The control by rollout is marked by its mean alone: a third outline would hide the other two.
    """
    most = max(len(result.directions.cosines) for result in directions)
    edges = np.linspace(-1.0, 1.0, 41 if most >= 40 else 21)
    drawn = [(r.directions.cosines, r.directions.control_cosines) for r in directions]
    tallest = max((_shares(values, edges).max() for pair in drawn for values in pair if len(values)), default=1.0)
    for ax, result, (cosines, control), colour in zip(axes, directions, drawn, colours, strict=True):
        _cosine_axes(ax, tallest)
        if len(cosines):
            ax.stairs(_shares(cosines, edges), edges, fill=True, color=colour, alpha=HISTOGRAM_ALPHA)
        else:
            note(ax, _no_prompt_note(result))
        if len(control):
            ax.stairs(_shares(control, edges), edges, color=CONTROL_COLOUR, linewidth=2.0)
        means = ((cosines, colour, colour), (control, CONTROL_COLOUR, CONTROL_COLOUR))
        for values, edge, face in (*means, (result.control_by_rollout_cosines, "black", "none")):
            if len(values):
                place = (np.mean(values), 1.1 * tallest)
                ax.plot(*place, "v", color=edge, markerfacecolor=face, markersize=10, clip_on=False)


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of [n] values in each bin."""
    return np.histogram(values, edges)[0] / len(values)


def _cosine_axes(ax: Axes, tallest: float) -> None:
    ax.axvline(0.0, color="black", linewidth=0.8)
    ax.set_xlim(-1.0, 1.0)
    ax.set_ylim(0.0, 1.18 * tallest)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.yaxis.set_tick_params(labelleft=True)
    ax.set_xlabel("cosine (+1 same direction, 0 orthogonal, −1 opposed)")
    ax.set_ylabel("share of cosines")


def _histogram_legend(figure: Figure, subjects: list[Subject]) -> None:
    handles: list[Any] = [
        Patch(color=colour, alpha=HISTOGRAM_ALPHA, label=f"{subject.label}: correct vs incorrect")
        for subject, colour in zip(subjects, series_colours(subjects), strict=True)
    ]
    token = Line2D([], [], color=CONTROL_COLOUR, linewidth=2.0, label="control: halves of one group's tokens")
    marker = {"color": "black", "marker": "v", "linestyle": "none", "markersize": 8}
    mean = Line2D([], [], **marker, label="mean of the same colour")
    rollout = Line2D([], [], **marker, markerfacecolor="none", label="mean of the control by halves of rollouts")
    n_columns = 2 if len(subjects) > 1 else 1
    figure.legend(handles=[*handles, token, mean, rollout], loc="outside lower center", ncols=n_columns)


def control_band(control: np.ndarray) -> tuple[float, float] | None:
    """The central 95% of [n] half-split cosines; None where there is none."""
    if len(control) == 0:
        return None
    low, high = np.quantile(control, [0.025, 0.975])
    return float(low), float(high)


def _sorted_bars(ax: Axes, result: BucketDirections, colour: str) -> None:
    """Every prompt's cosine in ascending order over the controls' 95% bands; below, how many are outside."""
    cosines = np.sort(result.directions.cosines)
    bands = _control_bands(result)
    if bands[0] is not None:
        ax.axhspan(*bands[0], color=CONTROL_COLOUR, alpha=0.2, linewidth=0)
    for edge in bands[1] or ():
        ax.axhline(edge, color="black", linewidth=1.6, linestyle="--", zorder=3)
    if len(cosines) > MAX_BARS:  # as one shape: thousands of bars would take as many seconds
        ax.stairs(cosines, np.arange(len(cosines) + 1) + 0.5, fill=True, color=colour)
    else:
        ax.bar(np.arange(1, len(cosines) + 1), cosines, 0.86, color=colour)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set_xlabel("usable prompts, sorted by cosine")
    ax.set_ylabel("cos(correct, incorrect)")
    ax.yaxis.set_tick_params(labelleft=True)
    ax.grid(axis="x", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(0.4, max(1, len(cosines)) + 0.6)
    if len(cosines) == 0:
        ax.set_xticks([])
        note(ax, _no_prompt_note(result))
    sizes = (MIN_TOKENS_TO_SPLIT, MIN_ROLLOUTS_OF_EACH_KIND)
    halves = (result.directions.control, result.control_by_rollout)
    lines = [
        _band_sentence(name, unit, size, found, band, cosines)
        for name, unit, size, found, band in zip(
            ("grey", "dashed"), ("tokens", "rollouts"), sizes, halves, bands, strict=True
        )
    ]
    caption(ax, "\n".join(lines))


def _band_sentence(
    name: str,
    unit: str,
    fewest: int,
    halves: tuple[float | None, ...],
    band: tuple[float, float] | None,
    cosines: np.ndarray,
) -> str:
    if band is None:
        why = "mean gradients are zero" if halves else f"no group has {fewest} top-bin {unit}"
        return f"no control by {unit}: {why}"
    n_outside = int(np.sum((cosines < band[0]) | (cosines > band[1])))
    counted = f"; {n_outside} of {len(cosines)} outside" if len(cosines) else ""
    return f"{name}: control by {unit}, {typeset_number(band[0], 2)} to {typeset_number(band[1], 2)}{counted}"


def _control_bands(result: BucketDirections) -> list[tuple[float, float] | None]:
    """Of the control by token and of that by rollout."""
    return [control_band(control) for control in (result.directions.control_cosines, result.control_by_rollout_cosines)]


def _share_sorted_limits(axes: np.ndarray, directions: list[BucketDirections]) -> None:
    """Limits about 0 that hold every bar and band, and are not so narrow that noise looks large."""
    reach = [0.2]
    for result in directions:
        reach.extend(np.abs(result.directions.cosines))
        for band in _control_bands(result):
            reach.extend(np.abs(band or ()))
    limit = min(1.05, 1.1 * max(reach))
    for ax in axes:
        ax.set_ylim(-limit, limit)
