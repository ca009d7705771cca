"""Exp 2's figures, in the look of `look`: do updates cancel, what do they share, what are the prompts' cosines?

Each has its answers in words at the left, a paragraph per tag, and what they rest on beside them. Only what is told is
drawn, in the tag's colour; what is not is grey text that says why and what would tell.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..analysis.summaries import Summary
from ..analysis.text import CANT_TELL, counted, number, share, with_interval
from ..exp2.coupling import SAME_UNCERTAIN
from ..exp2.direction import (
    ADD_UP,
    ALIGNED,
    CANCEL,
    LEVEL,
    MIN_TOKENS_OF_EACH_KIND,
    OPPOSED,
    ORTHOGONAL,
    ORTHOGONAL_WITHIN,
    UNSAMPLED,
)
from ..exp2.summary import named_buckets
from .look import (
    CONTROL_COLOUR,
    NOTE_COLOUR,
    Subject,
    bucket_axis,
    bucket_places,
    dodge,
    heading,
    new_figure,
    panel_title,
    series_colours,
    styled,
    subjects_of,
    top_bucket_name,
)

HEADLINE = "exp2_headline.png"
ALIGNMENT = "exp2_alignment.png"
HISTOGRAM = "exp2_direction_cosine_hist.png"
TOLD = (ADD_UP, CANCEL, ALIGNED, OPPOSED, ORTHOGONAL)
WIDTH, WIDTH_RATIOS = 11.0, (1.0, 2.0)
LINE_HEIGHT, TITLE_HEIGHT = 0.19, 0.8
CHARS_PER_INCH = 15.5
"""Of grey text, 9 points high."""
ORTHOGONAL_COLOUR, CHANCE_COLOUR = "#eaf3ea", "#cfcfcf"
FURTHEST_END, LEAST_VIEW = 1.5, 1.1
N_BINS = 20

Numbers = Mapping[str, Any]
"""One tag's part of `exp2_summary.json`."""


def draw_exp2(summary: Summary) -> dict[str, Figure]:
    """The figures of the analysis by file name."""
    subjects, numbers = subjects_of(summary), list(summary.values())
    return {
        HEADLINE: draw_headline(subjects, numbers),
        ALIGNMENT: draw_alignment(subjects, numbers),
        HISTOGRAM: draw_histogram(subjects, numbers),
    }


