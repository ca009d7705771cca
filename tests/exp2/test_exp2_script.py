"""Exp 2's script on whole dumps: every key, the same verdict in summary, table and figure, figures without noise."""

import json
import re
from pathlib import Path

import numpy as np
import planted
import pytest
from looking import assert_nothing_is_cut_off, texts_of
from matplotlib.colors import same_color

import analyze_exp2_direction
from gradprobe.exp2.summary import named_buckets, tables_of
from gradprobe.figures.exp2 import ALIGNMENT, HEADLINE, HISTOGRAM, draw_exp2, draw_rho, is_told, rho_limit
from gradprobe.figures.look import NOTE_COLOUR, new_figure

CONTROL = {"mean", "median", "n", "n_zero_mean", "band"}
MEASURES = {
    "n_prompts_usable",
    "n_prompts_zero_mean",
    "correct_vs_incorrect",
    "control_within_group",
    "control_within_group_by_rollout",
    "alignment",
    "cancellation",
    "n_rare",
    "on_policy",
    "rho_over_sums",
    "reference",
    "coupling",
}
ALIGNMENT_KEYS = {"n_prompts", "rho", "ci95", "p_value", "min_detectable", "signal_correct", "signal_incorrect"}
ALIGNMENT_KEYS |= {"verdict", "reason"}
CANCELLATION = {"n_prompts", "ratio", "null_mean", "null_ci95", "p_value", "verdict", "reason"}


def write_exp2_dump(path: Path, n_correct: list[int], n_rollouts: int = 4, planted_rho: int = 1) -> Path:
    """Rollouts of 4 tokens a bucket; those of a prompt and kind share a direction, both kinds' at `planted_rho`."""
    rng = np.random.default_rng(3)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((len(n_correct), n_rollouts, 5, 4)))
    correct = sample < np.array(n_correct)[prompt]
    one, other = rng.standard_normal((2, len(n_correct), 64))
    kinds = np.stack([planted_rho * one + np.sqrt(1 - planted_rho**2) * other, one])
    grads = 0.4 * kinds[correct.astype(int), prompt] + rng.standard_normal((len(prompt), 64))
    return planted.write_dump(path, grads, bucket, prompt=prompt, sample=sample, correct=correct)


def run_exp2(output_dir: Path, *dumps: Path | str) -> dict:
    """What the script writes; JSON as the standard has it, in which there is no NaN."""
    assert analyze_exp2_direction.main(["--output-dir", str(output_dir), *map(str, dumps)]) == 0
    return json.loads((output_dir / "exp2_summary.json").read_text(), parse_constant=pytest.fail)


STUDIES = {  # correct rollouts of each prompt, rollouts of each prompt, and what there is
    "no usable prompt": ([0, 4], 4, set()),
    "all correct": ([4, 4, 4], 4, set()),
    "one rollout of each kind": ([1, 1, 1], 2, {"cosine", "cancellation"}),
    "one rollout a prompt": ([1, 0, 1], 1, set()),
    "one usable prompt": ([2, 4, 0], 4, {"cosine", "p_value", "cancellation"}),
    "several": ([2, 3, 2, 1, 2, 2], 5, {"cosine", "p_value", "rho", "ci95", "cancellation"}),
}


@pytest.mark.parametrize("case", STUDIES)
def test_every_key_in_every_bucket_and_null_where_there_is_no_number(case, tmp_path: Path, capsys):
    n_correct, n_rollouts, there = STUDIES[case]
    summary = run_exp2(tmp_path, write_exp2_dump(tmp_path / "dump", n_correct, n_rollouts))
    assert list(summary["by_bucket"]) == list("01234")
    assert {key: summary[key] for key in MEASURES} == summary["by_bucket"]["4"]
    assert summary["draws"] == {"bootstrap": 4000, "permutations": 9999, "ids": 999}
    for found in summary["by_bucket"].values():
        assert set(found) == MEASURES
        assert set(found["alignment"]) == ALIGNMENT_KEYS
        assert set(found["cancellation"]) == CANCELLATION | {"group_normalised"}
        assert set(found["cancellation"]["group_normalised"]) == CANCELLATION
        assert set(found["control_within_group"]) == set(found["control_within_group_by_rollout"]) == CONTROL
        numbers = {
            "cosine": found["correct_vs_incorrect"]["mean"],
            "rho": found["alignment"]["rho"],
            "ci95": found["alignment"]["ci95"],
            "p_value": found["alignment"]["p_value"],
            "cancellation": found["cancellation"]["p_value"],
        }
        assert {name for name, number in numbers.items() if number is not None} == there
        assert (found["alignment"]["verdict"] == "underpowered") == ("ci95" not in there)
        for measure in ("alignment", "cancellation"):
            assert (found[measure]["reason"] is None) == is_told(found[measure])
    assert not {"nan", "None", "-0", "−0"} & set(re.split(r"[\s\[\],%]+", capsys.readouterr().out))


