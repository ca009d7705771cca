"""The calibration's planted gradients, and that its one command runs."""

import importlib.util
import re
import sys

import numpy as np
import pytest
from planted import REPOSITORY

spec = importlib.util.spec_from_file_location("calibration", REPOSITORY / "benchmarks" / "calibration.py")
calibration = importlib.util.module_from_spec(spec)
sys.modules["calibration"] = calibration  # dataclasses look their module up
spec.loader.exec_module(calibration)


def full_dimension_grams(planted: "calibration.Planted", rng: np.random.Generator) -> np.ndarray:
    """[prompts, tokens, tokens] dot products of gradients drawn in all their dimensions, all of one kind."""
    p, r, t, d = planted.n_prompts, planted.n_rollouts, planted.n_tokens, planted.dim
    grads = rng.standard_normal((p, r, t, d)) / np.sqrt(d)
    grads += planted.rollout_effect * rng.standard_normal((p, r, 1, d)) / np.sqrt(d)
    grads[..., 0] += planted.signal
    grads = grads.reshape(p, r * t, d)
    return grads @ grads.transpose(0, 2, 1)


def test_dot_products_are_distributed_as_in_all_dimensions():
    planted = calibration.Planted(0.7, 1.0, 0.8, dim=60, n_prompts=4000, n_rollouts=3, n_tokens=2)
    tokens = calibration.plant(planted, np.random.default_rng(0))
    grads = tokens.grads.reshape(planted.n_prompts, 6, -1)
    found = grads @ grads.transpose(0, 2, 1)
    expected = full_dimension_grams(planted, np.random.default_rng(1))
    for moment in (np.mean, np.var):
        np.testing.assert_allclose(moment(found, axis=0), moment(expected, axis=0), rtol=0.12, atol=0.01)


@pytest.mark.parametrize("rho", [1.0, 0.5, 0.0, -1.0])
def test_planted_directions_have_the_planted_cosine(rho: float):
    planted = calibration.Planted(50.0, rho, dim=100, n_prompts=8)
    tokens = calibration.plant(planted, np.random.default_rng(0))
    assert len(tokens.grads) == 8 * 8 * 4
    found = calibration.draw_row((0, 0, planted, 0, 10, 0))
    assert found.alignment.rho == pytest.approx(rho, abs=0.02)


def test_ragged_rollouts_keep_at_least_one_token():
    planted = calibration.Planted(0.1, 1.0, n_prompts=30, ragged=True)
    tokens = calibration.plant(planted, np.random.default_rng(0))
    _, counts = np.unique(tokens.prompt * 8 + tokens.sample_idx, return_counts=True)
    assert len(counts) == 240
    assert set(counts) == {1, 2, 3, 4}


@pytest.mark.slow
def test_the_command_prints_its_tables(capsys, monkeypatch):
    monkeypatch.setattr(calibration, "N_SPECTRUM_DRAWS", 1)
    monkeypatch.setattr(calibration, "N_GROUPS", 100)
    settings = ["--draws", "1", "--null-draws", "1", "--permutations", "19", "--bootstrap", "20", "--workers", "1"]
    assert calibration.main(settings) == 0
    text = capsys.readouterr().out
    assert text.count("\n## ") == 10
    assert not re.search(r"\bnan\b", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_planted_pooled_dumps_have_the_planted_moments():
    """Signal and noise of a dump as large as it takes, against the closed form."""
    planted = calibration.PlantedPooled(
        1.0, "grpo", strength_spread=0.3, norm_spread=0.3, n_prompts=3000, dim=8, ragged=True
    )
    truth = calibration.truth_of(planted, np.random.default_rng(0))
    found = calibration.signal_of_pooled(calibration.plant_pooled(planted, np.random.default_rng(1)), planted.objective)
    assert found.signal.value == pytest.approx(truth.signal.sum(), rel=0.1)
    assert found.noise_scale_prompts.value == pytest.approx(truth.noise.sum() / truth.signal.sum(), rel=0.1)
    for bucket, within in zip(found.buckets, truth.within / truth.within.sum(), strict=True):
        assert bucket.signal_share_within_prompts.value == pytest.approx(within, abs=0.05)
