"""Exp 2's mathematics against a plain loop, planted directions, and what must not change a number."""

import numpy as np
import pytest

from gradprobe.direction import compare_groups, cosine, half_split_cosine, summarise


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
    assert [prompt.prompt for prompt in found.per_prompt] == list(expected)
    for prompt in found.per_prompt:
        n_correct, n_incorrect, value = expected[prompt.prompt]
        assert (prompt.n_correct_tokens, prompt.n_incorrect_tokens) == (n_correct, n_incorrect)
        assert prompt.cosine == pytest.approx(value, abs=1e-12)
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
    np.testing.assert_allclose(found.control_cosines, 1.0, atol=0.02)


def test_the_control_hangs_on_its_seed_only():
    data = study()
    assert compare_groups(**data, seed=3).control == compare_groups(**data, seed=3).control
    assert compare_groups(**data, seed=3).control != compare_groups(**data, seed=4).control


def test_a_half_split_uses_every_token_once():
    assert half_split_cosine(np.eye(5), np.random.default_rng(0)) == 0.0
    assert half_split_cosine(np.ones((5, 2)), np.random.default_rng(0)) == pytest.approx(1.0)


def test_a_zero_mean_has_no_cosine_and_is_left_out():
    grads = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 2.0]] + [[0.0, 0.0]] * 4)
    prompt = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    correct = np.array([True, True, False, False, False, False, False, False])
    found = compare_groups(grads, np.arange(8), prompt, correct, 2)
    assert [(p.prompt, p.cosine) for p in found.per_prompt] == [(0, None)]
    assert found.control == (None,)
    assert summarise(found.cosines).n == 0
    assert cosine(np.zeros(2), np.ones(2)) is None


def test_summary_of_known_cosines():
    found = summarise(np.array([-0.5, 0.0, 0.5, 1.0]))
    assert (found.n, found.mean, found.median, found.frac_positive, found.frac_gt_0p5) == (4, 0.25, 0.25, 0.5, 0.25)
    assert found.std == pytest.approx(np.sqrt(0.3125))  # of the population
    assert summarise(np.zeros(0)).mean is None
