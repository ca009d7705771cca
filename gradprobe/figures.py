"""One look for every figure of the study.

Drawing functions take numbers and return a `matplotlib.figure.Figure`; nothing goes through pyplot's global state.
Every title and label is made from the numbers at hand. Colours are those of Okabe and Ito (2008), which stay apart
for colour-blind readers; base and trained have the same two in every figure, buckets a scale that is also ordered
by lightness. What can't be drawn (an empty bucket, no usable prompt) leaves its place and says why.
"""

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from .direction import MIN_TOKENS_OF_EACH_KIND, MIN_TOKENS_TO_SPLIT, Directions
from .spectrum import Projection, Spectrum, cumulative_energy

DPI = 160
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "figure.titlesize": 13,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "text.parse_math": False,  # a model's path may hold a dollar sign
    "axes.unicode_minus": True,
}
SERIES_COLOURS = {"base": "#0072B2", "trained": "#D55E00"}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
CONTROL_COLOUR = "#4d4d4d"
HISTOGRAM_ALPHA = 0.65
NOTE_COLOUR = "#595959"
SHARE_MARKED = 0.95
CENTRAL_SHARE = 0.99
MAX_NAME_LENGTH = 32
MAX_TAG_LENGTH = 16
MAX_NUMBERED_BUCKETS = 12


@dataclass(frozen=True)
class Subject:
    """Whose numbers are drawn.

    Attributes:
        tag: the name given on the command line; None for a single untagged dump.
        model: name or path of the model.
        target: the weight and row, for example `model.layers.14.mlp.down_proj.weight[0]`.
        top_bucket: the number of the bucket of highest entropy.
    """

    tag: str | None
    model: str
    target: str
    top_bucket: int

    @property
    def label(self) -> str:
        """`base · Qwen2.5-1.5B`: the tag and the last component of the model's path, once where they are the same."""
        name = shortened(os.path.basename(self.model.rstrip("/\\")) or self.model)
        return name if self.tag in (None, name) else f"{shortened(self.tag, MAX_TAG_LENGTH)} · {name}"


def shortened(text: str, longest: int = MAX_NAME_LENGTH) -> str:
    """`text` on one line, its middle left out where it is longer than `longest` characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def series_colours(subjects: list[Subject]) -> list[str]:
    """One colour per subject: base and trained their own, others in the order they come."""
    others = [subject.tag for subject in subjects if subject.tag not in SERIES_COLOURS]
    return [
        SERIES_COLOURS.get(subject.tag or "") or OTHER_COLOURS[others.index(subject.tag) % len(OTHER_COLOURS)]
        for subject in subjects
    ]


def bucket_colours(n_buckets: int) -> np.ndarray:
    """[n_buckets, 4] colours from dark (lowest entropy) to light; pure yellow is left out, it drowns on white."""
    return matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, n_buckets))


def save(figure: Figure, file: Path) -> None:
    """Write a PNG, whole or not at all; the same figure gives the same bytes."""
    aside = file.with_name(file.name + ".partial")
    with matplotlib.rc_context(STYLE):  # tick labels are made when drawn
        figure.savefig(aside, format="png", dpi=DPI, metadata={"Software": None})
    os.replace(aside, file)


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the house style without changing anybody's settings."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def draw_cumulative_energy(subjects: list[Subject], spectra: list[list[Spectrum]]) -> Figure:
    """Cumulative energy of every bucket, one axes per subject, the rank that holds 95% marked."""
    figure, axes = _panels(len(subjects), width=6.2, height=4.0)
    for subject, buckets, ax in zip(subjects, spectra, axes, strict=True):
        colours = bucket_colours(len(buckets))
        drawn = [_energy_curve(ax, spectrum, colours[i]) for i, spectrum in enumerate(buckets)]
        _energy_axes(ax, [spectrum for spectrum, is_drawn in zip(buckets, drawn, strict=True) if is_drawn])
        ax.set_title(_panel_title(subject, subjects), loc="left")
        handles = [
            Line2D([], [], color=colour, linewidth=2.5, linestyle="-" if is_drawn else "none", label=label)
            for colour, is_drawn, label in zip(
                colours, drawn, map(_rank_label, range(len(buckets)), buckets), strict=True
            )
        ]
        _legend_beside(ax, handles, _bucket_legend_title(len(buckets)))
    figure.suptitle(_heading("Cumulative gradient energy per entropy bucket", subjects))
    return figure


@_styled
def draw_cross_bucket_cosine(subjects: list[Subject], cosines: list[list[list[float | None]]]) -> Figure:
    """Heatmaps of |cos| between the buckets' top-1 right singular vectors, one axes per subject."""
    n_buckets = max(len(matrix) for matrix in cosines)
    side = max(4.2, 0.62 * n_buckets + 1.6) if n_buckets <= MAX_NUMBERED_BUCKETS else 5.2
    figure, axes = _panels(len(subjects), width=side + 0.4, height=side)
    image = None
    for subject, matrix, ax in zip(subjects, cosines, axes, strict=True):
        image = _heatmap(ax, np.array(matrix, dtype=np.float64))
        ax.set_title(_panel_title(subject, subjects), loc="left")
    figure.colorbar(image, ax=axes, label="|cos| of top-1 right singular vectors", shrink=0.8)
    figure.suptitle(_heading("Do entropy buckets share their leading direction?", subjects))
    return figure


