"""Exp 3's figures, in the look of `look`: which tokens carry the update, and what keeping some of them does to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from ..analysis.summaries import Summary
from ..analysis.text import CANT_TELL, estimate, share_estimate
from ..exp3.signal import CLAIMED_SHARE, SEEN
from .by_weight import BY_WEIGHT, draw_by_weight, told_by_weight
from .checkpoints import MIN_OF_TRAJECTORY, Panel, draw_checkpoints, told
from .look import (
    CONTROL_COLOUR,
    MAX_TAG_LENGTH,
    NOTE_COLOUR,
    Subject,
    bucket_axis,
    bucket_places,
    caption,
    grid,
    heading,
    new_figure,
    note,
    panel_title,
    series_colours,
    shortened,
    styled,
    subjects_of,
    text_figure,
    wrapped,
)
from .step import STEP, draw_step

HEADLINE = "exp3_headline.png"
KEEP_TOP = "exp3_keep_top.png"
TRAJECTORY = "exp3_trajectory.png"
TOKENS_COLOUR = "#b3b3b3"
RULE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MAX_BANDS = 2
WIDEST = 1.0
VIEWS = {"signal_share": (-0.5, 1.5), "cosine": (-0.5, 1.3), "noise_scale_ratio": (0.05, 100.0)}
LEAST_VIEWS = {"signal_share": (0.0, 1.0), "cosine": (0.0, 1.0), "noise_scale_ratio": (0.4, 8.0)}
TITLES = {
    "signal_share": "share of the update's signal",
    "cosine": "cosine with the full update",
    "noise_scale_ratio": "prompts needed, over those of all tokens",
}

Numbers = Mapping[str, Any]
"""One tag's part of `exp3_summary.json`."""


def draw_exp3(summary: Summary) -> dict[str, Figure]:
    """The figures of the analysis by file name; the trajectory's where there are checkpoints enough, of one rule."""
    drawn = {STEP: draw_step(summary)} if any("step" in one for one in summary.values()) else {}
    if told := told_by_weight(summary):
        drawn[BY_WEIGHT] = draw_by_weight(told)
    pooled = {tag: one for tag, one in summary.items() if "signal" in one}
    if not pooled:
        return drawn
    subjects, numbers = subjects_of(pooled), list(pooled.values())
    drawn |= {HEADLINE: draw_headline(subjects, numbers), KEEP_TOP: draw_kept(subjects, numbers)}
    if not _are_rules(numbers) and len(subjects) >= MIN_OF_TRAJECTORY:
        drawn[TRAJECTORY] = draw_trajectory(subjects, numbers)
    return drawn