@pytest.mark.parametrize(("planted_rho", "verdict"), [(1, "aligned"), (0, "orthogonal"), (-1, "opposed")])
def test_planted_directions_get_their_verdict_in_summary_table_and_figure(planted_rho, verdict, tmp_path, capsys):
    dump = write_exp2_dump(tmp_path / "dump", 25 * [4], 8, planted_rho)
    summary = run_exp2(tmp_path, dump)
    rho, c = summary["alignment"], summary["cancellation"]
    assert rho["verdict"] == verdict
    assert planted_rho == 1 or c["verdict"] == "they add up"  # at +1 labels mean nothing
    assert abs(rho["rho"] - planted_rho) < rho["min_detectable"] < 0.2  # 2.8 standard errors
    out = capsys.readouterr().out
    assert any(re.match(rf"4 .* {c['verdict']} .* {verdict} ", line) for line in out.splitlines())
    assert "wrote" not in out
    said = texts_of(draw_exp2({None: summary})[HEADLINE]).splitlines()
    assert {c["verdict"], f"ρ: {verdict}"} <= set(said)
    assert any(f"ρ = {rho['rho']:.2f} [".replace("-", "−") in text for text in said)


def write_dump_of_tokens(path: Path) -> Path:
    """Two tokens of which the model is uncertain, one of them a line's end."""
    dump = planted.write_dump_along_step(path, np.full(5, 1.0), n_prompts=12)
    for file, change in (
        ("meta.jsonl", lambda line: {"token_id": (line["sample_idx"] + line["pos"]) % 2, "logprob": -1.0}),
        ("rollouts.jsonl", lambda line: {
            "response_ids": [i % 2 for i in range(len(line["response_ids"]))],
            "token_texts": ["\n" if i % 2 else " is" for i in range(len(line["response_ids"]))],
        }),
    ):  # fmt: skip
        lines = map(json.loads, (dump / file).read_text().splitlines())
        (dump / file).write_text("".join(json.dumps(line | change(line)) + "\n" for line in lines))
    return dump


def test_coupling_by_token_stands_in_summary_tables_and_figure(tmp_path: Path, capsys):
    summary = run_exp2(tmp_path / "out", f"base={write_dump_of_tokens(tmp_path / 'dump')}")["base"]
    out, figure = capsys.readouterr().out, draw_exp2({"base": summary})[HEADLINE]
    for found in (summary["coupling_all_tokens"], *(one["coupling"] for one in summary["by_bucket"].values())):
        assert sum(one["share_of_coupling"]["value"] for one in found.values() if one["n_pairs"]) == pytest.approx(1)
        same = found["same_token_both_uncertain"]
        assert set(same) == {"n_pairs", "share_of_pairs", "share_of_coupling", "mean_cosine", "mean_cosine_ci95",
                             "part_of_c", "null", "same_outcome", "different_outcome"}  # fmt: skip
        assert same["n_pairs"] == sum(same[outcome]["n_pairs"] for outcome in ("same_outcome", "different_outcome")) > 0
    assert summary["coupling"] == summary["by_bucket"]["4"]["coupling"]
    assert {one["text"] for one in summary["shared_tokens"]} == {"\n", " is"}
    assert re.search(r"^'\\n' +\d+ +\d", out, re.M)
    assert re.search(r"^all: same token, both uncertain +\d+\.\d% ", out, re.M)
    share = summary["coupling"]["same_token_both_uncertain"]["share_of_coupling"]["value"]
    assert f"same token: {100 * share:.1f}% of coupling" in texts_of(figure)
    assert_nothing_is_cut_off(figure)


def marks_of(axes, colour: str) -> int:
    return sum(line.get_marker() == "o" and same_color(line.get_color(), colour) for line in axes.lines)


def test_what_is_not_told_is_text_and_no_mark(tmp_path: Path):
    told = write_exp2_dump(tmp_path / "told", 25 * [4], 8, -1)
    untold = write_exp2_dump(tmp_path / "untold", 2 * [2])
    summary = run_exp2(tmp_path / "out", f"base={untold}", f"trained={told}")
    drawn = draw_exp2(summary)
    for name, n_marks in ((HEADLINE, 2), (ALIGNMENT, 5)):  # C and ρ; ρ in every bucket
        axes = drawn[name].axes
        assert sum(marks_of(ax, "#D55E00") for ax in axes) == n_marks
        assert sum(marks_of(ax, "#0072B2") for ax in axes) == sum(marks_of(ax, NOTE_COLOUR) for ax in axes) == 0
        assert "ρ: can't tell" in texts_of(drawn[name])
        assert "2 prompts with 2 rollouts of each kind" in texts_of(drawn[name])


