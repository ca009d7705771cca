"""Exp 3's figures draw the numbers of the summary, and say nothing that these don't; the reference of Exp 2's."""

import copy
import dataclasses

import numpy as np
import planted
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text

from gradprobe.analysis.inputs import fingerprints_of, open_dumps
from gradprobe.exp2.direction import Alignment
from gradprobe.exp3.measure import measure_dumps
from gradprobe.exp3.summary import summary_over_targets
from gradprobe.figures.exp2 import REFERENCE_WORDS, UNSAMPLED_COLOUR, draw_alignment
from gradprobe.figures.exp3 import (
    MEASURES,
    TRAJECTORY,
    draw_analysis,
    draw_headline,
    draw_keep,
    draw_rules,
    draw_trajectory,
)
from gradprobe.figures.look import CONTROL_COLOUR, Subject, subjects_of

STRENGTH = np.linspace(0.0, 0.5, 10)
ALIGNED = Alignment(
    n_prompts=9, rho=0.6, ci95=(0.3, 0.9), p_value=0.01, min_detectable=0.3, signal_correct=None,
    signal_incorrect=None, verdict="aligned",
)  # fmt: skip


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> tuple[list[Subject], list[dict]]:
    """Two tags with a signal, a third without."""
    root = tmp_path_factory.mktemp("figures")
    strengths = {"base": STRENGTH, "trained": STRENGTH[::-1], "nothing": 0 * STRENGTH}
    paths = {
        tag: planted.write_planted_signal(root / tag, strength, seed=7 + i, n_prompts=40, angle=np.linspace(0, 1, 10))
        for i, (tag, strength) in enumerate(strengths.items())
    }
    dumps = open_dumps(paths)
    found, others = measure_dumps(dumps)
    prints = fingerprints_of(dumps)
    numbers = [summary_over_targets(dumps[tag], found[tag], others[tag], prints[tag]) for tag in dumps]
    assert [one["signal"]["verdict"] for one in numbers] == ["seen", "seen", "underpowered"]
    return subjects_of({tag: of_tag[0] for tag, of_tag in dumps.items()}), numbers


def bars_of(ax: Axes) -> list[float]:
    return [bar.get_height() for bar in ax.patches]


