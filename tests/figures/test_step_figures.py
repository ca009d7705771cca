"""Along a step: the figure draws the summary's curves, and the third answer says what the numbers do."""

import copy

import numpy as np
import planted
import pytest
from looking import assert_nothing_is_cut_off, texts_of
from matplotlib.colors import to_hex

from gradprobe.analysis.inputs import about_study, open_dumps
from gradprobe.analysis.text import share_estimate
from gradprobe.exp3 import step as exp3_step
from gradprobe.exp3.measure import measure_dumps
from gradprobe.exp3.summary import at, numbers_of, with_measured_gains
from gradprobe.figures.answers import NOT_MEASURED, answers_of, limits_of
from gradprobe.figures.exp3 import HEADLINE, draw_exp3
from gradprobe.figures.step import STEP, _colour, draw_step

STRENGTH = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
STRENGTHS = {"base": (STRENGTH, "from"), "half": (STRENGTH[::-1], "to"), "loses": (-STRENGTH, "to")}
STRENGTHS["nothing"] = (0 * STRENGTH, "to")


@pytest.fixture(scope="module")
def summary(tmp_path_factory) -> dict[str, dict]:
    """Tags that gain ahead of them, gain going on, lose going on, and do neither; the first has pooled gradients."""
    root = tmp_path_factory.mktemp("step")
    paths = {
        tag: planted.write_dump_along_step(root / tag, strength, seed=2 + i, at=end, n_prompts=40)
        for i, (tag, (strength, end)) in enumerate(STRENGTHS.items())
    }
    dumps = open_dumps(paths)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exp3_step, "PERMUTATIONS", 400)
        found, others = measure_dumps(dumps)
    numbers = {tag: numbers_of(dumps[tag], found[tag], others[tag]) for tag in dumps}
    told = [one["step"]["gain"]["reason"] is None for one in numbers.values()]
    assert told == [True, True, True, False]
    return about_study(with_measured_gains(numbers, dumps, found), dumps, {tag: [] for tag in dumps})


def some(summary: dict, *tags: str) -> dict:
    return {tag: copy.deepcopy(summary[tag]) for tag in tags}


def test_curves_are_the_summary_s_by_rule_with_the_interval_of_entropy_s(summary):
    figure = draw_step(some(summary, "base", "half", "nothing"))
    assert sum(ax.axison for ax in figure.axes) == 2, "only what is told has a panel"
    for ax, tag in zip(figure.axes, ("base", "half"), strict=False):
        curves = {to_hex(line.get_color()).upper(): line for line in ax.lines if len(line.get_xdata()) == 21}
        keep_top = summary[tag]["step"]["keep_top"]
        assert len(curves) == len(keep_top) == 5
        for rule, curve in keep_top.items():
            line = curves[_colour(rule).upper()]
            np.testing.assert_allclose(line.get_xdata(), [0, *(part["share_of_tokens"] for part in curve)])
            np.testing.assert_allclose(line.get_ydata(), [0, *(part["share"]["value"] for part in curve)])
        (band,) = ax.collections
        corners = {tuple(corner) for corner in np.round(band.get_paths()[0].vertices, 9)}
        for part in keep_top["entropy"]:
            assert {(round(part["share_of_tokens"], 9), round(end, 9)) for end in part["share"]["ci95"]} <= corners
        said = share_estimate(at(keep_top["entropy"], 0.2)["share"])
        assert f"the 20% of highest entropy carry {said} of the gain" in ax.get_title(loc="left").replace("\n", " ")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == list(summary["base"]["step"]["keep_top"])


def test_what_is_not_told_is_one_line_beside_or_alone(summary):
    reason = f"can't tell: {summary['nothing']['step']['gain']['reason']}"
    for tags in (("base", "nothing"), ("nothing",)):
        said = texts_of(draw_step(some(summary, *tags))).replace("\n", " ")
        assert said.count(reason) == 1
        assert "nan" not in said.lower()


