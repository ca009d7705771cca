"""Exp 1's mathematics against numpy's SVD, planted structure, and what must not change a number."""

import numpy as np
import pytest

from gradprobe import spectrum
from gradprobe.spectrum import (
    cross_cosines,
    cumulative_energy,
    eigen_of_gram,
    iter_bucket_spectra,
    participation_ratio,
    project_to_plane,
    rank_of_share,
    spectrum_of_rows,
)

SHAPES = [(1, 1), (1, 6), (6, 1), (2, 2), (3, 40), (40, 3), (30, 31), (31, 30), (50, 50)]


def gradients(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, dim)) * np.exp(rng.standard_normal((n, 1)))).astype(np.float32)


def all_rows(grads: np.ndarray) -> np.ndarray:
    return np.arange(len(grads))


@pytest.mark.parametrize(("n", "dim"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
def test_spectrum_is_that_of_numpys_svd(n: int, dim: int, scale: float):
    grads = gradients(n, dim) * np.float32(scale)
    _, sigma, right = np.linalg.svd(grads.astype(np.float64), full_matrices=False)
    found = spectrum_of_rows(grads, all_rows(grads))
    np.testing.assert_allclose(found.energies, sigma**2, rtol=1e-10, atol=1e-13 * sigma[0] ** 2)
    assert abs(found.top_direction @ right[0]) == pytest.approx(1.0, abs=1e-10)
    assert found.participation_ratio == pytest.approx((sigma**2).sum() ** 2 / (sigma**4).sum(), rel=1e-10)
    assert found.top1_energy_frac == pytest.approx(sigma[0] ** 2 / (sigma**2).sum(), rel=1e-10)


def test_blocks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path):
    grads = gradients(70, 50)
    rows = np.random.default_rng(1).choice(70, 45, replace=False)
    whole = [spectrum_of_rows(grads, rows), spectrum_of_rows(grads, all_rows(grads))]
    plane = project_to_plane(grads, rows)
    np.save(tmp_path / "grads.npy", grads)
    monkeypatch.setattr(spectrum, "BLOCK_BYTES", 1000)
    mapped = np.load(tmp_path / "grads.npy", mmap_mode="r")
    for expected, blocked in zip(
        whole, [spectrum_of_rows(mapped, rows), spectrum_of_rows(mapped, all_rows(grads))], strict=True
    ):
        np.testing.assert_allclose(blocked.energies, expected.energies, rtol=1e-10)
        np.testing.assert_allclose(blocked.top_direction, expected.top_direction, atol=1e-9)
    np.testing.assert_allclose(project_to_plane(mapped, rows).coordinates, plane.coordinates, atol=1e-9)


def test_both_gram_matrices_give_the_same():
    grads = gradients(20, 12)
    wide = np.concatenate([grads, np.zeros((20, 20), np.float32)], axis=1)  # zero columns: d > n, nothing else changes
    narrow, padded = (spectrum_of_rows(x, all_rows(x)) for x in (grads, wide))
    np.testing.assert_allclose(padded.energies[:12], narrow.energies, rtol=1e-10)
    np.testing.assert_allclose(padded.top_direction[:12], narrow.top_direction, atol=1e-10)
    planes = [project_to_plane(x, all_rows(x)) for x in (grads, wide)]
    np.testing.assert_allclose(planes[0].coordinates, planes[1].coordinates, atol=1e-9)
    np.testing.assert_allclose(planes[0].explained, planes[1].explained, rtol=1e-10)


def test_row_order_rotation_and_scale_leave_participation_ratio_and_ranks():
    grads = gradients(40, 25).astype(np.float64)
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.standard_normal((25, 25)))[0]
    expected = spectrum_of_rows(grads, all_rows(grads))
    for changed in (grads[rng.permutation(40)], grads @ rotation, -3e4 * grads):
        found = spectrum_of_rows(changed, all_rows(changed))
        assert found.participation_ratio == pytest.approx(expected.participation_ratio, rel=1e-10)
        assert [found.rank(q) for q in (0.5, 0.9, 0.95, 0.99)] == [expected.rank(q) for q in (0.5, 0.9, 0.95, 0.99)]
    column_scaled = grads * np.linspace(0.1, 10, 25)  # not an invariance: it has to move the number
    assert spectrum_of_rows(column_scaled, all_rows(grads)).participation_ratio != pytest.approx(
        expected.participation_ratio, rel=0.05
    )


@pytest.mark.parametrize("k", [1, 3, 10])
def test_planted_dimensions_are_counted(k: int):
    rng = np.random.default_rng(k)
    basis = np.linalg.qr(rng.standard_normal((60, k)))[0]
    grads = rng.standard_normal((3000, k)) @ basis.T
    found = spectrum_of_rows(grads, all_rows(grads))
    assert found.participation_ratio == pytest.approx(k, rel=0.02)
    assert found.rank(0.99) == k


def test_rank_counts_equal_energies_exactly():
    assert [rank_of_share(np.ones(20), q) for q in (0.5, 0.9, 0.95, 0.99)] == [10, 18, 19, 20]
    assert rank_of_share(np.array([1.0, 0.0]), 0.99) == 1
    assert participation_ratio(np.ones(7)) == pytest.approx(7)


def test_an_empty_bucket_and_zero_gradients_have_no_number():
    grads = np.zeros((4, 3), np.float32)
    spectra = list(iter_bucket_spectra(grads, np.array([0, 0, 2, 2]), 3))
    assert [found.n for found in spectra] == [2, 0, 2]
    for found in spectra:
        assert found.participation_ratio is found.top1_energy_frac is found.rank(0.95) is found.top_direction is None
        assert cumulative_energy(found.energies) is None
    assert project_to_plane(grads, all_rows(grads)).explained is None
    assert project_to_plane(grads, np.zeros(0, int)).coordinates.shape == (0, 2)


def test_cross_cosines_have_no_sign_and_no_number_for_a_missing_direction():
    first, second = np.array([1.0, 0.0]), np.array([-0.6, 0.8])
    assert cross_cosines([first, None, second]) == [[1.0, None, 0.6], [None] * 3, [0.6, None, 1.0]]


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


def test_projection_samples_by_seed_where_the_gram_matrix_would_be_too_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spectrum, "MAX_PROJECTION_GRAM", 10)
    grads = gradients(40, 30)
    first, again, other = (project_to_plane(grads, all_rows(grads), seed) for seed in (0, 0, 1))
    assert (len(first.rows), first.n_rows) == (10, 40)
    np.testing.assert_array_equal(first.coordinates, again.coordinates)
    assert set(first.rows) != set(other.rows)


def test_leading_eigenvectors_of_equal_eigenvalues_are_orthonormal():
    values, vectors = eigen_of_gram(np.eye(6) * 2.0, n_vectors=3)
    np.testing.assert_allclose(values, 2.0)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


def test_leading_eigenvectors_are_those_of_scipy():
    grads = gradients(60, 90).astype(np.float64)
    gram = grads @ grads.T
    before = gram.copy()
    values, vectors = eigen_of_gram(gram, n_vectors=5)
    np.testing.assert_array_equal(gram, before)
    expected_values, expected = np.linalg.eigh(gram)
    np.testing.assert_allclose(values, expected_values[::-1], rtol=1e-9, atol=1e-12 * values[0])
    np.testing.assert_allclose(np.abs(np.sum(vectors * expected[:, ::-1][:, :5], axis=0)), 1.0, atol=1e-9)