@_styled
def draw_direction_histogram(subjects: list[Subject], directions: list[Directions]) -> Figure:
    """Per-prompt cosines of correct and incorrect mean gradients with the control's, one axes per subject."""
    figure, axes = _panels(len(subjects), width=6.4, height=4.0, sharey=True)
    _draw_cosine_histograms(axes, directions, series_colours(subjects))
    for subject, result, ax in zip(subjects, directions, axes, strict=True):
        ax.set_title(f"{_panel_title(subject, subjects)}\n{_cosine_sentence(result)}", loc="left")
    _histogram_legend(figure, subjects)
    figure.suptitle(_heading(f"Correct against incorrect gradients, {_top_bucket(subjects)}", subjects))
    return figure


@_styled
def draw_compression_headline(
    subjects: list[Subject],
    spectra: list[list[Spectrum]],
    projections: list[Projection],
    buckets_of_rows: list[np.ndarray],
) -> Figure:
    """Exp 1 at a glance: participation ratio and rank95 per bucket above, the gradients' 2-D PCA below.

    Args:
        subjects: two, base first.
        spectra: per subject, per bucket.
        projections: per subject.
        buckets_of_rows: per subject, [m] the bucket of each projected row.
    """
    figure = _figure(12.5, 10.4)
    above, below = figure.subfigures(2, 1, height_ratios=(1.0, 1.2))
    bars, scatters = above.subplots(1, 2), below.subplots(1, 2)
    ratios = [[spectrum.participation_ratio for spectrum in buckets] for buckets in spectra]
    ranks = [[spectrum.rank(SHARE_MARKED) for spectrum in buckets] for buckets in spectra]
    _bucket_bars(bars[0], subjects, spectra, ratios, "participation ratio")
    _bucket_bars(bars[1], subjects, spectra, ranks, "rank95 (directions for 95% of energy)")
    n_buckets = len(spectra[0])
    for subject, projection, buckets, ax in zip(subjects, projections, buckets_of_rows, scatters, strict=True):
        _scatter(ax, projection, buckets, n_buckets)
        ax.set_title(f"{_panel_title(subject, subjects)}\n{ax.get_title(loc='left')}", loc="left")
    of_series = [Patch(color=c, label=s.label) for c, s in zip(series_colours(subjects), subjects, strict=True)]
    above.legend(handles=of_series, loc="outside lower center", ncols=len(of_series))
    of_buckets = [
        Line2D([], [], marker="o", linestyle="none", color=colour, label=_bucket_name(index, n_buckets))
        for index, colour in enumerate(bucket_colours(n_buckets))
    ]
    below.legend(handles=of_buckets, loc="outside lower center", ncols=min(6, n_buckets), handletextpad=0.2)
    figure.suptitle(_heading("How many directions do the gradients span?", subjects))
    return figure


