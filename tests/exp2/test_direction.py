"""Exp 2's mathematics against a plain loop, planted directions, and what must not change a number."""

import re
from dataclasses import asdict
from itertools import combinations, product

import numpy as np
import pytest
from planted import bucket_of
from scipy.stats import t as student_t

from gradprobe.analysis.bucket import rollout_codes
from gradprobe.exp2 import direction, measure
from gradprobe.exp2.direction import (
    Alignment,
    Cancellation,
    Directions,
    RolloutGrams,
    alignment,
    cancellations,
    cosine,
    half_split_cosine,
    prompt_products,
    rollout_grams,
)
from gradprobe.exp2.measure import BucketDirections, Exp2Settings
from gradprobe.exp2.summary import summarise


def compare_groups(grads, rows, prompt, correct, n_prompts, seed=0) -> Directions:
    bucket = bucket_of(grads, rows, prompt)
    return direction.compare_groups(bucket, correct[rows], seed)


def directions_of_bucket(
    grads, rows, prompt, sample_idx, correct, n_prompts, n_bootstrap=4000, n_permutations=9999, seed=0
) -> BucketDirections:
    bucket = bucket_of(grads, rows, prompt, rollout_codes(prompt, sample_idx))
    settings = Exp2Settings(n_bootstrap, n_permutations, seed)
    return measure.directions_of_bucket(bucket, correct[rows], settings)


def study(seed: int = 0, n_prompts: int = 15, dim: int = 30) -> dict[str, np.ndarray]:
    """Prompts of unequal size; the share of correct tokens goes from none to all."""
    rng = np.random.default_rng(seed)
    prompt = rng.permutation(np.repeat(np.arange(n_prompts), rng.integers(3, 30, n_prompts)))
    return {
        "grads": rng.standard_normal((len(prompt), dim)).astype(np.float32),
        "rows": np.sort(rng.choice(len(prompt), int(0.8 * len(prompt)), replace=False)),
        "prompt": prompt,
        "correct": rng.random(len(prompt)) < prompt / (n_prompts - 1),
        "n_prompts": n_prompts,
    }


def test_cosines_are_those_of_a_plain_loop():
    data = study()
    expected, n_control = {}, 0
    for code in range(data["n_prompts"]):
        sums = {True: np.zeros(30), False: np.zeros(30)}
        counts = {True: 0, False: 0}
        for row in data["rows"]:
            if data["prompt"][row] == code:
                kind = bool(data["correct"][row])
                sums[kind] += data["grads"][row].astype(np.float64)
                counts[kind] += 1
        n_control += sum(count >= 4 for count in counts.values())
        if min(counts.values()) >= 2:
            a, b = sums[True] / counts[True], sums[False] / counts[False]
            expected[code] = (counts[True], counts[False], a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    found = compare_groups(**data)
    assert 4 <= len(expected) < data["n_prompts"]
    assert found.prompt.tolist() == list(expected)
    for n_tokens, found_cosine, (*counts, value) in zip(found.n_tokens, found.cosines, expected.values(), strict=True):
        assert n_tokens.tolist() == counts
        assert found_cosine == pytest.approx(value, abs=1e-12)
    assert len(found.control) == n_control


def test_row_order_rotation_and_scale_leave_the_cosines():
    data = study()
    expected = compare_groups(**data).cosines
    rng = np.random.default_rng(1)
    order = rng.permutation(len(data["grads"]))
    rotation = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    reordered = data | {key: data[key][order] for key in ("grads", "prompt", "correct")}
    reordered["rows"] = np.flatnonzero(np.isin(order, data["rows"]))
    for changed in (reordered, data | {"grads": data["grads"] @ rotation}, data | {"grads": 1e-9 * data["grads"]}):
        np.testing.assert_allclose(compare_groups(**changed).cosines, expected, atol=1e-6)


def test_swapped_labels_are_another_study():
    data = study()
    scrambled = data | {"correct": np.random.default_rng(5).permutation(data["correct"])}
    assert not np.array_equal(compare_groups(**data).cosines, compare_groups(**scrambled).cosines)


@pytest.mark.parametrize("planted", [1.0, 0.0, -1.0])
def test_planted_directions_are_found_and_the_control_reads_one(planted: float):
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(6), 20)
    correct = np.tile([True, False], 60)
    first, second = np.eye(50)[0], np.eye(50)[1]
    other = planted * first if planted else second
    grads = np.where(correct[:, None], first, other) + 0.01 * rng.standard_normal((120, 50))
    found = compare_groups(grads, np.arange(120), prompt, correct, 6)
    np.testing.assert_allclose(found.cosines, planted, atol=0.02)
    assert len(found.control) == 12
    np.testing.assert_allclose(found.control, 1.0, atol=0.02)


