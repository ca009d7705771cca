"""The page: complete in itself, every word from the summaries of one study, and nothing of a model gets through."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest
from looking import assert_nothing_is_cut_off, texts_of

import analyze_exp2_direction
import analyze_exp3_signal
import plot_exp12_intuitive
from gradprobe.analysis.text import number, with_interval
from gradprobe.dump.records import Rollout, write_records
from gradprobe.exp1.summary import span, top_bucket
from gradprobe.figures.answers import answers_of, summed_up
from gradprobe.figures.report import FIGURES_OF_ANSWERS, render_report
from gradprobe.figures.rollouts import MAX_TOKENS_SHOWN, RolloutsSeen, RolloutText, first_rollouts, see_rollouts
from gradprobe.figures.tables import commonest_tables, settings_table
from gradprobe.figures.tokens import Token

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)<script>'
EDGES = [0.0, 1.0, 2.0]
BLANK = "\N{NO-BREAK SPACE}"


def plot(figures: Path, **dumps: Path) -> str:
    """The page of these dumps, without the pixels."""
    tagged = [f"{tag}={path}" for tag, path in dumps.items()]
    assert plot_exp12_intuitive.main(["--output-dir", str(figures), *tagged]) == 0
    return re.sub(r'base64,[^"]*', "base64,", (figures / "report.html").read_text(encoding="utf-8"))


def summaries_in(figures: Path) -> list[dict]:
    return [json.loads((figures / f"exp{i}_summary.json").read_text()) for i in (1, 2, 3)]


def split(page: str) -> tuple[str, str]:
    """What stands before and in the folded part, with plain apostrophes."""
    top, *folded = page.replace("&#39;", "'").split("<details>")
    return top, "".join(folded)


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
def study(dumps, tmp_path_factory) -> tuple[str, Path]:
    """The page with Exp 3 of pooled dumps of the same study, one with a signal, one without; and where it lies."""
    root = tmp_path_factory.mktemp("pooled")
    strengths = {"base": np.linspace(0, 1.2, 5), "trained": np.zeros(5)}
    pooled = {t: planted.write_planted_signal(root / t, s, seed=3, n_prompts=20) for t, s in strengths.items()}
    tagged = [f"{tag}={path}" for tag, path in pooled.items()]
    assert analyze_exp3_signal.main(["--output-dir", str(root / "figures"), *tagged]) == 0
    return plot(root / "figures", **dumps), root / "figures"


def test_the_page_is_complete_in_itself_and_shows_the_figures_that_its_summaries_name(study, dumps):
    page, figures = study
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:image/png;base64,"}
    assert not re.search("<script|<img src=x|http|somebody", page)
    assert str(dumps["base"].parent) not in page
    assert "&lt;img src=x onerror=" in page
    assert "problems.jsonl" in page
    named = {file for summary in summaries_in(figures) for one in summary.values() for file in one["files"]}
    assert sorted(captions(page)) == sorted(file for file in named if file.endswith(".png"))
    assert len(captions(page)) > 9


def test_a_sentence_then_three_answers_each_with_its_one_figure_then_limits_and_the_rest_folded(study):
    top, folded = split(study[0])
    assert f"<h1>{summed_up(answers_of(*summaries_in(study[1])))}</h1>" in top
    answers, limits = top.split("What limits these answers")
    shown = [[names[-1]] for names in FIGURES_OF_ANSWERS]
    assert [captions(one) for one in answers.split('class="answer"')] == [[], *shown]
    assert "base and trained differ in max_new_tokens: 64 and 65." in limits
    assert not captions(limits)
    assert "<table" not in top
    assert folded.count("<table") > 6


def test_verdicts_and_numbers_are_those_of_the_summaries(study):
    top = split(study[0])[0]
    exp1, exp2, exp3 = summaries_in(study[1])
    for tag in ("base", "trained"):
        c, rho = exp2[tag]["cancellation"], exp2[tag]["alignment"]
        assert f'<span class="soft">{tag}</span><b>{c["verdict"]}</b>' in top
        assert f"C = {number(c['ratio'], 2)}, by chance {with_interval(c['null_mean'], c['null_ci95'])}" in top
        assert f"ρ = {with_interval(rho['rho'], rho['ci95'])}: {rho['verdict']}" in top
        assert f": {span(top_bucket(exp1[tag])[1])} directions" in top
    ratio = exp1["trained"]["compared_with"]["base"]["4"]
    assert f"{with_interval(ratio['ratio'], ratio['ci95'], 3)} times at equal n" in top
    carried = exp3["base"]["at_20_percent"]["top"]["signal_share"]
    low, high = (f"{100 * end:.0f}" for end in carried["ci95"])
    assert f"carry {100 * carried['value']:.0f}% [{low}, {high}] of it" in top
    assert "<b>can't tell which tokens carry it</b>" in top
    assert exp3["trained"]["signal"]["reason"] in top


def test_what_can_not_be_told_says_why_and_tokens_stand_shaded_marked_and_escaped(study):
    exp1, exp2, _ = summaries_in(study[1])
    exp2["base"]["alignment"] |= {"rho": None, "ci95": None, "verdict": "underpowered", "reason": "too few prompts"}
    exp1["trained"]["compared_with"]["base"]["4"] |= {"ratio": 4.447, "ci95": None, "verdict": "can't tell"}
    tokens = [Token(HOSTILE, 1.25, 0.75, True, True), Token("  so\n", 0.5, 0.25, False, False)]
    text = RolloutText(f"prompt 1: {HOSTILE}", tokens, 1234)
    seen = RolloutsSeen(["log π + H −0.5 nats", HOSTILE], [text], [[(HOSTILE, 0.5), ("x", 0.001)]], ())
    manifests = {tag: {"model_path": tag, "entropy_edges": [0, 1]} for tag in exp1}
    rollouts = {"base": seen, "trained": None}
    top, folded = split(render_report(answers_of(exp1, exp2, {}), exp1, exp2, {}, manifests, {}, rollouts))
    assert "ρ can't tell: too few prompts" in top
    assert "more or fewer directions than base? can't tell</b><p>no interval from 20 common prompts" in top
    assert not re.search(r"\b(nan|None|null|4\.447)\b", top)
    assert not re.search("<script|<img src=x", top + folded)
    assert '<span class="picked" style="--s:0.75" title="1.250 nats">&lt;img' in top
    assert '<span style="--s:0.25" title="0.500 nats">  so\n</span>' in top
    assert "1,234 more tokens" in top
    assert "log π + H −0.5 nats" in top
    assert re.search(rf"“&lt;img[^<]*”{BLANK}50%   “x”{BLANK}&lt;1%", folded)


def test_the_settings_say_how_rollouts_came_about():
    sampled = {"sampling": {"verifier": "boxed", "distribution": "full softmax", "method": "Philox"}}
    sampled |= {"prompts": {"prompt_template": "Q: {problem}"}, "server_logprob_gap": 0.0123}
    given = {"rollouts_from": {"format": "verl", "correct_from": "acc"}}
    manifests = {"sampled": sampled, "bare": {"dataset": {"path": "/a/b.jsonl"}}, "given": given}
    rows = {name: cells for name, *cells in settings_table(manifests).rows}
    assert rows["verifier"] == ["boxed", "–", "acc"]
    assert rows["prompts"] == ["prompt_template: Q: {problem}", "as the data set gives them", "–"]
    assert rows["sampler"] == ["full softmax; Philox", "–", "a file (verl)"]
    assert [cell[:18] for cell in rows["log-prob gap"]] == ["0.012 nats a token", "–", "–"]
    assert rows["dataset"][1] == "path: b.jsonl"


def test_a_study_without_any_number_still_has_a_page(tmp_path):
    one = planted.write_dump(tmp_path / "one", np.ones((1, 3)), np.array([4]))
    page = plot(tmp_path / "figures", base=one, trained=one)
    assert "can't tell" in split(page)[0]
    assert not re.search(r"\b(nan|None)\b", page)


OTHERS = {
    "of other rollouts": (lambda exp3: exp3["base"]["study"].update(num_rollouts=1), "base has another num_rollouts"),
    "of another layout": (lambda exp3: exp3["base"].update(layout=1), "it is of another layout"),
    "of another tag": (lambda exp3: exp3.update(third=exp3.pop("base")), "third is none of the dumps given"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_exp3_of_others_is_left_out_and_why_is_said(case, dumps, study, tmp_path, capsys):
    figures = shutil.copytree(study[1], tmp_path / "figures")
    exp3 = summaries_in(figures)[2]
    change, why = OTHERS[case]
    change(exp3)
    (figures / "exp3_summary.json").write_text(json.dumps(exp3))
    page = plot(figures, **dumps)
    assert f"exp3_summary.json is left out of report.html: {why}" in capsys.readouterr().err
    assert "Not measured" in page
    assert not any(name.startswith("exp3_") for name in captions(page))


def test_of_the_same_tags_the_other_way_round_both_analyses_run_again(dumps, study, tmp_path, capsys):
    figures = shutil.copytree(study[1], tmp_path / "figures")
    before = summaries_in(figures)[0]
    plot(figures, base=dumps["trained"], trained=dumps["base"])
    said = capsys.readouterr().err
    assert all(f"exp{i}_summary.json of these dumps is not there: running that analysis" in said for i in (1, 2))
    after = summaries_in(figures)[0]
    assert before["trained"]["per_bucket"] == after["base"]["per_bucket"] != before["base"]["per_bucket"]


def test_summaries_and_manifests_are_enough_and_a_figure_of_an_earlier_run_is_not_shown(dumps, study, tmp_path):
    figures = shutil.copytree(study[1], tmp_path / "figures")
    for stale in ("exp12_replication.png", "exp3_trajectory.png", "exp1_of_old.png"):
        (figures / stale).write_bytes(b"of an earlier run")
    bare = {tag: shutil.copytree(dump, tmp_path / tag) for tag, dump in dumps.items()}
    for dump in bare.values():
        (dump / "grads.npy").unlink()
    assert plot(figures, **bare) == study[0]


def test_a_second_run_writes_the_same_bytes_in_every_format(dumps, tmp_path):
    for run in ("one", "two"):
        arguments = ["--output-dir", str(tmp_path / run), "--figure-format", "pdf,svg", str(dumps["base"])]
        assert analyze_exp2_direction.main(arguments) == 0
    written = [{file.name: file.read_bytes() for file in (tmp_path / run).iterdir()} for run in ("one", "two")]
    assert {Path(name).suffix for name in written[0]} == {".png", ".pdf", ".svg", ".json"}
    assert written[0] == written[1]


def test_trajectory_and_replication_draw_the_summaries(study, dumps):
    tags, spread = ("base", "trained", "step500-of-a-long-run"), {"values": [-0.5, None, 0.25], "mean": -0.125}
    spreads = {"rho": spread, "participation_ratio_unit_norm": {str(bucket): spread for bucket in range(5)}}
    own = {"model": "Qwen2.5-1.5B-Instruct-DAPO-step-100-of-2000", "replication": {"targets": list("abc"), **spreads}}
    exp1, exp2 = ({tag: one[tags[i % 2]] | own for i, tag in enumerate(tags)} for one in summaries_in(study[1])[:2])
    exp2["trained"]["alignment"] |= {"rho": None, "ci95": None}
    found = plot_exp12_intuitive.read_sources({**dumps, tags[2]: dumps["base"]})
    sources = {tag: targets[0] for tag, targets in found.items()}
    drawn = plot_exp12_intuitive.draw_several(exp1, exp2, sources)
    trajectory, replication = drawn["exp12_trajectory.png"], drawn["exp12_replication.png"]
    curves = [next(line for line in ax.lines if len(line.get_xdata()) == 3) for ax in trajectory.axes]
    expected = [
        [top_bucket(one)[1]["participation_ratio_unit_norm"] for one in exp1.values()],
        [one["alignment"]["rho"] for one in exp2.values()],
        [source.manifest["num_correct_rollouts"] / 160 for source in sources.values()],
    ]
    np.testing.assert_allclose([curve.get_ydata() for curve in curves], np.array(expected, float))
    dots = [points.get_offsets()[:, 1].tolist() for points in replication.axes[1].collections]
    assert dots == [[-0.5, 0.25]] * 3
    assert "3 targets of each model" in texts_of(replication)
    for name, figure in drawn.items():
        assert_nothing_is_cut_off(figure, name)


LONG = MAX_TOKENS_SHOWN + 50


def rollout(prompt: int, sample: int, n: int, correct: bool, **changed) -> Rollout:
    """Tokens of entropy 0.5 and 1.5 in turn; the last one ends it."""
    kept = {"response_ids": [1] * (n - 1) + [9], "entropies": [0.5, 1.5] * (n // 2), "logprobs": [-0.5] * n}
    kept |= {"token_texts": [" sure", "\x1b<b>"] * (n // 2), "prompt_idx": prompt, "sample_idx": sample}
    told = {"problem_id": f"p{prompt}", "prompt_ids": [5 + prompt], "response": "\\boxed{7}", "ground_truth": "7"}
    return Rollout(correct=correct, **(told | kept | changed))


ROLLOUTS = [rollout(0, 0, 8, True), rollout(0, 1, 8, True), rollout(3, 0, LONG, True)]
ROLLOUTS.append(rollout(3, 1, 6, False, response="no answer", response_ids=[1] * 6))


def see(path: Path, rollouts: list[Rollout], *edges_of_signal, end_ids=(9,)) -> RolloutsSeen:
    path.mkdir()
    write_records(path / "rollouts.jsonl", rollouts)
    (path / "meta.jsonl").write_text('{"row": 0, "prompt_idx": 3, "sample_idx": 1, "pos": 2}\n')
    manifest = {"entropy_edges": EDGES, "num_rollouts": 4, "end_ids": list(end_ids) or None}
    return see_rollouts(path, manifest, *edges_of_signal)


def test_two_rollouts_of_one_prompt_are_seen_with_what_was_picked_and_facts_about_all(tmp_path):
    seen = see(tmp_path / "dump", ROLLOUTS, [0.0, 0.7, 1.2, 2.0])
    right, wrong = seen.texts
    assert right.head.startswith("prompt 3 sample 0 ('p3'): correct")
    assert wrong.head.startswith("prompt 3 sample 1 ('p3'): incorrect")
    assert [(len(one.tokens), one.n_more) for one in seen.texts] == [(MAX_TOKENS_SHOWN, 50), (6, 0)]
    assert [[place for place, token in enumerate(one.tokens) if token.is_picked] for one in seen.texts] == [[], [2]]
    assert [(token.text, token.shade) for token in wrong.tokens[:2]] == [(" sure", 0.25), ("\\x1b<b>", 0.75)]
    said = "\n".join(seen.facts)
    for fact in ("3 of 4 (75%) correct, 3 of 4 (75%) with a \\boxed{} answer", "1 of 4 (25%) cut off"):
        assert fact in said
    shares = [(0.1, [0.0, 0.2]), (0.2, None), (0.9, [0.8, 1.0])]
    of_buckets = [{"share_of_tokens": 0.5, "signal_share": {"value": v, "ci95": ends}} for v, ends in shares]
    signal = {"objective": "dapo", "per_bucket": {str(b): found for b, found in enumerate(of_buckets)}}
    own, of_signal = commonest_tables("base", seen.commonest, EDGES, seen.commonest_of_signal, signal)
    sure, fork = (f"“{text}”{BLANK}100%" for text in (" sure", "\\x1b<b>"))
    assert own.rows == [["1", "1 to 2", fork], ["0", "0 to 1", sure]]
    high, middle, _ = of_signal.rows
    assert (high, middle) == (["2", "50%", "90% [80, 100]", fork], ["1", "50%", "–", ""])


def test_of_rollouts_what_there_is_not_is_said_and_of_a_large_file_only_the_first_part_is_read(tmp_path):
    bare = see(tmp_path / "bare", [replace(one, token_texts=[]) for one in ROLLOUTS])
    assert (bare.texts, bare.facts[-1]) == ((), "its rollouts.jsonl keeps no texts of tokens: none are shown")
    one_kind = see(tmp_path / "one kind", ROLLOUTS[:2])
    assert (len(one_kind.texts), one_kind.facts[0]) == (2, "of 4 rollouts, the first 2 in the file")
    assert see(tmp_path / "no end_ids", ROLLOUTS, end_ids=()).facts == []  # nobody knows which were cut off
    assert see(tmp_path / "none", []) is None

    def endless() -> Iterator[Rollout]:
        yield from ROLLOUTS[:2]
        raise AssertionError("read on")

    assert first_rollouts(endless(), most_tokens=16) == ROLLOUTS[:2]
