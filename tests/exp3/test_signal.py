"""Exp 3's mathematics against plain loops over pairs, planted truths, and what must not change a number."""

from dataclasses import asdict, replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import t as student_t

from gradprobe.analysis.opposition import rho_over_sums
from gradprobe.analysis.pooled import Pooled, iter_prompts
from gradprobe.exp3.signal import Exp3, Signal, highest_share, reason_of, signal_of_pooled
from gradprobe.exp3.summary import signal_numbers
from gradprobe.exp3.tables import moments_of, prompt_tables
from gradprobe.exp3.weights import OBJECTIVES, hsic_weights, update_weights


def pooled_of(sums: np.ndarray, outcome: np.ndarray, *, present: np.ndarray | None = None, seed: int = 0) -> Pooled:
    """Equal groups as a dump with rows in random order.

    Args:
        sums: [P, R, B, d].
        outcome: [P, R].
        present: [P, R, B] bool, which rows there are; None for all.
    """
    p, r, b, d = sums.shape
    rng = np.random.default_rng(seed)
    present = np.ones((p, r, b), bool) if present is None else present
    places = rng.permutation(np.argwhere(present))
    prompt, sample, bucket = places.T
    rollout_prompt, rollout_sample = np.divmod(rng.permutation(p * r), r)
    n_tokens = 1 + (prompt + 2 * sample + 3 * bucket) % 7
    return Pooled(
        grads=sums[prompt, sample, bucket].reshape(-1, d),
        prompt=prompt,
        sample=sample,
        bucket=bucket,
        n_tokens=n_tokens,
        rare=n_tokens / 10,
        rollout_prompt=rollout_prompt,
        rollout_sample=rollout_sample,
        outcome=outcome[rollout_prompt, rollout_sample].astype(np.float64),
        correct=outcome[rollout_prompt, rollout_sample] > 0,
        n_response_tokens=1 + (rollout_prompt + rollout_sample) % 5,
        n_buckets=b,
    )


def study(seed: int = 0, n_prompts: int = 9, n_rollouts: int = 6, n_buckets: int = 4, dim: int = 7) -> Pooled:
    """Unequal groups, rows that are missing, a rollout without rows, prompts of one kind, a bucket without rows."""
    rng = np.random.default_rng(seed)
    shape = (n_prompts, n_rollouts, n_buckets)
    sums = rng.standard_normal((*shape, dim)) + 0.7
    outcome = (rng.random(shape[:2]) < rng.random((n_prompts, 1))).astype(float)
    outcome[0], outcome[1] = 1.0, 0.0
    sums += outcome[:, :, None, None] * np.linspace(0.2, 1.5, n_buckets)[:, None]
    present = rng.random(shape) < 0.8
    present[2, 3], present[:, :, 1] = False, False
    dump = pooled_of(sums, outcome, present=present)
    groups = 3 + np.arange(n_prompts) % (n_rollouts - 2)
    rows, rollouts = dump.sample < groups[dump.prompt], dump.rollout_sample < groups[dump.rollout_prompt]
    return select(dump, rows, rollouts)


def select(dump: Pooled, rows: np.ndarray, rollouts: np.ndarray) -> Pooled:
    """Some rows and rollouts, as masks or in an order."""
    of_rows = {key: getattr(dump, key)[rows] for key in ("grads", "prompt", "sample", "bucket", "n_tokens", "rare")}
    keys = ("rollout_prompt", "rollout_sample", "outcome", "correct", "n_response_tokens")
    return replace(dump, **of_rows, **{key: getattr(dump, key)[rollouts] for key in keys})