def test_the_control_hangs_on_its_seed_only():
    data = study()
    found, again, other = (compare_groups(**data, seed=seed).control for seed in (3, 3, 4))
    assert np.array_equal(found, again)
    assert not np.array_equal(found, other)


def test_a_half_split_uses_every_token_once():
    assert half_split_cosine(np.eye(5), np.random.default_rng(0)) == 0.0
    assert half_split_cosine(np.ones((5, 2)), np.random.default_rng(0)) == pytest.approx(1.0)


def test_a_zero_mean_has_no_cosine_and_is_left_out():
    grads = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 2.0]] + [[0.0, 0.0]] * 4)
    prompt = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    correct = np.array([True, True, False, False, False, False, False, False])
    found = compare_groups(grads, np.arange(8), prompt, correct, 2)
    assert found.prompt.tolist() == [0]
    assert np.isnan([*found.cosines, *found.control, cosine(np.zeros(2), np.ones(2))]).tolist() == 3 * [True]
    assert set(summarise(found.cosines).values()) == {None}


def test_summary_of_known_cosines():
    std = pytest.approx(np.sqrt(0.3125))  # of the population
    expected = {"mean": 0.25, "median": 0.25, "std": std, "frac_positive": 0.5, "frac_gt_0p5": 0.25}
    assert summarise(np.array([-0.5, 0.0, np.nan, 0.5, 1.0])) == expected


