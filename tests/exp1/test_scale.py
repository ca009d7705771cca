"""Parts, blocks and views give what the whole gives, and memory does not grow with the number of gradients."""

import tracemalloc

import numpy as np
import pytest
from planted import bucket_of, write_dump

from gradprobe.analysis.bucket import Bucket, rollout_codes
from gradprobe.analysis.bucket import bucket_of as dump_bucket
from gradprobe.dump.consistency import load_dump
from gradprobe.dump.mapped import SelectedRows
from gradprobe.exp1.measure import Exp1Settings, measure_dump, measure_dumps, sample_rollouts
from gradprobe.exp1.plane import project_to_plane
from gradprobe.exp2 import direction
from gradprobe.exp2.direction import RolloutGrams, alignment, cancellations
from gradprobe.exp2.measure import Exp2Settings, bucket_directions, directions_of_bucket

FAST = Exp1Settings(halves=200, matched=4, ceiling=3, null=3)


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


@pytest.mark.parametrize("huge", [None, 3])
def test_gram_matrices_of_parts_are_those_of_their_own_gradients(huge: int | None):
    grads, prompt, rollout, _ = planted_rows(12, 15)
    if huge is not None:  # what stays would be lost in the rounding of what goes
        grads[huge] *= 1e9
    x = grads.astype(np.float64)
    for dim in (15, 3):
        whole = bucket_of(grads[:, :dim], None, prompt, rollout)
        assert len(whole.gram) == dim
        for is_kept in (rollout >= 6, rollout < 6):
            part = x[is_kept, :dim]
            expected = part.T @ part if len(part) >= dim else part @ part.T
            np.testing.assert_allclose(whole.part(is_kept).gram, expected, rtol=1e-9, atol=1e-9)


def test_the_gram_matrix_of_a_part_of_few_gradients_is_cut_from_that_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    grads, *_ = planted_rows(4, 60)
    whole, is_kept = bucket_of(grads), np.arange(len(grads)) % 3 == 0
    expected = whole.gram[np.ix_(is_kept, is_kept)]
    monkeypatch.setattr(Bucket, "blocks", None)  # no gradient is read
    np.testing.assert_array_equal(whole.part(is_kept).gram, expected)


def grams_of(n_prompts: int, n_rollouts: int, seed: int = 0) -> RolloutGrams:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_prompts, n_rollouts, 10)) + rng.standard_normal((n_prompts, 1, 10))
    n_tokens = rng.integers(1, 4, (n_prompts, n_rollouts))
    n_tokens[::3, -1] = 0  # padding
    x[n_tokens == 0] = 0
    correct = (rng.random((n_prompts, n_rollouts)) < 0.5) & (n_tokens > 0)
    return RolloutGrams(np.arange(n_prompts), x @ x.transpose(0, 2, 1), n_tokens, correct)


def test_permutations_a_few_at_a_time_have_the_null_of_permutations(monkeypatch: pytest.MonkeyPatch):
    grams = grams_of(30, 5).with_rollouts_of_each_kind(1)
    nulls = []
    for label_bytes in (64 << 20, 8 * 30 * 5 * 7):
        monkeypatch.setattr(direction, "LABEL_BYTES", label_bytes)
        nulls.append(direction.permutation_null(grams, np.random.default_rng(1), 4000, direction._label_cosines))
    whole, parts = nulls
    assert len(whole) == len(parts) == 4000
    assert abs(parts.mean() - whole.mean()) < 4 * whole.std() * np.sqrt(2 / 4000)
    assert parts.std() == pytest.approx(whole.std(), rel=0.06)
    np.testing.assert_allclose(np.quantile(parts, [0.025, 0.975]), np.quantile(whole, [0.025, 0.975]), atol=0.015)


def test_p_values_of_many_prompts_are_those_of_few(monkeypatch: pytest.MonkeyPatch):
    grams = grams_of(40, 6, seed=3)
    measures = (alignment, lambda *args: cancellations(*args)[0])
    expected = [f(grams, np.random.default_rng(1)) for f in measures]
    monkeypatch.setattr(direction, "LABEL_BYTES", 1)
    found = [f(grams, np.random.default_rng(1)) for f in measures]
    for before, after in zip(expected, found, strict=True):
        assert after.p_value == pytest.approx(before.p_value, abs=0.03)
    assert found[0].rho == expected[0].rho
    assert found[1].null_ci95 == pytest.approx(expected[1].null_ci95, abs=0.03)


@pytest.mark.parametrize("dim", [10, 120])
def test_some_rows_of_a_dump_are_analysed_like_an_array_of_them(dim: int):
    grads, prompt, rollout, bucket = planted_rows(8, dim, n_buckets=2)
    kept = np.sort(np.random.default_rng(1).choice(len(grads), 80, replace=False))
    some = SelectedRows(grads, kept)
    whole = [Bucket(x, np.arange(80), prompt[kept], rollout[kept]) for x in (grads[kept], some)]
    first, second = (measure_dump(one, bucket[kept], 2, FAST).numbers for one in whole)
    assert first == second
    np.testing.assert_array_equal(*(project_to_plane(one)[0] for one in whole))
    of_array, of_some = (one.part(bucket[kept] == 1) for one in whole)
    np.testing.assert_array_equal(of_some.gram, of_array.gram)
    correct = of_array.rollout % 2 == 0
    expected, found = (directions_of_bucket(one, correct, Exp2Settings(permutations=99)) for one in (of_array, of_some))
    assert (found.alignment, found.cancellation) == (expected.alignment, expected.cancellation)
    np.testing.assert_array_equal(found.directions.cosines, expected.directions.cosines)


def test_memory_does_not_grow_with_the_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Twice the positions of 512 numbers each (2 KiB): both experiments and the projection keep less than a tenth."""
    monkeypatch.setattr("gradprobe.dump.mapped.BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr("gradprobe.analysis.bucket.HELD_BYTES", 8 << 20)
    monkeypatch.setattr("gradprobe.analysis.bucket.READ_BYTES", 8 << 20)
    monkeypatch.setattr("gradprobe.analysis.bucket.MAX_EXACT", 100)
    peaks = []
    for n_prompts in (400, 800):
        rng = np.random.default_rng(0)
        prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((n_prompts, 4, 2, 4)))
        grads = rng.standard_normal((len(prompt), 512))
        path = tmp_path / str(n_prompts)
        write_dump(path, grads, bucket, prompt=prompt, sample=sample, correct=sample < 2, bins=2)
        del grads
        dump = load_dump(path)
        tracemalloc.start()
        measure_dumps({"a": [sample_rollouts(dump, 200)]}, Exp1Settings(20, 2, 1, 1))
        project_to_plane(dump_bucket(dump))
        bucket_directions(dump, 1, Exp2Settings(20, 20))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    added = 400 * 4 * 2 * 4 * 512 * 4
    assert peaks[1] - peaks[0] < added / 10