def groups_of(dump: Pooled) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per prompt [R, B, d] sums, [R] outcomes and lengths, by a plain loop over rows."""
    found = []
    for prompt in sorted(set(dump.rollout_prompt)):
        own = [i for i in range(len(dump.rollout_prompt)) if dump.rollout_prompt[i] == prompt]
        own.sort(key=lambda i: dump.rollout_sample[i])
        sums = np.zeros((len(own), dump.n_buckets, dump.grads.shape[1]))
        for place, i in enumerate(own):
            for row in range(len(dump.prompt)):
                if (dump.prompt[row], dump.sample[row]) == (prompt, dump.rollout_sample[i]):
                    sums[place, dump.bucket[row]] += dump.grads[row]
        found.append((sums, dump.outcome[own], dump.n_response_tokens[own]))
    return found


def updates_of(dump: Pooled, objective: str) -> np.ndarray:
    """[P, B, d]."""
    return np.stack(
        [
            sum(w * g for w, g in zip(update_weights(c, n, objective), sums, strict=True))
            for sums, c, n in groups_of(dump)
        ]
    )


def signal_by_pairs(updates: np.ndarray) -> np.ndarray:
    """[B, B] the mean of ⟨u_p, u_q⟩ over p ≠ q."""
    return np.mean([updates[p] @ updates[q].T for p, q in permutations(range(len(updates)), 2)], axis=0)


def assert_same(found: Exp3, expected: Exp3) -> None:
    def flat(value: object, path: str = "") -> dict[str, object]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else None
        if items is None:
            return {path: value}
        return {key: leaf for name, inner in items for key, leaf in flat(inner, f"{path}/{name}").items()}

    left, right = flat(asdict(found)), flat(asdict(expected))
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value == (pytest.approx(right[key], rel=1e-7, abs=1e-7) if isinstance(value, float) else right[key]), key


def test_objective_weights_by_hand():
    outcome, length = np.array([1.0, 0.0, 0.0, 1.0, 0.0]), np.array([10, 20, 5, 40, 1])
    std = np.sqrt((2 * 0.36 + 3 * 0.16) / 4)  # of the sample
    advantages = np.array([0.6, -0.4, -0.4, 0.6, -0.4])
    expected = {
        "dapo": advantages / std / 5,
        "grpo": advantages / std / 5 / length,
        "dr-grpo": advantages / 4,
        "reinforce": outcome / 5,
    }
    assert expected.keys() == OBJECTIVES.keys()
    for objective, weights in expected.items():
        np.testing.assert_allclose(update_weights(outcome, length, objective), weights, atol=1e-15)


@pytest.mark.parametrize("objective", ["dapo", "grpo", "dr-grpo"])
def test_one_kind_has_no_advantage(objective: str):
    for outcome in (np.full(3, 0.1), np.ones(1), np.zeros(4)):  # the mean of three 0.1 is not 0.1
        assert not update_weights(outcome, np.ones(len(outcome)), objective).any()
    assert update_weights(np.ones(2), np.ones(2), "reinforce") == pytest.approx([0.5, 0.5])


def test_no_such_objective():
    with pytest.raises(ValueError, match="dapo, grpo, dr-grpo, reinforce"):
        update_weights(np.ones(2), np.ones(2), "ppo")


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_across_prompts_as_a_plain_loop_over_pairs(objective: str):
    dump = study()
    updates = updates_of(dump, objective)
    moments = moments_of(prompt_tables(dump, objective))
    for place in range(len(updates) + 1):
        some = updates if place == 0 else np.delete(updates, place - 1, axis=0)
        signal = signal_by_pairs(some)
        noise = np.einsum("pbd,pcd->bc", some - some.mean(axis=0), some - some.mean(axis=0)) / (len(some) - 1)
        np.testing.assert_allclose(moments.signal[place], signal, atol=1e-10)
        np.testing.assert_allclose(moments.noise[place], noise, atol=1e-10)


def test_numbers_follow_from_pairs():
    dump = study(n_prompts=40)
    updates = updates_of(dump, "dr-grpo")
    signal = signal_by_pairs(updates)
    result = signal_of_pooled(dump, "dr-grpo")
    assert result.signal.verdict == "seen"
    assert result.signal.value == pytest.approx(signal.sum(), abs=1e-10)
    values = [signal_by_pairs(np.delete(updates, p, axis=0)).sum() for p in range(len(updates))]
    error = np.sqrt(39 / 40 * np.sum((values - np.mean(values)) ** 2))
    assert result.signal.z == pytest.approx(signal.sum() / error, rel=1e-10)
    assert result.signal.ci95[0] == pytest.approx(signal.sum() - student_t.ppf(0.975, 39) * error, rel=1e-8)
    noise = np.einsum("pbd,pcd->bc", updates, updates) / 40 - signal
    assert result.noise_scale_prompts.value == pytest.approx(noise.sum() / signal.sum(), rel=1e-10)
    tokens = np.array([dump.n_tokens[dump.bucket == b].sum() for b in range(4)])
    for index, bucket in enumerate(result.buckets):
        assert bucket.share_of_tokens == pytest.approx(tokens[index] / tokens.sum())
        assert bucket.signal_share.value == pytest.approx(signal[index].sum() / signal.sum(), abs=1e-10)
        assert bucket.noise_share == pytest.approx(noise[index].sum() / noise.sum(), abs=1e-10)
    top = result.keep_top[1]  # buckets 2 and 3
    own = signal[2:, 2:].sum()
    assert top.share_of_tokens == pytest.approx(tokens[2:].sum() / tokens.sum())
    assert top.cosine.value == pytest.approx(signal[2:].sum() / np.sqrt(own * signal.sum()), abs=1e-10)
    scales = noise[2:, 2:].sum() / own, noise.sum() / signal.sum()
    assert top.noise_scale_ratio.value == pytest.approx(scales[0] / scales[1], rel=1e-10)
    assert result.keep_bottom[0].signal_share == result.buckets[0].signal_share
    last = result.keep_top[-1]
    assert last.share_of_tokens == last.cosine.value == last.signal_share.value == pytest.approx(1)
    assert last.cosine.ci95 == pytest.approx((1, 1), abs=1e-6)
    assert last.noise_scale_ratio.value == pytest.approx(1)


def test_shares_add_up_to_one():
    result = signal_of_pooled(study(n_prompts=120))
    buckets = result.buckets
    assert sum(bucket.signal_share.value for bucket in buckets) == pytest.approx(1, abs=1e-10)
    assert sum(bucket.signal_share_within_prompts.value for bucket in buckets) == pytest.approx(1, abs=1e-10)
    assert sum(bucket.noise_share for bucket in buckets) == pytest.approx(1, abs=1e-10)
    assert sum(bucket.share_of_tokens for bucket in buckets) == pytest.approx(1, abs=1e-10)


def song_hsic(outcome: np.ndarray, gram: np.ndarray) -> float:
    """Song et al. 2012, as printed, with L symmetrised."""
    n, ones = len(outcome), np.ones(len(outcome))
    kernel, other = np.outer(outcome, outcome), (gram + gram.T) / 2
    np.fill_diagonal(kernel, 0)
    other = other - np.diag(np.diag(other))
    middle = (ones @ kernel @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    return (np.trace(kernel @ other) + middle - 2 / (n - 2) * ones @ kernel @ other @ ones) / (n * (n - 3))


def test_within_prompts_is_the_published_hsic():
    dump = study(n_prompts=120)
    expected = [
        [song_hsic(outcome, sums[:, b] @ sums.sum(axis=1).T) for b in range(dump.n_buckets)]
        for sums, outcome, _ in groups_of(dump)
        if len(outcome) >= 4
    ]
    assert 60 <= len(expected) < 120
    np.testing.assert_allclose(prompt_tables(dump, "dapo").within, expected, atol=1e-10)
    totals = np.sum(expected, axis=0)
    for bucket, total in zip(signal_of_pooled(dump).buckets, totals, strict=True):
        assert bucket.signal_share_within_prompts.value == pytest.approx(total / totals.sum(), abs=1e-10)


def test_within_prompts_is_unbiased_where_the_mean_is_not_zero():
    """And advantages against the mean of the other rollouts, over pairs of different rollouts, are not."""
    rng = np.random.default_rng(0)
    n_draws, n, dim, chance = 20_000, 6, 3, 0.3
    mean, effect = np.full(dim, 0.8), np.array([1.0, -0.5, 0.2])
    outcome = (rng.random((n_draws, n)) < chance).astype(float)
    grads = mean + outcome[:, :, None] * effect + 0.5 * rng.standard_normal((n_draws, n, dim))
    grams = grads @ grads.transpose(0, 2, 1)
    truth = (chance * (1 - chance)) ** 2 * effect @ effect
    unbiased = np.array([np.sum(hsic_weights(c) * gram) for c, gram in zip(outcome, grams, strict=True)])
    advantages = (outcome - outcome.mean(axis=1, keepdims=True)) * n / (n - 1)
    products = advantages[:, :, None] * advantages[:, None] * grams
    biased = (products.sum(axis=(1, 2)) - np.trace(products, axis1=1, axis2=2)) / (n * (n - 1))
    errors = [values.std() / np.sqrt(n_draws) for values in (unbiased, biased)]
    assert abs(unbiased.mean() - truth) < 4 * errors[0] < 0.3 * truth
    assert abs(biased.mean() - truth) > 10 * errors[1]


def test_score_mean_as_a_plain_loop():
    dump = replace(study(n_prompts=20), rare=None)
    groups = [sums for sums, _, _ in groups_of(dump)]
    for b, bucket in enumerate(signal_of_pooled(dump).buckets):
        products = [np.mean([g[r, b] @ g[s, b] for r, s in permutations(range(len(g)), 2)]) for g in groups]
        energies = [np.mean(np.sum(g[:, b] ** 2, axis=1)) for g in groups]
        if b == 1:  # a bucket without rows
            assert (bucket.score_mean.share_of_energy, bucket.score_mean.z) == (None, None)
            continue
        assert bucket.score_mean.share_of_energy == pytest.approx(np.sum(products) / np.sum(energies), abs=1e-10)
        z = np.mean(products) / (np.std(products, ddof=1) / np.sqrt(20))
        assert bucket.score_mean.z == pytest.approx(z, abs=1e-8)


def test_a_score_mean_is_no_test_where_its_rare_tokens_were_not_to_be_expected():
    dump = study(n_prompts=20)
    assert all(bucket.score_mean.z is None for bucket in signal_of_pooled(replace(dump, rare=dump.rare / 1e4)).buckets)
    assert signal_of_pooled(replace(dump, rare=dump.rare * 1e4)).buckets[0].score_mean.z is not None


def test_order_of_rows_and_rollouts_leaves_every_number():
    dump = study(n_prompts=30)
    rng = np.random.default_rng(3)
    shuffled = select(dump, rng.permutation(len(dump.prompt)), rng.permutation(len(dump.rollout_prompt)))
    assert_same(signal_of_pooled(shuffled), signal_of_pooled(dump))
    renamed = replace(
        dump, sample=10_000 - 7 * dump.sample, rollout_sample=10_000 - 7 * dump.rollout_sample,
        prompt=3 * dump.prompt, rollout_prompt=3 * dump.rollout_prompt,
    )  # fmt: skip
    assert_same(signal_of_pooled(renamed), signal_of_pooled(dump))


def test_a_memory_map_gives_the_same(tmp_path):
    dump = replace(study(n_prompts=30), grads=study(n_prompts=30).grads.astype(np.float32))
    np.save(tmp_path / "grads.npy", dump.grads)
    mapped = replace(dump, grads=np.load(tmp_path / "grads.npy", mmap_mode="r"))
    assert signal_of_pooled(mapped) == signal_of_pooled(dump)


def test_a_missing_row_is_a_zero_row():
    dump = study(n_prompts=20)
    there = set(zip(dump.prompt.tolist(), dump.sample.tolist(), dump.bucket.tolist(), strict=True))
    rollouts = zip(dump.rollout_prompt.tolist(), dump.rollout_sample.tolist(), strict=True)
    missing = np.array([(p, s, b) for p, s in rollouts for b in range(4) if (p, s, b) not in there])
    filled = replace(
        dump,
        grads=np.concatenate([dump.grads, np.zeros((len(missing), dump.grads.shape[1]))]),
        n_tokens=np.concatenate([dump.n_tokens, np.zeros(len(missing), int)]),
        rare=np.concatenate([dump.rare, np.zeros(len(missing))]),
        **{
            key: np.concatenate([getattr(dump, key), missing[:, column]])
            for column, key in enumerate(("prompt", "sample", "bucket"))
        },
    )
    assert_same(signal_of_pooled(filled), signal_of_pooled(dump))


def test_prompts_of_one_kind_count_as_zero():
    dump = study(n_prompts=30)
    mixed = [i for i, u in enumerate(updates_of(dump, "dapo")) if u.any()]
    kept = select(dump, np.isin(dump.prompt, mixed), np.isin(dump.rollout_prompt, mixed))
    n, m = 30, len(mixed)
    assert m < n
    full, only_mixed = signal_of_pooled(dump), signal_of_pooled(kept)
    assert (full.n_prompts, full.n_prompts_mixed, only_mixed.n_prompts) == (n, m, m)
    assert full.signal.value * n * (n - 1) == pytest.approx(only_mixed.signal.value * m * (m - 1))
    for a, b in zip(full.buckets, only_mixed.buckets, strict=True):
        assert a.signal_share.value == pytest.approx(b.signal_share.value)


def test_rollouts_without_any_row_shift_the_advantages():
    """A rollout whose gradients are all 0 still counts in the mean of its prompt's outcomes."""
    dump = study(n_prompts=30)
    bare = ~np.isin(dump.rollout_prompt * 100 + dump.rollout_sample, dump.prompt * 100 + dump.sample)
    assert bare.any()
    without = select(dump, np.ones(len(dump.prompt), bool), ~bare)
    assert signal_of_pooled(without).signal.value != pytest.approx(signal_of_pooled(dump).signal.value, rel=1e-6)


