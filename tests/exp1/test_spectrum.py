"""Exp 1's mathematics against numpy's SVD, planted structure, and what must not change a number."""

import json

import numpy as np
import pytest
import torch
from planted import bucket_of

from gradprobe.analysis import bucket as linear_algebra
from gradprobe.analysis.bucket import Bucket, block_krylov, leading_eigenpairs, rollout_codes
from gradprobe.exp1 import plane
from gradprobe.exp1.compression import (
    Sums,
    compare_buckets,
    half_sample_interval,
    matched_n,
    matched_picks,
    sums_of,
)
from gradprobe.exp1.measure import Exp1Settings, measure_dump, smallest_bucket
from gradprobe.exp1.plane import Projection
from gradprobe.exp1.spectrum import Spectrum, cumulative_energy, effective_rank, participation_ratio, rank_of_share
from gradprobe.exp1.subspaces import shuffled_labels
from gradprobe.exp1.summary import numbers_of

SHAPES = [(1, 1), (1, 6), (6, 1), (2, 2), (3, 40), (40, 3), (30, 31), (31, 30), (50, 50)]


def gradients(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, dim)) * np.exp(rng.standard_normal((n, 1)))).astype(np.float32)


def spectrum_of(grads: np.ndarray, rows: np.ndarray | None = None) -> Spectrum:
    bucket = bucket_of(grads, rows)
    return Spectrum(bucket.n, bucket.energies())


