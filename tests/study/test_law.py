"""benchmarks/law.py: a model that is to be sampled otherwise is sampled otherwise."""

import importlib.util
import json

import numpy as np
import pytest
from planted import REPOSITORY
from tiny import tiny_model

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
    (tmp_path / "law.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert law.main(["--report", str(tmp_path / "law.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "m: 1 re-samplings; log π + H: |z| > 2 in 100%" in told
    assert "bucket 0: 1.0 rare tokens; opposed 1; above 0 0; ρ over sums: 1 of 1 intervals hold −1" in told
    assert "top-k 1: z over rollouts 32: +5.0" in told