def texts_of(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_headline_draws_shares_and_intervals(studied):
    subjects, numbers = studied
    axes = draw_headline(subjects, numbers).axes
    for ax, one in zip(axes, numbers, strict=False):
        buckets = list(one["per_bucket"].values())
        shares = [found["signal_share"]["value"] for found in buckets if found["signal_share"]["value"] is not None]
        assert bars_of(ax) == pytest.approx(shares)
        noise = [float(line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "D"]
        assert noise == pytest.approx([found["noise_share"] for found in buckets])
        segments = [tuple(line.get_ydata()) for line in ax.lines if line.get_linewidth() == 1.4]
        low, high = ax.get_ylim()
        expected = [np.clip(found["signal_share"]["ci95"], low, high) for found in buckets if shares]
        np.testing.assert_allclose(np.array(segments).reshape(-1, 2), np.array(expected).reshape(-1, 2))
    titles = [ax.get_title(loc="left") for ax in axes]
    assert "signal seen, z = " in titles[0]
    assert "signal underpowered" in titles[2]
    assert "noise scale" not in titles[2]
    assert "not above 0 at the 95% level" in texts_of(axes[2].figure)


def test_kept_tokens_are_the_summary_s_with_the_reading_at_20_percent(studied):
    subjects, numbers = studied
    axes = draw_keep(subjects, numbers).axes
    for place, one in enumerate(numbers[:2]):
        for ax, measure in zip(axes[place::3], MEASURES, strict=True):
            curve = next(line for line in ax.lines if len(line.get_xdata()) == 10 and line.get_linestyle() == "-")
            kept = one["keep_top"]
            np.testing.assert_allclose(curve.get_xdata(), [found["share_of_tokens"] for found in kept])
            known = np.array([found[measure]["value"] for found in kept], dtype=float)
            np.testing.assert_allclose(curve.get_ydata(), known)
            found = one["at_20_percent"]["top"][measure]
            dots = [
                float(line.get_ydata()[0])
                for line in ax.lines
                if line.get_markersize() == 9 and line.get_color() != CONTROL_COLOUR
            ]
            assert dots == ([pytest.approx(found["value"])] if found["ci95"] else [])
    said = numbers[0]["at_20_percent"]["top"]["cosine"]
    assert f"top {said['value']:.2f} [{said['ci95'][0]:.2f}, " in axes[0].get_title(loc="left")
    assert "can't tell" in axes[2].get_title(loc="left")
    assert "underpowered" in texts_of(axes[2].figure)


def test_rules_stand_in_one_row_and_are_named(studied):
    subjects, numbers = studied
    of_rules = [copy.deepcopy(one) for one in (*numbers[:2], numbers[0])]
    for one, (rule, by_prefix) in zip(
        of_rules, {"entropy": True, "surprisal": False, "score:mine": None}.items(), strict=True
    ):
        one["bucket_by"], one["is_chosen_by_prefix"] = rule, by_prefix
    figure = draw_analysis(subjects, of_rules)["exp3_keep_top.png"]
    assert len(figure.axes) == 3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [one["at_20_percent"]["top"]["cosine"]["ci95"] is None for one in of_rules] == [False, True, False]
    untold = "surprisal (looks at the token drawn): can't tell at 20%"
    assert labels == ["entropy", untold, "score:mine (a score of one's own)"]
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 10]
    for curve, one in zip(curves, of_rules, strict=True):
        expected = np.array([found["cosine"]["value"] for found in one["keep_top"]], dtype=float)
        np.testing.assert_allclose(curve.get_ydata(), expected)
    assert "3 ways to choose" in texts_of(figure)


def test_trajectory_is_of_three_or_more_and_says_where_it_can_not_tell(studied):
    subjects, numbers = studied
    assert TRAJECTORY not in draw_analysis(subjects[:2], numbers[:2])
    figure = draw_analysis(subjects, numbers)[TRAJECTORY]
    top = [one["at_20_percent"]["top"] for one in numbers]
    for ax, values in zip(
        figure.axes,
        (
            [kept["signal_share"]["value"] for kept in top],
            [kept["cosine"]["value"] for kept in top],
            [one["noise_scale_prompts"]["value"] for one in numbers],
        ),
        strict=True,
    ):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), np.array(values, dtype=float))
        assert sum(text.get_text() == "can't tell" for text in ax.texts) == values.count(None)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_text_is_cut_off(studied, count):
    subjects, numbers = studied
    named = [dataclasses.replace(one, model=f"Qwen2.5-1.5B-Instruct-DAPO-step-{i}") for i, one in enumerate(subjects)]
    drawings = [draw_headline, draw_keep, draw_rules, *([draw_trajectory] if count == 3 else [])]
    for draw in drawings:
        figure = draw(named[:count], numbers[:count])
        figure.canvas.draw()
        page = figure.bbox.padded(1)
        axes = figure.findobj(Axes)
        ticks = {tick for ax in axes for tick in (*ax.get_xticklabels(), *ax.get_yticklabels())}
        for text in set(figure.findobj(Text)) - ticks:
            if text.get_text():
                box = text.get_window_extent()
                assert page.x0 <= box.x0 <= box.x1 <= page.x1, f"{draw.__name__}: {text.get_text()!r} is cut off"
                assert page.y0 <= box.y0 <= box.y1 <= page.y1, f"{draw.__name__}: {text.get_text()!r} is cut off"
        boxes = [ax._left_title.get_window_extent() for ax in axes if ax._left_title.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), draw.__name__


def test_the_reference_is_drawn_where_theory_fixes_rho_and_for_whom():
    subjects = [Subject(tag, tag, "w[0]", 0) for tag in ("base", "trained")]

    def drawn(references) -> tuple[list[float], list[str]]:
        ax = draw_alignment(subjects, [[ALIGNED], [ALIGNED]], references).axes[0]
        dashed = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
        return dashed, [text.get_text() for text in ax.texts if REFERENCE_WORDS in text.get_text()]

    assert drawn([-1.0, -1.0]) == ([-1.0], [REFERENCE_WORDS])
    assert drawn([None, -1.0]) == ([-1.0], [f"{REFERENCE_WORDS} (trained only)"])
    assert drawn([None, None]) == drawn(()) == ([], [])


def test_an_unsampled_bucket_is_hollow_and_grey_with_its_word():
    subject = Subject("base", "base", "w[0]", 0)
    ax = draw_alignment([subject], [[dataclasses.replace(ALIGNED, verdict="unsampled")]]).axes[0]
    mark = next(line for line in ax.lines if line.get_marker() == "X")
    assert (mark.get_markerfacecolor(), mark.get_markeredgecolor()) == ("white", UNSAMPLED_COLOUR)
    assert "unsampled, n = 9" in [text.get_text() for text in ax.texts]
