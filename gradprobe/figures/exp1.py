"""Exp 1's figures, in the look of `look`: how many directions, shared or not, and whether norms explain it.

All are drawn from `exp1_summary.json`'s dictionary and the arrays beside it. What was found stands in words at the
left, above the axes; what can't be told is grey.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from ..analysis.summaries import Summary
from ..analysis.text import MISSING, estimate, number
from ..exp1.compression import CANT_TELL
from ..exp1.proxies import ALL
from ..exp1.spectrum import cumulative_energy, rank_of_share
from ..exp1.summary import (
    TRUSTED,
    compared,
    group_name,
    ratio_in_words,
    share_of_random,
    span,
    top_bucket,
    verdict_of,
    what_would_tell,
)
from . import look
from .look import Subject

HEADLINE = "exp1_headline.png"
TOP_BUCKET_ENERGY = "exp1_bin4_energy.png"
CUMULATIVE_ENERGY = "exp1_cumulative_energy.png"
CROSS_BUCKET_COSINE = "exp1_cross_bucket_cosine.png"
NORMS = "exp1_norms.png"
SHARE_MARKED = 0.95
CENTRAL_SHARE = 0.99
UNDECIDED_COLOUR = "#a8a8a8"
TICKS, NARROW_TICKS = (1.0, 2.0, 5.0), (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
PLANE = ("points", "point_buckets", "explained")
MAX_SCATTERS = 3
MAX_ANSWERS = 6
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PROXY_MARKS = (("o", "#000000"), ("s", "#009E73"), ("D", "#CC79A7"))

Numbers = Mapping[str, Any]
"""One tag's part of `exp1_summary.json`."""
Arrays = Mapping[str, np.ndarray]
"""As `exp1.measure.Findings.arrays`."""
Answer = tuple[str, Any]
"""A line of text, and the colour of the mark before it; None for a grey line without one."""


def draw_exp1(summary: Summary, arrays: Arrays) -> dict[str, Figure]:
    """The figures of the analysis by file name."""
    subjects, numbers = look.subjects_of(summary), list(summary.values())
    return {
        HEADLINE: draw_headline(subjects, numbers, arrays),
        TOP_BUCKET_ENERGY: draw_top_bucket_energy(subjects, numbers, arrays),
        CUMULATIVE_ENERGY: draw_cumulative_energy(subjects, numbers, arrays),
        CROSS_BUCKET_COSINE: draw_cross_bucket(subjects, numbers),
        NORMS: draw_norms(subjects, numbers),
    }


@look.styled
def draw_headline(subjects: list[Subject], numbers: Sequence[Numbers], arrays: Arrays) -> Figure:
    """Unit-norm participation ratios per bucket, below them further tags over the first, below these the 2-D PCA."""
    is_compared = any(found is not None and found[1] is not None for found in map(compared, numbers))
    heights = [3.0 + 0.22 * len(_few(subjects)), *([2.6 + 0.22 * len(subjects)] if is_compared else []), 3.6]
    figure = look.new_figure(10.0, sum(heights) + 0.8)
    spans, *ratios, below = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_spans(spans.subplots(), subjects, numbers, is_compared)
    for part in ratios:
        _draw_ratios(part.subplots(), subjects, numbers)
    _draw_scatters(below, _few(list(zip(subjects, numbers, strict=True)), MAX_SCATTERS), arrays)
    _ask(figure, "How many directions do the gradients span?", subjects)
    return figure


@look.styled
def draw_cumulative_energy(subjects: list[Subject], numbers: Sequence[Numbers], arrays: Arrays) -> Figure:
    """Cumulative energy of every bucket, one axes per subject."""
    figure, axes = look.panels(len(subjects), width=6.0, height=5.2)
    for subject, one, ax in zip(subjects, numbers, axes, strict=True):
        names = [_bucket_name(index, len(one["per_bucket"])) for index in range(len(one["per_bucket"]))]
        energies = [arrays[f"{subject.tag}.energies{bucket}"] for bucket in one["per_bucket"]]
        curves = list(zip(names, look.bucket_colours(len(names)), energies, strict=True))
        _draw_energies(ax, look.panel_title(subject, subjects), curves[::-1])
    _ask(figure, "How many directions hold 95% of the energy, the squared norms, of a bucket?", subjects)
    return figure


