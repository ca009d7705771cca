"""What can be imported, and that the lines in docs/library.md do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from scipy import stats
from tiny import oracle_gradient, relative_error, tiny_model

import gradprobe
from gradprobe.common.errors import InputError

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), flags=re.DOTALL)
PROMPT, RESPONSE = [3, 70, 41, 9], [12, 200, 33, 8, 91]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_examples_run(number, tmp_path):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    planted.write_dump_along_step(tmp_path / "out" / "exp12" / "exp12_base", np.arange(5.0), n_prompts=12)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BLOCKS[number]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_loading_a_dump_imports_neither_torch_nor_matplotlib_nor_a_model_class():
    code = (
        "import sys; from gradprobe import load_dump; print({'torch', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_only_what_is_public_is_there():
    assert {name for name in gradprobe.__all__ if callable(getattr(gradprobe, name))} == set(gradprobe.__all__)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        gradprobe.nothing_of_that_name  # noqa: B018


@pytest.mark.parametrize("positions", [None, [2], [3, 0], [4, 1, 2]])
def test_row_gradients_are_the_oracles_in_the_order_asked_for(positions):
    model = tiny_model(seed=4, dtype=torch.float64)
    found = gradprobe.row_gradients(model, PROMPT, RESPONSE, positions, layer=1, row_idx=5)
    wanted = range(len(RESPONSE)) if positions is None else positions
    assert found.shape == (len(wanted), 24)
    for t, row in zip(wanted, found, strict=True):
        expected = oracle_gradient(model, PROMPT + RESPONSE, len(PROMPT) + t, "model.layers.1.mlp.down_proj.weight", 5)
        assert relative_error(torch.from_numpy(row), expected) < 1e-10


@pytest.mark.parametrize("wrong", [{"positions": [5]}, {"positions": [1, 1]}, {"layer": 3}, {"row_idx": 16}])
def test_what_there_is_not_is_refused(wrong):
    with pytest.raises(InputError):
        gradprobe.row_gradients(tiny_model(seed=4), PROMPT, RESPONSE, **wrong)


def test_participation_ratio_counts_directions_and_unit_norm_takes_lengths_out():
    rows = np.eye(7)[[0, 1, 2, 3]] * np.array([1.0, 1.0, 1.0, 100.0])[:, None]
    assert gradprobe.participation_ratio(rows) == pytest.approx(1.0, abs=1e-3)
    assert gradprobe.participation_ratio(rows, unit_norm=True) == pytest.approx(4.0)
    assert gradprobe.participation_ratio(np.zeros((3, 7)), unit_norm=True) is None


def test_of_a_mean_over_prompts_the_jackknife_is_students_interval():
    values = np.random.default_rng(0).standard_normal((12, 5))
    prompt = np.repeat(np.arange(12) * 3, 5)
    found = gradprobe.jackknife(lambda rows: values.ravel()[rows].mean(), prompt)
    low, high = stats.t.interval(0.95, 11, values.mean(), values.mean(axis=1).std(ddof=1) / np.sqrt(12))
    assert [found.value, *found.ci95] == pytest.approx([values.mean(), low, high])
    assert gradprobe.jackknife(len, prompt[:10]).value is None
    assert gradprobe.jackknife(lambda rows: np.nan, prompt).ci95 is None