@_styled
def draw_top_bucket_energy(subjects: list[Subject], spectra: list[Spectrum]) -> Figure:
    """Cumulative energy of the highest-entropy bucket, all subjects in one axes, rank95 marked."""
    figure = _figure(8.0, 5.4)
    ax = figure.subplots()
    colours = series_colours(subjects)
    drawn = [_energy_curve(ax, spectrum, colour) for spectrum, colour in zip(spectra, colours, strict=True)]
    _energy_axes(ax, [spectrum for spectrum, is_drawn in zip(spectra, drawn, strict=True) if is_drawn])
    for spectrum, colour, is_drawn in zip(spectra, colours, drawn, strict=True):
        if is_drawn:
            ax.axvline(spectrum.rank(SHARE_MARKED), color=colour, linestyle=":", linewidth=1.2, zorder=1)
    handles = [
        Line2D([], [], color=colour, linewidth=2.5, label=f"{subject.label}: {_spectrum_facts(spectrum)}")
        for subject, spectrum, colour in zip(subjects, spectra, colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=1)
    figure.suptitle(_heading(f"Cumulative gradient energy, {_top_bucket(subjects)}", subjects))
    return figure


@_styled
def draw_direction_headline(subjects: list[Subject], directions: list[Directions]) -> Figure:
    """Exp 2 at a glance: cosine histograms above, the prompts' cosines sorted with the control's band below."""
    figure = _figure(6.4 * len(subjects), 8.4)
    axes = figure.subplots(2, len(subjects), sharey="row", squeeze=False)
    for subject, result, column, colour in zip(subjects, directions, axes.T, series_colours(subjects), strict=True):
        column[0].set_title(f"{_panel_title(subject, subjects)}\n{_cosine_sentence(result)}", loc="left")
        _sorted_bars(column[1], result, colour)
    _draw_cosine_histograms(axes[0], directions, series_colours(subjects))
    _share_sorted_limits(axes[1], directions)
    _histogram_legend(figure, subjects)
    figure.suptitle(_heading(f"Correct against incorrect gradients, {_top_bucket(subjects)}", subjects))
    return figure


@_styled
def draw_replication(subjects: list[Subject], exp1: list[dict[str, Any]], exp2: list[dict[str, Any]]) -> Figure:
    """Each headline number over all probed rows and layers: a dot per target, a line at their mean.

    Args:
        subjects: base and trained.
        exp1: per subject `{measure: {bucket: spread}}`, a spread as `replication.spread_of` gives it.
        exp2: per subject `{measure: spread}`.
    """
    figure = _figure(13.0, 5.2)
    axes = figure.subplots(1, 3)
    colours = series_colours(subjects)
    for ax, measure in zip(axes, ("participation_ratio", "rank95"), strict=False):
        name = measure.replace("_", " ")
        buckets = list(exp1[0][measure])
        for i, (table, colour) in enumerate(zip(exp1, colours, strict=True)):
            for place, bucket in enumerate(buckets):
                _dots(ax, place + (i - 0.5) * 0.4, table[measure][bucket], colour)
        ax.set_xticks(range(len(buckets)), buckets)
        ax.set_ylim(bottom=0)
        ax.set_xlabel(f"entropy bucket (0 lowest, {len(buckets) - 1} highest)")
        ax.set_ylabel(name)
        ax.set_title(f"{name} per bucket", loc="left")
    names = {"mean_cosine": "correct vs incorrect", "control_mean": "control"}
    for i, (table, colour) in enumerate(zip(exp2, colours, strict=True)):
        for place, measure in enumerate(names):
            _dots(axes[2], place + (i - 0.5) * 0.4, table[measure], colour)
    axes[2].axhline(0, color="black", linewidth=1.0, zorder=1)
    axes[2].set_xticks(range(len(names)), names.values())
    axes[2].set_xlim(-0.6, len(names) - 0.4)
    axes[2].set_ylabel("mean cosine over prompts")
    axes[2].set_title(_top_bucket(subjects), loc="left")
    for ax in axes:
        ax.grid(axis="x", visible=False)
    of_series = [
        Line2D([], [], marker="o", linestyle="none", color=colour, label=subject.label)
        for subject, colour in zip(subjects, colours, strict=True)
    ]
    mean = Line2D([], [], color=CONTROL_COLOUR, linewidth=2.5, label="mean over targets")
    figure.legend(handles=[*of_series, mean], loc="outside lower center", ncols=3)
    counts = {len(table["targets"]) for table in (*exp1, *exp2)}
    figure.suptitle(f"Do other rows and layers agree? {' and '.join(map(str, sorted(counts)))} targets of each model")
    return figure


def _dots(ax: Axes, place: float, spread: dict[str, Any], colour: str) -> None:
    """One dot for each number of a spread, fanned out so that they stay apart, and a line at the mean."""
    values = [value for value in spread["values"] if value is not None]
    if not values:
        ax.annotate("no number", (place, 0), rotation=90, ha="center", va="bottom", color=colour, fontsize=9)
        return
    offsets = np.linspace(-0.13, 0.13, len(values)) if len(values) > 1 else [0.0]
    ax.scatter(place + np.asarray(offsets), values, s=16, color=colour, alpha=0.75, linewidths=0, zorder=3)
    ax.plot([place - 0.17, place + 0.17], [spread["mean"]] * 2, color=colour, linewidth=2.5, zorder=2)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(count: int, width: float, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """One axes per subject, at most two beside each other, each about `width` × `height` inches."""
    n_columns = min(2, count)
    n_lines = -(-count // n_columns)
    figure = _figure(max(7.5, width * n_columns), height * n_lines + 1.0)
    axes = figure.subplots(n_lines, n_columns, squeeze=False, sharey=sharey).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])


def _heading(question: str, subjects: list[Subject]) -> str:
    targets = sorted({subject.target for subject in subjects})
    return f"{question}\n{shortened(targets[0], 80)}" if len(targets) == 1 else question


def _top_bucket(subjects: list[Subject]) -> str:
    numbers = {subject.top_bucket for subject in subjects}
    return f"bucket {numbers.pop()} (highest entropy)" if len(numbers) == 1 else "bucket of highest entropy"


def _panel_title(subject: Subject, subjects: list[Subject]) -> str:
    """Who it is; and which weight, where that is not the same for all and so not in the heading."""
    if len({other.target for other in subjects}) == 1:
        return subject.label
    return f"{subject.label}\n{shortened(subject.target, 60)}"


def _note(ax: Axes, text: str) -> None:
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=NOTE_COLOUR,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 6},
    )  # fmt: skip