def top_direction(grads: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Its largest entry positive."""
    (top,) = bucket_of(grads, rows).leading_directions(1)[1].numpy().T
    return top * np.sign(top[np.argmax(np.abs(top))])


def project_to_plane(grads: np.ndarray, rows: np.ndarray, seed: int = 0) -> Projection:
    return plane.project_to_plane(bucket_of(grads, rows), seed)


def sums_of_rows(grads: np.ndarray, rows: np.ndarray, rollout: np.ndarray, prompt: np.ndarray) -> Sums:
    """`rollout`, `prompt`: of each of `rows`."""
    return sums_of(Bucket(grads, rows, prompt, rollout))


def all_rows(grads: np.ndarray) -> np.ndarray:
    return np.arange(len(grads))


@pytest.mark.parametrize(("n", "dim"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
def test_spectrum_is_that_of_numpys_svd(n: int, dim: int, scale: float):
    grads = gradients(n, dim) * np.float32(scale)
    _, sigma, right = np.linalg.svd(grads.astype(np.float64), full_matrices=False)
    found = spectrum_of(grads, all_rows(grads))
    np.testing.assert_allclose(found.energies, sigma**2, rtol=1e-10, atol=1e-13 * sigma[0] ** 2)
    assert abs(top_direction(grads) @ right[0]) == pytest.approx(1.0, abs=1e-10)
    assert found.participation_ratio == pytest.approx((sigma**2).sum() ** 2 / (sigma**4).sum(), rel=1e-10)
    assert found.top1_energy_frac == pytest.approx(sigma[0] ** 2 / (sigma**2).sum(), rel=1e-10)


def test_blocks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path):
    grads = gradients(70, 50)
    rows = np.random.default_rng(1).choice(70, 45, replace=False)
    whole = [(spectrum_of(grads, some), top_direction(grads, some)) for some in (rows, all_rows(grads))]
    plane = project_to_plane(grads, rows)
    np.save(tmp_path / "grads.npy", grads)
    monkeypatch.setattr("gradprobe.dump.mapped.BLOCK_BYTES", 1000)
    mapped = np.load(tmp_path / "grads.npy", mmap_mode="r")
    for (expected, direction), some in zip(whole, (rows, all_rows(grads)), strict=True):
        np.testing.assert_allclose(spectrum_of(mapped, some).energies, expected.energies, rtol=1e-10)
        np.testing.assert_allclose(top_direction(mapped, some), direction, atol=1e-9)
    np.testing.assert_allclose(project_to_plane(mapped, rows).coordinates, plane.coordinates, atol=1e-9)


def test_both_gram_matrices_give_the_same():
    grads = gradients(20, 12)
    wide = np.concatenate([grads, np.zeros((20, 20), np.float32)], axis=1)  # zero columns: d > n, nothing else changes
    narrow, padded = (spectrum_of(x, all_rows(x)) for x in (grads, wide))
    np.testing.assert_allclose(padded.energies[:12], narrow.energies, rtol=1e-10)
    np.testing.assert_allclose(top_direction(wide)[:12], top_direction(grads), atol=1e-10)
    planes = [project_to_plane(x, all_rows(x)) for x in (grads, wide)]
    np.testing.assert_allclose(planes[0].coordinates, planes[1].coordinates, atol=1e-9)
    np.testing.assert_allclose(planes[0].explained, planes[1].explained, rtol=1e-10)


def test_row_order_rotation_and_scale_leave_participation_ratio_and_ranks():
    grads = gradients(40, 25).astype(np.float64)
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.standard_normal((25, 25)))[0]
    expected = spectrum_of(grads, all_rows(grads))
    for changed in (grads[rng.permutation(40)], grads @ rotation, -3e4 * grads):
        found = spectrum_of(changed, all_rows(changed))
        assert found.participation_ratio == pytest.approx(expected.participation_ratio, rel=1e-10)
        assert [found.rank(q) for q in (0.5, 0.9, 0.95, 0.99)] == [expected.rank(q) for q in (0.5, 0.9, 0.95, 0.99)]
    column_scaled = grads * np.linspace(0.1, 10, 25)  # not an invariance: it has to move the number
    assert spectrum_of(column_scaled, all_rows(grads)).participation_ratio != pytest.approx(
        expected.participation_ratio, rel=0.05
    )


@pytest.mark.parametrize("k", [1, 3, 10])
def test_planted_dimensions_are_counted(k: int):
    rng = np.random.default_rng(k)
    basis = np.linalg.qr(rng.standard_normal((60, k)))[0]
    grads = rng.standard_normal((3000, k)) @ basis.T
    found = spectrum_of(grads, all_rows(grads))
    assert found.participation_ratio == pytest.approx(k, rel=0.02)
    assert found.rank(0.99) == k


def test_rank_counts_equal_energies_exactly():
    assert [rank_of_share(np.ones(20), q) for q in (0.5, 0.9, 0.95, 0.99)] == [10, 18, 19, 20]
    assert rank_of_share(np.array([1.0, 0.0]), 0.99) == 1
    assert participation_ratio(np.ones(7)) == pytest.approx(7)


def test_an_empty_bucket_and_zero_gradients_have_no_number():
    grads = np.zeros((4, 3), np.float32)
    spectra = [spectrum_of(grads, np.flatnonzero(np.array([0, 0, 2, 2]) == index)) for index in range(3)]
    assert [found.n for found in spectra] == [2, 0, 2]
    for found in spectra:
        assert found.participation_ratio is found.top1_energy_frac is found.rank(0.95) is None
        assert cumulative_energy(found.energies) is None
    assert bucket_of(grads).leading_directions(2)[1].shape == (3, 0)
    assert project_to_plane(grads, all_rows(grads)).explained is None
    assert project_to_plane(grads, np.zeros(0, int)).coordinates.shape == (0, 2)


@pytest.mark.parametrize(("n", "dim"), [(30, 8), (8, 30), (2, 5), (5, 1)])
def test_projection_is_principal_component_analysis(n: int, dim: int):
    grads = gradients(n, dim) + 5  # the mean has to go
    centred = grads.astype(np.float64) - grads.astype(np.float64).mean(axis=0)
    left, sigma, _ = np.linalg.svd(centred, full_matrices=False)
    plane = project_to_plane(grads, all_rows(grads))
    for axis in range(min(2, len(sigma))):
        expected = left[:, axis] * sigma[axis]
        found = plane.coordinates[:, axis]
        atol = 1e-7 * sigma[0]
        assert np.allclose(found, expected, atol=atol) or np.allclose(found, -expected, atol=atol)
        assert plane.explained[axis] == pytest.approx(sigma[axis] ** 2 / (sigma**2).sum(), abs=1e-10)
    if plane.explained[0] < 1:
        farthest = plane.coordinates[np.argmax(np.abs(plane.coordinates), axis=0), [0, 1]]
        assert (farthest[: min(2, n - 1, dim)] > 0).all()


def test_projection_shows_a_sample_of_points_and_finds_the_components_of_all(monkeypatch: pytest.MonkeyPatch):
    grads = gradients(40, 30)
    whole = project_to_plane(grads, all_rows(grads))
    monkeypatch.setattr(plane, "MAX_POINTS", 10)
    first, again, other = (project_to_plane(grads, all_rows(grads), seed) for seed in (0, 0, 1))
    assert (len(first.rows), first.n_rows) == (10, 40)
    np.testing.assert_array_equal(first.coordinates, again.coordinates)
    np.testing.assert_array_equal(first.coordinates, whole.coordinates[first.rows])
    np.testing.assert_array_equal(first.explained, whole.explained)
    assert set(first.rows) != set(other.rows)


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
    plane = project_to_plane(grads, all_rows(grads))
    np.testing.assert_allclose(plane.explained, (sigma[:2] / np.linalg.norm(sigma)) ** 2, rtol=1e-6)
    expected = left[:, :2] * sigma[:2]
    signs = np.sign(np.sum(expected * plane.coordinates, axis=0))
    assert np.linalg.norm(plane.coordinates - expected * signs) < 1e-3 * np.linalg.norm(expected)
    np.testing.assert_array_equal(project_to_plane(grads, all_rows(grads)).coordinates, plane.coordinates)


def test_leading_eigenvectors_of_equal_eigenvalues_are_orthonormal():
    values, vectors = leading_eigenpairs(torch.eye(6, dtype=torch.float64) * 2.0, n_vectors=3)
    np.testing.assert_allclose(values, 2.0)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


def test_leading_eigenvectors_are_those_of_numpy():
    grads = gradients(60, 90).astype(np.float64)
    bucket = bucket_of(grads)
    np.testing.assert_allclose(bucket.gram, grads @ grads.T, rtol=1e-12, atol=1e-12)
    before = bucket.gram.clone()
    values, vectors = leading_eigenpairs(bucket.gram, n_vectors=5)
    energies = bucket.energies()
    np.testing.assert_array_equal(bucket.gram, before)
    expected_values, expected = np.linalg.eigh(grads @ grads.T)
    np.testing.assert_allclose(energies, expected_values[::-1], rtol=1e-9, atol=1e-12 * energies[0])
    np.testing.assert_allclose(values, energies[:5], rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(vectors.numpy() * expected[:, ::-1][:, :5], axis=0)), 1.0, atol=1e-9)


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


FAST = Exp1Settings(halves=200, matched=4, matched_rank=2, ceiling=3, null=3)


def test_effective_rank_is_roy_and_vetterlis():
    assert effective_rank(np.full(7, 4.0)) == pytest.approx(7)
    sigma = np.array([5.0, 2.0, 1.0])
    p = sigma / 8
    assert effective_rank(sigma**2) == pytest.approx(float(np.exp(-sum(x * np.log(x) for x in p))))
    assert effective_rank(np.append(sigma**2, np.full(5000, 1e-17 * 25))) == pytest.approx(effective_rank(sigma**2))
    assert effective_rank(np.zeros(3)) is None


def krylov(gram: np.ndarray, n_vectors: int) -> tuple[np.ndarray, np.ndarray]:
    matrix = torch.from_numpy(gram)
    values, vectors = block_krylov(lambda block: matrix @ block, len(gram), np.trace(gram), n_vectors)
    return values.numpy(), vectors.numpy()


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
        assert np.sum((right[:20] @ directions.numpy()) ** 2) / 20 > 0.999
    of_half = np.linalg.svd(grads[half].astype(np.float64), full_matrices=False)[1][:20] ** 2
    np.testing.assert_allclose(whole.part(half).leading_directions(20)[0], of_half, rtol=1e-6)


@pytest.mark.parametrize(("spread", "dtype"), [(1.0, torch.float32), (1e3, torch.float64)])
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
    assert np.sum((right[:5] @ directions.double().numpy()) ** 2) / 5 == pytest.approx(1, abs=1e-5)


def test_float32_energies_move_no_rank_by_more_than_1():
    bucket = bucket_of((gradients(400, 500) / np.sqrt(1 + np.arange(500) / 20)).astype(np.float32))
    exact, rounded = bucket.energies(), bucket.energies(np.float32)
    assert 0 < np.abs(rounded - exact).max() < 1e-6 * exact[0]
    assert abs(rank_of_share(rounded, 0.95) - rank_of_share(exact, 0.95)) <= 1


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


@pytest.mark.parametrize("dim", [20, 200])
def test_matched_numbers_are_those_of_the_drawn_rows(dim: int):
    grads, prompt, rollout, _ = clustered(6, 4, 3, dim)
    rows = np.arange(len(grads))
    x = grads.astype(np.float64)
    sums = sums_of_rows(grads, rows, rollout, prompt)
    whole = spectrum_of(grads, rows)
    bucket = Bucket(grads, rows, prompt, rollout)
    found = matched_n(bucket, sums, whole, 36, draws=5, rank_draws=3, seed=2)
    ratios, ranks = [], []
    for pick in matched_picks(sums.n, 36, 5, seed=2):
        part = x[np.isin(rollout, np.flatnonzero(pick))]
        assert len(part) == 36
        ratios.append(naive_ratio(part))
        ranks.append(rank_of_share(np.linalg.svd(part, compute_uv=False) ** 2, 0.95))
    assert found.participation_ratio.mean == pytest.approx(np.mean(ratios), rel=1e-9)
    assert found.participation_ratio.ci95 == pytest.approx(np.quantile(ratios, [0.025, 0.975]), rel=1e-9)
    assert (found.rank95.mean, found.rank95.draws) == (pytest.approx(np.mean(ranks[:3])), 3)
    all_of_it = matched_n(bucket, sums, whole, 72)
    assert all_of_it.participation_ratio.mean == pytest.approx(whole.participation_ratio)
    assert (all_of_it.rank95.mean, all_of_it.rank95.draws) == (whole.rank(0.95), 1)


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


def measured(grads, bucket, n_buckets, prompt, rollout, common_n, **keywords):
    whole = Bucket(grads, np.arange(len(grads)), prompt, rollout)
    return measure_dump(whole, bucket, n_buckets, common_n, FAST, **keywords)


def naive_measures(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """From numpy's SVD: of `second`'s energy in `first`'s space, and symmetric ones."""
    a, b = (np.linalg.svd(x.astype(np.float64), full_matrices=False)[2] for x in (first, second))
    found = {"top1_cosine": abs(a[0] @ b[0])}
    for k in (1, 5, 10, 20):
        if min(len(a), len(b)) >= k:
            found[f"overlap/{k}"] = np.linalg.norm(a[:k] @ b[:k].T) ** 2 / k
        if len(a) >= k:
            found[f"captured/{k}"] = np.linalg.norm(second @ a[:k].T) ** 2 / np.linalg.norm(second) ** 2
    return found


@pytest.mark.parametrize("dim", [130, 24])
def test_measures_across_buckets_are_those_of_numpys_svd(dim: int):
    grads, prompt, rollout, bucket = clustered(6, 4, 2, dim, n_buckets=3)
    grads *= np.exp(2 * np.random.default_rng(1).standard_normal((len(grads), 1))).astype(np.float32)
    found = measured(grads, bucket, 3, prompt, rollout, 40)
    for i, j in np.ndindex(3, 3):
        for name, value in naive_measures(grads[bucket == i], grads[bucket == j]).items():
            assert found.cross[name][i, j] == pytest.approx(value, abs=1e-5), name
    labels = list(shuffled_labels(bucket, rollout, 3, seed=0))
    for draw, shuffled in enumerate(labels):
        for name, value in naive_measures(grads[shuffled == 0], grads[shuffled == 2]).items():
            assert found.null[name][draw, 0, 2] == pytest.approx(value, abs=1e-5), name
    rng = np.random.default_rng(0)
    own = np.flatnonzero(bucket == 1)
    for draw in range(3):
        first = np.isin(prompt[own], rng.permutation(np.unique(prompt[own]))[:3])
        ways = [naive_measures(grads[own[a]], grads[own[b]]) for a, b in ((first, ~first), (~first, first))]
        for name in ways[0]:
            assert found.ceilings[1][name][draw] == pytest.approx((ways[0][name] + ways[1][name]) / 2, abs=1e-5), name


def test_more_numbers_than_gradients_or_fewer_gives_the_same():
    grads, prompt, rollout, bucket = clustered(5, 4, 3, 70, n_buckets=2)
    wide = np.concatenate([grads, np.zeros((120, 40), np.float32)], axis=1)
    narrow = grads[:, :50]
    for dims in ((grads, wide), (narrow, np.concatenate([narrow, np.zeros((120, 60), np.float32)], axis=1))):
        first, second = (measured(x, bucket, 2, prompt, rollout, 40) for x in dims)
        for name, values in first.cross.items():
            np.testing.assert_allclose(second.cross[name], values, atol=1e-5)
            np.testing.assert_allclose(second.null[name], first.null[name], atol=1e-5)
            np.testing.assert_allclose(second.ceilings[0][name], first.ceilings[0][name], atol=1e-5)
        for before, after in zip(first.buckets, second.buckets, strict=True):
            assert after.participation_ratio == pytest.approx(before.participation_ratio)
            assert after.matched_n.participation_ratio.mean == pytest.approx(before.matched_n.participation_ratio.mean)
            assert after.matched_n.rank95.mean == pytest.approx(before.matched_n.rank95.mean, abs=1)


def test_no_directions_are_made_up_beyond_the_rank():
    rng = np.random.default_rng(0)
    prompt, sample, bucket = (axis.ravel() for axis in np.indices((10, 4, 2)))
    grads = (rng.standard_normal((80, 3)) @ rng.standard_normal((3, 300))).astype(np.float32)
    found = numbers_of(measured(grads, bucket, 2, prompt, rollout_codes(prompt, sample), 40))
    assert found["cross_bucket_overlap"]["5"] == [[None, None], [None, None]]
    assert found["cross_bucket_top1_cosine"][0][0] == pytest.approx(1, abs=1e-5)
    assert found["per_bucket"]["0"]["rank99"] <= 3


def test_ceiling_is_high_for_a_shared_direction_and_low_for_none():
    rng = np.random.default_rng(0)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((16, 4, 2, 2)))
    grads = rng.standard_normal((len(prompt), 300))
    grads[bucket == 1] += 8 * np.eye(300)[0] * rng.standard_normal((np.sum(bucket == 1), 1))
    found = numbers_of(measured(grads.astype(np.float32), bucket, 2, prompt, rollout_codes(prompt, sample), 128))
    low, high = found["cross_bucket_ceiling"]
    assert low < 0.3
    assert high > 0.85
    detail = found["cross_bucket_ceiling_detail"][1]
    assert detail["overlap"]["1"]["mean"] > 0.7 > 0.3 > detail["overlap"]["20"]["mean"]
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
    expected = measured(grads, bucket, 2, prompt, rollout, 30)
    order = rng.permutation(len(grads))
    for x, keep in ((grads @ rotation, slice(None)), (-3e-15 * grads, slice(None)), (grads[order], order)):
        found = measured(x, bucket[keep], 2, prompt[keep], rollout[keep], 30)
        for before, after in zip(expected.buckets, found.buckets, strict=True):
            assert after.participation_ratio == pytest.approx(before.participation_ratio, rel=1e-5)
            assert after.participation_ratio_ci95 == pytest.approx(before.participation_ratio_ci95, rel=1e-5)
            assert after.participation_ratio_unit_norm == pytest.approx(before.participation_ratio_unit_norm, rel=1e-5)
            assert after.effective_rank == pytest.approx(before.effective_rank, rel=1e-5)
            assert after.rank95 == before.rank95
        for name, values in expected.cross.items():
            np.testing.assert_allclose(found.cross[name], values, atol=1e-4)


