"""Edges, buckets and the choice of positions."""

import numpy as np

from gradprobe.dump.buckets import bucket_of, choose_positions, fit_edges


def test_edges_are_quantiles_and_buckets_are_equally_filled():
    entropies = np.random.default_rng(0).exponential(size=1000)
    edges = fit_edges(entropies, 5)
    np.testing.assert_allclose(edges, np.quantile(entropies, [0, 0.2, 0.4, 0.6, 0.8, 1]), rtol=1e-14)
    assert np.bincount(bucket_of(entropies, edges)).tolist() == [200] * 5


def test_a_value_on_an_edge_belongs_above_it_and_the_last_bucket_is_closed():
    assert bucket_of([0.0, 0.5, 1.0, 1.5, 2.0], [0.0, 1.0, 2.0]).tolist() == [0, 0, 1, 1, 1]


def test_values_outside_given_edges_go_to_the_outer_buckets():
    assert bucket_of([-1.0, 9.0], [0.0, 1.0, 2.0]).tolist() == [0, 1]


def test_repeated_edges_are_raised():
    edges = fit_edges(np.array([0.0] * 90 + [1.0] * 10), 5)
    np.testing.assert_allclose(edges, [0, 1e-6, 2e-6, 3e-6, 4e-6, 1])
    assert np.bincount(bucket_of([0.0] * 90 + [1.0] * 10, edges), minlength=5).tolist() == [90, 0, 0, 0, 10]


def test_choice_takes_up_to_so_many_of_each_bucket():
    buckets = np.array([0] * 10 + [1] * 2 + [3] * 5)
    chosen = choose_positions(buckets, 4, 3, np.random.default_rng(0))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert np.bincount(buckets[chosen], minlength=4).tolist() == [3, 2, 0, 3]
    assert choose_positions(buckets, 4, 0, np.random.default_rng(0)).tolist() == list(range(17))


def test_choice_is_uniform_within_a_bucket():
    counts = np.zeros(6)
    for seed in range(3000):
        counts[choose_positions(np.zeros(6, int), 2, 2, np.random.default_rng(seed))] += 1
    np.testing.assert_allclose(counts / 3000, 2 / 6, atol=0.04)


def test_a_token_that_changes_its_bucket_leaves_the_others_choice_alone():
    buckets = np.array([0, 1] * 20)
    moved = buckets.copy()
    moved[6] = 1
    before, after = (set(choose_positions(b, 2, 4, np.random.default_rng(1)).tolist()) for b in (buckets, moved))
    assert len(before ^ after) <= 4
    assert len(before & after) >= 6