def _bucket_name(index: int, n_buckets: int) -> str:
    if n_buckets == 1:
        return "bucket 0"
    return f"bucket {index}" + {0: " (lowest entropy)", n_buckets - 1: " (highest)"}.get(index, "")


def _bucket_ticks(n_buckets: int) -> range:
    return range(0, n_buckets, -(-n_buckets // MAX_NUMBERED_BUCKETS))


def _bucket_legend_title(n_buckets: int) -> str:
    return f"entropy bucket\n(0 lowest, {n_buckets - 1} highest)" if n_buckets > 1 else "entropy bucket"


def _spectrum_facts(spectrum: Spectrum) -> str:
    if spectrum.n == 0:
        return "n = 0"
    rank = spectrum.rank(SHARE_MARKED)
    return f"n = {spectrum.n}, " + ("all gradients zero" if rank is None else f"rank95 = {rank}")


def _rank_label(index: int, spectrum: Spectrum) -> str:
    return f"{index}: {_spectrum_facts(spectrum)}"


def _legend_beside(ax: Axes, handles: list[Any], title: str) -> None:
    ax.legend(handles=handles, title=title, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.2)


def _energy_curve(ax: Axes, spectrum: Spectrum, colour: Any) -> bool:
    """Draw one cumulative energy curve with its rank95; False if there is none."""
    cumulative = cumulative_energy(spectrum.energies)
    if cumulative is None:
        return False
    counts = np.arange(1, len(cumulative) + 1)
    rank = spectrum.rank(SHARE_MARKED)
    ax.plot(counts, cumulative, color=colour, linewidth=2.2)
    ax.plot(rank, cumulative[rank - 1], "o", color=colour, markersize=7, markeredgecolor="white", zorder=4)
    return True


def _energy_axes(ax: Axes, spectra: list[Spectrum]) -> None:
    ax.set_ylim(0, 1.03)
    ax.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, SHARE_MARKED])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylabel("share of energy")
    ax.set_xlabel("number of directions (log scale)")
    ax.set_xscale("log")
    longest = max((len(spectrum.energies) for spectrum in spectra), default=1)
    ax.set_xlim(0.9, max(10.0, 1.1 * longest))
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.axhline(SHARE_MARKED, color=NOTE_COLOUR, linestyle="--", linewidth=1)
    if not spectra:
        _note(ax, "no gradient other than zero")


