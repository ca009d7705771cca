"""What stands in for matrices that would grow with the number of positions, and that memory does not grow with it."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest

from gradprobe.analysis.gram import HOST
from gradprobe.dump.blocks import SelectedRows
from gradprobe.exp1 import compression, subspaces
from gradprobe.exp1.compression import (
    AdditiveDots,
    Sums,
    compare_buckets,
    half_sample_interval,
    rollout_codes,
    sums_of_rows,
)
from gradprobe.exp1.measure import Draws, measure_dump
from gradprobe.exp1.spectrum import project_to_plane, smaller_gram
from gradprobe.exp1.subspaces import ColumnGeometry
from gradprobe.exp2 import direction
from gradprobe.exp2.direction import RolloutGrams, alignment, cancellation, directions_of_bucket

FAST = Draws(halves=200, matched=4, matched_rank=2, ceiling=3, null=3)
MEASURES = (Sums.participation_ratios, Sums.unit_norm_participation_ratios)


def planted_rows(n_prompts: int, dim: int, seed: int = 0, n_buckets: int = 1, samples: int = 3, positions: int = 2):
    """Gradients with effects of prompts and rollouts and uneven norms; prompt, rollout and bucket of each row."""
    rng = np.random.default_rng(seed)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((n_prompts, samples, n_buckets, positions)))
    rollout = rollout_codes(prompt, sample)
    grads = rng.standard_normal((len(prompt), dim)) / np.sqrt(1 + np.arange(dim) / 3)
    grads += 0.5 * rng.standard_normal((n_prompts, dim))[prompt] / np.sqrt(1 + np.arange(dim) / 3)
    grads += 0.5 * rng.standard_normal((rollout.max() + 1, dim))[rollout] / np.sqrt(1 + np.arange(dim) / 3)
    grads *= np.exp(0.5 * rng.standard_normal((len(prompt), 1)))
    return grads.astype(np.float32), prompt, rollout, bucket


def both_kinds_of_sums(monkeypatch: pytest.MonkeyPatch, grads, rows, rollout, prompt, **keywords) -> tuple[Sums, Sums]:
    exact = sums_of_rows(grads, rows, rollout[rows], prompt[rows])
    monkeypatch.setattr(compression, "MAX_EXACT_ROLLOUTS", 2)
    monkeypatch.setattr("gradprobe.dump.blocks.BLOCK_BYTES", 5000)  # several panels, and prompts that don't fit one
    found = sums_of_rows(grads, rows, rollout[rows], prompt[rows], **keywords)
    assert isinstance(found.dots, AdditiveDots)
    assert not isinstance(exact.dots, AdditiveDots)
    return exact, found


@pytest.mark.parametrize("given", ["nothing", "row products", "column products"])
@pytest.mark.parametrize("by_prompt", [False, True])
def test_what_stands_for_all_pairs_is_exact_for_all_and_for_all_but_one(monkeypatch, given: str, by_prompt: bool):
    grads, prompt, rollout, _ = planted_rows(6, 20)
    grads[4] = 0
    shuffled = np.random.default_rng(5).permutation(len(grads))  # in no order
    grads, prompt, rollout = (
        grads[shuffled],
        prompt[shuffled],
        np.random.default_rng(6).permutation(18)[rollout[shuffled]],
    )
    rows = np.arange(3, len(grads))
    x = grads[rows].astype(np.float64)
    keywords = {"nothing": {}, "row products": {"gram": x @ x.T}, "column products": {"columns": x.T @ x}}[given]
    exact, found = both_kinds_of_sums(monkeypatch, grads, rows, rollout, prompt, **keywords)
    if by_prompt:
        exact, found = exact.by_prompt(), found.by_prompt()
    for name in ("n", "n_nonzero", "energy", "energy_squares", "prompt"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), rtol=1e-12)
    m = len(exact.n)
    picks = np.concatenate([np.ones((1, m)), 1 - np.eye(m)])
    for measure in MEASURES:
        np.testing.assert_allclose(measure(found, picks), measure(exact, picks), rtol=1e-10)
    halves = np.random.default_rng(0).permuted(np.tile(np.arange(m) % 2, (50, 1)), axis=1).astype(float)
    assert np.abs(found.participation_ratios(halves) / exact.participation_ratios(halves) - 1).max() > 1e-6  # not exact


def test_intervals_and_comparisons_hardly_change(monkeypatch: pytest.MonkeyPatch):
    grads, prompt, rollout, _ = planted_rows(300, 40, samples=2)
    other = grads * np.where(np.arange(40) < 4, 1.4, 1.0).astype(np.float32)
    rows = np.arange(len(grads))
    exact, found = both_kinds_of_sums(monkeypatch, grads, rows, rollout, prompt)
    found_other = sums_of_rows(other, rows, rollout, prompt)
    monkeypatch.setattr(compression, "MAX_EXACT_ROLLOUTS", 10_000)
    exact_other = sums_of_rows(other, rows, rollout, prompt)
    for measure in MEASURES:
        expected, interval = (half_sample_interval(sums, measure, 1000) for sums in (exact, found))
        assert interval == pytest.approx(expected, abs=0.08 * (expected[1] - expected[0]))
        expected, ratio = (
            compare_buckets(*pair, measure, half_draws=1000) for pair in ((exact, exact_other), (found, found_other))
        )
        assert (ratio.verdict, ratio.n_prompts) == (expected.verdict, 300)
        assert ratio.ratio == pytest.approx(expected.ratio, rel=1e-9)
        assert ratio.ci95 == pytest.approx(expected.ci95, abs=0.08 * (expected.ci95[1] - expected.ci95[0]))
    assert expected.verdict == "smaller"


def test_picks_in_parts_are_the_same_picks(monkeypatch: pytest.MonkeyPatch):
    grads, prompt, rollout, _ = planted_rows(9, 12)
    sums = sums_of_rows(grads, np.arange(len(grads)), rollout, prompt)
    whole = half_sample_interval(sums, Sums.participation_ratios, 100), compare_buckets(sums, sums, half_draws=100)
    monkeypatch.setattr(compression, "PICKS_AT_ONCE_BYTES", 8 * 9 * 4)
    parts = half_sample_interval(sums, Sums.participation_ratios, 100), compare_buckets(sums, sums, half_draws=100)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    assert parts[1].ci95 == pytest.approx(whole[1].ci95, rel=1e-12)


@pytest.mark.parametrize("huge", [None, 3])
def test_matched_ranks_from_what_is_left_out_are_those_of_what_stays(huge: int | None):
    grads, _, rollout, _ = planted_rows(12, 15)
    if huge is not None:  # what stays would be lost in the rounding of what goes
        grads[huge] *= 1e9
    rows = np.arange(len(grads))
    x = grads.astype(np.float64)
    is_kept = rollout >= 6
    found = compression._gram_of_some(grads, rows, is_kept, None, x.T @ x, HOST)
    np.testing.assert_allclose(found, x[is_kept].T @ x[is_kept], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("held_bytes", [1 << 29, 8 * 14**2 * 6])
def test_draws_from_one_pass_are_those_of_one_by_one(monkeypatch: pytest.MonkeyPatch, held_bytes: int):
    grads, prompt, rollout, bucket = planted_rows(8, 14, n_buckets=3)
    monkeypatch.setattr(subspaces, "MAX_HELD_BYTES", held_bytes)
    one_pass = measure_dump(grads, bucket, 3, prompt, rollout, 40, draws=FAST)
    monkeypatch.setattr(subspaces, "MAX_HELD_BYTES", 0)
    one_by_one = measure_dump(grads, bucket, 3, prompt, rollout, 40, draws=FAST)
    for name, values in one_by_one.null.items():
        np.testing.assert_allclose(one_pass.null[name], values, atol=1e-8)
        for found, expected in zip(one_pass.ceilings, one_by_one.ceilings, strict=True):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-8)


def test_labellings_are_read_in_one_pass_only_where_matrices_are_no_larger_than_the_rows(monkeypatch):
    grads, *_ = planted_rows(4, 30)
    labels = np.arange(len(grads)) % 2
    passes: list[int] = []
    monkeypatch.setattr(ColumnGeometry, "_grams_of_parts", lambda *_: passes.append(1) or iter(()))
    list(ColumnGeometry(grads).compare_parts(np.arange(len(grads)), [labels], 2))
    assert not passes
    list(ColumnGeometry(grads[:, :5]).compare_parts(np.arange(len(grads)), [labels], 2))
    assert passes


def grams_of(n_prompts: int, n_rollouts: int, seed: int = 0) -> RolloutGrams:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_prompts, n_rollouts, 10)) + rng.standard_normal((n_prompts, 1, 10))
    n_tokens = rng.integers(1, 4, (n_prompts, n_rollouts))
    n_tokens[::3, -1] = 0  # padding
    x[n_tokens == 0] = 0
    correct = (rng.random((n_prompts, n_rollouts)) < 0.5) & (n_tokens > 0)
    return RolloutGrams(np.arange(n_prompts), x @ x.transpose(0, 2, 1), n_tokens, correct)


@pytest.mark.parametrize("listed", [1000, 3])
def test_permutations_from_tables_have_the_null_of_permutations(monkeypatch: pytest.MonkeyPatch, listed: int):
    grams = grams_of(30, 5).with_rollouts_of_each_kind(1)
    monkeypatch.setattr(direction, "LABELLINGS_LISTED", listed)
    nulls = []
    for limit in (10**9, 1):
        monkeypatch.setattr(direction, "MAX_LABELS_EACH", limit)
        nulls.append(direction.permutation_null(grams, np.random.default_rng(1), 4000, direction._label_cosines))
    drawn, from_tables = nulls
    assert len(drawn) == len(from_tables) == 4000
    if listed == 3:  # a table of 3 labellings each is no fair picture of one prompt, but is of the mean over 30
        assert abs(from_tables.mean() - drawn.mean()) < 0.1
        return
    assert abs(from_tables.mean() - drawn.mean()) < 4 * drawn.std() * np.sqrt(2 / 4000)
    assert from_tables.std() == pytest.approx(drawn.std(), rel=0.06)
    np.testing.assert_allclose(np.quantile(from_tables, [0.025, 0.975]), np.quantile(drawn, [0.025, 0.975]), atol=0.015)


def test_tables_hold_every_labelling_of_one_prompt_once():
    labels = direction._labellings(4, 2, 6, np.random.default_rng(0))
    assert sorted(map(tuple, map(np.flatnonzero, labels))) == sorted(combinations(range(4), 2))
    many = direction._labellings(20, 10, 20, np.random.default_rng(0))
    assert many.shape == (1000, 20)
    assert set(many.sum(axis=1)) == {10}


def test_p_values_of_many_prompts_are_those_of_few(monkeypatch: pytest.MonkeyPatch):
    grams = grams_of(40, 6, seed=3)
    expected = [f(grams, np.random.default_rng(1)) for f in (alignment, cancellation)]
    monkeypatch.setattr(direction, "MAX_LABELS_EACH", 1)
    found = [f(grams, np.random.default_rng(1)) for f in (alignment, cancellation)]
    for before, after in zip(expected, found, strict=True):
        assert after.p_value == pytest.approx(before.p_value, abs=0.03)
    assert found[0].rho == expected[0].rho
    assert found[1].null_ci95 == pytest.approx(expected[1].null_ci95, abs=0.03)


@pytest.mark.parametrize("dim", [10, 120])
def test_some_rows_of_a_dump_are_analysed_like_an_array_of_them(dim: int):
    grads, prompt, rollout, bucket = planted_rows(8, dim, n_buckets=2)
    kept = np.sort(np.random.default_rng(1).choice(len(grads), 80, replace=False))
    some = SelectedRows(grads, kept)
    labels = prompt[kept], rollout[kept]
    first, second = (measure_dump(x, bucket[kept], 2, *labels, 30, draws=FAST) for x in (grads[kept], some))
    for one, other in zip(first.buckets, second.buckets, strict=True):
        assert one == other
    np.testing.assert_array_equal(
        project_to_plane(some, np.arange(80)).coordinates, project_to_plane(grads[kept], np.arange(80)).coordinates
    )
    rows = np.flatnonzero(bucket[kept] == 1)
    np.testing.assert_array_equal(smaller_gram(some, rows), smaller_gram(grads[kept], rows))
    correct = rollout[kept] % 2 == 0
    of_array, of_some = (
        directions_of_bucket(x, rows, labels[0], labels[1], correct, 8, n_permutations=99) for x in (grads[kept], some)
    )
    assert of_array == of_some


def test_memory_does_not_grow_with_the_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Twice the positions of 512 numbers each (2 KiB): both experiments and the projection keep less than a tenth."""
    monkeypatch.setattr("gradprobe.dump.blocks.BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(compression, "MAX_EXACT_ROLLOUTS", 100)
    monkeypatch.setattr(subspaces, "MAX_HELD_BYTES", 8 << 20)
    peaks = []
    for n_prompts in (400, 800):
        rng = np.random.default_rng(0)
        prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((n_prompts, 4, 2, 4)))
        np.save(tmp_path / "grads.npy", rng.standard_normal((len(prompt), 512)).astype(np.float32))
        grads = np.load(tmp_path / "grads.npy", mmap_mode="r")
        tracemalloc.start()
        measure_dump(grads, bucket, 2, prompt, rollout_codes(prompt, sample), 1500, draws=Draws(20, 2, 1, 1, 1, 1))
        project_to_plane(grads, np.arange(len(grads)))
        directions_of_bucket(
            grads, np.flatnonzero(bucket == 1), prompt, sample, sample < 2, n_prompts, n_bootstrap=20, n_permutations=20
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    added = 400 * 4 * 2 * 4 * 512 * 4
    assert peaks[1] - peaks[0] < added / 10
