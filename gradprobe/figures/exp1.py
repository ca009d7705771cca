"""Exp 1's figures, in the look of `look`: how many directions, shared or not, and whether norms explain it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from ..analysis.bucket import bucket_of
from ..dump.format import Dump
from ..exp1.compression import Interval, Ratio
from ..exp1.measure import BucketNumbers, Exp1, chance_outside_null, place_in_null
from ..exp1.plane import Projection
from ..exp1.spectrum import Spectrum, cumulative_energy
from ..exp1.summary import OVERLAP_SHOWN
from .inputs import Compression
from .look import (
    MAX_NUMBERED_BUCKETS,
    NOTE_COLOUR,
    Subject,
    bucket_axis,
    bucket_colours,
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
    styled,
    subjects_of,
    top_bucket_name,
)

CUMULATIVE_ENERGY = "exp1_cumulative_energy.png"
CROSS_BUCKET_COSINE = "exp1_cross_bucket_cosine.png"
NORMS = "exp1_norms.png"
SHARE_MARKED = 0.95
CENTRAL_SHARE = 0.99
CROSS_MEASURES = {
    "top1_cosine": "|cos| of top-1 right singular vectors",
    f"overlap/{OVERLAP_SHOWN}": f"overlap of top-{OVERLAP_SHOWN} subspaces",
}
NULL_MARKS = {-1: "▾", 0: "", 1: "▴"}
VERDICT_MARKS = {"smaller": "v", "larger": "^"}
MAX_BUCKETS_IN_WORDS = 7
MAX_HEATMAPS_ABREAST = 4
MAX_SCATTERS_ABREAST = 3
SURPRISAL_GROUPS = 10
LEAST_ZOOM, INSET_SIZE = 5.0, 0.34
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNIT_NORM = "PR of unit-norm rows"
COUNTS_SHOWN = {
    "participation ratio (PR)": ("participation_ratio", "o", "#000000"),
    UNIT_NORM: ("participation_ratio_unit_norm", "s", "#009E73"),
    "ESS, which PR can't exceed": ("ess", "v", "#CC79A7"),
    "PR of isotropic directions, same norms": ("participation_ratio_isotropic", "D", "#E69F00"),
}


@dataclass(frozen=True)
class Norms:
    """What `draw_norms` needs to know of a dump's gradients.

    Attributes:
        bucket: [n] entropy bucket.
        norm: [n] ‖g‖.
        surprisal: [n] −log π_t in nats; None in dumps of the original scripts.
    """

    bucket: np.ndarray
    norm: np.ndarray
    surprisal: np.ndarray | None


def draw_analysis(dumps: Mapping[str, Dump], results: Mapping[str, Exp1]) -> dict[str, Figure]:
    """The figures of the analysis by file name."""
    subjects, found = subjects_of(dumps), list(results.values())
    norms = [
        Norms(dump.bin, np.sqrt(bucket_of(dump).squared_norms), None if dump.logprob is None else -dump.logprob)
        for dump in dumps.values()
    ]
    return {
        CUMULATIVE_ENERGY: draw_cumulative_energy(subjects, [result.spectra for result in found]),
        CROSS_BUCKET_COSINE: draw_cross_bucket(subjects, found),
        NORMS: draw_norms(subjects, found, norms),
    }


@styled
def draw_cumulative_energy(subjects: list[Subject], spectra: list[list[Spectrum]]) -> Figure:
    """Cumulative energy of every bucket, one axes per subject, the rank that holds 95% marked."""
    figure, axes = panels(len(subjects), width=6.2, height=4.0)
    for subject, buckets, ax in zip(subjects, spectra, axes, strict=True):
        colours = bucket_colours(len(buckets))
        drawn = [_energy_curve(ax, spectrum, colours[i]) for i, spectrum in enumerate(buckets)]
        _energy_axes(ax, [spectrum for spectrum, is_drawn in zip(buckets, drawn, strict=True) if is_drawn])
        ax.set_title(panel_title(subject, subjects), loc="left")
        handles = [
            Line2D([], [], color=colour, linewidth=2.5, linestyle="-" if is_drawn else "none", label=label)
            for colour, is_drawn, label in zip(
                colours, drawn, map(_rank_label, range(len(buckets)), buckets), strict=True
            )
        ]
        _legend_beside(ax, handles, _bucket_legend_title(len(buckets)))
    figure.suptitle(heading("Cumulative gradient energy per entropy bucket", subjects))
    return figure


@styled
def draw_cross_bucket(subjects: list[Subject], results: list[Exp1]) -> Figure:
    """Heatmaps between buckets, a row per measure and a column per subject; on the diagonals, halves of a bucket."""
    n_buckets = max(len(result.buckets) for result in results)
    side = max(4.2, 0.7 * n_buckets + 1.4) if n_buckets <= MAX_NUMBERED_BUCKETS else 5.2
    n_columns = min(MAX_HEATMAPS_ABREAST, len(subjects))
    n_lines = -(-len(subjects) // n_columns)
    figure = new_figure(max(7.5, (side + 0.3) * n_columns + 1.0), (2 * side + 2.0) * n_lines + 1.0)
    figure.get_layout_engine().set(h_pad=0.12)  # titles away from the captions above them
    axes = grid(figure, len(subjects), n_columns, rows_each=len(CROSS_MEASURES))
    for place, (measure, label) in enumerate(CROSS_MEASURES.items()):
        for subject, result, ax in zip(subjects, results, axes[:, place], strict=True):
            image = _heatmap(ax, result, measure)
            ax.set_title(f"{panel_title(subject, subjects)}\n{label}", loc="left")
            if measure == "top1_cosine":
                caption(ax, _repeats_in_words(result.top1_repeats()))
    figure.colorbar(image, ax=list(axes.ravel()), shrink=0.5, aspect=30)
    draws = results[0].settings
    handles = [
        Patch(facecolor="none", edgecolor="black", linewidth=1.8, label=(
            f"diagonal: between halves of one bucket's prompts (mean of {draws.ceiling}); halves hold half the\n"
            "gradients, so this is no bound: two buckets, of all prompts each, may come out higher"
        )),
        Line2D([], [], linestyle="none", marker="v", color="black", markersize=5, label=(
            f"below the 95% range of {draws.null} shuffles of bucket labels"
        )),
        Line2D([], [], linestyle="none", marker="^", color="black", markersize=5, label=(
            f"above it (either by chance: about {chance_outside_null(draws.null):.0%})"
        )),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if len(subjects) < 3 else 3)
    figure.suptitle(heading("Do entropy buckets share their leading directions?", subjects))
    return figure


@styled
def draw_compression_headline(
    subjects: list[Subject], found: list[Compression], compared: list[list[Ratio | None]]
) -> Figure:
    """Exp 1 at a glance: participation ratios and rank95 with intervals above, the gradients' 2-D PCA below.

    Args:
        subjects: one or more.
        found: per subject.
        compared: for every subject but the first, per bucket, how it compares with the first.
    """
    n_columns = max(2, min(MAX_SCATTERS_ABREAST, len(subjects)))
    n_lines = -(-len(subjects) // n_columns)
    figure = new_figure(14.0 if n_columns == 2 else 17.0, 4.8 + 5.8 * n_lines)
    above, below = figure.subfigures(2, 1, height_ratios=(4.8, 5.8 * n_lines))
    bars = above.subplots(1, 3)
    buckets = [of_subject.buckets for of_subject in found]
    _bucket_bars(bars[0], subjects, buckets, _ratio_bar, "participation ratio", _sizes(buckets))
    _bucket_bars(bars[1], subjects, buckets, _unit_norm_bar, UNIT_NORM, _sizes(buckets))
    common_n = buckets[0][0].matched_n.n
    _bucket_bars(bars[2], subjects, buckets, _matched_rank_bar, "rank95 at equal n", f"n = {common_n:,}")
    lines = Line2D([], [], color="black", linewidth=1.4, label="95%: over prompts; of rank95, over subsamples")
    of_series = [Patch(color=c, label=s.label) for c, s in zip(series_colours(subjects), subjects, strict=True)]
    verdicts = _show_verdicts(bars[1], subjects, buckets, compared)
    above.legend(handles=[*of_series, lines, *verdicts], loc="outside lower center", ncols=3 if n_columns == 2 else 4)
    _scatters(below, subjects, found, n_lines, n_columns)
    figure.suptitle(heading("How many directions do the gradients span?", subjects))
    return figure


@styled
def draw_top_bucket_energy(subjects: list[Subject], spectra: list[Spectrum]) -> Figure:
    """Cumulative energy of the highest-entropy bucket, all subjects in one axes, rank95 marked."""
    figure = new_figure(8.0, 5.4)
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
    figure.suptitle(heading(f"Cumulative gradient energy, {top_bucket_name(subjects)}", subjects))
    return figure


@styled
def draw_norms(subjects: list[Subject], results: list[Exp1], norms: list[Norms]) -> Figure:
    """Gradient norms per bucket and against surprisal above; below, per subject, PR beside what norms do to it."""
    n_below = min(2, len(subjects))
    n_lines = -(-len(subjects) // n_below)
    figure = new_figure(13.0, 5.2 + 4.6 * n_lines)
    above, below = figure.subfigures(2, 1, height_ratios=(4.6, 4.9 * n_lines))
    with_surprisal = [i for i, of_subject in enumerate(norms) if of_subject.surprisal is not None]
    upper = above.subplots(1, 2 if with_surprisal else 1, squeeze=False)[0]
    _norm_ranges(upper[0], subjects, norms)
    if with_surprisal:
        _norms_by_surprisal(upper[1], subjects, norms, with_surprisal)
    of_series = [Patch(color=c, label=s.label) for c, s in zip(series_colours(subjects), subjects, strict=True)]
    above.legend(
        handles=of_series, loc="outside lower center", ncols=min(3, len(subjects)), handlelength=1.2, columnspacing=1.2
    )
    lower = below.subplots(n_lines, n_below, squeeze=False, sharey=True).ravel()
    for unused in lower[len(subjects) :]:
        unused.set_axis_off()
    for subject, result, ax in zip(subjects, results, lower, strict=False):
        _counts(ax, result.buckets)
        ax.set_title(panel_title(subject, subjects), loc="left")
    handles = [
        Line2D([], [], marker=marker, linestyle="none", color=colour, label=name)
        for name, (_, marker, colour) in COUNTS_SHOWN.items()
    ]
    below.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.2)
    figure.suptitle(heading("Gradient norms: is it direction or size?", subjects))
    return figure


def _scatters(
    below: SubFigure, subjects: list[Subject], found: list[Compression], n_lines: int, n_columns: int
) -> None:
    n_buckets = len(found[0].buckets)
    scatters = below.subplots(n_lines, n_columns, squeeze=False).ravel()
    for unused in scatters[len(subjects) :]:
        unused.set_axis_off()
    for subject, of_subject, ax in zip(subjects, found, scatters, strict=False):
        _scatter(ax, of_subject.projection, of_subject.point_buckets, n_buckets)
        ax.set_title(f"{panel_title(subject, subjects)}\n{ax.get_title(loc='left')}", loc="left")
    of_buckets = [
        Line2D([], [], marker="o", linestyle="none", color=colour, label=_bucket_name(index, n_buckets))
        for index, colour in enumerate(bucket_colours(n_buckets))
    ]
    below.legend(handles=of_buckets, loc="outside lower center", ncols=min(6, n_buckets), handletextpad=0.2)


def _bucket_name(index: int, n_buckets: int) -> str:
    if n_buckets == 1:
        return "bucket 0"
    return f"bucket {index}" + {0: " (lowest entropy)", n_buckets - 1: " (highest)"}.get(index, "")


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
        note(ax, "no gradient other than zero")


def _heatmap(ax: Axes, result: Exp1, measure: str) -> Any:
    """One measure in cells, between halves framed on the diagonal; what has no number is grey. Returns the image."""
    matrix = result.cross[measure].copy()
    count = len(matrix)
    for index, ceiling in enumerate(result.ceilings):
        known = ceiling[measure][np.isfinite(ceiling[measure])]
        matrix[index, index] = known.mean() if len(known) else np.nan
        for colour, width in (("white", 4.0), ("black", 1.6)):  # seen on dark and on light
            corner = (index - 0.45, index - 0.45)
            ax.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=colour, linewidth=width))
    colour_map = matplotlib.colormaps["cividis"].with_extremes(bad="#dddddd")
    image = ax.imshow(np.ma.masked_invalid(matrix), cmap=colour_map, vmin=0.0, vmax=1.0)
    if count <= MAX_NUMBERED_BUCKETS:
        for (i, j), value in np.ndenumerate(matrix):
            missing = not np.isfinite(value)
            mark = "" if i == j else NULL_MARKS[place_in_null(value, result.null[measure][:, i, j])]
            text = "–" if missing else f"{value:.2f}\n{mark}".strip()
            dark = missing or value > 0.6
            ax.text(j, i, text, ha="center", va="center", color="black" if dark else "white", linespacing=0.95)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks(bucket_ticks(count))
    ax.set_yticks(bucket_ticks(count))
    ax.tick_params(length=0)
    ax.set_xlabel("entropy bucket")
    ax.set_ylabel("entropy bucket")
    return image


def _repeats_in_words(repeats: list[str | None]) -> str:
    """In which buckets the leading direction comes up in both halves of the prompts."""
    if len(repeats) > MAX_BUCKETS_IN_WORDS:
        return f"repeats between halves in {repeats.count('yes')} of {len(repeats)} buckets"
    found = {
        verdict: ", ".join(str(index) for index, other in enumerate(repeats) if other == verdict)
        for verdict in ("yes", "no", "can't tell")
    }
    known = "; ".join(f"{verdict}: {buckets}" for verdict, buckets in found.items() if buckets)
    return f"repeats between halves of a bucket?\n{known or 'no number'}"


def _ratio_bar(numbers: BucketNumbers) -> tuple[float | None, Interval | None]:
    return numbers.participation_ratio, numbers.participation_ratio_ci95


def _unit_norm_bar(numbers: BucketNumbers) -> tuple[float | None, Interval | None]:
    return numbers.participation_ratio_unit_norm, numbers.participation_ratio_unit_norm_ci95


def _matched_rank_bar(numbers: BucketNumbers) -> tuple[float | None, Interval | None]:
    rank = numbers.matched_n.rank95
    return (None, None) if rank is None else (rank.mean, rank.ci95)


def _bucket_bars(
    ax: Axes, subjects: list[Subject], buckets: list[list[BucketNumbers]], bar: Any, measure: str, sizes: str
) -> None:
    """Bars of one measure with intervals, subjects beside each other in every bucket."""
    n_buckets = len(buckets[0])
    width = 0.8 / len(subjects)
    for i, (colour, of_subject) in enumerate(zip(series_colours(subjects), buckets, strict=True)):
        for index, numbers in enumerate(of_subject):
            place = index + dodge(i, len(subjects))
            value, interval = bar(numbers)
            if value is None:
                _say_why(ax, place, numbers.n, colour)
                continue
            ax.bar(place, value, 0.94 * width, color=colour)
            if interval is not None:
                ax.plot([place, place], interval, color="black", linewidth=1.4, solid_capstyle="butt", zorder=3)
    if not any(bar(numbers)[0] is not None for of_subject in buckets for numbers in of_subject):
        ax.set_ylim(0, 1)
    ax.set_ylim(bottom=0)
    bucket_axis(ax, n_buckets)
    ax.set_ylabel(measure)
    ax.set_title(f"{measure}, {sizes}", loc="left")


def _show_verdicts(
    ax: Axes, subjects: list[Subject], buckets: list[list[BucketNumbers]], compared: list[list[Ratio | None]]
) -> list[Line2D]:
    """What each further subject is against the first: in words for one of them, else as marks above the bars.

    Returns:
        the legend's entries for the marks.
    """
    first = subjects[0].tag or subjects[0].label
    if len(compared) == 1:
        if len(compared[0]) <= MAX_BUCKETS_IN_WORDS:
            words = ["no number" if ratio is None else ratio.verdict for ratio in compared[0]]
            ax.set_xticks(range(len(words)), [f"{i}\n{word.replace(' ', chr(10))}" for i, word in enumerate(words)])
            name = subjects[1].tag or subjects[1].label
            ax.set_xlabel(f"entropy bucket, and what {name} is against {first} at equal n")
        return []
    height = 0.03 * ax.get_ylim()[1]
    for i, ratios in enumerate(compared, 1):
        for index, ratio in enumerate(ratios):
            marker = None if ratio is None else VERDICT_MARKS.get(ratio.verdict)
            if marker is not None:
                value, interval = _unit_norm_bar(buckets[i][index])
                top = max([value, *(interval or ())])
                ax.plot(index + dodge(i, len(subjects)), top + height, marker, color="black", markersize=5)
    return [
        Line2D([], [], linestyle="none", marker=marker, color="black", markersize=5, label=f"{verdict} than {first}")
        for verdict, marker in VERDICT_MARKS.items()
        if compared
    ]


def _sizes(buckets: list[list[BucketNumbers]]) -> str:
    sizes = [numbers.n for of_subject in buckets for numbers in of_subject]
    low, high = min(sizes), max(sizes)
    return f"n = {low:,} each" if low == high else f"n = {low:,} to {high:,}"


def _norm_ranges(ax: Axes, subjects: list[Subject], norms: list[Norms]) -> None:
    """Per bucket and subject: median, quartiles and central 95% of the norms that are not 0, the largest above."""
    n_buckets = max(subject.top_bucket for subject in subjects) + 1
    thickness = 8 if len(subjects) <= 3 else 24 / len(subjects)
    for i, (colour, of_subject) in enumerate(zip(series_colours(subjects), norms, strict=True)):
        for index in range(n_buckets):
            found = of_subject.norm[(of_subject.bucket == index) & (of_subject.norm > 0)]
            place = index + dodge(i, len(subjects))
            if len(found) == 0:
                _say_why(ax, place, int(np.sum(of_subject.bucket == index)), colour)
                continue
            low, lower, median, upper, high = np.quantile(found, [0.025, 0.25, 0.5, 0.75, 0.975])
            ax.plot([place, place], [low, high], color=colour, linewidth=1.6, solid_capstyle="butt")
            ax.plot([place, place], [lower, upper], color=colour, linewidth=thickness, solid_capstyle="butt")
            ax.plot(place, median, "o", color="white", markeredgecolor=colour, markersize=0.75 * thickness)
            ax.plot(place, found.max(), "_", color=colour, markersize=thickness + 1, markeredgewidth=1.8)
    _log_axis(ax, any((of_subject.norm > 0).any() for of_subject in norms))
    bucket_axis(ax, n_buckets)
    ax.set_ylabel("gradient norm (log scale)")
    ax.set_title("median, quartiles, central 95%, largest", loc="left")


def _norms_by_surprisal(ax: Axes, subjects: list[Subject], norms: list[Norms], shown: list[int]) -> None:
    """Medians and quartiles of the norm over equally many positions each, against their median −log π_t."""
    colours = series_colours(subjects)
    drawn = False
    for i in shown:
        usable = (norms[i].norm > 0) & (norms[i].surprisal > 0)
        norm, surprisal = norms[i].norm[usable], norms[i].surprisal[usable]
        groups = [group for group in np.array_split(np.argsort(surprisal), SURPRISAL_GROUPS) if len(group)]
        if not groups:
            continue
        drawn = True
        places = [np.median(surprisal[group]) for group in groups]
        low, median, high = np.transpose([np.quantile(norm[group], [0.25, 0.5, 0.75]) for group in groups])
        ax.fill_between(places, low, high, color=colours[i], alpha=0.18, linewidth=0)
        ax.plot(places, median, "o-", color=colours[i], linewidth=2.0, markersize=5)
    _log_axis(ax, drawn)
    if drawn:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("surprisal −log π_t in nats (log scale)")
    ax.set_ylabel("gradient norm (log scale)")
    only = "" if len(shown) == len(subjects) else f", {', '.join(subjects[i].label for i in shown)} only"
    ax.set_title(f"median and quartiles by tenths of surprisal{only}", loc="left")


def _counts(ax: Axes, buckets: list[BucketNumbers]) -> None:
    """Per bucket PR, unit-norm PR, ESS and isotropic PR, with intervals, on one log axis."""
    offsets = np.linspace(-0.27, 0.27, len(COUNTS_SHOWN))
    for offset, (measure, marker, colour) in zip(offsets, COUNTS_SHOWN.values(), strict=True):
        for index, numbers in enumerate(buckets):
            value = getattr(numbers, measure)
            if value is None:
                continue
            interval = getattr(numbers, f"{measure}_ci95", None)
            if interval is not None:
                ax.plot([index + offset] * 2, interval, color=colour, linewidth=2.0, solid_capstyle="butt")
            ax.plot(index + offset, value, marker, color=colour, markersize=7)
    _log_axis(ax, any(numbers.participation_ratio is not None for numbers in buckets))
    for index, numbers in enumerate(buckets):
        if numbers.participation_ratio is None and len(buckets) <= MAX_NUMBERED_BUCKETS:
            _say_why(ax, index, numbers.n, NOTE_COLOUR)
    bucket_axis(ax, len(buckets))
    ax.set_ylabel("count (log scale), with 95% interval")


def _say_why(ax: Axes, place: float, n: int, colour: str) -> None:
    """Why a bucket of `n` rows has no number."""
    ax.text(
        place, 0.03, "n = 0" if n == 0 else "all zero", transform=ax.get_xaxis_transform(), rotation=90, ha="center",
        va="bottom", color=colour, fontsize=9,
    )  # fmt: skip


def _power_of_ten(value: float, _: int) -> str:
    """Plain numbers near 1, else 10⁻⁶: without mathematical text, which names of models would upset."""
    if value <= 0:  # a tick outside the view
        return ""
    power = round(np.log10(value))
    if -2 <= power <= 4:
        return f"{value:,.0f}" if value >= 100 else f"{value:g}"
    return "10" + str(power).translate(SUPERSCRIPTS)


def _log_axis(ax: Axes, has_numbers: bool) -> None:
    if not has_numbers:
        note(ax, "no gradient other than zero")
        ax.tick_params(axis="y", which="both", left=False, labelleft=False)  # ticks themselves may be shared
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 8 * low:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    elif high < 1000 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _scatter(ax: Axes, projection: Projection, buckets: np.ndarray, n_buckets: int) -> None:
    """2-D PCA; the view holds the central 99% along each axis and the title says how many points lie outside."""
    for axis, component in ((ax.xaxis, 0), (ax.yaxis, 1)):
        share = "" if projection.explained is None else f" ({projection.explained[component]:.1%} of variance)"
        axis.set_label_text(f"PC{component + 1}{share}")
    points = projection.coordinates
    is_sampled = len(points) < projection.n_rows
    number = f"{len(points):,} of {projection.n_rows:,} at random" if is_sampled else f"n = {len(points):,}"
    if projection.explained is None:
        note(ax, "no gradients" if len(points) == 0 else "nothing varies among the gradients")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"2-D PCA, {number}", loc="left")
        return
    limits = [_central_limits(points[:, i]) for i in range(2)]
    inside = np.all([(low <= x) & (x <= high) for (low, high), x in zip(limits, points.T, strict=True)], axis=0)
    # Gradients of low buckets are short and lie in the middle: drawn last, and smaller the lower, none hides another.
    size = float(np.clip(16000 / max(1, inside.sum()), 12, 36))
    _points_by_bucket(ax, points[inside], buckets[inside], n_buckets, size)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    _low_buckets_closer(ax, points, buckets, n_buckets, size)
    outside = f", {np.sum(~inside):,} out of view" if not inside.all() else ""
    ax.set_title(f"2-D PCA, {number}{outside}", loc="left")


def _points_by_bucket(ax: Axes, points: np.ndarray, buckets: np.ndarray, n_buckets: int, size: float) -> None:
    for bucket in reversed(range(n_buckets)):
        height = bucket / max(1, n_buckets - 1)
        ax.scatter(
            *points[buckets == bucket].T, s=size * (0.5 + 2.5 * height), color=bucket_colours(n_buckets)[bucket],
            alpha=0.9 - 0.45 * height, linewidths=0, zorder=3 - height, rasterized=True,
        )  # fmt: skip


def _low_buckets_closer(ax: Axes, points: np.ndarray, buckets: np.ndarray, n_buckets: int, size: float) -> None:
    """The lower half of the buckets in a corner of its own where they are a dot in the view, in the emptiest one."""
    low = points[buckets < n_buckets // 2]
    if len(low) == 0:
        return
    limits = [_central_limits(low[:, i]) for i in range(2)]
    views = (ax.get_xlim(), ax.get_ylim())
    zoom = min((view[1] - view[0]) / (end - start) for (start, end), view in zip(limits, views, strict=True))
    if zoom < LEAST_ZOOM:
        return
    places = [(points[:, i] - view[0]) / (view[1] - view[0]) for i, view in enumerate(views)]
    corners = [(x, y) for x in (0.02, 0.98 - INSET_SIZE) for y in (0.98 - INSET_SIZE, 0.02)]
    inside = [[(start <= p) & (p <= start + INSET_SIZE) for start, p in zip(c, places, strict=True)] for c in corners]
    corner = min(zip(corners, inside, strict=True), key=lambda pair: np.sum(pair[1][0] & pair[1][1]))[0]
    inset = ax.inset_axes((*corner, INSET_SIZE, INSET_SIZE), zorder=5)
    _points_by_bucket(inset, points, buckets, n_buckets, size)
    inset.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
    inset.spines[:].set_visible(True)
    times = f"{float(f'{zoom:.2g}'):,.0f}×"
    inset.text(
        0.5, 0.98, f"the middle, about {times} closer", transform=inset.transAxes, ha="center", va="top", fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.8}, zorder=6,
    )  # fmt: skip


def _central_limits(values: np.ndarray) -> tuple[float, float]:
    """An interval around the central 99% of `values`, with a margin; all of them if that is about as wide."""
    tail = (1 - CENTRAL_SHARE) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="nearest")
    if values.max() - values.min() < 1.5 * (high - low):
        low, high = values.min(), values.max()
    margin = 0.06 * (high - low) or max(abs(low), 1e-12)
    return float(low - margin), float(high + margin)
