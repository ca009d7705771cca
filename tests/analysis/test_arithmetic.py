"""torch and numpy give the same numbers; a GPU that is not there is bad input."""

from pathlib import Path

import numpy as np
import planted
import pytest
import torch

import analyze_exp1_compression
import analyze_exp2_direction
from gradprobe.analysis import gram as arithmetic
from gradprobe.analysis.gram import HOST, TorchArithmetic, arithmetic_for
from gradprobe.exp1 import spectrum
from gradprobe.exp1.compression import rollout_codes
from gradprobe.exp1.measure import Draws, measure_dump
from gradprobe.exp2.direction import directions_of_bucket

TORCH = TorchArithmetic("cpu")
rng = np.random.default_rng(0)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - expected) < 1e-10 * np.linalg.norm(expected))


@pytest.mark.parametrize(("n", "dim"), [(1, 1), (30, 9), (9, 30), (50, 50)])
def test_products_and_decompositions_are_the_same(monkeypatch: pytest.MonkeyPatch, n: int, dim: int):
    monkeypatch.setattr("gradprobe.dump.blocks.BLOCK_BYTES", 800)
    grads = np.random.default_rng(n).standard_normal((n, dim)).astype(np.float32)
    grams = [spectrum.smaller_gram(grads, np.arange(n), where) for where in (HOST, TORCH)]
    assert grams[0].dtype == grams[1].dtype == np.float64
    assert close(grams[1], grams[0])
    x = np.random.default_rng(1).standard_normal((7, len(grams[0])))
    assert close(TORCH.forms(grams[0])(x), HOST.forms(grams[0])(x))
    assert close(TORCH.product(x, x.T), HOST.product(x, x.T))
    assert TORCH.product(x.astype(np.float32), x.T.astype(np.float32)).dtype == np.float32
    n_vectors = min(3, len(grams[0]))
    (values, vectors), (expected, expected_vectors) = (where.eigen(grams[0], n_vectors) for where in (TORCH, HOST))
    assert close(values, expected)
    np.testing.assert_allclose(np.abs(np.sum(vectors * expected_vectors, axis=0)), 1.0, atol=1e-10)
    np.testing.assert_allclose(TORCH.rough_energies(grams[0]), expected, atol=1e-6 * expected[0])


def test_nothing_but_zeros_decomposes_alike():
    for where in (HOST, TORCH):
        values, vectors = where.eigen(np.zeros((4, 4)), 2)
        assert values.tolist() == [0.0] * 4
        assert vectors.shape == (4, 2)
        assert where.rough_energies(np.zeros((4, 4))).tolist() == [0.0] * 4


@pytest.mark.parametrize("dim", [20, 200])
def test_both_experiments_are_the_same(dim: int):
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((6, 4, 2, 3)))
    grads = (rng.standard_normal((len(prompt), dim)) + prompt[:, None] % 3).astype(np.float32)
    draws = Draws(halves=50, matched=3, matched_rank=2, ceiling=2, null=2)
    first, second = (
        measure_dump(grads, bucket, 2, prompt, rollout_codes(prompt, sample), 40, draws=draws, arithmetic=where)
        for where in (HOST, TORCH)
    )
    for one, other in zip(first.buckets, second.buckets, strict=True):
        assert other.participation_ratio == pytest.approx(one.participation_ratio, rel=1e-10)
        assert other.participation_ratio_unit_norm_ci95 == pytest.approx(
            one.participation_ratio_unit_norm_ci95, rel=1e-9
        )
        assert (other.rank95, other.matched_n.rank95) == (one.rank95, one.matched_n.rank95)
    for name, values in first.cross.items():
        np.testing.assert_allclose(second.cross[name], values, atol=1e-6)
        np.testing.assert_allclose(second.null[name], first.null[name], atol=1e-6)
    one, other = (
        directions_of_bucket(grads, np.flatnonzero(bucket == 1), prompt, sample, sample < 2, 6, arithmetic=where)
        for where in (HOST, TORCH)
    )
    assert other.alignment.rho == pytest.approx(one.alignment.rho, rel=1e-10)
    assert other.cancellation.ratio == pytest.approx(one.cancellation.ratio, rel=1e-10)


def test_device_says_where(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert arithmetic_for("cpu") is arithmetic_for("auto") is HOST
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(arithmetic_for("auto"), TorchArithmetic)
    assert isinstance(arithmetic_for("cuda"), TorchArithmetic)
    assert arithmetic_for("cpu") is HOST


@pytest.mark.parametrize("script", [analyze_exp1_compression, analyze_exp2_direction], ids=["exp1", "exp2"])
def test_a_gpu_that_is_not_there_is_status_2_in_one_line(
    script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dump = planted.write_dump(tmp_path / "dump", np.eye(5), np.arange(5))
    arguments = ["--output-dir", str(tmp_path / "figures"), "--device", "cuda", f"a={dump}"]
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device cuda: torch finds no CUDA GPU")
    assert error.count("\n") == 1
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("script", [analyze_exp1_compression, analyze_exp2_direction], ids=["exp1", "exp2"])
def test_scripts_compute_where_they_are_told(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    dump = planted.write_heavy_tailed_dump(tmp_path / "dump", seed=1, n_prompts=5)
    used: list[str] = []

    def asked(device: str) -> arithmetic.Arithmetic:
        used.append(device)
        return TORCH

    monkeypatch.setattr(script, "arithmetic_for", asked)
    summaries = []
    for name in ("torch", "numpy"):
        assert script.main(["--output-dir", str(tmp_path / name), "--device", "auto", f"a={dump}"]) == 0
        monkeypatch.setattr(script, "arithmetic_for", arithmetic_for if name == "torch" else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        summaries.append(next((tmp_path / name).glob("*_summary.json")).read_text())
    assert used == ["auto"]
    assert summaries[0] != ""