def rollout_study(
    seed: int = 0,
    *,
    rho: float = 0.0,
    signal: float = 0.0,
    rollout_effect: float = 0.0,
    n_prompts: int = 12,
    n_rollouts: int = 6,
    max_tokens: int = 4,
    dim: int = 40,
    ragged: bool = True,
) -> dict[str, np.ndarray]:
    """Planted directions in noise of length 1: the arguments of `directions_of_bucket`, rows in random order."""
    rng = np.random.default_rng(seed)
    prompt, sample, token = (axis.ravel() for axis in np.indices((n_prompts, n_rollouts, max_tokens)))
    n_correct = rng.integers(0, n_rollouts + 1, n_prompts) if ragged else np.full(n_prompts, n_rollouts // 2)
    right = rng.random((n_prompts, n_rollouts)).argsort(axis=1) < n_correct[:, None]
    n_tokens = rng.integers(0 if ragged else max_tokens, max_tokens + 1, (n_prompts, n_rollouts))
    first = np.linalg.qr(rng.standard_normal((n_prompts, dim, 2)))[0]  # two orthonormal directions per prompt
    second = rho * first[:, :, 0] + np.sqrt(1 - rho**2) * first[:, :, 1]
    shared = np.where(right[prompt, sample][:, None], first[prompt, :, 0], second[prompt])
    effect = rng.standard_normal((n_prompts, n_rollouts, dim))[prompt, sample] / np.sqrt(dim)
    grads = signal * shared + rollout_effect * effect + rng.standard_normal((len(prompt), dim)) / np.sqrt(dim)
    kept = rng.permutation(np.flatnonzero(token < n_tokens[prompt, sample]))
    return {
        "grads": grads[kept],
        "rows": np.arange(len(kept)),
        "prompt": prompt[kept],
        "sample_idx": sample[kept],
        "correct": right[prompt, sample][kept],
        "n_prompts": n_prompts,
    }


def grams_of(data: dict[str, np.ndarray]) -> RolloutGrams:
    rollout = rollout_codes(data["prompt"], data["sample_idx"])
    bucket = bucket_of(data["grads"], data["rows"], data["prompt"], rollout)
    return rollout_grams(bucket, data["correct"][data["rows"]])


def rollouts_of(data: dict[str, np.ndarray]) -> dict[int, dict[bool, list[np.ndarray]]]:
    """Prompt -> kind -> the rollouts' [tokens, d] gradients, collected in the plainest way."""
    found: dict[int, dict[bool, list[np.ndarray]]] = {}
    for prompt, sample in sorted(set(zip(data["prompt"].tolist(), data["sample_idx"].tolist(), strict=True))):
        rows = [row for row in data["rows"] if data["prompt"][row] == prompt and data["sample_idx"][row] == sample]
        if rows:
            kinds = found.setdefault(prompt, {True: [], False: []})
            kinds[bool(data["correct"][rows[0]])].append(data["grads"][rows].astype(np.float64))
    return found


def plain_products(data: dict[str, np.ndarray]) -> list[tuple[float, float, float]]:
    """⟨m_c, m_i⟩, S_c and S_i of every usable prompt, by loops over pairs of vectors."""
    rows = []
    for kinds in rollouts_of(data).values():
        means = {kind: [tokens.mean(axis=0) for tokens in rollouts] for kind, rollouts in kinds.items()}
        if min(len(means[True]), len(means[False])) >= 2:
            across = np.mean(means[True], axis=0) @ np.mean(means[False], axis=0)
            same = [np.mean([a @ b for a, b in combinations(means[kind], 2)]) for kind in (True, False)]
            rows.append((across, *same))
    return rows


QUICK = {"n_bootstrap": 200, "n_permutations": 199}


def test_alignment_is_that_of_a_plain_loop():
    data = rollout_study(3, rho=0.5, signal=1.0, n_prompts=60)
    data["rows"] = np.flatnonzero(data["rows"] % 5)
    expected = np.array(plain_products(data))
    assert 5 <= len(expected) < 60
    np.testing.assert_allclose(
        prompt_products(grams_of(data).with_rollouts_of_each_kind(2)), expected, rtol=1e-9, atol=1e-12
    )
    across, *squares = expected.mean(axis=0)
    found = alignment(grams_of(data), np.random.default_rng(0), **QUICK)
    assert found.n_prompts == len(expected)
    assert found.rho == pytest.approx(across / np.sqrt(squares[0] * squares[1]))
    errors = expected[:, 1:].std(axis=0, ddof=1) / np.sqrt(len(expected))
    for signal, square, error in zip((found.signal_correct, found.signal_incorrect), squares, errors, strict=True):
        assert (signal.value, signal.z) == pytest.approx((square, square / error))
        assert signal.ci95[1] - square == pytest.approx(student_t.ppf(0.975, len(expected) - 1) * error)
        assert signal.above_zero


def test_the_ends_of_the_interval_are_just_not_rejected():
    data = rollout_study(1, rho=0.5, signal=0.7, n_prompts=40, ragged=False)
    products = np.array(plain_products(data))
    sums = products.sum(axis=0)
    found = alignment(grams_of(data), np.random.default_rng(0), **QUICK)
    assert found.ci95[0] < found.rho < found.ci95[1]
    for end in found.ci95:
        shares = products / sums * np.array([found.rho, 0.5, 0.5])
        residuals = shares[:, 0] - end * (shares[:, 1] + shares[:, 2])
        statistic = residuals.sum() / (residuals.std(ddof=1) * np.sqrt(len(residuals)))
        assert abs(statistic) == pytest.approx(student_t.ppf(0.975, len(residuals) - 1))


@pytest.mark.parametrize("group_normalised", [False, True])
def test_cancellation_is_that_of_a_plain_loop(group_normalised: bool):
    data = rollout_study(4, rho=-0.5, signal=0.5, n_prompts=20)
    ratios = []
    for kinds in rollouts_of(data).values():
        if not kinds[True] or not kinds[False]:
            continue
        means = np.array([tokens.mean(axis=0) for kind in (True, False) for tokens in kinds[kind]])
        reward = np.repeat([1.0, 0.0], [len(kinds[True]), len(kinds[False])])
        advantage = (reward - reward.mean()) / reward.std(ddof=1) if group_normalised else 2 * reward - 1
        weighed = advantage[:, None] * means
        ratios.append(np.sum(weighed.sum(axis=0) ** 2) / np.sum(weighed**2))
    found = cancellations(grams_of(data), np.random.default_rng(0), n_permutations=499)[group_normalised]
    assert found.n_prompts == len(ratios) > 5
    assert found.ratio == pytest.approx(np.mean(ratios))
    assert found.null_ci95[0] < found.null_mean < found.null_ci95[1]


def test_permutations_are_those_of_an_enumeration():
    data = rollout_study(8, rho=0.2, signal=0.7, n_prompts=2, n_rollouts=4, ragged=False)
    grams = grams_of(data)

    def mean_cosine(groups: tuple[tuple[int, ...], ...]) -> float:
        values = []
        for gram, group in zip(grams.gram, groups, strict=True):
            w = np.isin(np.arange(4), group).astype(float)
            v = 1 - w
            values.append(w @ gram @ v / np.sqrt((w @ gram @ w) * (v @ gram @ v)))
        return float(np.mean(values))

    null = np.array([mean_cosine(groups) for groups in product(combinations(range(4), 2), repeat=2)])
    observed = mean_cosine(tuple(tuple(np.flatnonzero(labels)) for labels in grams.correct))
    exact = min(1.0, 2 * min(np.mean(null <= observed + 1e-12), np.mean(null >= observed - 1e-12)))
    found = alignment(grams, np.random.default_rng(0), n_bootstrap=10, n_permutations=9999)
    assert found.p_value == pytest.approx(exact, abs=0.02)


def test_p_values_are_uniform_where_labels_mean_nothing():
    found = []
    for seed in range(200):
        data = rollout_study(seed, rho=1.0, signal=0.3, rollout_effect=0.5, n_prompts=12, dim=12)
        result = directions_of_bucket(**data, n_bootstrap=10, n_permutations=199)
        parts = (result.alignment, result.cancellation, result.cancellation_group_normalised)
        found.append([part.p_value for part in parts])
    for column in zip(*found, strict=True):
        values = np.array([value for value in column if value is not None])
        assert len(values) > 150
        assert 0.1 < np.mean(values < 0.2) < 0.3
        assert 0.4 < np.mean(values) < 0.6


@pytest.mark.parametrize(
    ("rho", "signal", "verdict"),
    [(1.0, 0.4, "aligned"), (-1.0, 0.4, "opposed"), (0.0, 0.8, "orthogonal"), (1.0, 0.0, "underpowered")],
)
def test_planted_alignment_gives_its_verdict(rho: float, signal: float, verdict: str):
    data = rollout_study(0, rho=rho, signal=signal, rollout_effect=0.3, n_prompts=60, dim=200, ragged=False)
    found = directions_of_bucket(**data, **QUICK).alignment
    assert found.verdict == verdict
    if signal:
        assert found.ci95[0] < rho < found.ci95[1]
        assert found.min_detectable < 0.5
        assert found.signal_correct.above_zero
        assert found.signal_correct.value == pytest.approx(signal**2, rel=0.25)
    else:
        assert found.ci95 is None
        assert found.min_detectable is None


def test_a_rollout_paired_with_itself_would_hide_the_alignment():
    data = rollout_study(0, rho=1.0, signal=0.2, n_prompts=80, dim=400, ragged=False)
    grams = grams_of(data)
    found = alignment(grams, np.random.default_rng(0), **QUICK)
    means = grams.mean_gram
    w, v = grams.correct.astype(float) / 3, grams.incorrect.astype(float) / 3
    across, same, other = (np.einsum("pr,prs,ps->", a, means, b) for a, b in ((w, v), (w, w), (v, v)))
    assert across / np.sqrt(same * other) < 0.5 < found.ci95[0] < 1 < found.ci95[1]


def test_scrambled_labels_lose_the_opposition():
    data = rollout_study(0, rho=-1.0, signal=0.5, n_prompts=30, dim=200, ragged=False)
    code = data["prompt"] * 100 + data["sample_idx"]
    coin = np.random.default_rng(0).random(code.max() + 1) < 0.5
    truth = directions_of_bucket(**data, **QUICK)
    scrambled = directions_of_bucket(**(data | {"correct": coin[code]}), **QUICK)
    assert (truth.alignment.verdict, scrambled.alignment.verdict) == ("opposed", "underpowered")
    assert truth.alignment.p_value == 2 / 200 < scrambled.alignment.p_value
    assert truth.cancellation.ratio > truth.cancellation.null_ci95[1]  # opposed directions add under ±1
    assert (truth.cancellation.verdict, truth.cancellation.reason) == ("they add up", None)
    assert scrambled.cancellation.verdict == "can't tell"


def test_advantages_cancel_against_directions_that_hang_on_nothing():
    data = rollout_study(0, rho=1.0, signal=1.0, n_prompts=30, dim=200, ragged=False)
    found = directions_of_bucket(**data, **QUICK).cancellation
    assert found.ratio < 0.5  # the shared part is gone
    assert found.null_ci95[0] < found.ratio < found.null_ci95[1]  # as with any other labels
    assert found.verdict == "can't tell"


def test_updates_that_correctness_turns_against_each_other_cancel():
    """Half of each kind push one way, half the other, so that no labels but the true ones balance them."""
    rng = np.random.default_rng(0)
    prompt, sample, _ = (axis.ravel() for axis in np.indices((40, 4, 1)))
    sign = np.where(sample % 2, 1.0, -1.0)  # c c i i push + - + -: the sum over each kind is 0
    grads = sign[:, None] * np.ones(5) + 0.1 * rng.standard_normal((160, 5))
    data = {"grads": grads, "rows": np.arange(160), "prompt": prompt, "sample_idx": sample, "correct": sample < 2}
    found = directions_of_bucket(**data, n_prompts=40, **QUICK)
    for one in (found.cancellation, found.cancellation_group_normalised):
        assert one.ratio < one.null_ci95[0]
        assert (one.verdict, one.p_value) == ("they cancel", 2 / 200)


def test_a_rollout_effect_fools_the_token_split_only():
    data = rollout_study(0, rollout_effect=1.0, n_prompts=60, dim=400, ragged=False)
    found = directions_of_bucket(**data, **QUICK)
    assert np.mean(found.directions.control) > 0.3
    assert abs(np.mean(found.control_by_rollout)) < 0.03
    assert len(found.control_by_rollout) == 120
    assert found.alignment.verdict == "underpowered"


def assert_same_numbers(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same_numbers(found[key], value)
        elif isinstance(value, (float, tuple)):
            assert found[key] == pytest.approx(value, rel=1e-6), key
        else:
            assert found[key] == value, key


def test_row_order_rotation_and_scale_leave_every_number():
    data = rollout_study(2, rho=0.5, signal=0.8, n_prompts=40)
    rng = np.random.default_rng(1)
    order = rng.permutation(len(data["rows"]))
    reordered = data | {key: data[key][order] for key in ("grads", "prompt", "sample_idx", "correct")}
    rotated = data | {"grads": data["grads"] @ np.linalg.qr(rng.standard_normal((40, 40)))[0]}
    scaled = data | {"grads": 1e-12 * data["grads"]}
    expected = directions_of_bucket(**data, **QUICK)
    assert expected.alignment.verdict == "aligned"
    for changed in (reordered, rotated, scaled):
        found = directions_of_bucket(**changed, **QUICK)
        assert found.control_by_rollout == pytest.approx(expected.control_by_rollout)
        for part in ("alignment", "cancellation", "cancellation_group_normalised"):
            numbers, reference = asdict(getattr(found, part)), asdict(getattr(expected, part))
            if changed is scaled and part == "alignment":  # signals are squared gradients
                for signal in (numbers.pop("signal_correct"), numbers.pop("signal_incorrect")):
                    assert 0 < signal["value"] < 1e-20
                del reference["signal_correct"], reference["signal_incorrect"]
            assert_same_numbers(numbers, reference)


def test_swapped_kinds_swap_the_signals_only():
    data = rollout_study(2, rho=0.5, signal=0.8, n_prompts=40)
    found = directions_of_bucket(**data, **QUICK).alignment
    swapped = directions_of_bucket(**(data | {"correct": ~data["correct"]}), **QUICK).alignment
    assert (swapped.rho, swapped.ci95) == (pytest.approx(found.rho), pytest.approx(found.ci95))
    assert swapped.signal_correct.value == pytest.approx(found.signal_incorrect.value)


def test_numbers_hang_on_the_seed_and_their_own_draws_only():
    data = rollout_study(2, rho=0.5, signal=0.8, n_prompts=40)
    found = directions_of_bucket(**data, **QUICK)
    assert directions_of_bucket(**data, **QUICK).alignment == found.alignment
    fewer = directions_of_bucket(**data, n_bootstrap=100, n_permutations=199)
    assert fewer.alignment.p_value == found.alignment.p_value
    assert fewer.alignment.min_detectable != found.alignment.min_detectable
    other = directions_of_bucket(**data, **QUICK, seed=1).control_by_rollout
    assert not np.array_equal(other, found.control_by_rollout)


def test_no_permutations_no_p_value():
    data = rollout_study(2, rho=0.5, signal=0.8, n_prompts=40)
    found = directions_of_bucket(**data, n_permutations=0)
    assert found.alignment.p_value is None
    assert (found.cancellation.null_mean, found.cancellation.p_value) == (None, None)
    assert found.cancellation.ratio > 0
    assert found.cancellation.verdict == "can't tell"


NO_PROMPT = "no prompt with 2 rollouts of each kind"
NO_ALIGNMENT = Alignment(0, None, None, None, None, None, None, "underpowered", NO_PROMPT)


def some_rollouts(kinds: str, n_prompts: int = 1, tokens: int = 2) -> dict[str, np.ndarray]:
    """`n_prompts` prompts with one rollout per letter: c for correct, i for incorrect."""
    prompt, sample, _ = (axis.ravel() for axis in np.indices((n_prompts, len(kinds), tokens)))
    grads = np.random.default_rng(0).standard_normal((len(prompt), 10))
    right = np.array([kind == "c" for kind in kinds], dtype=bool)
    return {
        "grads": grads,
        "rows": np.arange(len(prompt)),
        "prompt": prompt,
        "sample_idx": sample,
        "correct": right[sample],
        "n_prompts": n_prompts,
    }


def test_no_tokens_at_all():
    data = some_rollouts("cci")
    found = directions_of_bucket(**(data | {"rows": np.zeros(0, int)}), **QUICK)
    assert found.alignment == NO_ALIGNMENT
    why = "no prompt with rollouts of each kind"
    nothing = Cancellation(0, None, None, None, None, "can't tell", why)
    assert found.cancellation == found.cancellation_group_normalised == nothing
    assert len(found.control_by_rollout) == len(found.directions.cosines) == 0


def test_one_kind_only():
    found = directions_of_bucket(**some_rollouts("cccc", n_prompts=3), **QUICK)
    assert found.alignment == NO_ALIGNMENT
    assert found.cancellation.n_prompts == 0
    assert len(found.control_by_rollout) == 3


def test_one_rollout_groups_have_a_cosine_and_a_ratio_but_no_alignment():
    found = directions_of_bucket(**some_rollouts("ci", n_prompts=3), **QUICK)
    assert len(found.directions.cosines) == 3
    assert found.alignment == NO_ALIGNMENT
    assert len(found.control_by_rollout) == 0
    assert found.cancellation.n_prompts == 3
    assert found.cancellation.p_value == 1.0  # swapping both labels changes nothing


def test_a_single_usable_prompt_has_no_interval():
    data = some_rollouts("ccii")
    data["grads"] = data["grads"] + 5.0
    found = directions_of_bucket(**data, **QUICK).alignment
    assert found.n_prompts == 1
    assert found.signal_correct.value > 0
    assert (found.rho, found.ci95, found.min_detectable, found.signal_correct.ci95) == (None, None, None, None)
    assert not found.signal_correct.above_zero
    assert found.p_value > 0.2
    assert found.verdict == "underpowered"


def test_two_usable_prompts_stay_uncertain():
    data = some_rollouts("ccii", n_prompts=2)
    found = directions_of_bucket(**data, **QUICK).alignment
    assert found.n_prompts == 2
    assert found.verdict == "underpowered"


def test_zero_gradients_have_no_number():
    data = some_rollouts("ccii", n_prompts=2)
    data["grads"] = np.zeros_like(data["grads"])
    found = directions_of_bucket(**data, **QUICK)
    assert found.alignment == NO_ALIGNMENT
    assert found.cancellation.ratio is None
    assert np.isnan(found.control_by_rollout).tolist() == 4 * [True]


def test_a_rollout_is_correct_or_not():
    data = some_rollouts("cc")
    data["correct"] = np.array([True, True, True, False])
    with pytest.raises(ValueError, match="both correct and incorrect"):
        grams_of(data)


def reason_at(rho: float, signal: float, n_prompts: int = 60, kinds: str = "cccciiii", rare: bool = True):
    data = some_rollouts(kinds, n_prompts, tokens=1)
    rng = np.random.default_rng(2)
    shared = np.linalg.qr(rng.standard_normal((n_prompts, 50, 2)))[0][data["prompt"]]
    other = rho * shared[..., 0] + np.sqrt(1 - rho**2) * shared[..., 1]
    noise = rng.standard_normal((len(shared), 50)) / np.sqrt(50)
    data["grads"] = noise + signal * np.where(data["correct"][:, None], shared[..., 0], other)
    return alignment(grams_of(data), np.random.default_rng(0), not rare, **QUICK)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"n_prompts": 1}, r"1 prompt with 2 rollouts of each kind"),
        (
            {"signal": 0.1},
            r"signal of correct \(z [-−.\d]+\) and incorrect \(z [-−.\d]+\) rollouts not above 0; 60 prom.*; .+",
        ),
        (
            {"signal": 0.2},
            r"the interval of rho reaches beyond ±0.25 and holds 0; 60 prompts .* kind; about \d+ prompts .*",
        ),
        ({"signal": 0.2, "rare": False}, r"fewer than 30 rare tokens .*"),
    ],
)
def test_every_verdict_that_tells_nothing_says_why_and_what_would(asked, why):
    found = reason_at(**({"rho": 0.0, "signal": 1.0} | asked))
    assert found.verdict == ("underpowered" if asked.get("rare", True) else "unsampled")
    assert re.fullmatch(why, found.reason), found.reason


def test_the_prompts_that_a_reason_asks_for_decide():
    few = reason_at(0.0, 0.2)
    n_prompts = int(re.search(r"about ([\d,]+) prompts", few.reason)[1].replace(",", ""))
    assert 60 < n_prompts < 1000
    assert (few.verdict, reason_at(0.0, 0.2, n_prompts).verdict) == ("underpowered", "orthogonal")
