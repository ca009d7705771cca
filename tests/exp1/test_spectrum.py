"""Exp 1's mathematics against numpy's SVD, planted structure, and what must not change a number."""

import json

import numpy as np
import pytest
from planted import bucket_of

from gradprobe.analysis import bucket as linear_algebra
from gradprobe.analysis.bucket import Bucket, block_krylov, leading_eigenpairs, rollout_codes
from gradprobe.exp1 import plane
from gradprobe.exp1.compression import Sums, compare_buckets, half_sample_interval, matched_picks, sums_of
from gradprobe.exp1.measure import Exp1Settings, measure_dump, norm_by
from gradprobe.exp1.spectrum import (
    cumulative_energy,
    effective_rank,
    participation_ratio,
    rank_of_share,
    top1_energy_frac,
)
from gradprobe.exp1.subspaces import compare_parts, shuffled_labels, split_half_ceiling

SHAPES = [(1, 1), (1, 6), (6, 1), (2, 2), (3, 40), (40, 3), (30, 31), (31, 30), (50, 50)]


def gradients(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, dim)) * np.exp(rng.standard_normal((n, 1)))).astype(np.float32)


def energies_of(grads: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    return bucket_of(grads, rows).energies()


def top_direction(grads: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Its largest entry positive."""
    (top,) = bucket_of(grads, rows).leading_directions(1)[1].T
    return top * np.sign(top[np.argmax(np.abs(top))])


def project_to_plane(grads: np.ndarray, rows: np.ndarray | None = None, seed: int = 0):
    return plane.project_to_plane(bucket_of(grads, rows), seed)


def sums_of_rows(grads: np.ndarray, rows: np.ndarray, rollout: np.ndarray, prompt: np.ndarray) -> Sums:
    """`rollout`, `prompt`: of each of `rows`."""
    return sums_of(Bucket(grads, rows, prompt, rollout))


@pytest.mark.parametrize(("n", "dim"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
def test_spectrum_is_that_of_numpys_svd(n: int, dim: int, scale: float):
    grads = gradients(n, dim) * np.float32(scale)
    _, sigma, right = np.linalg.svd(grads.astype(np.float64), full_matrices=False)
    energies = energies_of(grads)
    np.testing.assert_allclose(energies, sigma**2, rtol=1e-10, atol=1e-13 * sigma[0] ** 2)
    assert abs(top_direction(grads) @ right[0]) == pytest.approx(1.0, abs=1e-10)
    assert participation_ratio(energies) == pytest.approx((sigma**2).sum() ** 2 / (sigma**4).sum(), rel=1e-10)
    assert top1_energy_frac(energies) == pytest.approx(sigma[0] ** 2 / (sigma**2).sum(), rel=1e-10)


def test_blocks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path):
    grads = gradients(70, 50)
    rows = np.random.default_rng(1).choice(70, 45, replace=False)
    whole = [(energies_of(grads, some), top_direction(grads, some)) for some in (rows, None)]
    points = project_to_plane(grads, rows)[0]
    np.save(tmp_path / "grads.npy", grads)
    monkeypatch.setattr("gradprobe.dump.mapped.BLOCK_BYTES", 1000)
    mapped = np.load(tmp_path / "grads.npy", mmap_mode="r")
    for (energies, direction), some in zip(whole, (rows, None), strict=True):
        np.testing.assert_allclose(energies_of(mapped, some), energies, rtol=1e-10)
        np.testing.assert_allclose(top_direction(mapped, some), direction, atol=1e-9)
    np.testing.assert_allclose(project_to_plane(mapped, rows)[0], points, atol=1e-9)


def test_both_gram_matrices_give_the_same():
    grads = gradients(20, 12)
    wide = np.concatenate([grads, np.zeros((20, 20), np.float32)], axis=1)  # zero columns: d > n, nothing else changes
    np.testing.assert_allclose(energies_of(wide)[:12], energies_of(grads), rtol=1e-10)
    np.testing.assert_allclose(top_direction(wide)[:12], top_direction(grads), atol=1e-10)
    (points, _, explained), (padded_points, _, padded_explained) = map(project_to_plane, (grads, wide))
    np.testing.assert_allclose(points, padded_points, atol=1e-9)
    np.testing.assert_allclose(explained, padded_explained, rtol=1e-10)


def test_row_order_rotation_and_scale_leave_participation_ratio_and_ranks():
    grads = gradients(40, 25).astype(np.float64)
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.standard_normal((25, 25)))[0]
    expected = energies_of(grads)
    for changed in (grads[rng.permutation(40)], grads @ rotation, -3e4 * grads):
        found = energies_of(changed)
        assert participation_ratio(found) == pytest.approx(participation_ratio(expected), rel=1e-10)
        for share in (0.5, 0.9, 0.95, 0.99):
            assert rank_of_share(found, share) == rank_of_share(expected, share)
    column_scaled = grads * np.linspace(0.1, 10, 25)  # not an invariance: it has to move the number
    moved = participation_ratio(energies_of(column_scaled))
    assert moved != pytest.approx(participation_ratio(expected), rel=0.05)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_planted_dimensions_are_counted(k: int):
    rng = np.random.default_rng(k)
    basis = np.linalg.qr(rng.standard_normal((60, k)))[0]
    grads = rng.standard_normal((3000, k)) @ basis.T
    assert participation_ratio(energies_of(grads)) == pytest.approx(k, rel=0.02)
    assert rank_of_share(energies_of(grads), 0.99) == k


def test_rank_counts_equal_energies_exactly():
    assert [rank_of_share(np.ones(20), q) for q in (0.5, 0.9, 0.95, 0.99)] == [10, 18, 19, 20]
    assert rank_of_share(np.array([1.0, 0.0]), 0.99) == 1
    assert participation_ratio(np.ones(7)) == pytest.approx(7)


def test_an_empty_bucket_and_zero_gradients_have_no_number():
    grads = np.zeros((4, 3), np.float32)
    for rows in ([0, 1], []):
        energies = energies_of(grads, np.array(rows, int))
        for number in (participation_ratio, top1_energy_frac, effective_rank, cumulative_energy):
            assert number(energies) is None
        assert rank_of_share(energies, 0.95) is None
    assert bucket_of(grads).leading_directions(2)[1].shape == (3, 0)
    assert project_to_plane(grads)[2].tolist() == [0, 0]
    assert project_to_plane(grads, np.zeros(0, int))[0].shape == (0, 2)


@pytest.mark.parametrize(("n", "dim"), [(30, 8), (8, 30), (2, 5), (5, 1)])
def test_projection_is_principal_component_analysis(n: int, dim: int):
    grads = gradients(n, dim) + 5  # the mean has to go
    centred = grads.astype(np.float64) - grads.astype(np.float64).mean(axis=0)
    left, sigma, _ = np.linalg.svd(centred, full_matrices=False)
    points, _, explained = project_to_plane(grads)
    for axis in range(min(2, len(sigma))):
        expected = left[:, axis] * sigma[axis]
        atol = 1e-7 * sigma[0]
        assert np.allclose(points[:, axis], expected, atol=atol) or np.allclose(points[:, axis], -expected, atol=atol)
        assert explained[axis] == pytest.approx(sigma[axis] ** 2 / (sigma**2).sum(), abs=1e-10)
    if explained[0] < 1:
        farthest = points[np.argmax(np.abs(points), axis=0), [0, 1]]
        assert (farthest[: min(2, n - 1, dim)] > 0).all()


def test_projection_shows_a_sample_of_points_and_finds_the_components_of_all(monkeypatch: pytest.MonkeyPatch):
    grads = gradients(40, 30)
    whole, _, explained = project_to_plane(grads)
    monkeypatch.setattr(plane, "MAX_POINTS", 10)
    first, again, other = (project_to_plane(grads, seed=seed) for seed in (0, 0, 1))
    assert len(first[1]) == 10
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[0], whole[first[1]])
    np.testing.assert_array_equal(first[2], explained)
    assert set(first[1]) != set(other[1])


@pytest.mark.parametrize("exact", [600, 100])
@pytest.mark.parametrize(("n", "dim"), [(900, 400), (300, 900)])
def test_projection_of_many_rows_is_that_of_numpys_svd(monkeypatch: pytest.MonkeyPatch, n: int, dim: int, exact: int):
    monkeypatch.setattr(linear_algebra, "MAX_EXACT", exact)
    monkeypatch.setattr("gradprobe.dump.mapped.BLOCK_BYTES", 200_000)
    rng = np.random.default_rng(0)
    scales = np.concatenate([[6.0, 4.0], 2 / np.sqrt(1 + np.arange(dim - 2) / 9)])
    grads = (rng.standard_normal((n, dim)) * scales + 3).astype(np.float32)
    centred = grads.astype(np.float64) - grads.astype(np.float64).mean(axis=0)
    left, sigma, _ = np.linalg.svd(centred, full_matrices=False)
    points, _, explained = project_to_plane(grads)
    np.testing.assert_allclose(explained, (sigma[:2] / np.linalg.norm(sigma)) ** 2, rtol=1e-6)
    expected = left[:, :2] * sigma[:2]
    signs = np.sign(np.sum(expected * points, axis=0))
    assert np.linalg.norm(points - expected * signs) < 1e-3 * np.linalg.norm(expected)
    np.testing.assert_array_equal(project_to_plane(grads)[0], points)


def test_leading_eigenvectors_of_equal_eigenvalues_are_orthonormal():
    values, vectors = leading_eigenpairs(np.eye(6) * 2.0, n_vectors=3)
    np.testing.assert_allclose(values, 2.0)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


def test_leading_eigenvectors_are_those_of_numpy():
    grads = gradients(60, 90).astype(np.float64)
    bucket = bucket_of(grads)
    np.testing.assert_allclose(bucket.gram, grads @ grads.T, rtol=1e-12, atol=1e-12)
    before = bucket.gram.copy()
    values, vectors = leading_eigenpairs(bucket.gram, n_vectors=5)
    energies = bucket.energies()
    np.testing.assert_array_equal(bucket.gram, before)
    expected_values, expected = np.linalg.eigh(grads @ grads.T)
    np.testing.assert_allclose(energies, expected_values[::-1], rtol=1e-9, atol=1e-12 * energies[0])
    np.testing.assert_allclose(values, energies[:5], rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(vectors * expected[:, ::-1][:, :5], axis=0)), 1.0, atol=1e-9)


def clustered(n_prompts: int, samples: int, positions: int, dim: int, seed: int = 0, n_buckets: int = 1):
    """Gradients with an effect per prompt and per rollout and uneven norms; prompt, rollout and bucket of each row."""
    rng = np.random.default_rng(seed)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((n_prompts, samples, n_buckets, positions)))
    rollout = rollout_codes(prompt, sample)
    grads = rng.standard_normal((len(prompt), dim)) / np.sqrt(1 + np.arange(dim) / 3)
    grads += 0.5 * rng.standard_normal((n_prompts, dim))[prompt] / np.sqrt(1 + np.arange(dim) / 3)
    grads *= np.exp(0.3 * rng.standard_normal((len(prompt), 1)))
    return grads.astype(np.float32), prompt, rollout, bucket


def naive_ratio(x: np.ndarray) -> float:
    squares = [sum(float(a @ b) ** 2 for b in x) for a in x]
    return sum(float(a @ a) for a in x) ** 2 / sum(squares)


def one(measure, sums: Sums) -> float:
    return measure(sums, np.ones((1, len(sums.n))))[0]


FAST = Exp1Settings(halves=200, matched=4, ceiling=3, null=3)


def test_effective_rank_is_roy_and_vetterlis():
    assert effective_rank(np.full(7, 4.0)) == pytest.approx(7)
    sigma = np.array([5.0, 2.0, 1.0])
    p = sigma / 8
    assert effective_rank(sigma**2) == pytest.approx(float(np.exp(-sum(x * np.log(x) for x in p))))
    assert effective_rank(np.append(sigma**2, np.full(5000, 1e-17 * 25))) == pytest.approx(effective_rank(sigma**2))
    assert effective_rank(np.zeros(3)) is None


def krylov(gram: np.ndarray, n_vectors: int) -> tuple[np.ndarray, np.ndarray]:
    return block_krylov(lambda block: gram @ block, len(gram), np.trace(gram), n_vectors)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_krylov_directions_are_the_leading_ones(seed: int, decay: float):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((700, 900)) * np.exp(decay * rng.standard_normal((700, 1))) / np.sqrt(1 + np.arange(900))
    gram = x @ x.T
    values, vectors = krylov(gram, 20)
    exact, exact_vectors = np.linalg.eigh(gram)
    np.testing.assert_allclose(values, exact[::-1][:20], rtol=1e-6)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(20), atol=1e-9)
    assert np.sum((exact_vectors[:, ::-1][:, :20].T @ vectors) ** 2) / 20 > 0.999
    np.testing.assert_array_equal(krylov(gram, 20)[1], vectors)


@pytest.mark.parametrize("held_bytes", [1 << 29, 0])
@pytest.mark.parametrize(("n", "dim"), [(700, 900), (900, 700)])
def test_directions_of_many_gradients_are_those_of_numpys_svd(monkeypatch, n: int, dim: int, held_bytes: int):
    monkeypatch.setattr(linear_algebra, "HELD_BYTES", held_bytes)
    grads = (np.random.default_rng(0).standard_normal((n, dim)) / np.sqrt(1 + np.arange(dim))).astype(np.float32)
    _, sigma, right = np.linalg.svd(grads.astype(np.float64), full_matrices=False)
    whole, half = bucket_of(grads), np.arange(n) % 2 == 0
    of_rows = whole.leading_directions(20)
    assert not whole.has_gram
    assert whole.gram.shape == (min(n, dim),) * 2
    for energies, directions in (of_rows, whole.leading_directions(20)):
        np.testing.assert_allclose(energies, sigma[:20] ** 2, rtol=1e-6)
        np.testing.assert_allclose(directions.T @ directions, np.eye(20), atol=1e-7)
        assert np.sum((right[:20] @ directions) ** 2) / 20 > 0.999
    of_half = np.linalg.svd(grads[half].astype(np.float64), full_matrices=False)[1][:20] ** 2
    np.testing.assert_allclose(whole.part(half).leading_directions(20)[0], of_half, rtol=1e-6)


@pytest.mark.parametrize(("spread", "dtype"), [(1.0, np.float32), (1e3, np.float64)])
@pytest.mark.parametrize("held_bytes", [1 << 29, 0])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
def test_float32_is_for_energies_that_do_not_spread(monkeypatch, scale: float, held_bytes: int, spread: float, dtype):
    monkeypatch.setattr(linear_algebra, "MAX_EXACT", 100)
    monkeypatch.setattr(linear_algebra, "HELD_BYTES", held_bytes)
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((150, 200)) / np.sqrt(1 + np.arange(200))
    grads[0] *= spread
    grads = (scale * grads).astype(np.float32)
    energies, directions = bucket_of(grads).leading_directions(5, dtype=np.float32)
    _, sigma, right = np.linalg.svd(grads.astype(np.float64), full_matrices=False)
    assert directions.dtype == dtype
    np.testing.assert_allclose(energies, sigma[:5] ** 2, rtol=1e-5)
    assert np.sum((right[:5] @ directions) ** 2) / 5 == pytest.approx(1, abs=1e-5)


def test_krylov_survives_low_rank_and_zero():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((650, 3))
    values, vectors = krylov(x @ x.T, 20)
    np.testing.assert_allclose(values[:3], np.linalg.svd(x, compute_uv=False) ** 2, rtol=1e-9)
    assert values[3:].max() < 1e-9 * values[0]
    assert np.isfinite(vectors).all()
    assert bucket_of(np.zeros((650, 650))).leading_directions(4)[0].tolist() == []


@pytest.mark.parametrize("n_rows", [25, 14])
def test_sums_give_every_subset_its_numbers(monkeypatch: pytest.MonkeyPatch, n_rows: int):
    monkeypatch.setattr("gradprobe.dump.mapped.BLOCK_BYTES", 2000)  # several panels
    grads, prompt, rollout, _ = clustered(3, 3, 3, 17)
    grads[4] = 0
    rows = np.random.default_rng(5).permutation(27)[:n_rows]
    x = grads[rows].astype(np.float64)
    sums = sums_of_rows(grads, rows, rollout[rows], prompt[rows])
    picks = np.random.default_rng(6).integers(0, 2, (6, len(sums.n))).astype(float)
    for pick, pr, unit_pr, ess, isotropic in zip(
        picks,
        sums.participation_ratios(picks),
        sums.unit_norm_participation_ratios(picks),
        sums.effective_sample_sizes(picks),
        sums.isotropic_participation_ratios(picks),
        strict=True,
    ):
        part = x[np.isin(rollout[rows], np.unique(rollout[rows])[pick > 0])]
        a = (part**2).sum(axis=1)
        assert pr == pytest.approx(naive_ratio(part), rel=1e-9)
        assert unit_pr == pytest.approx(naive_ratio(part[a > 0] / np.sqrt(a[a > 0])[:, None]), rel=1e-9)
        assert ess == pytest.approx(a.sum() ** 2 / (a**2).sum(), rel=1e-9)
        pairs = sum(a[i] * a[j] for i in range(len(a)) for j in range(len(a)) if i != j)
        assert isotropic == pytest.approx(a.sum() ** 2 / ((a**2).sum() + pairs / 17), rel=1e-9)
        assert pr <= ess * (1 + 1e-12)
    by_prompt = sums.by_prompt()
    for measure in (Sums.participation_ratios, Sums.unit_norm_participation_ratios, Sums.effective_sample_sizes):
        assert one(measure, by_prompt) == pytest.approx(one(measure, sums), rel=1e-12)


def test_heavy_tailed_norms_move_participation_ratio_but_not_that_of_unit_rows():
    rng = np.random.default_rng(0)
    even = rng.standard_normal((600, 80))
    uneven = even * np.exp(2 * rng.standard_normal((600, 1)))
    ids = np.arange(600)
    light, heavy = (sums_of_rows(x, ids, ids // 4, ids // 40) for x in (even, uneven))
    assert one(Sums.participation_ratios, heavy) < 0.5 * one(Sums.participation_ratios, light)
    assert one(Sums.unit_norm_participation_ratios, heavy) == pytest.approx(
        one(Sums.unit_norm_participation_ratios, light), rel=1e-9
    )
    for sums in (light, heavy):  # isotropic directions: PR is what their norms alone give
        expected = one(Sums.isotropic_participation_ratios, sums)
        assert one(Sums.participation_ratios, sums) == pytest.approx(expected, rel=0.05)


def test_isotropic_reference_is_what_isotropic_directions_give():
    rng = np.random.default_rng(1)
    norms = np.exp(rng.standard_normal((60, 1)))
    ids = np.arange(60)
    found = []
    for _ in range(200):
        x = rng.standard_normal((60, 25))
        sums = sums_of_rows(norms * x / np.linalg.norm(x, axis=1, keepdims=True), ids, ids, ids)
        found.append(one(Sums.participation_ratios, sums))
    assert np.mean(found) == pytest.approx(one(Sums.isotropic_participation_ratios, sums), rel=0.02)


def test_interval_covers_what_other_prompts_would_give():
    """95% wanted; 250 draws of 16 prompts tell 0.95 from 0.89, and an interval that ignores prompts covers half."""
    values, intervals, naive = [], [], []
    for seed in range(250):
        grads, prompt, rollout, _ = clustered(16, 3, 2, 30, seed)
        sums = sums_of_rows(grads, np.arange(96), rollout, prompt)
        values.append(one(Sums.participation_ratios, sums))
        intervals.append(half_sample_interval(sums, Sums.participation_ratios, draws=300, seed=seed))
        whole = matched_picks(sums.n, 48, 100, seed)
        naive.append(np.quantile(sums.participation_ratios(whole), [0.025, 0.975]))
    truth = np.mean(values)
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.99
    assert np.mean([low <= truth <= high for low, high in naive]) < 0.6  # half of n: not the same number


def test_too_few_prompts_have_no_interval():
    grads, prompt, rollout, _ = clustered(3, 4, 2, 10)
    assert half_sample_interval(sums_of_rows(grads, np.arange(24), rollout, prompt), Sums.participation_ratios) is None


def test_matched_draws_take_whole_rollouts_and_fill_up():
    sizes = np.array([4, 4, 3, 1, 4, 2])
    picks = matched_picks(sizes, 9, 50, seed=0)
    assert picks.shape == (50, 6)
    assert set(picks @ sizes) <= {6, 7, 8, 9}  # lacks at most one row less than the largest rollout has
    assert len({tuple(pick) for pick in picks}) > 5
    assert matched_picks(sizes, 18, 50, seed=0).tolist() == [[1] * 6]


def test_one_huge_gradient_does_not_pass_for_a_finding():
    grads, prompt, rollout, _ = clustered(12, 4, 3, 40)
    before, after = grads.copy(), grads.copy()
    after[17] *= 300
    even, uneven = (sums_of_rows(x, np.arange(144), rollout, prompt) for x in (before, after))
    raw = compare_buckets(even, uneven, Sums.participation_ratios, half_draws=300)
    assert (raw.ratio < 0.2, raw.verdict) == (True, "can't tell")
    low, high = half_sample_interval(uneven, Sums.participation_ratios)
    assert 1 <= low <= 1.01 * one(Sums.participation_ratios, uneven)
    assert high > 0.8 * one(Sums.participation_ratios, even)
    assert compare_buckets(even, uneven, half_draws=300).ratio == pytest.approx(1)


def test_buckets_are_compared_at_equal_n_over_shared_prompts():
    grads, prompt, rollout, _ = clustered(12, 4, 3, 40)
    squeezed = grads * np.where(np.arange(40) < 3, 3.0, 1.0)
    whole, half = (
        sums_of_rows(grads, ids, rollout[ids], prompt[ids]) for ids in (np.arange(144), np.arange(0, 144, 2))
    )
    other = sums_of_rows(squeezed, np.arange(144), rollout, prompt)
    found = compare_buckets(whole, other, half_draws=300)
    assert found.verdict == "smaller"
    assert found.ci95[0] < found.ratio < found.ci95[1] < 1
    back = compare_buckets(other, whole, half_draws=300)
    assert (back.verdict, back.ratio) == ("larger", pytest.approx(1 / found.ratio))
    same = compare_buckets(whole, half, half_draws=300)  # PR of the half is smaller, the space is not
    assert (same.verdict, same.n) == ("can't tell", 72)
    assert same.ratio == pytest.approx(1, abs=0.1)
    assert one(Sums.participation_ratios, half) < 0.9 * one(Sums.participation_ratios, whole)
    few = sums_of_rows(grads, np.arange(24), rollout[:24], prompt[:24])
    assert (compare_buckets(few, other).ci95, compare_buckets(few, other).verdict) == (None, "can't tell")
    zero = sums_of_rows(0 * grads, np.arange(144), rollout, prompt)
    assert compare_buckets(zero, other) is None


def measured(grads, bucket, n_buckets, prompt, rollout, **keywords) -> dict:
    whole = Bucket(grads, np.arange(len(grads)), prompt, rollout)
    return measure_dump(whole, bucket, n_buckets, FAST, **keywords).numbers


def cross_of(found: dict) -> np.ndarray:
    """[2, B, B] NaN for no number."""
    return np.array([found["cross_bucket_top1_cosine"], found["cross_bucket_overlap"]["10"]], float)


def naive_measures(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """From numpy's SVD."""
    a, b = (np.linalg.svd(x.astype(np.float64), full_matrices=False)[2] for x in (first, second))
    return abs(a[0] @ b[0]), np.linalg.norm(a[:10] @ b[:10].T) ** 2 / 10


@pytest.mark.parametrize("dim", [130, 24])
def test_measures_across_buckets_are_those_of_numpys_svd(dim: int):
    grads, prompt, rollout, bucket = clustered(6, 4, 2, dim, n_buckets=3)
    grads *= np.exp(2 * np.random.default_rng(1).standard_normal((len(grads), 1))).astype(np.float32)
    found = measured(grads, bucket, 3, prompt, rollout)
    for i, j in np.ndindex(3, 3):
        expected = naive_measures(grads[bucket == i], grads[bucket == j])
        np.testing.assert_allclose(cross_of(found)[:, i, j], expected, atol=1e-5)
    drawn = [naive_measures(grads[x == 0], grads[x == 2]) for x in shuffled_labels(bucket, rollout, 3, seed=0)]
    null = found["cross_bucket_null"]
    null = [null["top1_cosine"][0][2], null["overlap"]["10"][0][2]]
    rng = np.random.default_rng(0)
    own = np.flatnonzero(bucket == 1)
    halves = []
    for _ in range(3):
        first = np.isin(prompt[own], rng.permutation(np.unique(prompt[own]))[:3])
        halves.append(naive_measures(grads[own[first]], grads[own[~first]]))
    ceiling = found["cross_bucket_ceiling_detail"][1]
    for values, numbers in ((drawn, null), (halves, [ceiling["top1_cosine"], ceiling["overlap"]["10"]])):
        for of_measure, numbers_of_measure in zip(np.transpose(values), numbers, strict=True):
            low, high = np.quantile(of_measure, [0.025, 0.975])
            assert numbers_of_measure["mean"] == pytest.approx(of_measure.mean(), abs=1e-5)
            assert numbers_of_measure["ci95"] == pytest.approx([low, high], abs=1e-5)
            assert numbers_of_measure["draws"] == 3


def test_more_numbers_than_gradients_or_fewer_gives_the_same():
    grads, prompt, rollout, bucket = clustered(5, 4, 3, 70, n_buckets=2)
    wide = np.concatenate([grads, np.zeros((120, 40), np.float32)], axis=1)
    narrow = grads[:, :50]
    for dims in ((grads, wide), (narrow, np.concatenate([narrow, np.zeros((120, 60), np.float32)], axis=1))):
        first, second = (measured(x, bucket, 2, prompt, rollout) for x in dims)
        np.testing.assert_allclose(cross_of(second), cross_of(first), atol=1e-5)
        wholes = [Bucket(x, np.arange(120), prompt, rollout) for x in dims]
        np.testing.assert_allclose(*(compare_parts(one, bucket, 2, seed=0) for one in wholes), atol=1e-5)
        np.testing.assert_allclose(*(split_half_ceiling(one, 2) for one in wholes), atol=1e-5)
        for before, after in zip(first["per_bucket"].values(), second["per_bucket"].values(), strict=True):
            assert after["participation_ratio"] == pytest.approx(before["participation_ratio"])
            assert after["rank95"] == before["rank95"]


def test_no_directions_are_made_up_beyond_the_rank():
    rng = np.random.default_rng(0)
    prompt, sample, bucket = (axis.ravel() for axis in np.indices((10, 4, 2)))
    grads = (rng.standard_normal((80, 3)) @ rng.standard_normal((3, 300))).astype(np.float32)
    found = measured(grads, bucket, 2, prompt, rollout_codes(prompt, sample))
    assert found["cross_bucket_overlap"]["10"] == [[None, None], [None, None]]
    assert found["cross_bucket_top1_cosine"][0][0] == pytest.approx(1, abs=1e-5)
    assert found["per_bucket"]["0"]["rank99"] <= 3


def test_ceiling_is_high_for_a_shared_direction_and_low_for_none():
    rng = np.random.default_rng(0)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((16, 4, 2, 2)))
    grads = rng.standard_normal((len(prompt), 300))
    grads[bucket == 1] += 8 * np.eye(300)[0] * rng.standard_normal((np.sum(bucket == 1), 1))
    found = measured(grads.astype(np.float32), bucket, 2, prompt, rollout_codes(prompt, sample))
    low, high = found["cross_bucket_ceiling"]
    assert low < 0.3
    assert high > 0.85
    detail = found["cross_bucket_ceiling_detail"][1]
    assert detail["top1_cosine"]["mean"] == high > 0.5 > detail["overlap"]["10"]["mean"]
    # Shuffled, both buckets have the direction: what the real ones don't share, the null does.
    null = found["cross_bucket_null"]["top1_cosine"][0][1]
    assert found["cross_bucket_top1_cosine"][0][1] < 0.4 < 0.7 < null["mean"]
    assert null["draws"] == 3
    assert found["cross_bucket_null"]["top1_cosine"][0][0] is None


def test_shuffling_stays_within_rollouts():
    rollout = np.array([2, 0, 0, 2, 1, 0, 2, 1, 2])
    bucket = np.array([0, 1, 2, 1, 0, 2, 0, 1, 2])
    drawn = list(shuffled_labels(bucket, rollout, 20, seed=0))
    for labels in drawn:
        for code in range(3):
            assert sorted(labels[rollout == code]) == sorted(bucket[rollout == code])
    assert len({tuple(labels) for labels in drawn}) > 10


@pytest.mark.parametrize("dim", [12, 90])
def test_row_order_rotation_and_scale_leave_the_whole_experiment(dim: int):
    grads, prompt, rollout, bucket = clustered(6, 3, 2, dim, n_buckets=2)
    rng = np.random.default_rng(2)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    expected = measured(grads, bucket, 2, prompt, rollout)
    order = rng.permutation(len(grads))
    for x, keep in ((grads @ rotation, slice(None)), (-3e-15 * grads, slice(None)), (grads[order], order)):
        found = measured(x, bucket[keep], 2, prompt[keep], rollout[keep])
        for before, after in zip(expected["per_bucket"].values(), found["per_bucket"].values(), strict=True):
            for key in set(before) - {"norm", "top1_energy_frac"}:
                assert after[key] == pytest.approx(before[key], rel=1e-5), key
        np.testing.assert_allclose(cross_of(found), cross_of(expected), atol=1e-4)


@pytest.mark.parametrize("dim", [3, 40])
def test_degenerate_dumps_have_nulls_and_not_nan(dim: int):
    rng = np.random.default_rng(0)
    ids = np.arange(24)
    bucket = np.array([0] * 12 + [1] * 11 + [3])  # 2 is empty, 3 has one row, 1 is all zero
    grads = rng.standard_normal((24, dim)).astype(np.float32)
    grads[bucket == 1] = 0
    grads[0] = 0
    steps: list[int] = []
    found = measured(grads, bucket, 4, ids % 6, ids % 12, on_step=lambda: steps.append(1))
    assert len(steps) == 4 + FAST.null
    json.dumps(found, allow_nan=False)
    nothing, empty, single = (found["per_bucket"][str(index)] for index in (1, 2, 3))
    assert (nothing["n"], empty["n"], single["n"]) == (11, 0, 1)
    for numbers in (nothing, empty):
        assert {value for name, value in numbers.items() if name != "n"} == {None}
    assert single["participation_ratio"] == pytest.approx(1)
    assert single["participation_ratio_ci95"] is None
    assert found["cross_bucket_ceiling"][1:] == [None, None, None]
    assert found["cross_bucket_top1_cosine"][0][1] is None
    json.dumps(measured(grads[:0], bucket[:0], 2, ids[:0], ids[:0]), allow_nan=False)
    one_prompt = measured(grads[:12], bucket[:12], 1, 0 * ids[:12], ids[:12])
    assert one_prompt["cross_bucket_ceiling"] == [None]


def test_norms_are_told_by_tenths_of_surprisal():
    rng = np.random.default_rng(0)
    grads = (rng.standard_normal((300, 9)) * np.exp(rng.standard_normal((300, 1)))).astype(np.float32)
    grads[:7] = 0
    norms = np.linalg.norm(grads.astype(np.float64), axis=1)
    surprisal = rng.exponential(size=300)
    surprisal[7:23] = 0  # no place on a log axis: these and the norms of 0 are left out
    groups = norm_by(surprisal, norms**2)
    kept = np.argsort(surprisal[23:]) + 23
    assert len(groups) == 10
    for group, rows in zip(groups, np.array_split(kept, 10), strict=True):
        assert group["surprisal"] == pytest.approx(np.median(surprisal[rows]))
        assert group["quartiles"] == pytest.approx(np.quantile(norms[rows], [0.25, 0.5, 0.75]))
    assert norm_by(np.zeros(300), norms**2) is None