def _heatmap(ax: Axes, matrix: np.ndarray) -> Any:
    """|cos| in cells with its number; buckets without a direction stay grey. Returns the image."""
    colour_map = matplotlib.colormaps["cividis"].with_extremes(bad="#dddddd")
    image = ax.imshow(np.ma.masked_invalid(matrix), cmap=colour_map, vmin=0.0, vmax=1.0)
    count = len(matrix)
    if count <= MAX_NUMBERED_BUCKETS:
        for (i, j), value in np.ndenumerate(matrix):
            missing = not np.isfinite(value)
            text = "–" if missing else f"{value:.2f}"
            dark = missing or value > 0.6
            ax.text(j, i, text, ha="center", va="center", color="black" if dark else "white")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks(_bucket_ticks(count))
    ax.set_yticks(_bucket_ticks(count))
    ax.tick_params(length=0)
    ax.set_xlabel("entropy bucket")
    ax.set_ylabel("entropy bucket")
    return image


def _bucket_bars(
    ax: Axes,
    subjects: list[Subject],
    spectra: list[list[Spectrum]],
    values: list[list[float | int | None]],
    measure: str,
) -> None:
    """Bars of one measure, subjects beside each other in every bucket, with their numbers where those fit."""
    n_buckets = len(values[0])
    width = 0.8 / len(subjects)
    labelled = n_buckets <= 7
    for i, (colour, buckets, series) in enumerate(zip(series_colours(subjects), spectra, values, strict=True)):
        places = np.arange(n_buckets) + (i - (len(subjects) - 1) / 2) * width
        for place, spectrum, value in zip(places, buckets, series, strict=True):
            if value is None:
                why = "n = 0" if spectrum.n == 0 else "all zero"
                ax.annotate(
                    why, (place, 0), (0, 4), textcoords="offset points", rotation=90, ha="center", va="bottom",
                    color=colour, fontsize=9,
                )  # fmt: skip
                continue
            ax.bar(place, value, 0.94 * width, color=colour)
            if labelled:
                ax.annotate(
                    _bar_label(value), (place, value), (0, 2), textcoords="offset points", ha="center", va="bottom",
                    fontsize=9,
                )  # fmt: skip
    highest = max((value for series in values for value in series if value is not None), default=1.0)
    ax.set_ylim(0, 1.12 * highest)
    ax.set_xlim(-0.6, n_buckets - 0.4)
    ax.set_xticks(_bucket_ticks(n_buckets))
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(f"entropy bucket (0 lowest, {n_buckets - 1} highest)")
    ax.set_ylabel(measure)
    ax.set_title(f"{measure.split(' (')[0]} per bucket, {_sizes(spectra)}", loc="left")