@styled
def draw_headline(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """C against chance in the bucket of highest entropy, under it ρ against what theory fixes: a line per tag.

    And where it is known, how much of the coupling there is in the same token, of which the model was uncertain.
    """
    asked = f"Would updates of correct and\nincorrect rollouts cancel?\n{top_bucket_name(subjects)}"
    has_coupling = any(one["coupling"] for one in numbers)
    figure, axes = _with_answers(asked, subjects, 2 + has_coupling, 5 * len(subjects))
    colours = series_colours(subjects)
    if has_coupling:
        _draw_coupling(*axes[2], subjects, numbers)
    for (answers, ax), measure, said in zip(axes[:2], ("cancellation", "alignment"), (_c_said, _rho_said), strict=True):
        found = [one[measure] for one in numbers]
        ax.set_yticks([])
        ax.grid(axis="y", visible=False)
        for place, (subject, one, colour) in enumerate(zip(subjects, numbers, colours, strict=True)):
            told = is_told(one[measure])
            _answer(answers, place, panel_title(subject, subjects), said(one), colour, told)
            if not told:
                _say(ax, place, one[measure]["reason"])
            elif measure == "cancellation":
                _draw_c(ax, place, one[measure], colour)
            else:
                draw_rho(ax, place, one[measure], colour, "x")
        for of_row in (answers, ax):
            of_row.set_ylim(len(subjects) - 0.5, -0.5)
        if not any(map(is_told, found)):
            ax.set_axis_off()
        elif measure == "cancellation":
            ax.set_xlabel("they cancel  ←  C  →  they add up\ngrey: 95% of C with advantages dealt out at random")
        else:
            draw_reference(ax, [one["reference"] for one in numbers], "x")
            ax.set_xlim(-rho_limit(found), rho_limit(found))
            ax.set_xlabel("opposed  ←  ρ, the cosine with noise removed, 95% interval  →  aligned")
    return figure


def _draw_c(ax: Axes, place: float, found: Numbers, colour: str) -> None:
    low, high = found["null_ci95"]
    ax.plot([low, high], [place, place], color=CHANCE_COLOUR, linewidth=22, solid_capstyle="butt", zorder=2)
    ax.plot(found["ratio"], place, "o", color=colour, markersize=13, zorder=4)


def _draw_coupling(answers: Axes, ax: Axes, subjects: list[Subject], numbers: Sequence[Numbers]) -> None:
    """The share of coupling in the same uncertain token, over what ids dealt anew give and the share of pairs."""
    ax.set_axis_off()
    for place, (subject, one, colour) in enumerate(zip(subjects, numbers, series_colours(subjects), strict=True)):
        found, said = (one["coupling"] or {}).get(SAME_UNCERTAIN), ["shared tokens: can't tell", "no interval"]
        is_said = bool(found and found["share_of_coupling"]["ci95"])
        if found and is_said:
            ax.set_axis_on()
            (value, bounds), of_pairs, null = (
                found["share_of_coupling"].values(),
                found["share_of_pairs"],
                found["null"],
            )
            said = [f"same token: {share(value, None, 1)} of coupling", f"{share(of_pairs, None, 1)} of pairs"]
            if null:
                said[1] += f", ids dealt anew {share(null['mean'], None, 1)}"
                ax.plot(null["ci95"], 2 * [place], color=CHANCE_COLOUR, linewidth=22, solid_capstyle="butt")
            ax.plot(of_pairs, place, "|", color="black", markersize=22, markeredgewidth=1.6)
            ax.plot(bounds, 2 * [place], color=colour, linewidth=2.6, solid_capstyle="butt")
            ax.plot(value, place, "o", color=colour, markersize=11)
        _answer(answers, place, panel_title(subject, subjects), said, colour, is_said)
    for of_row in (answers, ax):
        of_row.set_ylim(len(subjects) - 0.5, -0.5)
    ax.set_yticks([])
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("share of coupling in pairs of the same token, uncertain in both rollouts, 95% interval\n"
                  "upright line: their share of pairs; grey: 95% with ids dealt anew")  # fmt: skip


@styled
def draw_alignment(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """ρ with its interval in the buckets where it is told, and a line per tag about the others."""
    asked = "Do correct and incorrect rollouts\nshare a direction?"
    found = [[bucket["alignment"] for bucket in one["by_bucket"].values()] for one in numbers]
    lines = [f"{panel_title(s, subjects)}: {_untold(one)}" for s, one in zip(subjects, found, strict=True)]
    told = [one for of_tag in found for one in of_tag if is_told(one)]
    figure, axes = _with_answers(asked, subjects, 1, max(20 if told else 5, 5 * len(subjects)))
    answers, ax = axes[0]
    ax.set_visible(bool(told))
    answers.set_ylim(len(subjects) - 0.5, -0.5)
    bucket_axis(ax, max(map(len, found)), numbers[0]["bucket_by"])
    draw_reference(ax, [one["reference"] for one in numbers], "y")
    limit = rho_limit(told)
    for i, (subject, one, of_tag) in enumerate(zip(subjects, numbers, found, strict=True)):
        colour = series_colours(subjects)[i]
        _answer(answers, i, panel_title(subject, subjects), _rho_said(one), colour, is_told(of_tag[-1]))
        for place, result in zip(bucket_places(len(of_tag)), of_tag, strict=True):
            draw_rho(ax, place + 0.6 * dodge(i, len(subjects)), result, colour, "y")
    ax.set_ylim(-limit, limit)
    ax.set_ylabel("ρ, with 95% interval")
    if any(abs(end) > limit for one in told for end in one["ci95"]):
        lines.append(f"Intervals that reach the edge run on beyond ±{number(limit, 1)}.")
    text = "\n".join(line for one in lines for line in textwrap.wrap(one, int(WIDTH * CHARS_PER_INCH * 0.97)))
    figure.supxlabel(text, x=0.005, ha="left", color=NOTE_COLOUR, fontsize=9)
    return figure


@styled
def draw_histogram(subjects: list[Subject], numbers: Sequence[Numbers]) -> Figure:
    """The prompts' cosines in the bucket of highest entropy over the bands of both controls, a panel per tag."""
    asked = f"Do correct and incorrect gradients\npoint the same way?\n{top_bucket_name(subjects)}"
    figure, axes = _with_answers(asked, subjects, len(subjects), 9)
    edges = np.linspace(-1.0, 1.0, N_BINS + 1)
    for (answers, ax), subject, one, colour in zip(axes, subjects, numbers, series_colours(subjects), strict=True):
        found = [prompt["cos_correct_vs_incorrect"] for prompt in one["per_prompt"]]
        cosines = [cosine for cosine in found if cosine is not None]
        _answer(answers, 0.0, panel_title(subject, subjects), _cosines_said(one), colour, len(cosines) > 0)
        answers.set_ylim(0.5, -0.5)
        if not cosines:
            ax.set_axis_off()
            continue
        ax.stairs(np.histogram(cosines, edges)[0] / len(cosines), edges, fill=True, color=colour, alpha=0.85)
        if one["control_within_group"]["band"]:
            ax.axvspan(*one["control_within_group"]["band"], color=CHANCE_COLOUR, linewidth=0, zorder=0.5)
        for end in one["control_within_group_by_rollout"]["band"] or ():
            ax.axvline(end, color=CONTROL_COLOUR, linewidth=1.6, linestyle="--", zorder=3)
        ax.axvline(0.0, color="black", linewidth=1.0)
        ax.set_xlim(-1.0, 1.0)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_ylabel("share of prompts")
    for ax in [ax for ax in axes[:, 1] if ax.axison][-1:]:
        ax.set_xlabel(
            "opposed  ←  cosine of a prompt's correct and incorrect gradients  →  aligned\n"
            "95% of the controls, halves of one kind: of its tokens grey, of its rollouts dashed"
        )
    return figure


def is_told(found: Numbers) -> bool:
    """Whether a verdict, of `cancellation` or `alignment`, says anything."""
    return found["verdict"] in TOLD


def rho_limit(alignments: Sequence[Numbers]) -> float:
    """The view's reach: every ρ that is told, and its interval as far as ±1.5."""
    told = [one for one in alignments if is_told(one)]
    ends = [min(abs(end), FURTHEST_END) for one in told for end in one["ci95"]]
    return 1.05 * max([LEAST_VIEW, *ends, *(abs(one["rho"]) for one in told)])


def draw_rho(ax: Axes, place: float, found: Numbers, colour: str, axis: str) -> None:
    """One ρ with its interval along an axis, "x" or "y"; nothing where it is not told. `found`: an `alignment`."""
    if is_told(found):
        line, point = (found["ci95"], [place, place]), ([found["rho"]], [place])
        ax.plot(*(line if axis == "x" else line[::-1]), color=colour, linewidth=2.6, solid_capstyle="butt", zorder=3)
        ax.plot(*(point if axis == "x" else point[::-1]), "o", color=colour, markersize=11, zorder=4)


def draw_reference(ax: Axes, references: Sequence[float | None], axis: str) -> None:
    """0 with the limits of orthogonal, and dashed what theory fixes ρ at, where it does so for a tag."""
    across, span = (ax.axvline, ax.axvspan) if axis == "x" else (ax.axhline, ax.axhspan)
    span(-ORTHOGONAL_WITHIN, ORTHOGONAL_WITHIN, color=ORTHOGONAL_COLOUR, linewidth=0, zorder=0)
    across(0.0, color="black", linewidth=1.0, zorder=1.5)
    for value in sorted({reference for reference in references if reference is not None}):
        across(value, color="black", linewidth=1.3, linestyle=(0, (5, 3)), zorder=1.6)
        words = "theory, on-policy" if None not in references else "theory, on-policy, of some"
        at, frame, style = (value, 1.0), ("data", "axes fraction"), {"va": "bottom", "ha": "center"}
        if axis == "y":
            words = words.replace(", ", ",\n")
            at, frame, style = at[::-1], frame[::-1], {"va": "center", "ha": "left"}
        style |= {"fontsize": 9, "color": NOTE_COLOUR}
        ax.annotate(words, at, (2, 2), xycoords=frame, textcoords="offset points", **style)


def _with_answers(question: str, subjects: list[Subject], n_rows: int, n_lines: int) -> tuple[Figure, np.ndarray]:
    """[n_rows, 2] axes: at the left words, beside what they rest on; a row is as high as `n_lines` of text."""
    figure = new_figure(WIDTH, n_rows * (n_lines * LINE_HEIGHT + TITLE_HEIGHT) + TITLE_HEIGHT)
    axes = figure.subplots(n_rows, 2, squeeze=False, width_ratios=WIDTH_RATIOS)
    for ax in axes[:, 0]:
        ax.set_axis_off()
    figure.suptitle(heading(question, subjects), x=0.005, ha="left")
    return figure, axes


def _answer(ax: Axes, place: float, name: str, lines: Sequence[str], colour: str, is_said: bool = True) -> None:
    """Whose answer, the answer itself, grey where nothing `is_said`, and the numbers below."""
    verdict, *rest = lines
    grey_or_colour = colour if is_said else NOTE_COLOUR
    for text, above, side, style in (
        (name, 20, "bottom", {"color": colour, "fontsize": 10}),
        (verdict, 3, "bottom", {"color": grey_or_colour, "weight": "bold"}),
        ("\n".join(rest), -1, "top", {"fontsize": 10}),
    ):
        ax.annotate(text, (0, place), (0, above), textcoords="offset points", va=side, **style)


def _say(ax: Axes, place: float, text: str) -> None:
    """Grey text in the place of what is not told."""
    wide = int(WIDTH * WIDTH_RATIOS[1] / sum(WIDTH_RATIOS) * CHARS_PER_INCH * 0.9)
    ax.axhspan(place - 0.5, place + 0.5, color="white", linewidth=0, zorder=2.5)
    ax.annotate("\n".join(textwrap.wrap(text, wide)), (0.01, place), xycoords=("axes fraction", "data"), va="center",
                color=NOTE_COLOUR, fontsize=9, zorder=5)  # fmt: skip


def _c_said(one: Numbers) -> list[str]:
    found = one["cancellation"]
    if found["null_ci95"] is None:
        return [found["verdict"]]
    by_chance = with_interval(found["null_mean"], found["null_ci95"])
    n = counted(found["n_prompts"], "prompt")
    c = f"C = {number(found['ratio'], 2)}, by chance {by_chance}"
    return [found["verdict"], c, f"p = {number(found['p_value'], 4)}, {n}"]


def _rho_said(one: Numbers) -> list[str]:
    found = one["alignment"]
    n = f"bucket {one['bucket']}, {counted(found['n_prompts'], 'prompt')}"
    if not is_told(found):
        return [f"ρ: {UNSAMPLED if found['verdict'] == UNSAMPLED else CANT_TELL}", n]
    return [f"ρ: {found['verdict']}", f"ρ = {with_interval(found['rho'], found['ci95'])}", n]


def _cosines_said(one: Numbers) -> list[str]:
    """The mean with the controls', and whether labels that mean nothing would give such cosines."""
    found, p_value = one["correct_vs_incorrect"], one["alignment"]["p_value"]
    if found["mean"] is None:
        n = counted(one["n_prompts_usable"], "prompt")
        return ["no cosine", f"{n} with {MIN_TOKENS_OF_EACH_KIND} tokens of each kind"]
    lines = [
        f"mean cosine {number(found['mean'], 2)}",
        f"{counted(one['n_prompts_usable'], 'prompt')}, {share(found['frac_positive'])} above 0",
        f"controls {number(one['control_within_group']['mean'], 2)} by tokens, "
        f"{number(one['control_within_group_by_rollout']['mean'], 2)} by rollouts",
    ]
    if p_value is not None:
        lines.append(f"{'unlike' if p_value < LEVEL else 'as under'} shuffled labels (p {number(p_value, 4)})")
    return lines


def _untold(of_tag: Sequence[Numbers]) -> str:
    """`buckets 3, 4 underpowered (...); buckets 0 to 2 unsampled (...)`: where reasons differ, the highest bucket's."""
    named: dict[str, list[int]] = {}
    for bucket, found in enumerate(of_tag):
        if not is_told(found):
            named.setdefault(found["verdict"], []).append(bucket)
    said = []
    for verdict, buckets in reversed(named.items()):
        reasons = [of_tag[bucket]["reason"] for bucket in buckets]
        which = f"bucket {buckets[-1]}: " if len(set(reasons)) > 1 else ""
        said.append(f"{named_buckets(buckets)} {verdict} ({which}{reasons[-1]})")
    return "; ".join(said) or "told in every bucket"
