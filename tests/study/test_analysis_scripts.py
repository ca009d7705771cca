"""The three analysis scripts on whole dumps: golden shards, degenerate dumps, bad input."""

import dataclasses
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import planted
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text

import analyze_exp1_compression
import analyze_exp2_direction
import plot_exp12_intuitive
from gradprobe.dump.consistency import load_dump
from gradprobe.exp1.measure import Exp1Settings, measure_dumps
from gradprobe.exp2.measure import bucket_directions
from gradprobe.figures import exp1 as figures_compression
from gradprobe.figures import exp2 as figures_direction
from gradprobe.figures.headlines import draw_headlines
from gradprobe.figures.inputs import Headlines, compression_of
from gradprobe.figures.look import subjects_of

SHARDS = ("s0", "s1")
SUMMARIES = {"exp1_summary.json", "exp2_summary.json"}
ARRAYS = {"exp1_arrays.npz", "exp2_arrays.npz"}
FIGURES = {
    "exp1_cumulative_energy.png",
    "exp1_cross_bucket_cosine.png",
    "exp2_alignment.png",
    "exp2_direction_cosine_hist.png",
    "exp1_headline.png",
    "exp1_bin4_energy.png",
    "exp1_norms.png",
    "exp2_headline.png",
}


def run_all(base: Path, trained: Path, output_dir: Path) -> tuple[dict, dict]:
    """Run the three scripts on two dumps, look into every figure, return both summaries."""
    tagged = [f"base={base}", f"trained={trained}"]
    assert analyze_exp1_compression.main(["--output-dir", str(output_dir), *tagged]) == 0
    assert analyze_exp2_direction.main(["--output-dir", str(output_dir), *tagged]) == 0
    arguments = ["--base", str(base), "--trained", str(trained), "--output-dir", str(output_dir)]
    assert plot_exp12_intuitive.main(arguments) == 0
    assert {file.name for file in output_dir.iterdir()} == SUMMARIES | ARRAYS | FIGURES | {"report.html"}
    for name in FIGURES:
        picture = matplotlib.image.imread(output_dir / name)
        assert min(picture.shape[:2]) > 600
        assert (picture[..., :3].min(axis=2) < 0.9).mean() > 0.005, f"{name} is blank"
    return read_strict(output_dir / "exp1_summary.json"), read_strict(output_dir / "exp2_summary.json")


def read_strict(file: Path) -> dict:
    """JSON as the standard has it: NaN is refused."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{file} holds {constant}")

    return json.loads(file.read_text(), parse_constant=refuse)


def labels_of(folder: Path, by_row: bool) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: line["row"]) if by_row else lines


def participation_ratios(folder: Path, by_row: bool) -> list[float]:
    """Participation ratio per bucket by numpy's SVD and nothing of ours."""
    grads = np.load(folder / "grads.npy").astype(np.float64)
    bucket = np.array([line["bin"] for line in labels_of(folder, by_row)])
    energies = [np.linalg.svd(grads[bucket == index], compute_uv=False) ** 2 for index in range(5)]
    return [(energy.sum() ** 2 / (energy**2).sum()) for energy in energies]


def prompt_cosines(folder: Path, by_row: bool) -> dict[int, float]:
    """Exp 2's cosines by a plain loop and nothing of ours."""
    grads = np.load(folder / "grads.npy").astype(np.float64)
    groups: dict[tuple[int, bool], list[np.ndarray]] = {}
    for gradient, line in zip(grads, labels_of(folder, by_row), strict=True):
        if line["bin"] == 4:
            groups.setdefault((line["prompt_idx"], line["correct"]), []).append(gradient)
    cosines = {}
    for prompt in sorted({prompt for prompt, _ in groups}):
        kinds = [groups.get((prompt, correct), []) for correct in (True, False)]
        if min(map(len, kinds)) >= 2:
            a, b = (np.mean(kind, axis=0) for kind in kinds)
            cosines[prompt] = a @ b / np.sqrt((a @ a) * (b @ b))
    return cosines


