"""benchmarks/law.py: a model that is to be sampled otherwise is sampled otherwise."""

import importlib.util

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
