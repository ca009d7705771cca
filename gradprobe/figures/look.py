"""One look for every figure of the study.

Drawing functions take numbers and return a `matplotlib.figure.Figure`; nothing goes through pyplot's global state.
Every title and label is made from the numbers at hand. Colours are those of Okabe and Ito (2008), which stay apart
for colour-blind readers; base and trained have the same two in every figure, buckets a scale that is also ordered
by lightness, and so have many checkpoints. What can't be drawn (an empty bucket, no usable prompt) leaves its place and
says why.
"""

import functools
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure

from ..analysis.summaries import Summary
from ..common.files import bytes_aside
from ..dump.format import target_name

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
    "pdf.fonttype": 42,  # TrueType: journals refuse matplotlib's Type 3
    "svg.hashsalt": "gradprobe",  # the same names of parts every time
    "axes.unicode_minus": True,
}
SERIES_COLOURS = {"base": "#0072B2", "trained": "#D55E00"}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
CONTROL_COLOUR = "#4d4d4d"
NOTE_COLOUR = "#595959"
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}
"""Of each of `FIGURE_FORMATS`, entries that would change from day to day."""
MAX_NAME_LENGTH = 32
MAX_TAG_LENGTH = 16
MAX_UPRIGHT_NAMES = 4
MAX_NUMBERED_BUCKETS = 12


@dataclass(frozen=True)
class Subject:
    """Whose numbers are drawn.

    Attributes:
        tag: the name given on the command line; None for a single untagged dump.
        model: name or path of the model, or of its adapter.
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


def subjects_of(summary: Summary) -> list[Subject]:
    """What the figures call each tag of a summary."""
    return [Subject(tag, one["model"], target_name(one), one["bins"] - 1) for tag, one in summary.items()]


def shortened(text: str, longest: int = MAX_NAME_LENGTH) -> str:
    """`text` on one line, its middle left out where it is longer than `longest` characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def series_colours(subjects: list[Subject]) -> list[str]:
    """One colour per subject: base and trained their own, others in the order they come; of many, a scale."""
    others = [subject.tag for subject in subjects if subject.tag not in SERIES_COLOURS]
    if len(others) > len(OTHER_COLOURS):
        return list(map(to_hex, matplotlib.colormaps["plasma"](np.linspace(0.0, 0.85, len(subjects)))))
    return [
        SERIES_COLOURS.get(subject.tag or "") or OTHER_COLOURS[others.index(subject.tag) % len(OTHER_COLOURS)]
        for subject in subjects
    ]


def bucket_places(n_buckets: int) -> np.ndarray:
    """[n_buckets] where each stands on the axis: the highest, which every question is about, first and apart."""
    places = np.arange(n_buckets - 1, -1, -1, dtype=float)
    places[:-1] += 0.5
    return places


def bucket_axis(ax: Axes, n_buckets: int, by: str = "entropy") -> None:
    """The x axis of what is drawn per bucket, at `bucket_places`."""
    places, shown = bucket_places(n_buckets), bucket_ticks(n_buckets)
    ends = {n_buckets - 1: "\nhighest"} if n_buckets > 1 else {}
    ax.set_xlim(-0.6, max(places) + 0.6)
    ax.set_xticks(places[shown], [f"{index}{ends.get(index, '')}" for index in shown])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(f"bucket by {by}, 0 the lowest")
    if n_buckets > 1:
        ax.axvline(0.75, color="#d0d0d0", linewidth=0.8, zorder=0.5)


def bucket_colours(n_buckets: int) -> np.ndarray:
    """[n_buckets, 4] colours from dark (lowest entropy) to light; pure yellow is left out, it drowns on white."""
    return matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, n_buckets))


