"""What a bucket gives is what numpy gives, also a few gradients at a time; a GPU that is not there is bad input."""

from pathlib import Path

import numpy as np
import planted
import pytest
import torch

import analyze_exp1_compression
import analyze_exp2_direction
import gradprobe.exp1.measure
import gradprobe.exp2.measure
from gradprobe.analysis.bucket import device_for, rollout_codes, to_device, to_host


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(to_host(found) - expected) <= 1e-10 * np.linalg.norm(expected))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"], ids=["numpy", "torch"])
@pytest.mark.parametrize("block_bytes", [64 << 20, 800])
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (30, 9), (9, 30), (50, 50), (450, 400)])
def test_products_and_decompositions_are_those_of_numpy(monkeypatch, n: int, dim: int, block_bytes: int, device: str):
    monkeypatch.setattr("gradprobe.dump.mapped.BLOCK_BYTES", block_bytes)
    grads = np.random.default_rng(n).standard_normal((n + 3, dim)).astype(np.float32)
    rows = np.random.default_rng(0).permutation(n + 3)[:n]
    x, bucket = grads[rows].astype(np.float64), planted.bucket_of(grads, rows, device=device)
    v = np.random.default_rng(1).standard_normal((dim, 4))
    assert type(bucket.gram) is (np.ndarray if device == "cpu" else torch.Tensor)
    assert to_host(bucket.gram).dtype == np.float64
    assert close(bucket.gram, x @ x.T if n < dim else x.T @ x)
    assert close(bucket.times(to_device(v, device)), x @ v)
    assert close(bucket.combined(x @ v), x.T @ x @ v)
    assert close(bucket.squared_norms, np.sum(x**2, axis=1))
    some = np.arange(n)[::2]
    assert close(bucket.dots(some, np.arange(n)), x[some] @ x.T)
    _, sigma, right = np.linalg.svd(x, full_matrices=False)
    assert close(bucket.energies(), sigma**2)
    monkeypatch.setattr("gradprobe.analysis.bucket.LARGE", 0)
    assert close(bucket.energies(), sigma**2)
    energies, directions = bucket.leading_directions(3)
    assert close(energies, sigma[:3] ** 2)
    np.testing.assert_allclose(np.abs(np.sum(to_host(directions) * right[:3].T, axis=0)), 1.0, atol=1e-9)
    assert close(bucket.centred().times(to_device(v, device)) + 1, (x - x.mean(axis=0)) @ v + 1)


@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (9, 4), (0, 5)])
def test_nothing_but_zeros_has_no_direction(shape: tuple[int, int]):
    bucket = planted.bucket_of(np.zeros(shape, np.float32))
    assert bucket.energies().tolist() == [0.0] * min(shape)
    assert bucket.leading_directions(2)[1].shape == (shape[1], 0)


def test_rollouts_are_numbered_by_prompt_and_sample():
    assert rollout_codes(np.array([3, 0, 3, 0]), np.array([1, 5, 0, 5])).tolist() == [2, 0, 1, 0]


def test_device_says_where(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for("cpu") == device_for("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for("auto") == device_for("cuda") == "cuda"
    assert device_for("cpu") == "cpu"


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


@pytest.mark.parametrize(
    ("script", "measure"),
    [(analyze_exp1_compression, gradprobe.exp1.measure), (analyze_exp2_direction, gradprobe.exp2.measure)],
    ids=["exp1", "exp2"],
)
def test_scripts_compute_where_they_are_told(script, measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    dump = planted.write_heavy_tailed_dump(tmp_path / "dump", seed=1, n_prompts=5)
    measure_dumps, used = measure.measure_dumps, []

    def measured(dumps, device: str):
        used.append(device)
        return measure_dumps(dumps)

    monkeypatch.setattr(measure, "measure_dumps", measured)
    monkeypatch.setattr(script, "device_for", lambda name: f"where {name} says")
    assert script.main(["--output-dir", str(tmp_path / "out"), "--device", "auto", f"a={dump}"]) == 0
    assert set(used) == {"where auto says"}
