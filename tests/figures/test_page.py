"""The page: complete in itself, every word from the summaries, of one study, and nothing of a model gets through."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import planted
import pytest
from looking import assert_nothing_is_cut_off, texts_of

import analyze_exp2_direction
import analyze_exp3_signal
import plot_exp12_intuitive
from gradprobe.analysis.text import number, with_interval
from gradprobe.exp1.summary import span, top_bucket
from gradprobe.figures.answers import answers_of, summed_up
from gradprobe.figures.report import FIGURES_OF_ANSWERS, render_report
from gradprobe.figures.rollouts import RolloutsSeen, RolloutText
from gradprobe.figures.tables import settings_table
from gradprobe.figures.tokens import Token

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)<script>'
MANIFESTS = {tag: {"model_path": tag, "entropy_edges": [0, 1]} for tag in ("base", "trained")}


def plot(figures: Path, *arguments: str, **dumps: Path) -> str:
    """The page of these dumps."""
    tagged = [f"{tag}={path}" for tag, path in dumps.items()]
    assert plot_exp12_intuitive.main(["--output-dir", str(figures), *arguments, *tagged]) == 0
    return without_pixels((figures / "report.html").read_text(encoding="utf-8"))


def without_pixels(page: str) -> str:
    return re.sub(r'base64,[^"]*', "base64,", page)


def summaries_in(figures: Path) -> list[dict]:
    files = [figures / f"exp{i}_summary.json" for i in (1, 2, 3)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def split(page: str) -> tuple[str, str]:
    """What stands before and in the folded part."""
    start = page.index("<details>")
    return page[:start], page[start:]


def captions(page: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


@pytest.fixture(scope="module")
def dumps(tmp_path_factory) -> dict[str, Path]:
    root, home = tmp_path_factory.mktemp("study"), "/home/somebody"
    same = {"model_identity": "planted", "dataset": {"path": f"{home}/problems.jsonl"}}
    return {
        "base": planted.write_heavy_tailed_dump(root / "base", seed=1, model_path=f"{home}/{HOSTILE}", **same),
        "trained": planted.write_heavy_tailed_dump(root / "trained", seed=2, max_new_tokens=65, **same),
    }


@pytest.fixture(scope="module")
def two(dumps, tmp_path_factory) -> tuple[str, Path]:
    """The page without Exp 3, and where it lies."""
    figures = tmp_path_factory.mktemp("two") / "figures"
    return plot(figures, **dumps), figures


@pytest.fixture(scope="module")
def three(dumps, two, tmp_path_factory) -> tuple[str, Path]:
    """The page with Exp 3 of pooled dumps of the same study: one with a signal, one without."""
    root = tmp_path_factory.mktemp("three")
    shutil.copytree(two[1], root / "figures")
    strengths = {"base": np.linspace(0, 1.2, 5), "trained": np.zeros(5)}
    for tag, strength in strengths.items():
        planted.write_planted_signal(root / tag, strength, seed=3, n_prompts=20)
    tagged = [f"{tag}={root / tag}" for tag in strengths]
    assert analyze_exp3_signal.main(["--output-dir", str(root / "figures"), *tagged]) == 0
    return plot(root / "figures", **dumps), root / "figures"


def test_the_page_is_complete_in_itself_and_shows_the_figures_of_its_summaries(three):
    page, figures = three
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:image/png;base64,"}
    named = {file for summary in summaries_in(figures) for one in summary.values() for file in one["files"]}
    assert sorted(captions(page)) == sorted(file for file in named if file.endswith(".png"))
    assert len(captions(page)) > 9


def test_no_markup_of_a_model_and_no_path_of_the_machine_is_in_it(three, dumps):
    page, _ = three
    assert not re.search("<script|<img src=x|http|somebody", page)
    assert str(dumps["base"].parent) not in page
    assert "&lt;img src=x onerror=" in page
    assert "problems.jsonl" in page


def test_a_sentence_then_three_answers_each_with_its_one_figure_then_limits_and_the_rest_folded(three):
    page, figures = three
    top, folded = split(page)
    sentence = re.escape(summed_up(answers_of(*summaries_in(figures))))
    assert re.search(sentence, re.search(r"<h1>(.*?)</h1>", page)[1].replace("&#39;", "'"))
    answers = top[: top.index("What limits these answers")].split('<section class="answer">')[1:]
    assert [captions(answer) for answer in answers] == [[name] for name in FIGURES_OF_ANSWERS]
    assert captions(top) == list(FIGURES_OF_ANSWERS)
    assert "<table" not in top
    assert folded.count("<table") > 6
    assert "<details open" not in page
    assert page.index("base and trained differ in max_new_tokens: 64 and 65.") > page.index("What limits these")


def test_verdicts_and_numbers_are_those_of_the_summaries(three):
    page, figures = three
    top = split(page)[0].replace("&#39;", "'")
    exp1, exp2, exp3 = summaries_in(figures)
    for tag in ("base", "trained"):
        c, rho = exp2[tag]["cancellation"], exp2[tag]["alignment"]
        assert f'<span class="soft">{tag}</span><b>{c["verdict"]}</b>' in top
        assert f"C = {number(c['ratio'], 2)}, by chance {with_interval(c['null_mean'], c['null_ci95'])}" in top
        assert f"ρ = {with_interval(rho['rho'], rho['ci95'])}: {rho['verdict']}" in top
        assert f": {span(top_bucket(exp1[tag])[1])} directions" in top
    ratio = exp1["trained"]["compared_with"]["base"]["4"]
    assert f"{with_interval(ratio['ratio'], ratio['ci95'], 3)} times base's at equal n" in top
    carried = exp3["base"]["at_20_percent"]["top"]["signal_share"]
    low, high = (f"{100 * end:.0f}" for end in carried["ci95"])
    assert f"carry {100 * carried['value']:.0f}% [{low}, {high}] of it" in top
    assert "<b>can't tell which tokens carry it</b>" in top
    assert exp3["trained"]["signal"]["reason"] in top


def test_what_has_no_interval_is_said_not_to_be_told_and_why(two):
    exp1, exp2, _ = summaries_in(two[1])
    exp2["base"]["alignment"] |= {"rho": None, "ci95": None, "verdict": "underpowered", "reason": "too few prompts"}
    exp1["trained"]["compared_with"]["base"]["4"] |= {"ratio": 4.447, "ci95": None, "verdict": "can't tell"}
    page = render_report(answers_of(exp1, exp2, {}), exp1, exp2, {}, MANIFESTS, {}, {}).replace("&#39;", "'")
    top = split(page)[0]
    assert "ρ can't tell: too few prompts" in top
    assert "more or fewer directions than base? can't tell: no interval from 20 common prompts" in top
    assert "4.447" not in top
    assert not re.search(r"\b(nan|None|null)\b", top)


def test_tokens_stand_in_the_page_shaded_marked_and_escaped(two):
    exp1, exp2, _ = summaries_in(two[1])
    tokens = [Token(HOSTILE, 1.25, 0.75, True, True), Token("  so\n", 0.5, 0.25, False, False)]
    text = RolloutText(f"prompt 1: {HOSTILE}", tokens, 1234)
    seen = RolloutsSeen(["log π + H −0.5 nats", HOSTILE], [text], [[(HOSTILE, 0.5), ("x", 0.001)]], ())
    rollouts = {"base": seen, "trained": None}
    top, folded = split(render_report(answers_of(exp1, exp2, {}), exp1, exp2, {}, MANIFESTS, {}, rollouts))
    assert "<img src=x" not in top + folded
    assert "<script" not in top + folded
    assert '<span class="picked" style="--s:0.75" title="1.250 nats">&lt;img' in top
    assert '<span style="--s:0.25" title="0.500 nats">  so\n</span>' in top
    assert "1,234 more tokens" in top
    assert "log π + H −0.5 nats" in top
    assert re.search(r"“&lt;img[^<]*”\N{NO-BREAK SPACE}50%   “x”\N{NO-BREAK SPACE}&lt;1%", folded)


def test_the_settings_say_how_rollouts_came_about():
    sampled = {
        "sampling": {"verifier": "boxed", "distribution": "full softmax", "method": "Philox"},
        "prompts": {"prompt_template": "Q: {problem}"},
        "server_logprob_gap": 0.0123,
    }
    manifests = {"sampled": sampled, "bare": {"dataset": {"path": "/a/b.jsonl"}}, "read": {"dataset": None}}
    manifests["read"] |= {"rollouts_from": {"format": "verl", "correct_from": "acc"}}
    rows = {name: cells for name, *cells in settings_table(manifests).rows}
    assert rows["verifier"] == ["boxed", "–", "acc"]
    assert rows["prompts"] == ["prompt_template: Q: {problem}", "as the data set gives them", "–"]
    assert rows["sampler"] == ["full softmax; Philox", "–", "a file (verl)"]
    assert [cell[:18] for cell in rows["log-prob gap"]] == ["0.012 nats a token", "–", "–"]
    assert rows["dataset"][1] == "path: b.jsonl"


def test_a_study_without_any_number_still_has_a_page(tmp_path):
    one = planted.write_dump(tmp_path / "one", np.ones((1, 3)), np.array([4]))
    page = plot(tmp_path / "figures", base=one, trained=one)
    assert "can&#39;t tell" in page
    assert not re.search(r"\b(nan|None|null)\b", split(page)[0])
    assert not re.search(r"\bnan\b", page.lower())


OTHERS = {
    "of other rollouts": (lambda exp3: exp3["base"]["study"].update(num_rollouts=1), "base has another num_rollouts"),
    "of another layout": (lambda exp3: exp3["base"].update(layout=1), "it is of another layout"),
    "of another tag": (lambda exp3: exp3.update(third=exp3.pop("base")), "third is none of the dumps given"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_exp3_of_others_is_left_out_and_why_is_said(case, dumps, three, tmp_path, capsys):
    figures = shutil.copytree(three[1], tmp_path / "figures")
    exp3 = summaries_in(figures)[2]
    change, why = OTHERS[case]
    change(exp3)
    (figures / "exp3_summary.json").write_text(json.dumps(exp3))
    page = plot(figures, **dumps)
    assert f"exp3_summary.json is left out of report.html: {why}" in capsys.readouterr().err
    assert "Not measured" in page
    assert not any(name.startswith("exp3_") for name in captions(page))


def test_different_studies_are_never_united(dumps, two, tmp_path, capsys):
    """The summaries that lie there are of the same tags the other way round: both analyses run again."""
    figures = shutil.copytree(two[1], tmp_path / "figures")
    before = summaries_in(figures)
    page = plot(figures, base=dumps["trained"], trained=dumps["base"])
    said = capsys.readouterr().err
    for i in (1, 2):
        assert f"exp{i}_summary.json of these dumps is not there: running that analysis" in said
    after = summaries_in(figures)
    assert [one["base"]["manifest_sha256"] for one in after[:2]] == [
        one["trained"]["manifest_sha256"] for one in before[:2]
    ]
    assert f": {span(top_bucket(before[0]['trained'])[1])} directions" in page.split('<span class="soft">trained')[0]


def test_the_page_needs_summaries_and_manifests_alone_and_a_figure_that_none_names_is_not_shown(dumps, two, tmp_path):
    figures = shutil.copytree(two[1], tmp_path / "figures")
    for stale in ("exp12_replication.png", "exp3_headline.png", "exp1_of_old.png"):
        (figures / stale).write_bytes(b"of an earlier run")
    bare = {tag: shutil.copytree(dump, tmp_path / tag) for tag, dump in dumps.items()}
    for dump in bare.values():
        (dump / "grads.npy").unlink()
    assert plot(figures, **bare) == two[0]


def test_a_second_run_writes_the_same_bytes_in_every_format(dumps, tmp_path):
    for run in ("one", "two"):
        arguments = ["--output-dir", str(tmp_path / run), "--figure-format", "pdf,svg", str(dumps["base"])]
        assert analyze_exp2_direction.main(arguments) == 0
    written = [{file.name: file.read_bytes() for file in (tmp_path / run).iterdir()} for run in ("one", "two")]
    assert {Path(name).suffix for name in written[0]} == {".png", ".pdf", ".svg", ".json"}
    assert written[0] == written[1]


def test_trajectory_and_replication_draw_the_summaries(tmp_path):
    names = {"base": "m", "step100": "Qwen2.5-1.5B-Instruct-DAPO-step-100-of-2000", "step500-of-a-long-run": "n" * 99}
    targets = [f"L{layer}.mlp.down_proj.weight.r0" for layer in (1, 2)]
    for seed, (tag, model) in enumerate(names.items()):
        for target in targets:
            own = {"n_prompts": 20, "dim": 24, "model_path": model, "target": target}
            planted.write_heavy_tailed_dump(tmp_path / tag / target, seed=seed, **own)
    paths = {tag: tmp_path / tag for tag in names}
    page = plot(tmp_path / "figures", **paths)
    assert captions(page)[-2:] == ["exp12_trajectory.png", "exp12_replication.png"]
    exp1, exp2, _ = summaries_in(tmp_path / "figures")
    sources = {tag: found[0] for tag, found in plot_exp12_intuitive.read_sources(paths).items()}
    drawn = plot_exp12_intuitive.draw_several(exp1, exp2, sources)
    trajectory, replication = drawn["exp12_trajectory.png"], drawn["exp12_replication.png"]
    ratios, rhos, correct = (next(line for line in ax.lines if len(line.get_xdata()) == 3) for ax in trajectory.axes)
    expected = [top_bucket(one)[1]["participation_ratio_unit_norm"] for one in exp1.values()]
    np.testing.assert_allclose(ratios.get_ydata(), expected)
    found = [one["alignment"] for one in exp2.values()]
    np.testing.assert_allclose(rhos.get_ydata(), [one["rho"] if one["ci95"] else np.nan for one in found])
    shares = [source.manifest["num_correct_rollouts"] / 160 for source in sources.values()]
    np.testing.assert_allclose(correct.get_ydata(), shares)
    dots = [points.get_offsets()[:, 1].tolist() for points in replication.axes[1].collections]
    values = [[rho for rho in one["replication"]["rho"]["values"] if rho is not None] for one in exp2.values()]
    assert 0 < len(dots) < 3  # one tag has none
    assert dots == [of_tag for of_tag in values if of_tag]
    assert "2 targets of each model" in texts_of(replication)
    for name, figure in drawn.items():
        assert_nothing_is_cut_off(figure, name)