def test_too_little_gives_none_and_not_nan():
    empty = select(study(), np.zeros(0, int), np.zeros(0, int))
    two = select(study(), study().prompt < 2, study().rollout_prompt < 2)
    rowless = select(study(), np.zeros(0, int), np.arange(len(study().rollout_prompt)))
    for dump in (empty, two, rowless):
        result = signal_of_pooled(dump)
        assert result.signal.verdict == "underpowered"
        for bucket in result.buckets:
            assert bucket.signal_share.value is bucket.signal_share.ci95 is None
        assert "nan" not in repr(signal_numbers(result)).lower()
        assert rho_over_sums(dump).all_tokens.value is None


def test_summary_has_the_keys_of_the_format():
    summary = signal_numbers(signal_of_pooled(study(n_prompts=30)))
    head = "n_prompts n_prompts_mixed n_rollouts bins objective outcome signal noise_scale_prompts per_bucket"
    assert summary.keys() == {*head.split(), "keep_top", "keep_bottom", "keep_random", "at_20_percent", "by_weight"}
    assert list(summary["per_bucket"]) == ["0", "1", "2", "3"]
    assert summary["signal"].keys() == {"value", "ci95", "z", "verdict", "reason"}
    assert summary["per_bucket"]["0"]["score_mean"].keys() == {"share_of_energy", "z"}
    keys = {"share_of_tokens", "cosine", "signal_share", "noise_share", "noise_scale_ratio"}
    assert {key for kept in summary["keep_random"] for key in kept} == keys
    assert len(summary["keep_top"]) == len(summary["keep_bottom"]) == len(summary["keep_random"]) == 4