def test_golden_shards_give_the_same_aligned_and_scrambled_and_by_plain_numpy(tmp_path: Path):
    found = {
        order: run_all(*(planted.GOLDEN / order / shard for shard in SHARDS), tmp_path / order)
        for order in ("aligned", "scrambled")
    }
    assert found["aligned"] == found["scrambled"]
    for name in FIGURES:  # also: the same data give the same bytes every time
        assert (tmp_path / "aligned" / name).read_bytes() == (tmp_path / "scrambled" / name).read_bytes(), name
    exp1, exp2 = found["scrambled"]
    for tag, shard in zip(("base", "trained"), SHARDS, strict=True):
        folder = planted.GOLDEN / "scrambled" / shard
        ratios = [bucket["participation_ratio"] for bucket in exp1[tag]["per_bucket"].values()]
        np.testing.assert_allclose(ratios, participation_ratios(folder, by_row=True), rtol=1e-9)
        cosines = {prompt["prompt_idx"]: prompt["cos_correct_vs_incorrect"] for prompt in exp2[tag]["per_prompt"]}
        assert cosines == pytest.approx(prompt_cosines(folder, by_row=True), rel=1e-9)
        assert exp2[tag]["n_prompts_usable"] == len(cosines)
        assert exp2[tag]["correct_vs_incorrect"]["mean"] == pytest.approx(np.mean(list(cosines.values())), rel=1e-9)


def test_labels_by_line_number_would_give_other_numbers():
    for shard in SHARDS:
        folder = planted.GOLDEN / "scrambled" / shard
        right, wrong = (participation_ratios(folder, by_row) for by_row in (True, False))
        assert np.abs(np.array(wrong) / right - 1).max() > 0.2
        assert prompt_cosines(folder, by_row=True) != pytest.approx(prompt_cosines(folder, by_row=False), rel=0.1)