@pytest.mark.parametrize("tags", [("base",), ("base", "half"), ("base", "nothing"), ("nothing",), tuple(STRENGTHS)])
def test_no_text_is_cut_off(summary, tags):
    named = some(summary, *tags)
    for tag, one in named.items():
        one["model"] = f"Qwen2.5-1.5B-Instruct-DAPO-step-{tag}"
        one["step"] |= {"from": "Qwen2.5-1.5B-Instruct", "to": "Qwen2.5-1.5B-Instruct-DAPO-step-500"}
        one["step"]["keep_top"]["score:a rule of one's own"] = one["step"]["keep_top"]["random"]
    assert_nothing_is_cut_off(draw_step(named))


def test_without_pooled_gradients_the_step_s_is_the_one_figure(summary):
    assert list(draw_exp3(summary)) == [STEP]
    without = {tag: {key: value for key, value in one.items() if key != "step"} for tag, one in summary.items()}
    assert draw_exp3(without) == {}
    assert HEADLINE not in draw_exp3(summary)


def third(exp3: dict) -> tuple[str, list[tuple[str, str]]]:
    answer = answers_of({"base": EXP1}, {}, exp3)[2]
    return answer.in_short, [(one.verdict, ". ".join(one.numbers)) for one in answer.statements]


EXP1 = {"per_bucket": {"0": {"n": 0, "participation_ratio_unit_norm": None}}, "row_dim": 3}


def test_the_third_answer_is_along_the_step_from_where_one_stands(summary):
    in_short, said = third(some(summary, "base", "half", "loses", "nothing"))
    assert [f"{tag}: {verdict}" for tag, (verdict, _) in zip(summary, said, strict=True)] == in_short.split("; ")
    for (verdict, numbers), tag, words in zip(
        said,
        ("base", "half", "loses"),
        (
            "gain along the step to models/trained",
            "gain going on along the step from models/base",
            "loss going on along the step from models/base",
        ),
        strict=False,
    ):
        step = summary[tag]["step"]
        carried = share_estimate(at(step["keep_top"]["entropy"], 0.2)["share"])
        assert verdict == f"the top 20% of the tokens by entropy carry {carried} of the {words}"
        assert f"{share_estimate(at(step['keep_top']['surprisal'], 0.2)['share'])} by surprisal" in numbers
        assert f"{share_estimate(at(step['keep_top']['entropy'], 0.3)['share'])} by 30% of the tokens" in numbers
        assert " by random" not in numbers
        assert "over 40 prompts, p = 0.005" in numbers
    verdict, numbers = said[3]
    assert verdict == "can't tell which tokens carry it: going on along the step from models/base no gain is seen"
    assert numbers == summary["nothing"]["step"]["gain"]["reason"]


def test_the_measured_gain_is_said_where_both_ends_are_there(summary):
    both = some(summary, "base", "half")
    for measured, is_said in ((0.234, True), (None, False)):
        both["base"]["step"]["measured_gain"] = measured
        _, ((_, numbers), _) = third(both)
        assert ("0.23 as measured between its ends" in numbers) == is_said


def test_pooled_gradients_stand_beside_the_step_and_alone_where_there_is_none(summary, tmp_path):
    path = planted.write_planted_signal(tmp_path / "pooled", 2 * STRENGTH, n_prompts=40)
    dumps = open_dumps({"base": path})
    found, others = measure_dumps(dumps)
    pooled = numbers_of(dumps["base"], found["base"], others["base"])
    assert pooled["signal"]["verdict"] == "seen"
    _, ((alone, _),) = third({"base": pooled})
    assert alone.startswith("the top 20% of the tokens by entropy carry ")
    assert alone.endswith(" of it")
    along = summary["base"]
    _, ((verdict, numbers),) = third({"base": {**pooled, "step": along["step"]}})
    assert verdict == third({"base": along})[1][0][0]
    assert numbers.endswith(f"pooled gradients, without the step: {alone}")
    assert third({}) == (NOT_MEASURED, [])


def test_limits_say_how_straight_the_step_is_and_what_halves_the_width(summary):
    of_policy = {tag: {"model_path": tag} for tag in summary}
    limits = {limit.name: limit.text for limit in limits_of({}, {}, summary, of_policy)}
    straight = summary["base"]["step"]["linearity"]
    assert f"correlation {straight['correlation']:.2f}, slope {straight['slope']:.2f}" in limits["the step"]
    assert "half the width (40 × 8 now): 160 prompts × 8 rollouts, or " in limits["the step"]
    assert "prompts for the signal" not in limits