@pytest.mark.parametrize("fault", ["rollout twice", "row without rollout", "two rows in one bucket"])
def test_what_is_no_pooled_dump_is_refused(fault: str):
    dump = study()
    rows, rollouts = np.arange(len(dump.prompt)), np.arange(len(dump.rollout_prompt))
    if fault == "rollout twice":
        rollouts = np.append(rollouts, 0)
    elif fault == "row without rollout":
        own = (dump.rollout_prompt == dump.prompt[0]) & (dump.rollout_sample == dump.sample[0])
        rollouts = rollouts[~own]
    else:
        rows = np.append(rows, 0)
    with pytest.raises(ValueError, match="rollout"):
        list(iter_prompts(select(dump, rows, rollouts)))


def test_highest_share_cuts_one_bucket():
    np.testing.assert_allclose(highest_share(np.array([50, 30, 0, 20]), 0.2), [0, 0, 0, 1])
    np.testing.assert_allclose(highest_share(np.array([50, 30, 10, 10]), 0.3), [0, 1 / 3, 1, 1])
    np.testing.assert_allclose(highest_share(np.array([0, 0]), 0.3), [0, 0])


def test_tokens_kept_at_random_cost_the_noise_that_is_foretold():
    """A dump whose buckets are drawn at random measures in `keep_top` what `keep_random` computes in another one."""
    rng = np.random.default_rng(0)
    p, r, tokens, dim = 1500, 8, 12, 6
    outcome = (rng.random((p, r)) < 0.5).astype(float)
    grads = rng.standard_normal((p, r, tokens, dim))
    grads[..., 0] += 0.6 * (outcome - 0.5)[:, :, None]
    by_entropy = signal_of_pooled(pooled_of(grads.reshape(p, r, 2, 6, dim).sum(axis=3), outcome), "dr-grpo")
    labels = rng.integers(4, size=(p, r, tokens))
    by_chance = np.stack([(grads * (labels == b)[..., None]).sum(axis=2) for b in range(4)], axis=2)
    measured = signal_of_pooled(pooled_of(by_chance, outcome), "dr-grpo").keep_top[0]
    for kept in by_entropy.keep_random:
        assert kept.cosine.value == pytest.approx(1)
        assert [kept.signal_share.value, kept.noise_share] == pytest.approx([kept.share_of_tokens] * 2)
    half = by_entropy.keep_random[0]
    assert half.share_of_tokens == pytest.approx(0.5, abs=0.02)
    assert half.noise_scale_ratio.value == pytest.approx(1 / half.share_of_tokens, rel=0.05)
    assert measured.cosine.value == pytest.approx(1, abs=0.05)
    assert measured.signal_share.value == pytest.approx(0.25, abs=0.03)
    assert measured.noise_scale_ratio.value == pytest.approx(4, rel=0.15)
    assert by_entropy.at_20_percent["random"].noise_scale_ratio.value == pytest.approx(5, rel=0.1)