def test_one_untagged_dump_is_not_keyed_by_tag(tmp_path: Path):
    dump = planted.GOLDEN / "aligned" / "s0"
    assert analyze_exp2_direction.main(["--output-dir", str(tmp_path), str(dump)]) == 0
    summary = read_strict(tmp_path / "exp2_summary.json")
    assert summary["run_dir"] == "s0"
    assert summary["model"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert summary["target"] == "model.layers.14.mlp.down_proj.weight"
    assert set(summary["control_within_group"]) >= {"mean", "median", "n"}


def test_results_go_beside_the_first_dump_by_default(tmp_path: Path):
    dump = planted.write_dump(tmp_path / "study" / "exp12_base", np.eye(5), np.arange(5))
    assert analyze_exp1_compression.main([f"base={dump}"]) == 0
    assert analyze_exp2_direction.main([str(dump)]) == 0
    assert (tmp_path / "study" / "exp12_figures" / "exp1_summary.json").is_file()
    assert (tmp_path / "study" / "exp12_figures" / "exp2_summary.json").is_file()


def test_degenerate_dumps_give_nulls_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(0)
    bucket = np.repeat([0, 1, 2, 4], [10, 1, 12, 6])  # bucket 3 is empty, bucket 1 has one position
    grads = rng.standard_normal((29, 24))
    grads[:10] = 0
    base = planted.write_dump(tmp_path / "base", grads, bucket, prompt=np.arange(29) % 12)
    kinds = np.arange(40) // 10 % 2 == 0
    signs = np.where(np.arange(40) // 5 % 2 == 0, 1.0, -1.0)  # tokens of a rollout and bucket cancel each other
    cancelling = planted.write_dump(
        tmp_path / "cancelling",
        signs[:, None] * np.ones(24),
        np.arange(40) % 5,
        sample=np.arange(40) // 10,
        correct=kinds,
    )
    exp1, exp2 = run_all(base, cancelling, tmp_path / "figures")

    buckets = exp1["base"]["per_bucket"]
    assert [buckets[str(index)]["n"] for index in range(5)] == [0, 1, 12, 0, 6]
    for index in "03":
        assert {value for key, value in buckets[index].items() if key != "n"} == {None}
    assert buckets["1"]["participation_ratio"] == pytest.approx(1.0)
    cosines = exp1["base"]["cross_bucket_top1_cosine"]
    assert [row[3] for row in cosines] == cosines[3] == [None] * 5
    assert exp2["base"]["n_prompts_usable"] == 0
    assert set(exp2["base"]["correct_vs_incorrect"].values()) == {None}
    assert {exp2[tag]["alignment"]["verdict"] for tag in exp2} == {"underpowered"}
    assert exp2["base"]["control_within_group"] == {"mean": None, "median": None, "n": 0, "n_zero_mean": 0}
    assert (exp2["trained"]["n_prompts_usable"], exp2["trained"]["n_prompts_zero_mean"]) == (1, 1)
    captured = capsys.readouterr()
    assert "left out because a mean gradient is zero: 1 prompts" in captured.out
    assert "10 rows that are zero throughout are left out (0, 1, 2" in captured.err


@pytest.mark.parametrize("n", [0, 1])
def test_a_dump_of_none_or_one_position(tmp_path: Path, n: int):
    dump = planted.write_dump(tmp_path / "dump", np.ones((n, 6)), np.full(n, 4))
    exp1, exp2 = run_all(dump, dump, tmp_path / "figures")
    assert exp1["base"]["n_positions"] == n
    assert exp1["base"]["per_bucket"]["4"]["rank95"] == (1 if n else None)
    assert exp2["trained"]["n_prompts_usable"] == 0


@pytest.mark.parametrize("bins", [2, 20])
def test_any_number_of_buckets(tmp_path: Path, bins: int):
    rng = np.random.default_rng(0)
    bucket = np.arange(20 * bins) % bins
    dump = planted.write_dump(tmp_path / "dump", rng.standard_normal((20 * bins, 8)), bucket, bins=bins)
    exp1, exp2 = run_all(dump, dump, tmp_path / "figures")
    assert list(exp1["base"]["per_bucket"]) == [str(index) for index in range(bins)]
    assert exp2["base"]["bucket"] == bins - 1


def test_heavy_tailed_dumps_and_names_that_look_like_formulas(tmp_path: Path):
    base = planted.write_heavy_tailed_dump(tmp_path / "base", seed=1)
    trained = planted.write_heavy_tailed_dump(tmp_path / "trained", seed=2, model_path="/models/$x_{$\n" + 300 * "y")
    exp1, exp2 = run_all(base, trained, tmp_path / "figures")
    assert exp1["base"]["per_bucket"]["0"]["participation_ratio"] < 10
    assert exp2["base"]["correct_vs_incorrect"]["mean"] < -0.2 < exp2["base"]["control_within_group"]["mean"]


def test_no_title_label_or_legend_is_cut_off(tmp_path: Path):
    name = "Qwen2.5-1.5B-Instruct-DAPO-step-1200-of-2000"
    dumps = {
        tag: load_dump(planted.write_heavy_tailed_dump(tmp_path / tag, seed=seed, model_path=name))
        for seed, tag in enumerate(("base", "trained"))
    }
    results, compared = measure_dumps(dumps, Exp1Settings(ceiling=2, null=2))
    found = {tag: compression_of(dump, results[tag]) for tag, dump in dumps.items()}
    buckets = [[bucket_directions(dump, b) for b in range(dump.bins)] for dump in dumps.values()]
    directions = [of_dump[-1] for of_dump in buckets]
    subjects = subjects_of(dumps)
    drawn = draw_headlines(dumps, Headlines(found, compared, dict(zip(dumps, directions, strict=True))))
    drawn |= figures_compression.draw_analysis(dumps, results)
    drawn |= {
        f"one of them: {name}": figure
        for name, figure in figures_compression.draw_analysis(
            *({"base": found["base"]} for found in (dumps, results))
        ).items()
    }
    drawn |= figures_direction.draw_analysis(dumps, buckets)
    drawn["one histogram"] = figures_direction.draw_direction_histogram(subjects[:1], directions[:1])
    alignments = [[found.alignment for found in of_dump] for of_dump in buckets]
    drawn["one alignment"] = figures_direction.draw_alignment(subjects[:1], [alignments[0][:1]])
    drawn["many alignments"] = figures_direction.draw_alignment(subjects, [4 * found for found in alignments])
    for name, figure in drawn.items():
        figure.canvas.draw()
        page = figure.bbox.padded(1)
        axes = figure.findobj(Axes)
        ticks = {tick for ax in axes for tick in (*ax.get_xticklabels(), *ax.get_yticklabels())}
        for text in set(figure.findobj(Text)) - ticks:
            if text.get_text():
                box = text.get_window_extent()
                assert page.x0 <= box.x0 <= box.x1 <= page.x1, f"{name}: {text.get_text()!r} is cut off"
                assert page.y0 <= box.y0 <= box.y1 <= page.y1, f"{name}: {text.get_text()!r} is cut off"
        assert not overlapping([ax.title for ax in axes] + [ax._left_title for ax in axes]), name
        assert all(ax.get_title(loc="left").count("\n") <= 1 for ax in axes), f"{name}: a title of more than two lines"


def overlapping(texts: list[Text]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)]


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
}
ALIGNMENT = {"n_prompts", "rho", "ci95", "p_value", "min_detectable", "signal_correct", "signal_incorrect", "verdict"}
ALIGNMENT |= {"reason"}
CANCELLATION = {"n_prompts", "ratio", "null_mean", "null_ci95", "p_value"}