@look.styled
def draw_top_bucket_energy(subjects: list[Subject], numbers: Sequence[Numbers], arrays: Arrays) -> Figure:
    """The same of the bucket of highest entropy, all subjects in one axes."""
    figure = look.new_figure(8.0, 5.4 + 0.22 * len(subjects))
    names = [subject.label for subject in subjects]
    energies = [arrays[f"{s.tag}.energies{top_bucket(one)[0]}"] for s, one in zip(subjects, numbers, strict=True)]
    _draw_energies(figure.subplots(), None, list(zip(names, look.series_colours(subjects), energies, strict=True)))
    _ask(figure, f"How many directions hold 95% of the energy of {look.top_bucket_name(subjects)}?", subjects)
    return figure


@look.styled
def draw_cross_bucket(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """|cos| of buckets' leading directions, a heat map per subject; on the diagonals, halves of a bucket."""
    n_buckets = _n_buckets(numbers)
    side = 0.7 * n_buckets + 1.4 if 4 < n_buckets <= look.MAX_NUMBERED_BUCKETS else 5.2
    figure, axes = look.panels(len(subjects), width=side + 0.8, height=side + 1.0)
    for subject, one, ax in zip(subjects, numbers, axes, strict=True):
        image = _heatmap(ax, one)
        ax.set_title(f"{look.panel_title(subject, subjects)}\n{_repeats_in_words(one)}", loc="left")
    figure.get_layout_engine().set(h_pad=0.1, hspace=0.05)
    figure.colorbar(image, ax=axes, shrink=0.5, aspect=30, label="|cos| of two leading directions")
    handles = [
        Patch(facecolor="none", edgecolor="black", linewidth=1.8, label="between halves of one bucket's prompts, mean"),
        Patch(facecolor="#eeeeee", label="a direction that is not seen to repeat: its |cos| says nothing"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=1)
    _ask(figure, "Do buckets share their leading direction?", subjects)
    return figure


@look.styled
def draw_norms(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """Per subject, how proxies rank rows as their norms do; beside them the norms against surprisal."""
    has_surprisal = any(one["norm_by_surprisal"] for one in numbers)
    count = len(subjects) + has_surprisal
    n_columns = min(3, count)
    figure = look.new_figure(max(8.0, 5.8 * n_columns), 5.2 * -(-count // n_columns) + 0.8)
    axes = figure.subplots(-(-count // n_columns), n_columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    for subject, one, ax in zip(subjects, numbers, axes, strict=False):
        _draw_proxies(ax, one)
        ax.set_title(f"{look.panel_title(subject, subjects)}\n{_proxy_in_words(one)}", loc="left")
    handles = [
        Line2D([], [], marker=marker, linestyle="none", color=colour, label=name)
        for name, (marker, colour) in zip(numbers[0]["proxies"], PROXY_MARKS, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, handletextpad=0.2)
    if has_surprisal:
        _draw_norms_by_surprisal(axes[len(subjects)], subjects, numbers)
    _ask(figure, "Do proxies rank tokens as the length of their gradient does?", subjects)
    return figure


def _ask(figure: Figure, question: str, subjects: list[Subject]) -> None:
    figure.suptitle(look.heading(question, subjects), x=0.01, ha="left")


def _few(found: list[Any], most: int = MAX_ANSWERS) -> list[Any]:
    """At most `most`, the first and the last ones."""
    return found if len(found) <= most else [*found[: most - 1], found[-1]]


def _answer(ax: Axes, title: str | None, answers: list[Answer]) -> None:
    """What was found, in words above the axes, at the left: at most 6 lines."""
    answers = _few(answers)
    handles = [Patch(color="none" if colour is None else colour, label=text) for text, colour in answers]
    legend = ax.legend(
        handles=handles, title=title, alignment="left", loc="lower left", bbox_to_anchor=(0.0, 1.0), borderpad=0.2,
        borderaxespad=0.2, handlelength=0.8, handleheight=0.5, handletextpad=0.5, labelspacing=0.3,
    )  # fmt: skip
    for text, (_, colour) in zip(legend.get_texts(), answers, strict=True):
        text.set_color(look.NOTE_COLOUR if colour is None else "black")


def _bucket_name(index: int, n_buckets: int) -> str:
    return f"bucket {index}" + ({0: ", lowest", n_buckets - 1: ", highest"}.get(index, "") if n_buckets > 1 else "")


def _n_buckets(numbers: Sequence[Numbers]) -> int:
    return max(len(one["per_bucket"]) for one in numbers)


def _placed(subjects: list[Subject], numbers: Sequence[Numbers]) -> Iterator[tuple[float, Any, Numbers]]:
    """Of every bucket of every subject where it stands, the subject's colour, and its numbers."""
    for i, (colour, one) in enumerate(zip(look.series_colours(subjects), numbers, strict=True)):
        places = look.bucket_places(len(one["per_bucket"])) + look.dodge(i, len(subjects))
        yield from ((place, colour, found) for place, found in zip(places, one["per_bucket"].values(), strict=True))


def _draw_spans(ax: Axes, subjects: list[Subject], numbers: Sequence[Numbers], is_compared: bool) -> None:
    """Bars of the unit-norm participation ratio with intervals, subjects beside each other in every bucket."""
    for place, colour, found in _placed(subjects, numbers):
        value, interval = found[TRUSTED], found[f"{TRUSTED}_ci95"]
        if value is None:
            _say_why(ax, place, found["n"], colour)
            continue
        ax.bar(place, value, 0.75 / len(subjects), color=colour)
        if interval is not None:
            ax.plot([place, place], interval, color="black", linewidth=1.4, solid_capstyle="butt", zorder=3)
    answers: list[Answer] = []
    for subject, colour, one in zip(subjects, look.series_colours(subjects), numbers, strict=True):
        _, top = top_bucket(one)
        answers.append((f"{subject.label}: {span(top)}", colour))
        if len(subjects) == 1 and top[TRUSTED] is not None:
            answers.append((f"{share_of_random(one, top)} of what random directions would span", None))
        if not is_compared and compared(one) is not None:
            answers.append((_not_compared(subject, compared(one)), None))
    ax.set_ylim(bottom=0)
    look.bucket_axis(ax, _n_buckets(numbers))
    ax.set_ylabel("participation ratio of\nunit-norm gradients")
    if is_compared:
        ax.set_xlabel("")
    _answer(ax, f"unit-norm PR [95%], {look.top_bucket_name(subjects)}", answers)


def _not_compared(subject: Subject, found: tuple[str, Any, Numbers]) -> str:
    return f"{subject.tag} is not compared with {found[0]}: {found[2]['reason']}"


def _draw_ratios(ax: Axes, subjects: list[Subject], numbers: Sequence[Numbers]) -> None:
    """Further subjects' unit-norm participation ratios over the first's, in colour where the interval is off 1."""
    further = list(zip(subjects, look.series_colours(subjects), map(compared, numbers), strict=True))[1:]
    shown = [(subject, colour, found) for subject, colour, found in further if found[1] is not None]
    answers: list[Answer] = []
    for i, (subject, colour, (first, ratios, _)) in enumerate(shown):
        places = look.bucket_places(len(ratios)) + look.dodge(i, len(shown))
        for place, ratio in zip(places, ratios.values(), strict=True):
            of_ratio = UNDECIDED_COLOUR if verdict_of(ratio) == CANT_TELL else colour
            if ratio is None:
                continue
            ends = ratio["ci95"] or (ratio["ratio"],) * 2
            ax.plot([place, place], ends, color=of_ratio, linewidth=3.0, solid_capstyle="butt")
            ax.plot(place, ratio["ratio"], "o", color=of_ratio, markersize=7)
            if len(shown) == 1 and len(ratios) <= look.MAX_NUMBERED_BUCKETS:
                at, offset = (ends[0], -14) if verdict_of(ratio) == "smaller" else (ends[1], 5)
                text = {"textcoords": "offset points", "ha": "center", "color": look.NOTE_COLOUR, "fontsize": 10}
                ax.annotate(verdict_of(ratio), (place, at), (0, offset), **text)
        *_, ratio = ratios.values()
        is_told = verdict_of(ratio) in ("smaller", "larger")
        answers.append((f"{subject.tag} over {first}: {ratio_in_words(ratio)}", colour if is_told else None))
        if len(shown) == 1 and (told := what_would_tell(ratio)):
            answers.append((told, None))
    answers += [(_not_compared(subject, found), None) for subject, _, found in further if found[1] is None]
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    room = (high / low) ** 0.15  # for words
    ax.set_ylim(min(low, 0.95) / room, max(high, 1.05) * room)
    _log_axis(ax)
    ax.axhline(1.0, color="black", linewidth=1.0, zorder=1)
    look.bucket_axis(ax, _n_buckets(numbers))
    ax.set_ylabel("ratio at equal n")
    _answer(ax, f"ratio of the two at equal n; grey: {CANT_TELL}", answers)


def _draw_scatters(below: SubFigure, shown: Sequence[tuple[Subject, Numbers]], arrays: Arrays) -> None:
    """2-D PCA; the view holds the central 99% along each axis, and the title says how many points lie outside."""
    axes = below.subplots(1, max(2, len(shown)), squeeze=False)[0]
    for unused in axes[len(shown) :]:
        unused.set_axis_off()
    for (subject, one), ax in zip(shown, axes, strict=False):
        points, buckets, explained = (arrays[f"{subject.tag}.{name}"] for name in PLANE)
        n_buckets = len(one["per_bucket"])
        name = look.shortened(subject.tag, look.MAX_TAG_LENGTH)
        ax.set_title(f"{name}: 2-D PCA\n{len(points):,} of {one['n_positions']:,}", loc="left")
        if not explained[0] > 0:
            look.note(ax, "no gradients" if len(points) == 0 else "nothing varies among the gradients")
            ax.set(xticks=[], yticks=[])
            continue
        tail = (1 - CENTRAL_SHARE) / 2
        low, high = np.quantile(points, [tail, 1 - tail], axis=0, method="nearest")
        margin = 0.06 * np.where(high > low, high - low, 1.0)
        is_inside = np.all((low <= points) & (points <= high), axis=1)
        for bucket in reversed(range(n_buckets)):  # those of low buckets are short and lie in the middle: drawn last
            style = {"s": 9, "color": look.bucket_colours(n_buckets)[bucket], "alpha": 0.7, "linewidths": 0}
            ax.scatter(*points[is_inside & (buckets == bucket)].T, **style, rasterized=True)
        (left, bottom), (right, top) = low - margin, high + margin
        ax.set(xlim=(left, right), ylim=(bottom, top))
        ax.set(xlabel=f"PC1 ({explained[0]:.0%} of variance)", ylabel=f"PC2 ({explained[1]:.0%})")
        ax.tick_params(labelsize=8)
        if not is_inside.all():
            ax.set_title(f"{ax.get_title('left')}, {np.sum(~is_inside):,} out of view", loc="left")
    handles = [
        Line2D([], [], marker="o", linestyle="none", color=colour, label=_bucket_name(index, n_buckets))
        for index, colour in reversed(list(enumerate(look.bucket_colours(n_buckets))))
        if index in look.bucket_ticks(n_buckets)
    ]
    below.legend(handles=handles, loc="outside lower left", ncols=5, handletextpad=0.1, columnspacing=1.0)


def _draw_energies(ax: Axes, title: str | None, curves: Sequence[tuple[str, Any, np.ndarray]]) -> None:
    """Cumulative energy, the rank that holds 95% marked. `curves`: name, colour, energies."""
    answers: list[Answer] = []
    for place, (name, colour, energies) in enumerate(curves):
        cumulative, rank = cumulative_energy(energies), rank_of_share(energies, SHARE_MARKED)
        if cumulative is None:
            answers.append((f"{name}: no gradient other than zero", None))
            continue
        line = {"color": colour, "zorder": 3 - place / len(curves)}
        ax.plot(np.arange(1, len(energies) + 1), cumulative, linewidth=1.8, **line)
        ax.plot(rank, cumulative[rank - 1], "o", color=colour, markersize=7, markeredgecolor="white", zorder=4)
        answers.append((f"{name}: {rank:,} of {len(energies):,}", colour))
    _answer(ax, title, answers)
    ax.set(xscale="log", xlim=(0.9, max(10.0, *(1.1 * len(energies) for _, _, energies in curves))), ylim=(0, 1.03))
    ax.set(xlabel="number of directions (log scale)", ylabel="share of energy")
    ax.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, SHARE_MARKED])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.axhline(SHARE_MARKED, color=look.NOTE_COLOUR, linestyle="--", linewidth=1)


def _heatmap(ax: Axes, one: Numbers) -> Any:
    """Cells in the order of `look.bucket_places`; in colour where both directions repeat. Returns the image."""
    values = np.array(one["cross_bucket_top1_cosine"], float)[::-1, ::-1]  # None becomes NaN
    repeats = np.array([repeat == "yes" for repeat in one["cross_bucket_top1_repeats"]])[::-1]
    count = len(values)
    values[range(count), range(count)] = np.array(one["cross_bucket_ceiling"], float)[::-1]
    is_told = repeats[:, None] & repeats & np.isfinite(values)
    for index in range(count):
        ax.add_patch(Rectangle((index - 0.45, index - 0.45), 0.9, 0.9, fill=False, edgecolor="black", linewidth=1.4))
    colour_map = matplotlib.colormaps["cividis"].with_extremes(bad="#eeeeee")
    image = ax.imshow(np.ma.masked_where(~is_told, values), cmap=colour_map, vmin=0.0, vmax=1.0)
    if count <= look.MAX_NUMBERED_BUCKETS:
        for (i, j), value in np.ndenumerate(values):
            colour = look.NOTE_COLOUR if not is_told[i, j] else "black" if value > 0.45 else "white"
            text = f"{value:.2f}" if np.isfinite(value) else MISSING
            ax.text(j, i, text, ha="center", va="center", color=colour)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([count - 1 - index for index in look.bucket_ticks(count)], look.bucket_ticks(count))
        axis.set_tick_params(length=0)
    ax.set_xlabel(f"bucket of entropy, {count - 1} the highest" if count > 1 else "bucket of entropy")
    return image


def _repeats_in_words(one: Numbers) -> str:
    """In which buckets the leading direction comes up in both halves of the prompts, and what |cos| these have."""
    repeats = one["cross_bucket_top1_repeats"]
    seen = [bucket for bucket, repeat in enumerate(repeats) if repeat == "yes"]
    cosines = [one["cross_bucket_top1_cosine"][i][j] for i in seen for j in seen if i < j]
    of_these = f"; |cos| {' to '.join(sorted({number(f(cosines), 2) for f in (min, max)}))}" if cosines else ""
    not_seen = _listed(bucket for bucket in range(len(repeats)) if bucket not in seen)
    return f"repeats between halves: {_listed(seen)}{of_these}\nnot, or can't tell: {not_seen}"


def _listed(buckets: Iterable[int]) -> str:
    """Highest first; their number where they are many."""
    found = sorted(buckets, reverse=True)
    return f"{len(found)} of them" if len(found) > look.MAX_NUMBERED_BUCKETS else ", ".join(map(str, found)) or "none"


def _proxy_in_words(one: Numbers) -> str:
    """The first proxy that is known, over all rows and inside the bucket of highest entropy."""
    name, groups = next((name, groups) for name, groups in one["proxies"].items() if groups is not None)
    said = [(group, estimate(groups[group]["rank_correlation"], 3)) for group in (ALL, str(one["bins"] - 1))]
    return "\n".join(f"{name}, {group_name(group)}: {found}" for group, found in said)


def _draw_proxies(ax: Axes, one: Numbers) -> None:
    """Each proxy's rank correlation with its interval: over all rows at the left, then inside each bucket."""
    n_buckets = one["bins"]
    places = {ALL: -1.5, **{str(bucket): place for bucket, place in enumerate(look.bucket_places(n_buckets))}}
    look.bucket_axis(ax, n_buckets)
    ax.set_xticks([places[ALL], *ax.get_xticks()], ["all rows", *(text.get_text() for text in ax.get_xticklabels())])
    ax.set_xlim(left=-2.1)
    ax.axvline(-0.75, color="#d0d0d0", linewidth=0.8, zorder=0.5)
    for level in (0.0, 1.0):
        ax.axhline(level, color="black", linewidth=1.0, zorder=1)
    for groups, (marker, colour), off in zip(one["proxies"].values(), PROXY_MARKS, (-0.22, 0.0, 0.22), strict=True):
        for group, agreement in (groups or {}).items():
            found, at = agreement["rank_correlation"], places[group] + off
            if found["ci95"] is not None:
                ax.plot([at, at], found["ci95"], color=colour, linewidth=2.0, solid_capstyle="butt")
                ax.plot(at, found["value"], marker, color=colour, markersize=6)
    ax.set_ylim(-1.05, 1.1)
    ax.set_yticks([-1.0, -0.5, 0.0, 0.5, 1.0])
    ax.set_ylabel("rank correlation with the gradient norm, 95%\nreversed: −1, the same order: 1")


def _draw_norms_by_surprisal(ax: Axes, subjects: list[Subject], numbers: Sequence[Numbers]) -> None:
    """Medians and quartiles of the norm over equally many positions each, against their median −log π_t."""
    for colour, one in zip(look.series_colours(subjects), numbers, strict=True):
        groups = one["norm_by_surprisal"] or []
        places = [group["surprisal"] for group in groups]
        low, median, high = np.reshape([group["quartiles"] for group in groups], (-1, 3)).T
        ax.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        ax.plot(places, median, "o-", color=colour, linewidth=2.0, markersize=5)
    series = zip(look.series_colours(subjects), subjects, strict=True)
    ax.legend(handles=[Patch(color=colour, label=subject.label) for colour, subject in series], loc="lower right")
    _log_axis(ax)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="surprisal −log π_t in nats (log scale)", ylabel="gradient norm (log scale)")
    ax.set_title("norms by tenths of surprisal: median and quartiles", loc="left")


def _say_why(ax: Axes, place: float, n: int, colour: str) -> None:
    """Why a bucket of `n` rows has no number."""
    why = "n = 0" if n == 0 else "all zero"
    ax.text(place, 0.03, why, transform=ax.get_xaxis_transform(), rotation=90, ha="center", color=colour, fontsize=9)


def _power_of_ten(value: float, _: int) -> str:
    """Plain numbers near 1, else 10⁻⁶: without mathematical text, which names of models would upset."""
    if value <= 0:  # a tick outside the view
        return ""
    power = round(np.log10(value))
    if -2 <= power <= 4:
        return f"{value:,.0f}" if value >= 100 else f"{value:g}"
    return "10" + str(power).translate(SUPERSCRIPTS)


def _log_axis(ax: Axes) -> None:
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 1000 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=TICKS if high > 8 * low else NARROW_TICKS))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    ax.yaxis.set_minor_formatter(NullFormatter())