def test_no_signal_is_underpowered():
    verdicts = []
    for draw in range(100):
        rng = np.random.default_rng(draw)
        outcome = (rng.random((30, 6)) < 0.5).astype(float)
        result = signal_of_pooled(pooled_of(rng.standard_normal((30, 6, 3, 8)), outcome))
        verdicts.append(result.signal.verdict)
        if verdicts[-1] == "underpowered":
            assert all(bucket.signal_share.value is None for bucket in result.buckets)
    assert verdicts.count("seen") <= 5


def on_policy(rng: np.random.Generator, p: int, r: int, dim: int, effect: float) -> Pooled:
    """Chances of success differ by prompt; every rollout's score has mean 0."""
    chance = rng.uniform(0.05, 0.95, (p, 1))
    outcome = (rng.random((p, r)) < chance).astype(float)
    direction = effect * rng.standard_normal((p, 1, 2, dim)) / np.sqrt(dim)
    sums = (outcome - chance)[:, :, None, None] * direction + rng.standard_normal((p, r, 2, dim)) / np.sqrt(dim)
    return pooled_of(sums, outcome)


def test_rho_over_sums_as_a_plain_loop():
    dump = on_policy(np.random.default_rng(0), 60, 6, 5, 3.0)
    expected = np.zeros(3)
    for sums, outcome, _ in groups_of(dump):
        for r, s in permutations(range(6), 2):
            place = 0 if outcome[r] != outcome[s] else 1 if outcome[r] else 2
            expected[place] += sums[r, 1] @ sums[s, 1] / (1 if place else 2)  # either order of a mixed pair
    found = rho_over_sums(dump)
    assert found.by_bucket[1].value == pytest.approx(expected[0] / np.sqrt(expected[1] * expected[2]), abs=1e-10)
    low, high = found.all_tokens.ci95
    assert low < found.all_tokens.value < high