def save(figures: Mapping[str, Figure], directory: Path, formats: Sequence[str] = ("png",)) -> list[str]:
    """Write figures by the name of their PNG, each file whole or not at all; the same figure gives the same bytes.

    Returns:
        The names of the files, those of other `formats` with another suffix.
    """
    written = []
    for file, form in ((directory / name, form) for name in figures for form in formats):
        target = file.with_suffix(f".{form}")
        figure, metadata = figures[file.name], METADATA[form]
        with bytes_aside(target) as stream, matplotlib.rc_context(STYLE):  # tick labels are made when drawn
            if form == "png":  # the same bytes as savefig's, which draws everything twice
                figure.set_dpi(DPI)
                FigureCanvasAgg(figure).print_png(stream, metadata=metadata)
            else:
                figure.savefig(stream, format=form, dpi=DPI, metadata=metadata)
        written.append(target.name)
    return written


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the house style without changing anybody's settings."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def dodge(index: int, count: int) -> float:
    """How far from a bucket's middle the `index`-th of `count` subjects stands."""
    return (index - (count - 1) / 2) * 0.8 / count


def grid(figure: Figure | SubFigure, count: int, n_columns: int, rows_each: int = 1) -> np.ndarray:
    """[count, rows_each] axes, `n_columns` beside each other; those of one subject stand in one column.

    Axes of one line share their y axis; places that are left over stay empty.
    """
    n_lines = -(-count // n_columns)
    axes = figure.subplots(n_lines * rows_each, n_columns, sharey="row", squeeze=False)
    by_line = axes.reshape(n_lines, rows_each, n_columns).transpose(0, 2, 1).reshape(-1, rows_each)
    for unused in by_line[count:].ravel():
        unused.set_axis_off()
    return by_line[:count]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that can be saved."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def text_figure(title: str, lines: Sequence[str]) -> Figure:
    """What can't be told at all: a line each, and no picture of noise."""
    figure = new_figure(9.0, 1.6 + 0.3 * len(lines))
    figure.suptitle(title)
    figure.text(0.5, 0.3, "\n".join(lines), ha="center", va="center", color=NOTE_COLOUR, wrap=True)
    return figure


def panels(count: int, width: float, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """One axes per subject, at most two beside each other, each about `width` × `height` inches."""
    n_columns = min(2, count)
    n_lines = -(-count // n_columns)
    figure = new_figure(max(7.5, width * n_columns), height * n_lines + 1.0)
    axes = figure.subplots(n_lines, n_columns, squeeze=False, sharey=sharey).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])


def heading(question: str, subjects: list[Subject]) -> str:
    """A figure's title: what it asks, and the weight where it is the same for all."""
    targets = sorted({subject.target for subject in subjects})
    return f"{question}\n{shortened(targets[0], 80)}" if len(targets) == 1 else question


def top_bucket_name(subjects: list[Subject]) -> str:
    """What to call the bucket of highest entropy."""
    numbers = {subject.top_bucket for subject in subjects}
    return f"bucket {numbers.pop()} (highest entropy)" if len(numbers) == 1 else "bucket of highest entropy"


def panel_title(subject: Subject, subjects: list[Subject]) -> str:
    """Who it is; and which weight, where that is not the same for all and so not in the heading."""
    if len({other.target for other in subjects}) == 1:
        return subject.label
    return f"{subject.label}\n{shortened(subject.target, 60)}"


def note(ax: Axes, text: str) -> None:
    """Say in the middle of empty axes why they are empty."""
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=NOTE_COLOUR,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 6},
    )  # fmt: skip


def caption(ax: Axes, text: str) -> None:
    """Say below the axes what does not fit into two lines of title."""
    ax.set_xlabel(f"{ax.get_xlabel()}\n{text}" if ax.get_xlabel() else text)


def bucket_ticks(n_buckets: int) -> list[int]:
    """The buckets that get a number on an axis, the highest among them."""
    return list(range(n_buckets - 1, -1, n_buckets // -MAX_NUMBERED_BUCKETS))


def name_checkpoints(axes: Iterable[Axes], subjects: Sequence[Subject], label: str) -> None:
    """Give the horizontal axes the checkpoints' names, slanted where there are many."""
    names = [shortened(subject.tag or subject.label, MAX_TAG_LENGTH) for subject in subjects]
    for ax in axes:
        ax.set_xticks(range(len(names)), names)
        if len(names) > MAX_UPRIGHT_NAMES:
            ax.tick_params(axis="x", labelrotation=35)
            for tick in ax.get_xticklabels():
                tick.set(horizontalalignment="right", rotation_mode="anchor")
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.grid(axis="x", visible=False)
        ax.set_xlabel(label)


def wrapped(text: str, width: int = 68) -> str:
    """The same on lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width))
