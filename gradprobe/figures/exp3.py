"""Exp 3's figures, in the look of `look`: where signal and noise sit, and what keeping some of the tokens does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from ..analysis.text import typeset_estimate, typeset_number, typeset_share
from ..exp3.signal import CLAIMED_SHARE, SEEN
from .look import (
    CONTROL_COLOUR,
    MAX_TAG_LENGTH,
    NOTE_COLOUR,
    Subject,
    bucket_ticks,
    caption,
    grid,
    heading,
    name_checkpoints,
    new_figure,
    note,
    panel_title,
    series_colours,
    shortened,
    styled,
)

HEADLINE = "exp3_headline.png"
KEEP_TOP = "exp3_keep_top.png"
TRAJECTORY = "exp3_trajectory.png"
MIN_OF_TRAJECTORY = 3
MAX_ABREAST = 3
TOKENS_COLOUR = "#b3b3b3"
RULE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MEASURES = ("cosine", "noise_scale_ratio", "signal_share")
KEPT_STYLES = {"top": "-", "bottom": "--", "random": ":"}
SHARES_VIEW = (-0.5, 1.5)
COSINE_VIEW = (-0.5, 1.3)
RATIO_VIEW = (0.05, 100.0)

Numbers = Mapping[str, Any]
"""One tag's part of `exp3_summary.json`."""


def draw_analysis(subjects: list[Subject], numbers: Sequence[Numbers]) -> dict[str, Figure]:
    """The figures of the analysis by file name; the trajectory's where there are checkpoints enough, of one rule."""
    rules = {one["bucket_by"] for one in numbers}
    keep = draw_keep if len(rules) == 1 else draw_rules
    drawn = {HEADLINE: draw_headline(subjects, numbers), KEEP_TOP: keep(subjects, numbers)}
    if len(rules) == 1 and len(subjects) >= MIN_OF_TRAJECTORY:
        drawn[TRAJECTORY] = draw_trajectory(subjects, numbers)
    return drawn


