"""Exp 3's figures draw the numbers of the summary, and nothing where these tell nothing."""

import copy

import numpy as np
import planted
import pytest
from looking import assert_nothing_is_cut_off, texts_of

from gradprobe.analysis.inputs import about_study, open_dumps
from gradprobe.exp3.measure import measure_dumps
from gradprobe.exp3.summary import numbers_of
from gradprobe.figures.exp3 import HEADLINE, KEEP_TOP, TITLES, TRAJECTORY, draw_exp3
from gradprobe.figures.look import bucket_places

STRENGTH = np.linspace(0.0, 0.5, 10)


@pytest.fixture(scope="module")
def summary(tmp_path_factory) -> dict[str, dict]:
    """Two tags with a signal, a third without."""
    root = tmp_path_factory.mktemp("figures")
    strengths = {"base": STRENGTH, "trained": STRENGTH[::-1], "nothing": 0 * STRENGTH}
    paths = {
        tag: planted.write_planted_signal(root / tag, strength, seed=7 + i, n_prompts=40, angle=np.linspace(0, 1, 10))
        for i, (tag, strength) in enumerate(strengths.items())
    }
    dumps = open_dumps(paths)
    found, others = measure_dumps(dumps)
    numbers = {tag: numbers_of(dumps[tag], found[tag], others[tag]) for tag in dumps}
    assert [one["signal"]["verdict"] for one in numbers.values()] == ["seen", "seen", "underpowered"]
    return about_study(numbers, dumps, {tag: [] for tag in dumps})


def test_headline_draws_shares_with_intervals_the_highest_bucket_first(summary):
    axes = draw_exp3(summary)[HEADLINE].axes
    for ax, one in zip(axes[:2], list(summary.values())[:2], strict=True):
        found = [bucket["signal_share"] for bucket in one["per_bucket"].values()]
        bars = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in ax.patches}
        assert bars == pytest.approx({p: s["value"] for p, s in zip(bucket_places(10), found, strict=True)})
        assert min(bars) == bucket_places(10)[-1] == 0
        segments = [tuple(line.get_ydata()) for line in ax.lines if line.get_linewidth() == 1.4]
        np.testing.assert_allclose(segments, [one["ci95"] for one in found])
    share = summary["base"]["at_20_percent"]["top"]["signal_share"]
    assert f"carry {100 * share['value']:.0f}% [" in axes[0].get_title(loc="left")
    assert "can't tell: signal not above 0" in axes[2].get_title(loc="left").replace("\n", " ")


def test_what_is_kept_are_the_summary_s_curves_with_the_reading_at_20_percent(summary):
    figure = draw_exp3(summary)[KEEP_TOP]
    for ax, measure in zip(figure.axes, TITLES, strict=True):
        curves = [line for line in ax.lines if len(line.get_xdata()) == 10 and line.get_linestyle() == "-"]
        for curve, tag in zip(curves, ("base", "trained"), strict=True):
            kept = summary[tag]["keep_top"]
            np.testing.assert_allclose(curve.get_xdata(), [found["share_of_tokens"] for found in kept])
            np.testing.assert_allclose(curve.get_ydata(), np.array([one[measure]["value"] for one in kept], float))
        readings = [summary[tag]["at_20_percent"]["top"][measure] for tag in ("base", "trained")]
        dots = [float(line.get_ydata()[0]) for line in ax.lines if line.get_markersize() == 9]
        assert dots == pytest.approx([found["value"] for found in readings if found["ci95"]])
    assert "nothing · planted: can't tell: signal not above 0" in texts_of(figure)


def test_rules_stand_side_by_side_and_are_named(summary):
    rules = {"entropy": True, "surprisal": False, "score:mine": None}
    of_rules = {
        rule: copy.deepcopy(summary["base"]) | {"bucket_by": rule, "is_chosen_by_prefix": by_prefix}
        for rule, by_prefix in rules.items()
    }
    drawn = draw_exp3(of_rules)
    labels = [text.get_text() for text in drawn[KEEP_TOP].legends[0].get_texts()]
    assert labels[:3] == ["entropy", "surprisal (looks at the token drawn)", "score:mine (a score of one's own)"]
    assert TRAJECTORY not in drawn


def test_trajectory_is_of_three_or_more_and_says_where_it_can_not_tell(summary):
    assert TRAJECTORY not in draw_exp3({tag: summary[tag] for tag in ("base", "trained")})
    figure = draw_exp3(summary)[TRAJECTORY]
    top = [one["at_20_percent"]["top"] for one in summary.values()]
    of_panels = [[kept["signal_share"] for kept in top], [kept["cosine"] for kept in top]]
    of_panels.append([one["noise_scale_prompts"] for one in summary.values()])
    for ax, found in zip(figure.axes, of_panels, strict=True):
        values = [one["value"] if one["ci95"] else None for one in found]
        curve = next(line for line in ax.lines if len(line.get_xdata()) == 3)
        np.testing.assert_allclose(curve.get_ydata(), np.array(values, dtype=float))
        assert sum(text.get_text() == "can't tell" for text in ax.texts) == values.count(None)


@pytest.mark.parametrize("tags", [("base",), ("base", "trained"), ("base", "trained", "nothing"), ("nothing",)])
def test_no_text_is_cut_off(summary, tags):
    named = {tag: summary[tag] | {"model": f"Qwen2.5-1.5B-Instruct-DAPO-step-{tag}"} for tag in tags}
    for name, figure in draw_exp3(named).items():
        assert_nothing_is_cut_off(figure, name)