def _bar_label(value: float | int) -> str:
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}"


def _sizes(spectra: list[list[Spectrum]]) -> str:
    sizes = [spectrum.n for buckets in spectra for spectrum in buckets]
    low, high = min(sizes), max(sizes)
    return f"n = {low:,} each" if low == high else f"n = {low:,} to {high:,}"


def _scatter(ax: Axes, projection: Projection, buckets: np.ndarray, n_buckets: int) -> None:
    """2-D PCA; the view holds the central 99% along each axis and the title says how many points lie outside."""
    for axis, number in ((ax.xaxis, 0), (ax.yaxis, 1)):
        share = "" if projection.explained is None else f" ({projection.explained[number]:.1%} of variance)"
        axis.set_label_text(f"PC{number + 1}{share}")
    points = projection.coordinates
    sampled = f" of {projection.n_rows:,}, drawn at random" if len(points) < projection.n_rows else ""
    if projection.explained is None:
        _note(ax, "no gradients" if len(points) == 0 else "nothing varies among the gradients")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"2-D PCA, n = {len(points):,}", loc="left")
        return
    limits = [_central_limits(points[:, i]) for i in range(2)]
    inside = np.all([(low <= x) & (x <= high) for (low, high), x in zip(limits, points.T, strict=True)], axis=0)
    # A random order, the same every time: else the bucket drawn last would hide the others.
    order = np.random.default_rng(0).permutation(np.flatnonzero(inside))
    size = float(np.clip(16000 / max(1, len(order)), 9, 36))
    ax.scatter(*points[order].T, s=size, c=bucket_colours(n_buckets)[buckets[order]], alpha=0.7, linewidths=0)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    outside = f", {np.sum(~inside):,} outside the view" if not inside.all() else ""
    ax.set_title(f"2-D PCA, n = {len(points):,}{sampled}{outside}", loc="left")


def _central_limits(values: np.ndarray) -> tuple[float, float]:
    """An interval around the central 99% of `values`, with a margin; all of them if that is about as wide."""
    tail = (1 - CENTRAL_SHARE) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="nearest")
    if values.max() - values.min() < 1.5 * (high - low):
        low, high = values.min(), values.max()
    margin = 0.06 * (high - low) or max(abs(low), 1e-12)
    return float(low - margin), float(high + margin)


def _no_prompt_note(result: Directions) -> str:
    return (
        f"no usable prompt ({len(result.per_prompt)} of {result.n_prompts} prompts have\n"
        f"{MIN_TOKENS_OF_EACH_KIND} top-bin tokens of both kinds)"
        if not result.per_prompt
        else f"no cosine: a mean gradient is zero\nin all {len(result.per_prompt)} usable prompts"
    )


