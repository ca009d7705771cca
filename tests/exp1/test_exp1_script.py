"""Exp 1's script: every key, planted verdicts, what the tables and figures say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest
from looking import assert_nothing_is_cut_off, texts_of

import analyze_exp1_compression
from gradprobe.analysis.inputs import about_study, open_dumps
from gradprobe.dump.consistency import load_dump
from gradprobe.exp1.measure import Exp1Settings, measure_dumps, sample_rollouts
from gradprobe.exp1.summary import tables_of
from gradprobe.figures.exp1 import draw_exp1

PER_BUCKET = {
    *("n", "participation_ratio", "participation_ratio_ci95", "top1_energy_frac", "effective_rank"),
    *("rank50", "rank90", "rank95", "rank99", "ess", "ess_ci95", "participation_ratio_isotropic"),
    *("participation_ratio_unit_norm", "participation_ratio_unit_norm_ci95"),
}
CROSS = {
    *("cross_bucket_top1_cosine", "cross_bucket_top1_repeats", "cross_bucket_overlap"),
    *("cross_bucket_ceiling", "cross_bucket_ceiling_detail", "cross_bucket_null"),
}
PER_TAG = {"n_positions", "row_dim", "target", "row_idx", "projection", "model", "manifest_sha256", "per_bucket"}
PER_TAG |= {"draws", "differences", "files", "layout", "bins", "norm_by_surprisal", "proxies"} | CROSS
FIGURES = {
    f"exp1_{name}.png" for name in ("headline", "bin4_energy", "cumulative_energy", "cross_bucket_cosine", "norms")
}
FEW = Exp1Settings(halves=50, matched=2, ceiling=2, null=2)


def write_low_rank_dump(path: Path, *, n_dims: int, seed: int, n_prompts: int = 12, **manifest) -> Path:
    """3 rollouts a prompt and 4 positions a bucket, in the first `n_dims` of 48 dimensions."""
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((n_prompts, 3, 5, 4)))
    grads = np.zeros((len(prompt), 48))
    grads[:, :n_dims] = np.random.default_rng(seed).standard_normal((len(prompt), n_dims))
    return planted.write_dump(path, grads, bucket, prompt=prompt, sample=sample, **manifest)


def run(output_dir: Path, **dumps: Path) -> dict:
    arguments = [f"{tag}={path}" for tag, path in dumps.items()]
    assert analyze_exp1_compression.main(["--output-dir", str(output_dir), *arguments]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"the summary holds {constant}")

    return json.loads((output_dir / "exp1_summary.json").read_text(), parse_constant=refuse)


def test_every_key_is_there_and_verdicts_are_those_planted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dumps = {tag: write_low_rank_dump(tmp_path / tag, n_dims=n, seed=n) for tag, n in (("base", 24), ("trained", 6))}
    dumps["again"] = write_low_rank_dump(tmp_path / "again", n_dims=24, seed=1)
    summary = run(tmp_path / "out", **dumps)
    assert set(summary["base"]) == PER_TAG
    assert set(summary["trained"]) == set(summary["again"]) == PER_TAG | {"compared_with", "paired_with"}
    for numbers in summary.values():
        assert all(set(bucket) == PER_BUCKET for bucket in numbers["per_bucket"].values())
        assert len(numbers["cross_bucket_ceiling"]) == len(numbers["cross_bucket_top1_repeats"]) == 5
        assert list(numbers["cross_bucket_overlap"]) == list(numbers["cross_bucket_null"]["overlap"]) == ["10"]
        assert set(numbers["cross_bucket_null"]) == {"top1_cosine", "overlap"}
        assert numbers["draws"] == {"halves": 2000, "matched": 20, "ceiling": 10, "null": 10, "seed": 0}
        bucket = numbers["per_bucket"]["4"]
        low, high = bucket["participation_ratio_unit_norm_ci95"]
        assert low < bucket["participation_ratio_unit_norm"] < high
        assert bucket["participation_ratio"] <= bucket["ess"]
    trained = summary["trained"]["compared_with"]["base"]
    assert {ratio["verdict"] for ratio in trained.values()} == {"smaller"}
    assert [ratio["n_prompts"] for ratio in trained.values()] == [12] * 5
    assert [ratio["verdict"] for ratio in summary["again"]["compared_with"]["base"].values()].count("can't tell") >= 3
    assert {file.name for file in (tmp_path / "out").iterdir()} == FIGURES | {"exp1_summary.json", "exp1_arrays.npz"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 85
    assert not any("wrote" in line or "steps" in line for line in lines)  # results alone
    start = lines.index(next(line for line in lines if line.startswith("trained over base: ")))
    assert [line.split()[-1] for line in lines[start + 2 : start + 7]] == ["smaller"] * 5


def test_other_numbers_of_buckets_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    few = planted.write_dump(tmp_path / "few", np.eye(6, 48), np.arange(6) % 3, bins=3)
    summary = run(tmp_path / "out", a=write_low_rank_dump(tmp_path / "a", n_dims=6, seed=0, n_prompts=4), few=few)
    assert summary["few"]["compared_with"] == {"a": None}
    assert "not compared: the number of buckets differs" in capsys.readouterr().out


def test_tags_without_common_prompts_are_said_not_to_be_compared_in_table_and_figure(tmp_path: Path):
    """The figure lost a panel in silence, and still said that it was at equal n."""
    a = write_low_rank_dump(tmp_path / "a", n_dims=6, seed=0, n_prompts=4)
    dump = load_dump(a)
    b = planted.write_dump(tmp_path / "b", dump.grads, dump.bin, prompt=dump.prompt + 50, sample=dump.sample_idx)
    dumps = open_dumps({"a": a, "b": b, "again": a})
    found = measure_dumps(dumps, FEW)
    assert found.numbers["b"]["compared_with"] == {"a": None}
    for tags, is_drawn in ((("a", "b"), False), (("a", "b", "again"), True)):
        parts = {tag: found.numbers[tag] for tag in tags}
        summary = about_study(parts, {tag: dumps[tag] for tag in tags}, {tag: [] for tag in tags})
        said = texts_of(draw_exp1(summary, found.arrays)["exp1_headline.png"])
        assert "b is not compared with a: no prompt is common to both" in said
        assert ("at equal n" in said) == is_drawn
        (table,) = [table for table in tables_of("b", summary["b"]) if "over a" in table.caption]
        assert "not compared: no prompt is common to both" in table.text()


@pytest.mark.parametrize("n_tags", [1, 2, 8])
def test_figures_say_what_the_summary_says(tmp_path: Path, n_tags: int):
    paths = {
        f"step-{i}-of-a-long-run": write_low_rank_dump(
            tmp_path / str(i), n_dims=6 + i, seed=i, n_prompts=5, model_path=f"m/Qwen2.5-1.5B-Instruct-DAPO-step-{i}"
        )
        for i in range(n_tags)
    }
    dumps = open_dumps(paths)
    found = measure_dumps(dumps, FEW)
    summary = about_study(found.numbers, dumps, {tag: [] for tag in dumps})
    figures = draw_exp1(json.loads(json.dumps(summary)), found.arrays)  # as it is read from a file
    for name, figure in figures.items():
        assert_nothing_is_cut_off(figure, name)
    said = {name: texts_of(figure) for name, figure in figures.items()}
    top = summary["step-0-of-a-long-run"]["per_bucket"]["4"]
    assert set(said) == FIGURES
    assert f": {top['participation_ratio_unit_norm']:.1f} [" in said["exp1_headline.png"]
    assert f": {top['rank95']} of 48" in said["exp1_bin4_energy.png"]
    assert f": {top['rank95']} of 48" in said["exp1_cumulative_energy.png"]
    if n_tags == 1:
        random = 60 / (1 + 59 / 48)
        assert f"{top['participation_ratio_unit_norm'] / random:.0%} of what random" in said["exp1_headline.png"]
    else:
        (ratios,) = summary["step-1-of-a-long-run"]["compared_with"].values()
        ratio = ratios["4"]
        assert f"{ratio['ratio']:.3f} [" in said["exp1_headline.png"]
        assert f"], {ratio['verdict']}" in said["exp1_headline.png"]


def test_an_empty_bucket_and_one_position_leave_nulls(tmp_path: Path):
    rng = np.random.default_rng(0)
    dump = planted.write_dump(tmp_path / "dump", rng.standard_normal((9, 8)), np.array([0] * 8 + [2]))
    summary = run(tmp_path / "out", base=dump, same=dump)
    numbers = summary["base"]
    assert {value for key, value in numbers["per_bucket"]["1"].items() if key != "n"} == {None}
    assert numbers["cross_bucket_ceiling"] == numbers["cross_bucket_top1_repeats"] == [None] * 5
    assert numbers["cross_bucket_overlap"]["10"] == [[None] * 5] * 5
    ratios = summary["same"]["compared_with"]["base"]
    assert [ratios[index] for index in "134"] == [None] * 3
    assert ratios["2"]["ci95"] is None
    assert ratios["2"]["verdict"] == "can't tell"


def test_further_targets_have_unit_norm_ratios_that_a_run_of_their_own_gives(tmp_path: Path):
    names = ["L1.mlp.down_proj.weight.r0", "L2.mlp.down_proj.weight.r0"]
    paths = [write_low_rank_dump(tmp_path / "study" / name, n_dims=9, seed=i) for i, name in enumerate(names)]
    together = run(tmp_path / "together", base=tmp_path / "study")["base"]["replication"]
    alone = run(tmp_path / "alone", second=paths[1])["second"]["per_bucket"]
    assert together["targets"] == names
    for measure in ("participation_ratio", "participation_ratio_unit_norm", "rank95"):
        for bucket, numbers in alone.items():
            assert together[measure][bucket]["values"][1] == pytest.approx(numbers[measure], rel=1e-9)


def test_norms_are_drawn_against_surprisal_only_where_it_is_known(tmp_path: Path):
    (dump,) = open_dumps({"old": write_low_rank_dump(tmp_path / "old", n_dims=6, seed=0, n_prompts=4)})["old"]
    surprisal = np.random.default_rng(0).exponential(size=len(dump.grads))
    for logprob, n_panels in ((None, 1), (-surprisal, 2), (0 * surprisal, 1)):
        dumps = {"old": [replace(dump, logprob=logprob)]}
        found = measure_dumps(dumps, FEW)
        figure = draw_exp1(about_study(found.numbers, dumps, {"old": []}), found.arrays)["exp1_norms.png"]
        figure.canvas.draw()
        assert len(figure.axes) == n_panels
        assert any("surprisal" in ax.get_xlabel() for ax in figure.axes) == (n_panels == 2)


def test_a_leading_direction_repeats_where_one_is_planted(tmp_path: Path):
    rng = np.random.default_rng(0)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((12, 3, 5, 4)))
    grads = rng.standard_normal((len(prompt), 48))
    grads[:, 0] += np.where(bucket == 1, 6.0, 0.0)
    path = planted.write_dump(tmp_path / "dump", grads, bucket, prompt=prompt, sample=sample)
    found = run(tmp_path / "out", base=path)["base"]["cross_bucket_top1_repeats"]
    assert found[1] == "yes"
    assert "yes" not in [found[i] for i in (0, 2, 3, 4)]


def test_prompts_are_matched_by_key_not_by_place(tmp_path: Path):
    """The same rows under the same prompts, of which the second dump lacks some: the ratio is of what both have."""
    first = write_low_rank_dump(tmp_path / "first", n_dims=9, seed=0)
    keep = load_dump(first).prompt >= 4
    dump = load_dump(first)
    second = planted.write_dump(
        tmp_path / "second", dump.grads[keep], dump.bin[keep], prompt=dump.prompt[keep], sample=dump.sample_idx[keep]
    )
    dumps = open_dumps({"first": first, "second": second})
    found = measure_dumps(dumps, FEW).numbers
    assert [one["n_prompts"] for one in found["second"]["compared_with"]["first"].values()] == [8] * 5
    (whole,), (shared,) = dumps.values()
    alike = whole.only(np.flatnonzero(whole.prompt >= 4))
    of_shared = measure_dumps({"first": [alike], "second": [shared]}, FEW).numbers
    for before, after in zip(*(one["per_bucket"].values() for one in of_shared.values()), strict=True):
        assert after["participation_ratio"] == pytest.approx(before["participation_ratio"])


def test_of_many_rollouts_the_same_random_ones_are_taken_from_dumps_of_the_same_prompts(tmp_path: Path):
    dumps = [load_dump(write_low_rank_dump(tmp_path / tag, n_dims=6, seed=i)) for i, tag in enumerate("ab")]
    first, second = (sample_rollouts(dump, most=10) for dump in dumps)
    kept = set(zip(first.prompt.tolist(), first.sample_idx.tolist(), strict=True))
    assert len(kept) == 10
    assert kept == set(zip(second.prompt.tolist(), second.sample_idx.tolist(), strict=True))
    assert len(first.grads) == 10 * 5 * 4  # whole rollouts
    np.testing.assert_array_equal(first.grads[np.arange(200)], dumps[0].grads[first.row])
    assert "Exp 1 takes 10 of the 36 rollouts, drawn at random" in first.warnings[-1]
    assert len({tuple(sample_rollouts(dumps[0], most=10, seed=seed).row) for seed in range(5)}) == 5
    assert sample_rollouts(dumps[0], most=36) is dumps[0]