@pytest.mark.parametrize("dim", [3, 40])
def test_degenerate_dumps_have_nulls_and_not_nan(dim: int):
    rng = np.random.default_rng(0)
    ids = np.arange(24)
    bucket = np.array([0] * 12 + [1] * 11 + [3])  # 2 is empty, 3 has one row, 1 is all zero
    grads = rng.standard_normal((24, dim)).astype(np.float32)
    grads[bucket == 1] = 0
    grads[0] = 0
    steps: list[int] = []
    found = numbers_of(
        measured(grads, bucket, 4, ids % 6, ids % 12, smallest_bucket([bucket]), on_step=lambda: steps.append(1))
    )
    assert len(steps) == 4 + FAST.null
    json.dumps(found, allow_nan=False)
    nothing, empty, single = (found["per_bucket"][str(index)] for index in (1, 2, 3))
    assert (nothing["n"], empty["n"], single["n"]) == (11, 0, 1)
    for numbers in (nothing, empty):
        kept = {name: value for name, value in numbers.items() if name not in ("n", "matched_n")}
        assert set(kept.values()) == {None}
        assert numbers["matched_n"]["participation_ratio"] is None
    assert single["participation_ratio"] == pytest.approx(1)
    assert single["participation_ratio_ci95"] is None
    assert found["cross_bucket_ceiling"][1:] == [None, None, None]
    assert found["cross_bucket_top1_cosine"][0][1] is None
    json.dumps(numbers_of(measured(grads[:0], bucket[:0], 2, ids[:0], ids[:0], 0)), allow_nan=False)
    one_prompt = numbers_of(measured(grads[:12], bucket[:12], 1, 0 * ids[:12], ids[:12], 12))
    assert one_prompt["cross_bucket_ceiling"] == [None]