def test_rho_over_sums_is_minus_one_on_policy_for_any_chances():
    dump = on_policy(np.random.default_rng(1), 4000, 6, 5, 2.0)
    found = rho_over_sums(dump)
    for estimate in (found.all_tokens, *found.by_bucket):
        assert estimate.value == pytest.approx(-1, abs=0.07)
        assert estimate.ci95[0] <= -1 <= estimate.ci95[1]
    off_policy = replace(dump, grads=dump.grads + 0.2)
    assert rho_over_sums(off_policy).all_tokens.ci95[0] > -1


def test_rho_over_sums_without_signal_is_none():
    found = rho_over_sums(on_policy(np.random.default_rng(2), 50, 4, 5, 0.0))
    assert found.all_tokens.value is found.all_tokens.ci95 is None


@pytest.mark.parametrize(
    ("signal", "n_mixed", "why"),
    [
        (
            Signal(None, None, None, "underpowered"),
            2,
            "20 prompts, 2 with both outcomes; at least 3 prompts are needed",
        ),
        (
            Signal(0.1, (-0.1, 0.3), 1.4, "underpowered"),
            9,
            "signal not above 0 (z 1.4); 20 prompts, 9 with both outcomes; about 40 prompts would tell, if it is as "
            "large as it looks",
        ),
        (
            Signal(0.0, (0, 0), None, "underpowered"),
            0,
            "signal not above 0; 20 prompts, none with both outcomes; how many prompts would tell can't be said: it is "
            "too near 0",
        ),
        (Signal(2.0, (1, 3), 5.0, "seen"), 9, None),
    ],
)
def test_a_signal_that_is_not_seen_says_why(signal, n_mixed, why):
    assert reason_of(SimpleNamespace(signal=signal, n_prompts=20, n_prompts_mixed=n_mixed)) == why