@styled
def draw_headline(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """Per bucket the share of tokens, of the signal with its interval and of the noise, one axes per subject."""
    n_columns = min(2, len(subjects))
    n_lines = -(-len(subjects) // n_columns)
    figure = new_figure(max(9.0, 7.2 * n_columns), 4.6 * n_lines + 1.6)
    axes = grid(figure, len(subjects), n_columns)[:, 0]
    limits = _shares_limits(numbers)
    for ax, subject, one, colour in zip(axes, subjects, numbers, series_colours(subjects), strict=True):
        n_cut = _draw_shares(ax, one, colour, limits)
        ax.set_title(f"{panel_title(subject, subjects)}\n{signal_sentence(one)}", loc="left")
        if n_cut:
            caption(ax, f"view cut: {n_cut} of the intervals run on")
    colours = series_colours(subjects)
    shade, whose = (colours[0], "") if len(colours) == 1 else (NOTE_COLOUR, ", in the colour of each")
    handles: list[Any] = [Patch(color=shade, alpha=0.85, label=f"signal with 95% interval{whose}")]
    handles.append(Line2D([], [], color="black", marker="D", linestyle="none", markersize=6, label="noise"))
    handles.append(Line2D([], [], color=TOKENS_COLOUR, linewidth=5, label="tokens"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(heading(f"Where do signal and noise of the {_objectives(numbers)} update sit?", subjects))
    return figure


@styled
def draw_keep(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """Cosine with the full update, noise scale over its own, signal, by the share of tokens kept; a column each."""
    n_columns = min(MAX_ABREAST, len(subjects))
    n_lines = -(-len(subjects) // n_columns)
    figure = new_figure(max(8.5, 6.0 * n_columns), 10.8 * n_lines + 1.4)
    axes = grid(figure, len(subjects), n_columns, rows_each=3)
    for (cosine, ratio, share), subject, one, colour in zip(
        axes, subjects, numbers, series_colours(subjects), strict=True
    ):
        _cosine_axes(cosine, numbers)
        _ratio_axes(ratio, numbers)
        _signal_axes(share, numbers)
        share.set_title(_reading(one, "signal_share", "signal kept", _said_share), loc="left")
        cosine.set_title(f"{panel_title(subject, subjects)}\n{_reading(one, 'cosine', 'cosine')}", loc="left")
        ratio.set_title(_reading(one, "noise_scale_ratio", "noise scale ratio"), loc="left")
        for which, dash in KEPT_STYLES.items():
            shade = colour if which == "top" else CONTROL_COLOUR
            for ax, measure in zip((cosine, ratio, share), MEASURES, strict=True):
                if which == "random" and measure != "noise_scale_ratio":
                    continue  # fixed by construction: the lines at 1 and from 0 to 1
                draw_curve(ax, one[f"keep_{which}"], measure, shade, dash, band=which == "top")
                if which != "random":
                    draw_reading(ax, one["at_20_percent"][which][measure], shade, 0.0 if which == "top" else 0.008)
        if one["signal"]["verdict"] != SEEN:
            for ax in (cosine, ratio, share):
                note(ax, "no signal above 0 at the 95% level:\nunderpowered")
    rule = f"the {{}} {_rule_words(numbers[0])}"
    handles: list[Any] = [
        Line2D([], [], color="black", label=f"{rule.format('highest')} kept, 95% interval"),
        Line2D([], [], color=CONTROL_COLOUR, linestyle="--", label=f"{rule.format('lowest')} kept"),
        Line2D([], [], color=CONTROL_COLOUR, linestyle=":", label="random tokens kept (expected)"),
        Line2D([], [], color="black", marker="o", linewidth=2, label=f"at {CLAIMED_SHARE:.0%} of the tokens"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(heading("What does keeping only some of the tokens do to the update?", subjects))
    return figure


@styled
def draw_rules(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """As `draw_keep`, the highest tokens by several rules in the same axes."""
    figure = new_figure(17.5, 6.8)
    cosine, ratio, share = figure.subplots(1, 3)
    _cosine_axes(cosine, numbers)
    _ratio_axes(ratio, numbers)
    _signal_axes(share, numbers)
    names = rule_names(subjects, numbers)
    for place, one in enumerate(numbers):
        colour = RULE_COLOURS[place % len(RULE_COLOURS)]
        dash = "-" if place < len(RULE_COLOURS) else "--"
        offset = (place - (len(numbers) - 1) / 2) * 0.009
        for ax, measure in zip((cosine, ratio, share), MEASURES, strict=True):
            draw_curve(ax, one["keep_top"], measure, colour, dash, band=False)
            draw_reading(ax, one["at_20_percent"]["top"][measure], colour, offset)
    seen = [one["signal"]["verdict"] == SEEN for one in numbers]
    for ax in (cosine, ratio, share):
        if not any(seen):
            note(ax, "no signal above 0 at the 95% level:\nunderpowered")
    cosine.set_title(f"cosine with the full update\n{_count_read(numbers, 'cosine')}", loc="left")
    ratio.set_title(f"noise scale over that of all tokens\n{_count_read(numbers, 'noise_scale_ratio')}", loc="left")
    share.set_title(f"share of the signal kept\n{_count_read(numbers, 'signal_share')}", loc="left")
    handles = [
        Line2D([], [], color=RULE_COLOURS[place % len(RULE_COLOURS)], marker="o", label=name + _untold(one))
        for place, (name, one) in enumerate(zip(names, numbers, strict=True))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(names) > 4 else 4)
    counts = " and ".join(sorted({f"{one['n_prompts']} prompts" for one in numbers}))
    figure.suptitle(heading(f"{len(numbers)} ways to choose the tokens that are kept ({counts})", subjects))
    return figure


@styled
def draw_trajectory(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """The top 20% of the tokens over checkpoints: share of the signal, cosine, and the full update's noise scale."""
    figure = new_figure(max(15.0, 1.6 * len(subjects) + 6.0), 5.8)
    axes = figure.subplots(1, 3)
    top = [one["at_20_percent"]["top"] for one in numbers]
    colours = series_colours(subjects)
    name = f"top {CLAIMED_SHARE:.0%} of the tokens"
    _points(axes[0], [kept["signal_share"] for kept in top], colours, typeset_share_of)
    axes[0].set_title(f"signal in the {name}", loc="left")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].axhline(CLAIMED_SHARE, color=TOKENS_COLOUR, linewidth=3, zorder=1)
    axes[0].axhline(0.0, color="black", linewidth=1.0, zorder=1)
    _points(axes[1], [kept["cosine"] for kept in top], colours, typeset_value_of)
    axes[1].axhline(1.0, color="black", linewidth=1.0, zorder=1)
    axes[1].set_title(f"cosine, {name} with all", loc="left")
    _points(axes[2], [one["noise_scale_prompts"] for one in numbers], colours, typeset_prompts_of)
    axes[2].set_ylim(bottom=0)
    axes[2].set_ylabel("prompts")
    axes[2].set_title("noise scale of the full update", loc="left")
    name_checkpoints(axes, subjects, "checkpoint, in the order given; 95% intervals")
    line = Line2D([], [], color=TOKENS_COLOUR, linewidth=3, label=f"{CLAIMED_SHARE:.0%}: the share of the tokens")
    figure.legend(handles=[line], loc="outside lower center")
    figure.suptitle(heading(f"{len(subjects)} checkpoints: the {_objectives(numbers)} update", subjects))
    return figure


def signal_sentence(one: Numbers) -> str:
    """Verdict, z, the prompts behind it and the noise scale."""
    signal, prompts = one["signal"], f"{one['n_prompts']} prompts, {one['n_prompts_mixed']} mixed"
    z = "" if signal["z"] is None else f", z = {typeset_number(signal['z'], 1)}"
    scale = typeset_estimate(one["noise_scale_prompts"], 0)
    needs = f"; noise scale {scale} prompts" if one["noise_scale_prompts"]["ci95"] is not None else ""
    return f"signal {signal['verdict']}{z} ({prompts}){needs}"


def rule_names(subjects: Sequence[Subject], numbers: Sequence[Numbers]) -> list[str]:
    """What to call each curve: the rule, with its tag where rules repeat; and which rules look at the token drawn."""
    rules = [one["bucket_by"] for one in numbers]
    names = []
    for subject, one in zip(subjects, numbers, strict=True):
        tag = shortened(subject.tag or "", MAX_TAG_LENGTH)
        name = one["bucket_by"] if rules.count(one["bucket_by"]) == 1 else f"{tag}: {one['bucket_by']}"
        of_it = {True: "", False: " (looks at the token drawn)", None: " (a score of one's own)"}
        names.append(name + of_it[one["is_chosen_by_prefix"]])
    return names


def draw_curve(ax: Axes, kept: Sequence[Numbers], measure: str, colour: str, dash: str, band: bool) -> None:
    """One measure over the share of tokens kept; gaps where there is no number."""
    shares = np.array([np.nan if one["share_of_tokens"] is None else one["share_of_tokens"] for one in kept])
    values = np.array([np.nan if one[measure]["value"] is None else one[measure]["value"] for one in kept])
    style = {"markersize": 3.5, "linewidth": 1.8, "zorder": 3}
    ax.plot(shares, values, marker="." if dash == ":" else "o", linestyle=dash, color=colour, **style)
    if band:
        ends = [one[measure]["ci95"] or (np.nan, np.nan) for one in kept]
        ax.fill_between(shares, *np.transpose(ends), color=colour, alpha=0.15, linewidth=0, zorder=1)


def draw_reading(ax: Axes, found: Numbers, colour: str, offset: float) -> None:
    """The number at 20% of the tokens with its interval, cut at the view with a mark that it runs on."""
    if found["value"] is None or found["ci95"] is None:
        return
    place, view = CLAIMED_SHARE + offset, ax.get_ylim()
    low, high = np.clip(found["ci95"], *view)
    ax.plot([place, place], [low, high], color=colour, linewidth=2.6, solid_capstyle="butt", zorder=4)
    for end, inside in zip(found["ci95"], (low, high), strict=True):
        if end != inside:
            ax.plot(place, inside, "^" if end > inside else "v", color=colour, markersize=8, clip_on=False, zorder=5)
    if view[0] <= found["value"] <= view[1]:
        mark = {"markersize": 9, "markeredgecolor": "white", "zorder": 6}
        ax.plot(place, found["value"], "o", color=colour, **mark)


def typeset_value_of(found: Numbers) -> str:
    """`0.93`."""
    return typeset_number(found["value"], 2)


def typeset_share_of(found: Numbers) -> str:
    """`66%`."""
    return typeset_share(found["value"])


def typeset_prompts_of(found: Numbers) -> str:
    """`158`."""
    return typeset_number(found["value"], 0)


def _draw_shares(ax: Axes, one: Numbers, colour: str, limits: tuple[float, float]) -> int:
    """Bars of signal, lines of tokens, diamonds of noise; how many intervals the view cuts."""
    buckets, n_cut = list(one["per_bucket"].values()), 0
    ax.set_ylim(*limits)
    for place, found in enumerate(buckets):
        signal = found["signal_share"]
        if signal["value"] is not None:
            ax.bar(place, signal["value"], 0.62, color=colour, alpha=0.85, linewidth=0, zorder=2)
        if signal["ci95"] is not None:
            low, high = np.clip(signal["ci95"], *limits)
            n_cut += (low, high) != tuple(signal["ci95"])
            ax.plot([place, place], [low, high], color="black", linewidth=1.4, zorder=3.5)
        if found["share_of_tokens"] is not None:
            share = found["share_of_tokens"]
            ax.plot([place - 0.42, place + 0.42], [share, share], color=TOKENS_COLOUR, linewidth=5, zorder=3,
                    solid_capstyle="butt")  # fmt: skip
        if found["noise_share"] is not None:
            wide = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8, "zorder": 4}
            ax.plot(place + 0.2, found["noise_share"], "D", color="black", **wide)
    ax.axhline(0.0, color="black", linewidth=1.0, zorder=1.5)
    if one["signal"]["verdict"] != SEEN:
        ax.text(0.02, 0.97, "no share of the signal: it is not above 0 at the 95% level", transform=ax.transAxes,
                va="top", color=NOTE_COLOUR)  # fmt: skip
    ax.set_xlim(-0.6, len(buckets) - 0.4)
    ax.set_xticks(bucket_ticks(len(buckets)))
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(f"bucket by {one['bucket_by']} (0 lowest, {len(buckets) - 1} highest)")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.yaxis.set_tick_params(labelleft=True)
    ax.set_ylabel("share of the whole")
    return n_cut


def _shares_limits(numbers: Sequence[Numbers]) -> tuple[float, float]:
    """A view that holds every share, and the intervals that are not too far."""
    reach = [0.0, 0.25]
    for found in (found for one in numbers for found in one["per_bucket"].values()):
        known = (found["signal_share"]["value"], found["noise_share"], found["share_of_tokens"])
        reach += [value for value in known if value is not None]
        reach += list(np.clip(found["signal_share"]["ci95"] or [0.0], *SHARES_VIEW))
    pad = 0.06 * (max(reach) - min(reach))
    return min(reach) - pad, max(reach) + pad


def _cosine_axes(ax: Axes, numbers: Sequence[Numbers]) -> None:
    _share_axis(ax)
    low, high = _reach(numbers, "cosine", COSINE_VIEW)
    ax.set_ylim(min(0.0, low) - 0.05, max(1.0, high) + 0.08)
    ax.axhline(1.0, color="black", linewidth=1.0, zorder=1.5)
    ax.axhline(0.0, color="black", linewidth=0.8, zorder=1.5)
    ax.set_ylabel("cosine with the full update")


def _ratio_axes(ax: Axes, numbers: Sequence[Numbers]) -> None:
    _share_axis(ax)
    ax.set_yscale("log")
    low, high = _reach(numbers, "noise_scale_ratio", RATIO_VIEW)
    ax.set_ylim(min(0.4, low) / 1.25, max(8.0, high) * 1.25)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.axhline(1.0, color="black", linewidth=1.0, zorder=1.5)
    ax.set_ylabel("prompts needed, over those of all tokens")


def _signal_axes(ax: Axes, numbers: Sequence[Numbers]) -> None:
    _share_axis(ax)
    low, high = _reach(numbers, "signal_share", SHARES_VIEW)
    ax.set_ylim(min(0.0, low) - 0.05, max(1.0, high) + 0.05)
    ax.plot([0.0, 1.0], [0.0, 1.0], color=CONTROL_COLOUR, linestyle=":", linewidth=1.8, zorder=1.5)
    ax.axhline(0.0, color="black", linewidth=0.8, zorder=1.5)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylabel("share of the signal kept")


def _reach(numbers: Sequence[Numbers], measure: str, view: tuple[float, float]) -> tuple[float, float]:
    """The least and the most that any curve or any interval at 20% comes to, within `view`."""
    found = [kept[measure] for one in numbers for which in KEPT_STYLES for kept in one[f"keep_{which}"]]
    reach = [one["value"] for one in found if one["value"] is not None]
    reach += [end for one in numbers for kept in one["at_20_percent"].values() for end in kept[measure]["ci95"] or ()]
    low, high = np.clip([min(reach, default=1.0), max(reach, default=1.0)], *view)
    return float(low), float(high)


def _share_axis(ax: Axes) -> None:
    ax.set_xlim(0.0, 1.02)
    ax.axvline(CLAIMED_SHARE, color=TOKENS_COLOUR, linewidth=1.0, zorder=0.5)
    ax.set_xticks([0.0, CLAIMED_SHARE, 0.4, 0.6, 0.8, 1.0])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.yaxis.set_tick_params(labelleft=True)
    ax.set_xlabel("share of the tokens kept")


def _said(found: Numbers) -> str:
    return "can't tell" if found["value"] is None or found["ci95"] is None else typeset_estimate(found)


def _said_share(found: Numbers) -> str:
    return "can't tell" if found["ci95"] is None else typeset_share(found["value"], found["ci95"])


def _reading(one: Numbers, measure: str, name: str, said: Callable[[Numbers], str] = _said) -> str:
    """`cosine at 20%: top 0.93 [0.85, 1.01], bottom can't tell`."""
    parts = [f"{which} {said(one['at_20_percent'][which][measure])}" for which in ("top", "bottom")]
    return f"{name} at {CLAIMED_SHARE:.0%}: {', '.join(parts)}"


def _untold(one: Numbers) -> str:
    is_told = one["at_20_percent"]["top"]["cosine"]["ci95"] is not None
    return "" if is_told else f": can't tell at {CLAIMED_SHARE:.0%}"


def _count_read(numbers: Sequence[Numbers], measure: str) -> str:
    read = [one for one in numbers if one["at_20_percent"]["top"][measure]["ci95"] is not None]
    return f"95% interval at {CLAIMED_SHARE:.0%}: {len(read)} of {len(numbers)} have one"


def _points(ax: Axes, found: Sequence[Numbers], colours: Sequence[str], typeset: Callable[[Numbers], str]) -> None:
    """A dot with its interval for each checkpoint, joined; one without a number says so in its place."""
    values = [np.nan if one["value"] is None else one["value"] for one in found]
    ax.plot(range(len(values)), values, color=NOTE_COLOUR, linewidth=1.0, zorder=1)
    for place, (one, colour) in enumerate(zip(found, colours, strict=True)):
        if one["value"] is None or one["ci95"] is None:
            ax.annotate("can't tell", (place, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="center",
                        va="center", color=colour)  # fmt: skip
            continue
        ax.plot([place, place], one["ci95"], color=colour, linewidth=2.4, zorder=2)
        ax.plot(place, one["value"], "o", color=colour, markersize=9, markeredgecolor="white", zorder=3)
        ax.annotate(typeset(one), (place, one["value"]), (9, 0), textcoords="offset points", va="center", fontsize=10,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip


def _objectives(numbers: Sequence[Numbers]) -> str:
    return " and ".join(sorted({one["objective"] for one in numbers}))


def _rule_words(one: Numbers) -> str:
    return f"tokens by {one['bucket_by']}"
