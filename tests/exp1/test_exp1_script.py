"""Exp 1's script: every key, planted verdicts, what the tables and figures say."""

import json
from pathlib import Path

import numpy as np
import planted
import pytest

import analyze_exp1_compression
from gradprobe.analysis.inputs import open_dumps
from gradprobe.dump.consistency import load_dump
from gradprobe.exp1.measure import Exp1Settings, chance_outside_null, measure_dumps, place_in_null, sample_rollouts
from gradprobe.figures import exp1 as figures_compression
from gradprobe.figures.look import subjects_of

PER_BUCKET = {
    *("n", "participation_ratio", "participation_ratio_ci95", "top1_energy_frac", "effective_rank", "matched_n"),
    *("rank50", "rank90", "rank95", "rank99", "ess", "ess_ci95", "participation_ratio_isotropic"),
    *("participation_ratio_unit_norm", "participation_ratio_unit_norm_ci95"),
}
CROSS = {
    *("cross_bucket_top1_cosine", "cross_bucket_top1_repeats", "cross_bucket_overlap", "cross_bucket_captured_energy"),
    *("cross_bucket_ceiling", "cross_bucket_ceiling_detail", "cross_bucket_null"),
}
PER_TAG = {"n_positions", "row_dim", "target", "row_idx", "projection", "model", "manifest_sha256", "per_bucket"}
PER_TAG |= {"draws", "differences", "content_sha256"} | CROSS
SIZES = ["1", "5", "10", "20"]


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
        assert {bucket["matched_n"]["n"] for bucket in numbers["per_bucket"].values()} == {144}
        assert len(numbers["cross_bucket_ceiling"]) == len(numbers["cross_bucket_top1_repeats"]) == 5
        assert list(numbers["cross_bucket_overlap"]) == list(numbers["cross_bucket_captured_energy"]) == SIZES
        assert set(numbers["cross_bucket_null"]) == {"top1_cosine", "overlap", "captured"}
        bucket = numbers["per_bucket"]["4"]
        low, high = bucket["participation_ratio_unit_norm_ci95"]
        assert low < bucket["participation_ratio_unit_norm"] < high
        assert bucket["participation_ratio"] <= bucket["ess"]
    trained = summary["trained"]["compared_with"]["base"]
    assert {ratio["verdict"] for ratio in trained.values()} == {"smaller"}
    assert [ratio["n_prompts"] for ratio in trained.values()] == [12] * 5
    assert [ratio["verdict"] for ratio in summary["again"]["compared_with"]["base"].values()].count("can't tell") >= 3
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("trained over base: ")))
    assert [line.split()[-1] for line in lines[start + 2 : start + 7]] == ["smaller"] * 5


def test_other_numbers_of_buckets_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    few = planted.write_dump(tmp_path / "few", np.eye(6, 48), np.arange(6) % 3, bins=3)
    summary = run(tmp_path / "out", a=write_low_rank_dump(tmp_path / "a", n_dims=6, seed=0, n_prompts=4), few=few)
    assert summary["few"]["compared_with"] == {"a": None}
    assert "the number of buckets differs" in capsys.readouterr().out


def test_an_empty_bucket_and_one_position_leave_nulls(tmp_path: Path):
    rng = np.random.default_rng(0)
    dump = planted.write_dump(tmp_path / "dump", rng.standard_normal((9, 8)), np.array([0] * 8 + [2]))
    summary = run(tmp_path / "out", base=dump, same=dump)
    numbers = summary["base"]
    assert numbers["per_bucket"]["1"]["matched_n"] == {
        "n": 1, "participation_ratio": None, "participation_ratio_unit_norm": None, "rank95": None
    }  # fmt: skip
    assert numbers["cross_bucket_ceiling"] == numbers["cross_bucket_top1_repeats"] == [None] * 5
    assert numbers["cross_bucket_overlap"]["20"] == [[None] * 5] * 5
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
    dumps = {"old": load_dump(write_low_rank_dump(tmp_path / "old", n_dims=6, seed=0, n_prompts=4))}
    results, _ = measure_dumps(dumps, Exp1Settings(ceiling=2, null=2))
    rng = np.random.default_rng(0)
    dump = dumps["old"]
    norm = np.linalg.norm(dump.grads, axis=1)
    for surprisal, n_panels in ((None, 2), (rng.exponential(size=len(norm)), 3), (np.zeros(len(norm)), 3)):
        rows = [figures_compression.Norms(dump.bin, norm, surprisal)]
        figure = figures_compression.draw_norms(subjects_of(dumps), list(results.values()), rows)
        figure.canvas.draw()
        assert len(figure.axes) == n_panels
        assert any("surprisal" in ax.get_xlabel() for ax in figure.axes) == (surprisal is not None)


def test_a_leading_direction_repeats_where_one_is_planted(tmp_path: Path):
    rng = np.random.default_rng(0)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((12, 3, 5, 4)))
    grads = rng.standard_normal((len(prompt), 48))
    grads[:, 0] += np.where(bucket == 1, 6.0, 0.0)
    path = planted.write_dump(tmp_path / "dump", grads, bucket, prompt=prompt, sample=sample)
    found = run(tmp_path / "out", base=path)["base"]["cross_bucket_top1_repeats"]
    assert found[1] == "yes"
    assert "yes" not in [found[i] for i in (0, 2, 3, 4)]


def test_place_in_null():
    null = np.append(np.linspace(0.2, 0.4, 100), np.nan)
    assert [place_in_null(value, null) for value in (0.1, 0.3, 0.5, np.nan)] == [-1, 0, 1, 0]
    assert place_in_null(0.3 + 1e-7, np.full(10, 0.3)) == 0
    assert place_in_null(0.3, np.full(3, np.nan)) == 0


def test_chance_outside_null():
    drawn = np.random.default_rng(0).random((4000, 11))
    found = np.mean([place_in_null(row[0], row[1:]) != 0 for row in drawn])
    assert chance_outside_null(10) == pytest.approx(found, abs=0.02)


def test_prompts_are_matched_by_key_not_by_place(tmp_path: Path):
    """The same rows under the same prompts, of which the second dump lacks some: the ratio is of what both have."""
    first = write_low_rank_dump(tmp_path / "first", n_dims=9, seed=0)
    keep = load_dump(first).prompt >= 4
    dump = load_dump(first)
    second = planted.write_dump(
        tmp_path / "second", dump.grads[keep], dump.bin[keep], prompt=dump.prompt[keep], sample=dump.sample_idx[keep]
    )
    dumps = {tag: targets[0] for tag, targets in open_dumps({"first": first, "second": second}).items()}
    results, compared = measure_dumps(dumps, Exp1Settings(ceiling=1, null=1))
    assert [ratio.n_prompts for ratio in compared["second"].ratios] == [8] * 5
    assert results["second"].sums == []
    alike, shared = dumps["first"].only(np.flatnonzero(dumps["first"].prompt >= 4)), dumps["second"]
    of_shared, _ = measure_dumps({"first": alike, "second": shared}, Exp1Settings(ceiling=1, null=1))
    for before, after in zip(of_shared["first"].buckets, of_shared["second"].buckets, strict=True):
        assert after.participation_ratio == pytest.approx(before.participation_ratio)


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
