"""log π + H over tokens: zero on-policy, not at other temperatures, whatever the policy."""

import numpy as np
import pytest

from gradprobe.dump.on_policy import OFF_POLICY, ON_POLICY, OnPolicy, Tokens, on_policy, warning_of
from gradprobe.dump.records import Rollout

N_PROMPTS, N_TOKENS = 64, 400


def tokens_at(temperature: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, log π + H) of tokens drawn at a temperature from random softmaxes."""
    logits = rng.normal(size=(N_PROMPTS * N_TOKENS, 20)) * rng.gamma(2.0, 2.0, size=(N_PROMPTS * N_TOKENS, 1))
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    drawn = np.argmax(logits / temperature + rng.gumbel(size=logits.shape), axis=1)
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=1)
    return np.repeat(np.arange(N_PROMPTS), N_TOKENS), log_probs[np.arange(len(drawn)), drawn] + entropy


def test_z_is_a_standard_normal_on_policy():
    rng = np.random.default_rng(0)
    found = [on_policy(*tokens_at(1.0, rng), is_claimed=True) for _ in range(40)]
    assert np.mean([abs(one.z) > 2 for one in found]) <= 0.15
    assert 0.7 < np.std([one.z for one in found]) < 1.3
    assert {one.verdict for one in found} == {ON_POLICY}


@pytest.mark.parametrize("temperature", [0.9, 1.1])
def test_another_temperature_is_off_policy(temperature):
    found = on_policy(*tokens_at(temperature, np.random.default_rng(1)), is_claimed=True)
    assert found.verdict == OFF_POLICY
    assert (found.mean > 0) == (temperature < 1)


def test_what_is_not_claimed_gets_no_verdict_unless_it_is_off():
    rng = np.random.default_rng(2)
    assert on_policy(*tokens_at(1.0, rng), is_claimed=False).verdict is None
    assert on_policy(*tokens_at(0.8, rng), is_claimed=False).verdict == OFF_POLICY
    assert on_policy(np.zeros(0, int), np.zeros(0), is_claimed=True).mean is None
    assert on_policy(np.zeros(5, int), np.ones(5), is_claimed=True).z is None  # one prompt


def test_tokens_of_rollouts_go_by_their_bucket_score():
    def rollout(prompt, scores, tail):
        return Rollout(prompt, 0, "", [hash(prompt) % 97], [2, 3], [0.5, 0.1], [-0.4, -0.3], "", "", True, tail, scores)

    tokens = Tokens.of([rollout(7, [], [0.1, 0.2]), rollout((1, 2), [5.0, 6.0], [0.3, 0.4])])
    np.testing.assert_array_equal(tokens.prompt, [0, 0, 1, 1])
    np.testing.assert_allclose(tokens.excess, [0.1, -0.2] * 2)
    np.testing.assert_allclose(tokens.score, [0.5, 0.1, 5.0, 6.0])
    np.testing.assert_allclose(tokens.tail_mass, [0.1, 0.2, 0.3, 0.4])
    assert Tokens.of([rollout(7, [], [])]).tail_mass is None
    assert len(Tokens.of([rollout(7, [], [])]).test_by_bucket(np.array([0.0, 0.3, 1.0]), True)) == 2


def test_rare_tokens_that_did_not_come_up_are_no_proof():
    """A nearly certain softmax: without its rare tokens log π + H is above 0 throughout, and the same everywhere."""
    n, tail = 64 * 50, 1e-5
    entropy = -(1 - tail) * np.log1p(-tail) - tail * np.log(tail / 30)
    prompt, excess = np.arange(n) // 50, np.full(n, np.log1p(-tail) + entropy)
    excess = excess * np.random.default_rng(0).normal(1, 0.01, n)
    assert on_policy(prompt, excess, True).verdict == OFF_POLICY  # what the spread between prompts alone would say
    tokens = Tokens(prompt, excess, np.full(n, entropy), np.full(n, tail), np.full(n, entropy))
    np.testing.assert_allclose(tokens.variance, (np.log(tail / 30)) ** 2 * tail, rtol=1e-3)
    assert abs(tokens.test(True).z) < 1
    assert tokens.test(True).verdict == ON_POLICY


WEIGHTS, OTHERS = {"weights_sha256": "a"}, {"weights_sha256": "b"}
SAID = {  # a manifest, and whether |z| > 4 must be said of it
    "sampled at temperature 1": ({"sampling": {"temperature": 1.0}}, True),
    "sampled at another": ({"sampling": {"temperature": 0.7}}, False),
    "a file that says nothing": ({"sampling": None, "rollouts_from": {"identity": None}}, True),
    "another model's": ({"rollouts_from": {"identity": OTHERS}, "model_identity": WEIGHTS}, False),
    "this model's": ({"rollouts_from": {"identity": WEIGHTS}, "model_identity": WEIGHTS}, True),
}


@pytest.mark.parametrize("case", SAID)
def test_off_policy_is_said_where_nothing_explains_it(case):
    manifest, is_said = SAID[case]
    warning = warning_of(OnPolicy(-2.41, -28.0, OFF_POLICY), manifest)
    assert (warning is not None) == is_said
    assert not is_said or warning.startswith("log π + H is -2.410 nats a token, -28.0 standard errors from the 0")
    assert warning_of(OnPolicy(-0.01, -1.0, ON_POLICY), manifest) is None
    assert warning_of(OnPolicy(None, None, None), manifest) is None