def write_exp2_dump(path: Path, n_correct: list[int], n_rollouts: int = 4, planted_rho: int = 1) -> Path:
    """Rollouts of 4 tokens a bucket; those of a prompt and kind share a direction, both kinds' at `planted_rho`."""
    rng = np.random.default_rng(3)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((len(n_correct), n_rollouts, 5, 4)))
    correct = sample < np.array(n_correct)[prompt]
    one, other = rng.standard_normal((2, len(n_correct), 64))
    kinds = np.stack([planted_rho * one + np.sqrt(1 - planted_rho**2) * other, one])
    grads = 0.4 * kinds[correct.astype(int), prompt] + rng.standard_normal((len(prompt), 64))
    return planted.write_dump(path, grads, bucket, prompt=prompt, sample=sample, correct=correct)


def run_exp2(dump: Path, output_dir: Path) -> dict:
    assert analyze_exp2_direction.main(["--output-dir", str(output_dir), str(dump)]) == 0
    return read_strict(output_dir / "exp2_summary.json")


EXP2_STUDIES = {  # correct rollouts of each prompt, rollouts of each prompt, and what there is
    "no usable prompt": ([0, 4], 4, set()),
    "all correct": ([4, 4, 4], 4, set()),
    "one rollout of each kind": ([1, 1, 1], 2, {"cosine", "cancellation"}),
    "one rollout a prompt": ([1, 0, 1], 1, set()),
    "one usable prompt": ([2, 4, 0], 4, {"cosine", "rho", "cancellation"}),
    "several": ([2, 3, 2, 1, 2, 2], 5, {"cosine", "rho", "ci95", "cancellation"}),
}


@pytest.mark.parametrize("case", EXP2_STUDIES)
def test_exp2_has_every_key_in_every_bucket_and_null_where_there_is_no_number(case, tmp_path: Path, capsys):
    n_correct, n_rollouts, there = EXP2_STUDIES[case]
    summary = run_exp2(write_exp2_dump(tmp_path / "dump", n_correct, n_rollouts), tmp_path)
    assert list(summary["by_bucket"]) == list("01234")
    assert {key: summary[key] for key in MEASURES} == summary["by_bucket"]["4"]
    assert summary["draws"] == {"bootstrap": 4000, "permutations": 9999}
    for found in summary["by_bucket"].values():
        assert set(found) == MEASURES
        assert set(found["alignment"]) == ALIGNMENT
        assert set(found["cancellation"]) == CANCELLATION | {"group_normalised"}
        assert set(found["cancellation"]["group_normalised"]) == CANCELLATION
        assert set(found["control_within_group_by_rollout"]) == {"mean", "median", "n", "n_zero_mean"}
        numbers = {
            "cosine": found["correct_vs_incorrect"]["mean"],
            "rho": found["alignment"]["rho"],
            "ci95": found["alignment"]["ci95"],
            "cancellation": found["cancellation"]["p_value"],
        }
        assert {name for name, number in numbers.items() if number is not None} == there
        assert (found["alignment"]["verdict"] == "underpowered") == ("ci95" not in there)
        assert (found["alignment"]["reason"] is None) == ("ci95" in there)
        assert (found["alignment"]["p_value"] is None) == ("rho" not in there)
    assert "nan" not in capsys.readouterr().out.lower().split()


@pytest.mark.parametrize(("planted_rho", "verdict"), [(1, "aligned"), (0, "orthogonal"), (-1, "opposed")])
def test_planted_directions_get_their_verdict_in_summary_table_and_figure(planted_rho, verdict, tmp_path, capsys):
    dump = write_exp2_dump(tmp_path / "dump", 25 * [4], 8, planted_rho)
    found = run_exp2(dump, tmp_path)["alignment"]
    assert found["verdict"] == verdict
    assert abs(found["rho"] - planted_rho) < found["min_detectable"] < 0.2  # 2.8 standard errors
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sum(line[:1] == ["4"] and line[-1] == verdict for line in lines) == 1
    loaded = load_dump(dump)
    result = bucket_directions(loaded, 4)
    headline = figures_direction.draw_direction_headline(subjects_of({None: loaded}), [result])
    titles = "\n".join(ax.get_title(loc="left") for ax in headline.axes)
    assert f"n = 25 prompts: {verdict}" in titles


def test_a_view_that_cuts_an_interval_says_so(tmp_path: Path):
    dump = load_dump(write_exp2_dump(tmp_path / "dump", [2, 2, 2], 4))
    alignments = [bucket_directions(dump, bucket).alignment for bucket in range(5)]
    far = [dataclasses.replace(alignments[0], rho=0.9, ci95=(-2.5, 1.1), min_detectable=1.5, verdict="underpowered")]
    for drawn, cut in ((far, True), ([dataclasses.replace(far[0], ci95=(-1.5, 1.1))], False)):
        ax = figures_direction.draw_alignment(subjects_of({None: dump}), [drawn]).axes[0]
        assert ("view cut at ±1.5: 1 of" in ax.get_xlabel()) == cut
        assert ax.get_ylim()[1] <= 1.5