def _signed(value: float) -> str:
    """Two decimals with a proper minus; never minus zero."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _cosine_sentence(result: Directions) -> str:
    cosines, control = result.cosines, result.control_cosines
    mean = f"mean cos = {_signed(np.mean(cosines))} (n = {len(cosines)} prompts)" if len(cosines) else "no mean cos"
    floor = f"control {_signed(np.mean(control))} (n = {len(control)})" if len(control) else "no control"
    return f"{mean}, {floor}"


def _draw_cosine_histograms(axes: Iterable[Axes], directions: list[Directions], colours: list[str]) -> None:
    """Histograms of the same bins and the same height, so that axes can be compared, means marked above them."""
    most = max(len(result.cosines) for result in directions)
    edges = np.linspace(-1.0, 1.0, 41 if most >= 40 else 21)
    drawn = [
        (ax, result, [(result.cosines, colour, False), (result.control_cosines, CONTROL_COLOUR, True)])
        for ax, result, colour in zip(axes, directions, colours, strict=True)
    ]
    shares = [
        np.histogram(values, edges)[0].max() / len(values)
        for *_, series in drawn
        for values, *_ in series
        if len(values)
    ]
    tallest = max(shares, default=1.0)
    for ax, result, series in drawn:
        _cosine_axes(ax, tallest)
        for values, colour, is_control in series:
            if len(values):
                _cosine_histogram(ax, values, edges, colour, is_control)
                ax.plot(np.mean(values), 1.1 * tallest, "v", color=colour, markersize=10, clip_on=False)
        if len(result.cosines) == 0:
            _note(ax, _no_prompt_note(result))


def _cosine_axes(ax: Axes, tallest: float) -> None:
    ax.axvline(0.0, color="black", linewidth=0.8)
    ax.set_xlim(-1.0, 1.0)
    ax.set_ylim(0.0, 1.18 * tallest)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.yaxis.set_tick_params(labelleft=True)
    ax.set_xlabel("cosine (+1 same direction, 0 orthogonal, −1 opposed)")
    ax.set_ylabel("share of cosines")


def _cosine_histogram(ax: Axes, values: np.ndarray, edges: np.ndarray, colour: str, is_control: bool) -> None:
    """Shares of [n] cosines: bars, or for the control an outline that leaves the bars visible."""
    shares = np.histogram(values, edges)[0] / len(values)
    if is_control:
        ax.stairs(shares, edges, color=colour, linewidth=2.0)
    else:
        ax.stairs(shares, edges, fill=True, color=colour, alpha=HISTOGRAM_ALPHA)


def _histogram_legend(figure: Figure, subjects: list[Subject]) -> None:
    handles: list[Any] = [
        Patch(color=colour, alpha=HISTOGRAM_ALPHA, label=f"{subject.label}: correct vs incorrect")
        for subject, colour in zip(subjects, series_colours(subjects), strict=True)
    ]
    handles.append(Line2D([], [], color=CONTROL_COLOUR, linewidth=2.0, label="control: halves of one group"))
    mean = Line2D([], [], color="black", marker="v", linestyle="none", markersize=8, label="mean of the same colour")
    handles.append(mean)
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def control_band(result: Directions) -> tuple[float, float] | None:
    """The central 95% of the half-split control; None where there is none."""
    control = result.control_cosines
    if len(control) == 0:
        return None
    low, high = np.quantile(control, [0.025, 0.975])
    return float(low), float(high)


def _sorted_bars(ax: Axes, result: Directions, colour: str) -> None:
    """Every prompt's cosine in ascending order over the control's 95% band; the title counts those outside it."""
    cosines = np.sort(result.cosines)
    band = control_band(result)
    if band is not None:
        ax.axhspan(*band, color=CONTROL_COLOUR, alpha=0.2, linewidth=0)
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
        _note(ax, _no_prompt_note(result))
    if band is None:
        why = "mean gradients are zero" if result.control else f"no group has {MIN_TOKENS_TO_SPLIT} top-bin tokens"
        ax.set_title(f"no control: {why}", loc="left")
        return
    n_control = len(result.control_cosines)
    described = f"grey: control's central 95%, {_signed(band[0])} to {_signed(band[1])} (n = {n_control})"
    n_outside = int(np.sum((cosines < band[0]) | (cosines > band[1])))
    counted = f"\n{n_outside} of {len(cosines)} prompts outside" if len(cosines) else ""
    ax.set_title(described + counted, loc="left")


def _share_sorted_limits(axes: np.ndarray, directions: list[Directions]) -> None:
    """Limits about 0 that hold every bar and band, and are not so narrow that noise looks large."""
    reach = [0.2]
    for result in directions:
        reach.extend(np.abs(result.cosines))
        reach.extend(np.abs(control_band(result) or ()))
    limit = min(1.05, 1.1 * max(reach))
    for ax in axes:
        ax.set_ylim(-limit, limit)
