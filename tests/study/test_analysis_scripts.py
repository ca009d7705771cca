"""The three analysis scripts on whole dumps: golden shards, degenerate dumps, bad input."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import planted
import pytest

import analyze_exp1_compression
import analyze_exp2_direction
import plot_exp12_intuitive

SHARDS = ("s0", "s1")
SUMMARIES = {"exp1_summary.json", "exp2_summary.json"}
ARRAYS = {"exp1_arrays.npz"}
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
        assert min(picture.shape[:2]) > 200
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
        assert {value for key, value in buckets[index].items() if key not in ("n", "norm")} == {None}
    assert buckets["1"]["participation_ratio"] == pytest.approx(1.0)
    cosines = exp1["base"]["cross_bucket_top1_cosine"]
    assert [row[3] for row in cosines] == cosines[3] == [None] * 5
    assert exp2["base"]["n_prompts_usable"] == 0
    assert set(exp2["base"]["correct_vs_incorrect"].values()) == {None}
    assert {exp2[tag]["alignment"]["verdict"] for tag in exp2} == {"underpowered"}
    assert exp2["base"]["control_within_group"] == {
        **dict.fromkeys(("mean", "median", "band")), "n": 0, "n_zero_mean": 0,
    }  # fmt: skip
    assert (exp2["trained"]["n_prompts_usable"], exp2["trained"]["n_prompts_zero_mean"]) == (1, 1)
    captured = capsys.readouterr()
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


PLOT_REFUSES = {
    "different buckets": (["a={five}", "b={four}"], "buckets can only be compared where their number is the same"),
    "both ways": (["--base", "{five}", "--trained", "{five}", "a={five}"], "--base and --trained and 'a="),
    "half of one": (["--base", "{five}"], "--trained is missing"),
    "no such dump": (["a={five}", "b=nowhere"], "nowhere/manifest.json: not a finished dump"),
}


@pytest.mark.parametrize("case", PLOT_REFUSES)
def test_plot_refuses_in_one_line_and_writes_nothing(case: str, tmp_path: Path, capsys):
    paths = {
        name: planted.write_dump(tmp_path / name, np.eye(bins), np.arange(bins), bins=bins)
        for name, bins in (("five", 5), ("four", 4))
    }
    arguments, message = PLOT_REFUSES[case]
    output = ["--output-dir", str(tmp_path / "figures")]
    assert plot_exp12_intuitive.main([*output, *(argument.format(**paths) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "figures").exists()


def test_a_dump_merged_by_the_original_scripts_is_read_with_a_warning(tmp_path: Path, capsys):
    dump = planted.write_dump(tmp_path / "old", np.eye(5), np.arange(5), shards=["s0", "s1"])
    assert analyze_exp1_compression.main([f"base={dump}"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "merge it again" in warnings[0]