@pytest.mark.parametrize(
    ("rho", "marker", "shown"), [(0.3, "o", 0.3), (3.4, "^", 1.44), (-9.0, "v", -1.44), (None, None, None)]
)
def test_a_rho_without_interval_is_a_hollow_point_inside_the_axes(rho, marker, shown, tmp_path: Path):
    dump = load_dump(write_exp2_dump(tmp_path / "dump", [2, 2, 2], 4))
    alone = dataclasses.replace(
        bucket_directions(dump, 4).alignment, rho=rho, ci95=None, min_detectable=None, verdict="underpowered"
    )
    far = dataclasses.replace(alone, rho=0.0, ci95=(-2.0, 2.0), min_detectable=1.0)
    ax = figures_direction.draw_alignment(subjects_of({None: dump}), [[alone, far]]).axes[0]
    points = [(line.get_marker(), line.get_ydata()[0]) for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert points[:-1] == ([] if marker is None else [(marker, pytest.approx(shown))])
    assert any(text.get_text() == "no ρ: no signal" for text in ax.texts) == (rho is None)
    assert "1 without a finite interval" in ax.get_xlabel()


def test_no_figure_repeats_the_histogram(tmp_path: Path):
    dump = load_dump(write_exp2_dump(tmp_path / "dump", [2, 2, 2], 4))
    headline = figures_direction.draw_direction_headline(subjects_of({None: dump}), [bucket_directions(dump, 4)])
    (ax,) = headline.axes
    assert ax.get_ylabel() == "cos(correct, incorrect)"
    assert "control by tokens" in ax.get_xlabel()


def test_a_rollout_that_is_both_correct_and_incorrect_is_bad_input(tmp_path: Path, capsys):
    dump = planted.write_dump(tmp_path / "dump", np.eye(4), np.full(4, 4), correct=np.arange(4) < 2)
    assert analyze_exp2_direction.main(["--output-dir", str(tmp_path / "out"), str(dump)]) == 2
    error = capsys.readouterr().err
    assert f"{dump / 'meta.jsonl'}: the rollout of prompt_idx 0, sample_idx 0 is called both" in error
    assert error.count("\n") == 1


def test_other_targets_add_their_rho_to_the_replication(tmp_path: Path):
    for name in ("L1.mlp.down_proj.weight.r0", "L1.mlp.down_proj.weight.r1"):
        write_exp2_dump(tmp_path / "dump" / name, 6 * [2])
    summary = run_exp2(tmp_path / "dump", tmp_path)
    spread = summary["replication"]["rho"]
    assert spread["values"] == 2 * [summary["alignment"]["rho"]]
    assert (spread["n"], spread["std"]) == (2, 0)


BAD_INPUT = {
    "no such dump": lambda good, tmp: [f"a={tmp / 'nowhere'}"],
    "one good, one bad": lambda good, tmp: [f"a={good}", f"b={tmp / 'nowhere'}"],
    "tag twice": lambda good, tmp: [f"a={good}", f"a={good}"],
    "a tag is missing": lambda good, tmp: [str(good), f"a={good}"],
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("script", [analyze_exp1_compression, analyze_exp2_direction], ids=["exp1", "exp2"])
def test_bad_input_is_status_2_in_one_line_and_nothing_overwritten(script, case, tmp_path: Path, capsys):
    good = planted.write_dump(tmp_path / "good", np.eye(5), np.arange(5))
    output_dir = tmp_path / "figures"
    output_dir.mkdir()
    for name in SUMMARIES | FIGURES:
        (output_dir / name).write_text("before")
    assert script.main(["--output-dir", str(output_dir), *BAD_INPUT[case](good, tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert {file.read_text() for file in output_dir.iterdir()} == {"before"}


def test_plot_refuses_different_buckets(tmp_path: Path):
    base = planted.write_dump(tmp_path / "base", np.eye(5), np.arange(5))
    other_bins = planted.write_dump(tmp_path / "bins", np.eye(4), np.arange(4), bins=4)
    output = ["--output-dir", str(tmp_path / "figures")]
    assert plot_exp12_intuitive.main(["--base", str(base), "--trained", str(other_bins), *output]) == 2
    assert not (tmp_path / "figures").exists()


def test_a_dump_merged_by_the_original_scripts_is_read_with_a_warning(tmp_path: Path, capsys):
    dump = planted.write_dump(tmp_path / "old", np.eye(5), np.arange(5), shards=["s0", "s1"])
    assert analyze_exp1_compression.main([f"base={dump}"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "merge it again" in warnings[0]