@styled
def draw_headline(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """Per bucket the share of the signal with its interval over the share of the tokens, one axes per subject.

    Without a signal across prompts it is the share within prompts, where that is known.
    """
    n_columns = min(2, len(subjects))
    figure = new_figure(max(9.0, 7.2 * n_columns), 4.6 * -(-len(subjects) // n_columns) + 1.6)
    axes = grid(figure, len(subjects), n_columns)[:, 0]
    low, high = 0.0, 0.3
    for ax, subject, one, colour in zip(axes, subjects, numbers, series_colours(subjects), strict=True):
        buckets, is_seen = list(one["per_bucket"].values()), _is_seen(one)
        within = "" if is_seen else " within prompts"
        found = [bucket["signal_share" + within.replace(" ", "_")] for bucket in buckets]
        if not is_seen and not _is_narrow(found):
            found = []
        said = f"the top {CLAIMED_SHARE:.0%} of the tokens carry {_said_at_claimed(one, 'signal_share')}"
        ax.set_title(f"{panel_title(subject, subjects)}\n{wrapped(said if is_seen else _untold(one))}", loc="left")
        bucket_axis(ax, len(buckets), one["bucket_by"])
        for place, bucket in zip(bucket_places(len(buckets)), buckets, strict=True):
            if bucket["share_of_tokens"] is not None:
                ends, level = [place - 0.42, place + 0.42], [bucket["share_of_tokens"]] * 2
                ax.plot(ends, level, color=TOKENS_COLOUR, linewidth=5, zorder=3, solid_capstyle="butt")
                high = max(high, bucket["share_of_tokens"])
        _draw_shares(ax, found, colour)
        known = [end for one in found for end in (one["ci95"] or ())]
        low, high = min([low, *known]), max([high, *known])
        ax.axhline(0.0, color="black", linewidth=1.0, zorder=1.5)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.yaxis.set_tick_params(labelleft=True)
        ax.set_ylabel(f"share of the signal{within}")
        if not known:
            note(ax, f"no share of the signal{within} can be told")
    view = VIEWS["signal_share"]
    for ax in axes:
        ax.set_ylim(max(low - 0.05, view[0]), min(high + 0.05, view[1]))
    shade = series_colours(subjects)[0] if len(subjects) == 1 else NOTE_COLOUR
    handles: list[Any] = [Patch(color=shade, alpha=0.85, label="share of the signal, with 95% interval")]
    handles.append(Line2D([], [], color=TOKENS_COLOUR, linewidth=5, label="share of the tokens"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(heading(f"Which tokens carry the {_objectives(numbers)} update?", subjects))
    return figure


def _is_narrow(found: Sequence[Numbers]) -> bool:
    """Whether shares are told well enough to be looked at: wider intervals would be a picture of noise."""
    return all(one["ci95"] is None or one["ci95"][1] - one["ci95"][0] < WIDEST for one in found)


def _draw_shares(ax: Axes, found: Sequence[Numbers], colour: str) -> None:
    """Bars with intervals, cut off at the view, beyond which they tell nothing more."""
    for place, one in zip(bucket_places(len(found)), found, strict=True):
        if one["ci95"] is not None:
            ax.bar(place, one["value"], 0.62, color=colour, alpha=0.85, linewidth=0, zorder=2)
            ax.plot([place, place], one["ci95"], color="black", linewidth=1.4, zorder=3.5)


@styled
def draw_kept(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """What keeping some of the tokens does: signal, cosine and noise scale by the share kept, a line per tag or rule.

    The highest tokens are kept; of checkpoints, dashed, also the lowest, and dotted, random ones.
    """
    are_rules = _are_rules(numbers)
    asked = "Which rule should choose the tokens?" if are_rules else "What does keeping only some of the tokens do?"
    names = rule_names(subjects, numbers) if are_rules else [subject.label for subject in subjects]
    untold = [f"{name}: {_untold(one)}" for name, one in zip(names, numbers, strict=True) if not _is_seen(one)]
    told = [one for one in numbers if _is_seen(one)]
    if not told:
        return text_figure(heading(asked, subjects), untold)
    figure = new_figure(17.5, 6.8)
    axes = dict(zip(TITLES, figure.subplots(1, 3), strict=True))
    kept = ("top",) if are_rules else ("top", "bottom")
    for measure, ax in axes.items():
        _share_axes(ax, measure, told, kept)
    colours = _rule_colours(len(numbers)) if are_rules else series_colours(subjects)
    for place, (one, colour) in enumerate(zip(numbers, colours, strict=True)):
        if not _is_seen(one):
            continue
        for measure, ax in axes.items():
            for which in kept:
                band = which == "top" and len(told) <= MAX_BANDS
                draw_curve(ax, one[f"keep_{which}"], measure, colour, "-" if which == "top" else "--", band)
            draw_reading(ax, one["at_20_percent"]["top"][measure], colour, 0.009 * (place - (len(numbers) - 1) / 2))
        if not are_rules:
            draw_curve(axes["noise_scale_ratio"], one["keep_random"], "noise_scale_ratio", colour, ":", band=False)
    for measure, ax in axes.items():
        read = [
            f"{shortened(name, 40)}: {_said_at_claimed(one, measure)}"
            for name, one in zip(names, numbers, strict=True)
            if _is_seen(one)
        ]
        ax.set_title("\n".join([f"{TITLES[measure]}, at {CLAIMED_SHARE:.0%} of the tokens", *read]), loc="left")
    if untold:
        caption(axes["signal_share"], "\n".join(map(wrapped, untold)))
    handles: list[Any] = [
        Line2D([], [], color=colour, marker="o", label=name)
        for name, colour, one in zip(names, colours, numbers, strict=True)
        if _is_seen(one)
    ]
    handles.append(Line2D([], [], color=CONTROL_COLOUR, label="the highest kept, bar: 95% at 20%"))
    if not are_rules:
        handles.append(Line2D([], [], color=CONTROL_COLOUR, linestyle="--", label="the lowest kept"))
    handles.append(Line2D([], [], color=CONTROL_COLOUR, linestyle=":", label="random tokens kept"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.suptitle(heading(asked, subjects))
    return figure


def draw_trajectory(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """The top 20% of the tokens over checkpoints: share of the signal, cosine, and the full update's noise scale."""
    top = [one["at_20_percent"]["top"] for one in numbers]
    name = f"top {CLAIMED_SHARE:.0%} of the tokens"
    shares = [told(**kept["signal_share"]) for kept in top]
    panels = [
        Panel(f"signal in the {name}", shares, is_share=True, lines={CLAIMED_SHARE: "their share of the tokens"}),
        Panel(f"cosine, {name} with all", [told(**kept["cosine"]) for kept in top], lines={1.0: ""}),
        Panel("noise scale, in prompts", [told(**one["noise_scale_prompts"]) for one in numbers], decimals=0),
    ]
    return draw_checkpoints(subjects, f"Does the {_objectives(numbers)} update change in training?", panels)


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
    ax.plot(shares, values, marker=".", linestyle=dash, color=colour, linewidth=2.2 if dash == "-" else 1.3, zorder=3)
    if band:
        ends = [one[measure]["ci95"] or (np.nan, np.nan) for one in kept]
        ax.fill_between(shares, *np.transpose(ends), color=colour, alpha=0.15, linewidth=0, zorder=1)


def draw_reading(ax: Axes, found: Numbers, colour: str, offset: float) -> None:
    """The number at 20% of the tokens with its interval, cut at the view with a mark that it runs on."""
    if found["ci95"] is None:
        return
    place, view = CLAIMED_SHARE + offset, ax.get_ylim()
    shown = np.clip(found["ci95"], *view)
    ax.plot([place, place], shown, color=colour, linewidth=2.6, solid_capstyle="butt", zorder=4)
    for end, inside in zip(found["ci95"], shown, strict=True):
        if end != inside:
            ax.plot(place, inside, "^" if end > inside else "v", color=colour, markersize=8, clip_on=False, zorder=5)
    if view[0] <= found["value"] <= view[1]:
        ax.plot(place, found["value"], "o", color=colour, markersize=9, markeredgecolor="white", zorder=6)


def _share_axes(ax: Axes, measure: str, numbers: Sequence[Numbers], kept: Sequence[str]) -> None:
    """The axes of one measure over the share of the tokens kept, with what random tokens give where that is fixed."""
    ax.set_xlim(0.0, 1.02)
    ax.axvline(CLAIMED_SHARE, color=TOKENS_COLOUR, linewidth=1.0, zorder=0.5)
    ax.set_xticks([0.0, CLAIMED_SHARE, 0.4, 0.6, 0.8, 1.0])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("share of the tokens kept")
    found = [one[measure] for tag in numbers for which in kept for one in tag[f"keep_{which}"]]
    found += [one["at_20_percent"]["top"][measure] for one in numbers]
    reach = [value for one in found for value in (one["value"], *(one["ci95"] or ())) if value is not None]
    least, view = LEAST_VIEWS[measure], VIEWS[measure]
    low, high = max(view[0], min([least[0], *reach])), min(view[1], max([least[1], *reach]))
    if measure == "noise_scale_ratio":
        ax.set_yscale("log")
        ax.set_ylim(low / 1.25, high * 1.25)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.axhline(1.0, color="black", linewidth=1.0, zorder=1.5)
    else:
        ax.set_ylim(low - 0.05, high + 0.08)
        ax.axhline(0.0, color="black", linewidth=0.8, zorder=1.5)
        random = [0.0, 1.0] if measure == "signal_share" else [1.0, 1.0]
        ax.plot([0.0, 1.0], random, color=CONTROL_COLOUR, linestyle=":", linewidth=1.8, zorder=1.5)
    if measure == "signal_share":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _said_at_claimed(one: Numbers, measure: str) -> str:
    """The reading at 20% of the tokens."""
    found = one["at_20_percent"]["top"][measure]
    if found["ci95"] is None:
        return CANT_TELL
    if measure == "signal_share":
        return f"{share_estimate(found)} of the signal"
    return estimate(found)


def _are_rules(numbers: Sequence[Numbers]) -> bool:
    """Whether tags differ in how tokens are chosen, and not in the checkpoint."""
    return len({one["bucket_by"] for one in numbers}) > 1


def _is_seen(one: Numbers) -> bool:
    return one["signal"]["verdict"] == SEEN


def _untold(one: Numbers) -> str:
    return f"{CANT_TELL}: {one['signal']['reason']}"


def _rule_colours(count: int) -> list[str]:
    return [RULE_COLOURS[place % len(RULE_COLOURS)] for place in range(count)]


def _objectives(numbers: Sequence[Numbers]) -> str:
    return " and ".join(sorted({one["objective"] for one in numbers}))
