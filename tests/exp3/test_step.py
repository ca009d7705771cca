"""Exp 3 along a step: planted shares are read back, labels that mean nothing give no p, the planner's widths hold."""

import numpy as np
import pytest

from gradprobe.exp3 import step
from gradprobe.exp3.step import Along, highest, step_signal

STRENGTH = np.array([0.0, 0.1, 0.3, 0.6])
TOKENS = 3
"""Of a rollout in each bucket."""


def planted(
    seed: int, n_prompts: int, n_rollouts: int = 8, strength=STRENGTH, between: float = 0.5, within: float = 0.5
) -> Along:
    """Each token's d is the outcome's surprise times its bucket's strength, more on some prompts, and noise."""
    rng = np.random.default_rng(seed)
    chance = rng.uniform(0.2, 0.8, n_prompts)
    outcome = (rng.random((n_prompts, n_rollouts)) < chance[:, None]).astype(float)
    of_prompt = 1 + between * rng.standard_normal((n_prompts, 1, 1, 1))
    shape = (n_prompts, n_rollouts, len(strength), TOKENS)
    surprise = (outcome - chance[:, None])[:, :, None, None]
    d = of_prompt * surprise * strength[:, None] + within * rng.standard_normal(shape)
    bucket = np.broadcast_to(np.arange(len(strength))[:, None], shape).ravel()
    return Along(
        d=d.ravel(),
        n_tokens=np.full(n_prompts * n_rollouts, len(strength) * TOKENS),
        prompt=np.repeat(np.arange(n_prompts), n_rollouts),
        outcome=outcome.ravel(),
        shift=2 * d.ravel() + rng.standard_normal(d.size),
        bucket=bucket,
        n_buckets=len(strength),
        tail_mass=None,
        rules={"entropy": bucket + rng.random(d.size), "random": rng.random(d.size)},
        token=bucket,
    )


@pytest.fixture(autouse=True)
def few_permutations(monkeypatch):
    monkeypatch.setattr(step, "PERMUTATIONS", 200)


def test_planted_shares_are_read_back_by_bucket_rule_and_word():
    found = step_signal(planted(0, 200), "dr-grpo")
    assert found.gain.t > 5
    assert found.gain.p_value < 0.02
    shares = STRENGTH / STRENGTH.sum()
    for part, share in zip(found.buckets, shares, strict=True):
        low, high = part.share.ci95
        assert low - 0.03 < share < high + 0.03
        assert part.share_of_tokens == 0.25
    assert sum(part.share.value for part in found.buckets) == pytest.approx(1)
    assert sum(part.noise_share for part in found.buckets) == pytest.approx(1)
    top = {round(part.share_of_tokens, 2): part.share for part in found.keep_top["entropy"]}
    assert top[0.25] == found.buckets[3].share
    assert top[1.0].value == pytest.approx(1)
    at_random = found.keep_top["random"][4].share.ci95
    assert at_random[0] - 0.05 < 0.25 < at_random[1] + 0.05
    assert next(code for code, _, _ in found.tokens) == 3
    assert found.reward_gain.value == found.gain.value
    assert found.linearity[1] == pytest.approx(2, abs=0.1)


def test_shares_are_inside_their_intervals_as_often_as_said():
    inside = []
    for seed in range(200):
        found = step_signal(planted(seed, 40, strength=STRENGTH[2:], within=0.2), "dr-grpo")
        low, high = found.buckets[1].share.ci95
        inside.append(low < 2 / 3 < high)
    assert 0.91 < np.mean(inside) < 0.99


def test_outcomes_that_mean_nothing_are_called_so():
    few = sum(step_signal(planted(seed, 20, strength=np.zeros(2))).gain.p_value < 0.05 for seed in range(200))
    assert 4 <= few <= 16
    nothing = step_signal(planted(0, 20, strength=np.zeros(2)))
    assert abs(nothing.gain.t) < 2
    assert {part.share.value for part in nothing.buckets} == {None}
    assert nothing.tokens == ()


def test_more_prompts_or_rollouts_narrow_the_interval_as_planned():
    def width(n_prompts: int, n_rollouts: int) -> float:
        ends = [step_signal(planted(seed, n_prompts, n_rollouts), "reinforce").gain.ci95 for seed in range(30)]
        return float(np.mean([high - low for low, high in ends]))

    plans = [step_signal(planted(seed, 50), "reinforce").noise for seed in range(30)]
    now = np.mean([2 * plan.half_width for plan in plans])
    assert {plan.prompts_for_half_width for plan in plans} == {200}
    assert width(200, 8) / now == pytest.approx(0.5, rel=0.15)
    twice = round(np.mean([plan.prompts_of_twice_the_rollouts for plan in plans]))
    assert 50 < twice < 200
    assert width(twice, 16) / now == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("objective", ["dapo", "grpo", "dr-grpo", "reinforce"])
def test_the_gain_is_the_plain_mean_of_the_prompts_updates(objective):
    along = planted(1, 6)
    updates = []
    for code in range(6):
        own = along.prompt == code
        outcome, sums = along.outcome[own], along.sums(np.ones(len(along.d), bool))[own]
        weights = step.update_weights(outcome, along.n_tokens[own], objective)
        updates.append(sum(w * s for w, s in zip(weights, sums, strict=True)))
    gain = step_signal(along, objective).gain
    assert gain.value == pytest.approx(np.mean(updates))
    assert gain.t == pytest.approx(np.mean(updates) / (np.std(updates, ddof=1) / np.sqrt(6)))


def test_a_share_of_the_tokens_is_exact_and_ties_keep_their_order():
    np.testing.assert_array_equal(highest(np.array([1.0, 3.0, 3.0, 3.0, 0.0]), 0.4), [False, True, True, False, False])