def test_a_view_that_cuts_an_interval_says_so_and_keeps_the_point():
    found = {"rho": -0.9, "ci95": [-3.0, -0.1], "verdict": "opposed"}
    assert 1.5 < rho_limit([found]) < 1.6
    assert rho_limit([{**found, "rho": -1.8}]) > 1.8
    assert rho_limit([{"rho": None, "ci95": None, "verdict": "underpowered"}]) < 1.2
    ax = new_figure(3, 3).subplots()
    for axis in "xy":
        draw_rho(ax, 7.0, found, "black", axis)
    (across, point_across), (along, point_along) = ax.lines[:2], ax.lines[2:]
    assert list(across.get_xdata()) == list(along.get_ydata()) == [-3.0, -0.1]
    assert (point_across.get_xydata().tolist(), point_along.get_xydata().tolist()) == ([[-0.9, 7.0]], [[7.0, -0.9]])


def test_no_word_of_a_figure_is_cut_off_or_overlaps(tmp_path: Path):
    names = {"base": "Qwen2.5-1.5B-Instruct-DAPO-step-1200-of-2000", "step-1200-of-2000": "/models/$x_{$\n" + 300 * "y"}
    dumps = {
        tag: planted.write_heavy_tailed_dump(tmp_path / tag, seed=seed, model_path=name)
        for seed, (tag, name) in enumerate(names.items())
    }
    dumps["none"] = planted.write_dump(tmp_path / "none", np.ones((0, 96)), np.zeros(0, int))
    summary = run_exp2(tmp_path / "out", *(f"{tag}={dump}" for tag, dump in dumps.items()))
    for tags in (["base"], ["none"], list(summary)):
        for name, figure in draw_exp2({tag: summary[tag] for tag in tags}).items():
            assert_nothing_is_cut_off(figure, name)
            shown = [ax for ax in figure.axes if ax.get_visible()]
            labels = [axis.label for ax in shown if ax.axison for axis in (ax.xaxis, ax.yaxis)]
            texts = [*figure.texts, *(text for ax in shown for text in ax.texts), *labels]
            boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
            assert len(boxes) > 3
            clashes = [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)]
            assert not clashes, name


def test_the_histogram_shows_the_bands_of_both_controls(tmp_path: Path):
    summary = run_exp2(tmp_path, write_exp2_dump(tmp_path / "dump", 12 * [4], 8, 0))
    figure = draw_exp2({None: summary})[HISTOGRAM]
    ends = sorted(line.get_xdata()[0] for line in figure.axes[1].lines if line.get_linestyle() == "--")
    assert ends == summary["control_within_group_by_rollout"]["band"]
    mean = f"{summary['correct_vs_incorrect']['mean']:.2f}".replace("-", "−")
    assert f"mean cosine {mean}" in texts_of(figure)


def test_a_rollout_that_is_both_correct_and_incorrect_is_bad_input(tmp_path: Path, capsys):
    dump = planted.write_dump(tmp_path / "dump", np.eye(4), np.full(4, 4), correct=np.arange(4) < 2)
    assert analyze_exp2_direction.main(["--output-dir", str(tmp_path / "out"), str(dump)]) == 2
    error = capsys.readouterr().err
    assert f"{dump / 'meta.jsonl'}: the rollout of prompt_idx 0, sample_idx 0 is called both" in error
    assert error.count("\n") == 1


def test_other_targets_add_their_rho_to_the_replication(tmp_path: Path, capsys):
    for name in ("L1.mlp.down_proj.weight.r0", "L1.mlp.down_proj.weight.r1"):
        write_exp2_dump(tmp_path / "dump" / name, 6 * [2])
    summary = run_exp2(tmp_path, tmp_path / "dump")
    spread = summary["replication"]["rho"]
    assert spread["values"] == 2 * [summary["alignment"]["rho"]]
    assert (spread["n"], spread["std"]) == (2, 0)
    assert "over targets" in capsys.readouterr().out


def test_one_reason_is_said_once():
    assert named_buckets([3]) == "bucket 3"
    assert named_buckets([4, 0, 1, 2, 6, 7]) == "buckets 0 to 2, 4, 6, 7"


def test_a_bucket_s_reasons_stand_below_the_table(tmp_path: Path):
    summary = run_exp2(tmp_path, write_exp2_dump(tmp_path / "dump", [0, 4]))
    answers, cosines, coupling = tables_of(None, summary)
    assert coupling.notes == ["can't be told: not every line of meta.jsonl has token_id and logprob"]
    assert answers.rows == []
    assert len(cosines.rows) == 5  # the controls
    assert answers.notes == [
        "buckets 0 to 4: can't tell: no prompt with rollouts of each kind",
        "buckets 0 to 4: underpowered: no prompt with 2 rollouts of each kind",
    ]
