"""The report: complete in itself, every word from the numbers, nothing from a model gets through as markup."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from planted import write_dump, write_heavy_tailed_dump, write_planted_signal

import analyze_exp1_compression
import analyze_exp2_direction
import analyze_exp3_signal
import plot_exp12_intuitive
from gradprobe.figures.answers import CANCEL_WORDS, model_name
from gradprobe.figures.report import render_report
from gradprobe.figures.rollouts import RolloutsSeen, RolloutText
from gradprobe.figures.tables import settings_table
from gradprobe.figures.tokens import Token

HOSTILE = 'models/<img src=x onerror="alert(1)"><script>alert(2)<script>'


def study(base: Path, trained: Path, figures: Path, analyses: bool = True) -> str | None:
    """Run analyses and plots; the report, or None if there is none."""
    tagged = ["--output-dir", str(figures), f"base={base}", f"trained={trained}"]
    if analyses:
        assert analyze_exp1_compression.main(tagged) == 0
        assert analyze_exp2_direction.main(tagged) == 0
    arguments = ["--base", str(base), "--trained", str(trained), "--output-dir", str(figures)]
    assert plot_exp12_intuitive.main(arguments) == 0
    report = figures / "report.html"
    return report.read_text(encoding="utf-8") if report.exists() else None


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("report")
    base = write_heavy_tailed_dump(root / "base", seed=1, model_path=HOSTILE, model_identity="planted")
    trained = write_heavy_tailed_dump(root / "trained", seed=2, model_identity="planted", max_new_tokens=65)
    return study(base, trained, root / "figures"), root / "figures"


def test_the_page_is_complete_in_itself(results):
    page, figures = results
    assert "<script" not in page
    assert "http" not in re.sub(r'base64,[^"]*', "", page)
    names = {file.name for file in figures.glob("*.png")}
    assert len(names) >= 8
    assert set(re.findall(r"<figcaption>(.*?)</figcaption>", page)) == names
    assert page.count("data:image/png;base64,") == len(names)


def test_what_comes_from_a_model_is_escaped(results):
    page, _ = results
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=" in page


def test_verdicts_are_those_of_the_summaries(results):
    page, figures = results
    exp1, exp2 = (json.loads((figures / f"exp{i}_summary.json").read_text()) for i in (1, 2))
    for tag in ("base", "trained"):
        word = CANCEL_WORDS[exp2[tag]["alignment"]["verdict"]].replace("'", "&#39;")
        assert f'<span class="soft">{tag}</span><b>{word}</b>' in page
    verdict = exp1["trained"]["compared_with"]["base"]["4"]["verdict"].replace("'", "&#39;")
    assert re.search(rf"Over base&#39;s, at equal n: [−\d.]+ \[[^\]]+\], {verdict}</p>", page)


def sections_of(page: str) -> tuple[str, str]:
    """What stands before and in the folded part."""
    page = re.sub(r'base64,[^"]*', "", page)
    start = page.index("<details>")
    return page[:start], page[start:]


def test_answers_lead_each_with_its_one_figure_and_limits_follow(results):
    top, folded = sections_of(results[0])
    assert re.findall(r"<figcaption>(.*?)</figcaption>", top) == ["exp1_headline.png", "exp2_alignment.png"]
    assert top.index("What limits these answers") > top.index("exp2_alignment.png")
    assert "base and trained differ in max_new_tokens: 64 and 65." in top
    assert "<table" not in top
    assert folded.count("<table") >= 6
    assert "Not measured" in top


def test_no_path_of_the_machine_is_said(tmp_path):
    model = "/home/somebody/secret/models/Qwen2.5-1.5B"
    dataset = {"path": "/home/somebody/secret/problems.jsonl"}
    dump = write_heavy_tailed_dump(tmp_path / "dump", seed=1, model_path=model, dataset=dataset)
    page = study(dump, dump, tmp_path / "figures")
    assert "secret" not in page
    assert str(tmp_path) not in page
    assert "Qwen2.5-1.5B" in page
    assert "problems.jsonl" in page


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/b/Qwen", "Qwen"),
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("../x/y/", "y"),
        ("C:\\m\\n", "n"),
        ("m", "m"),
    ],
)
def test_models_are_named_by_hub_name_or_last_part(path, name):
    assert model_name(path) == name


def test_a_rho_without_an_interval_is_no_number(results, tmp_path):
    exp1, exp2 = (json.loads((results[1] / f"exp{i}_summary.json").read_text()) for i in (1, 2))
    for numbers in (exp2["base"], *exp2["base"]["by_bucket"].values()):
        numbers["alignment"] |= {"rho": 3.368, "ci95": None, "verdict": "underpowered"}
    page = render_report(exp1, exp2, MANIFESTS, {})
    assert "3.37" not in page
    assert "3.368" not in page
    assert "no ρ, as the signal" in page


MANIFESTS = {"base": {"model_path": "base"}, "trained": {"model_path": "trained"}}
OPPOSED = {"rho": -0.6, "ci95": [-1.2, -0.2], "verdict": "opposed", "n_prompts": 9}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": -1.0}, "theory fixes ρ at −1, inside the interval"),
        (
            {"reference": -1.0, "alignment": OPPOSED | {"ci95": [-0.9, -0.2]}},
            "theory fixes ρ at −1, below the interval",
        ),
        ({"reference": None}, "no: opposed"),
        ({"alignment": OPPOSED | {"verdict": "aligned", "ci95": [0.2, 0.9], "rho": 0.5}}, "yes: aligned"),
        ({"alignment": OPPOSED | {"verdict": "unsampled"}}, "can&#39;t tell: unsampled"),
    ],
)
def test_words_on_cancelling_follow_the_numbers(results, change, said):
    exp1, exp2 = (json.loads((results[1] / f"exp{i}_summary.json").read_text()) for i in (1, 2))
    numbers = exp2["base"]
    numbers["alignment"] |= OPPOSED
    numbers |= {key: value for key, value in change.items() if key != "alignment"}
    numbers["alignment"] |= change.get("alignment", {})
    top, _ = sections_of(render_report(exp1, exp2, MANIFESTS, {}))
    assert said in top
    assert ("theory fixes" in top) == (change.get("reference") is not None)


def test_tokens_stand_in_the_page_shaded_marked_and_escaped(results):
    exp1, exp2 = (json.loads((results[1] / f"exp{i}_summary.json").read_text()) for i in (1, 2))
    tokens = [Token(HOSTILE, 1.25, 0.75, True, True), Token("  so\n", 0.5, 0.25, False, False)]
    text = RolloutText(f"prompt 1: {HOSTILE}", tokens, 1234)
    seen = RolloutsSeen(["log π + H -0.5 nats", HOSTILE], [text], [[(HOSTILE, 0.5), ("x", 0.001)]], ())
    manifests = {tag: one | {"entropy_edges": [0, 1]} for tag, one in MANIFESTS.items()}
    top, folded = sections_of(render_report(exp1, exp2, manifests, {}, None, {"base": seen, "trained": None}))
    assert "<img src=x" not in top + folded
    assert "<script" not in top + folded
    assert '<span class="picked" style="--s:0.75" title="1.250 nats">models/&lt;img' in top
    assert '<span style="--s:0.25" title="0.500 nats">  so\n</span>' in top
    assert "1,234 more tokens" in top
    assert "log π + H −0.5 nats" in top
    assert re.search(r"<code>models/&lt;[^<]*</code> 50%</span><span><code>x</code> &lt;1%", folded)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"sampling": {"verifier": "boxed"}}, ["boxed"]),
        ({"sampling": {"distribution": "full softmax", "method": "Philox"}}, ["full softmax; Philox"]),
        ({"dataset": {"path": "/a/b.jsonl"}}, ["as the data set gives them"]),
        ({"prompts": {"prompt_template": "Q: {problem}"}}, ["prompt_template: Q: {problem}"]),
        ({"server_logprob_gap": 0.0123}, ["0.012 nats a token"]),
        (
            {"rollouts_from": {"format": "verl", "correct_from": "acc"}, "sampling": None, "dataset": None},
            ["a file (verl)", "acc"],
        ),
    ],
)
def test_the_settings_say_how_rollouts_came_about(manifest, said):
    table = settings_table({"base": {"model_path": "m"} | manifest, "trained": {"model_path": "m"}})
    of_base = {name: base for name, base, _ in table.rows}
    assert {"verifier", "prompts", "sampler", "log-prob gap"} < of_base.keys()
    assert all(any(one in cell for cell in of_base.values()) for one in said)
    assert [trained for name, _, trained in table.rows if name in ("verifier", "sampler")] == ["–", "–"]


def test_summaries_of_before_have_a_page_too(results):
    exp1, exp2 = (json.loads((results[1] / f"exp{i}_summary.json").read_text()) for i in (1, 2))
    for numbers in (one for of_tag in exp2.values() for one in (of_tag, *of_tag["by_bucket"].values())):
        for key in ("n_rare", "on_policy", "reference", "rho_over_sums"):
            numbers.pop(key, None)
    assert "don&#39;t tell 1 − max π" in render_report(exp1, exp2, MANIFESTS, {})


def test_exp3_is_the_third_answer_where_it_was_measured(results, tmp_path):
    figures = tmp_path / "figures"
    shutil.copytree(results[1], figures)
    for tag, strength in {"base": np.linspace(0, 1.2, 5), "trained": np.zeros(5)}.items():
        write_planted_signal(tmp_path / tag, strength, seed=3, n_prompts=20)
    tagged = [f"{tag}={tmp_path / tag}" for tag in ("base", "trained")]
    assert analyze_exp3_signal.main(["--output-dir", str(figures), *tagged]) == 0
    root = results[1].parent
    page = study(root / "base", root / "trained", figures, analyses=False)
    top, folded = sections_of(page)
    exp3 = json.loads((figures / "exp3_summary.json").read_text())
    share = exp3["base"]["at_20_percent"]["top"]["signal_share"]
    low, high = (f"{100 * end:.0f}" for end in share["ci95"])
    assert f"carry {100 * share['value']:.0f}% [{low}, {high}] of the signal" in top
    assert "more than their share in the top 20% of the tokens by entropy" in top
    assert "can&#39;t tell: underpowered" in top
    assert "<figcaption>exp3_headline.png</figcaption>" in top
    assert "<figcaption>exp3_keep_top.png</figcaption>" in folded
    assert "Not measured" not in page


def test_a_study_without_any_number_still_has_a_report(tmp_path):
    one = write_dump(tmp_path / "one", np.ones((1, 3)), np.array([4]))
    page = study(one, one, tmp_path / "figures")
    assert "underpowered" in page
    assert not re.search(r"\bnan\b", re.sub(r'base64,[^"]*', "", page).lower())


def test_a_figure_of_an_earlier_run_is_not_taken_for_this_one_s(tmp_path):
    dump = write_heavy_tailed_dump(tmp_path / "dump", seed=1)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "exp12_replication.png").write_bytes(b"of several targets, probed before")
    assert "exp12_replication.png" not in study(dump, dump, tmp_path / "figures")


def test_without_the_summaries_there_is_none_and_the_plot_says_so(tmp_path, capsys):
    dump = write_heavy_tailed_dump(tmp_path / "dump", seed=1)
    assert study(dump, dump, tmp_path / "figures", analyses=False) is None
    assert "report.html is not written" in capsys.readouterr().err
