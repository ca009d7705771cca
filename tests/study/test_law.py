"""benchmarks/law.py: a model that is to be sampled otherwise is sampled otherwise."""

import importlib.util
import json

import numpy as np
import pytest
from planted import REPOSITORY
from tiny import tiny_model

from gradprobe.dump.records import Rollout
from gradprobe.exp3 import step
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses

spec = importlib.util.spec_from_file_location("law", REPOSITORY / "benchmarks" / "law.py")
law = importlib.util.module_from_spec(spec)
spec.loader.exec_module(law)


@pytest.mark.parametrize("way", ["temperature 0.001", "top-p 0.001", "top-k 1"])
def test_other_ways_to_sample_change_what_is_drawn(way: str):
    model = tiny_model(0)
    uniforms = lambda p, s: rollout_uniforms(0, p, s, 6)  # noqa: E731

    def drawn() -> np.ndarray:
        return np.concatenate(list(sample_responses(model, [[3, 5]], uniforms, Sampling(8, 6))))[0]

    with law.drawn_by(way):
        assert len(np.unique(drawn(), axis=0)) == 1  # the likeliest words alone
    assert len(np.unique(drawn(), axis=0)) > 1


def test_what_was_found_is_told(tmp_path, capsys):
    held, missed = {"ci95": [-1.2, -0.8], "verdict": "opposed"}, {"ci95": None, "verdict": "unsampled"}
    found = {"model": "m", "on_policy": {"z": 3.0}, "rho": [held] + [missed] * 4, "n_rare": [1] * 5}
    other = {"model": "m", "way": "top-k 1", "detected": {"32": 5.0}}
    lines = [{**found, "rho_over_sums": [held, *[missed] * 5]}, other]
    step = {"score_mean_z": [None] * 3 + [3.5, -1.0], "n_rare": [1.0] * 3 + [50.0, 500.0], "t": 6.0}
    lines.append({"model": "s", "step": step | {"shuffled_p_values": [0.01, 0.6, 0.7, 0.8]}})
    (tmp_path / "law.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert law.main(["--report", str(tmp_path / "law.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "m: 1 re-samplings; log π + H: |z| > 2 in 100%" in told
    assert "bucket 0: 1.0 rare tokens; opposed 1; above 0 0; ρ over sums: 1 of 1 intervals hold −1" in told
    assert "s, along the step: 1 re-samplings; t of the gain 6.0" in told
    assert "within 3 standard errors of 0: 1 of 2 buckets (50%)" in told
    assert "p < 0.05 in 25.0% of 4" in told
    assert "bucket 2: 1.0 rare tokens; unsampled" in told
    assert "top-k 1: z over rollouts 32: +5.0" in told


def test_along_a_step_means_are_0_and_outcomes_dealt_out_at_random_say_nothing(monkeypatch):
    """Of made-up rollouts whose d hang on the outcome; with a mean of its own, that is found."""
    monkeypatch.setattr(step, "PERMUTATIONS", 200)

    def rollouts(mean: float) -> list[Rollout]:
        rng, made = np.random.default_rng(0), []
        for p, s in np.ndindex(12, 6):
            correct, d = bool((p + s) % 2), rng.standard_normal(20)
            of_tokens = {"entropies": rng.random(20).tolist(), "tail_mass": [0.5] * 20, "logprobs": [-1.0] * 20}
            of_tokens["step"] = (d + (0.5 if correct else -0.5) + mean).tolist()
            made.append(Rollout(p, s, "", [1], [1] * 20, response="", ground_truth="", correct=correct, **of_tokens))
        return made

    found, shifted = (law.along_step(rollouts(mean), seed=1) for mean in (0.0, 1.0))
    assert np.abs(found["score_mean_z"]).max() < 3
    assert np.min(shifted["score_mean_z"]) > 3
    assert found["t"] > 5
    assert found["p_value"] < 0.02
    assert np.mean(np.array(found["shuffled_p_values"]) < 0.05) < 0.4
