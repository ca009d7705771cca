"""Memory is bounded by the token budget; where it runs out the batch halves and nothing is lost."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import TARGETS, engine_rows, random_rollouts
from tiny import relative_error, tiny_model

from gradprobe.model.batches import run_in_batches
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses

ROOT = Path(__file__).parents[2]


def test_batches_hold_the_budget_and_cover_everything():
    lengths = [5, 90, 3, 40, 41, 7, 7, 300]
    batches = [batch for batch, _ in run_in_batches(lengths, 100, lambda batch: True)]
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100
    assert batches[0] == [7]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_a_batch_that_does_not_fit_is_halved_and_said_once(error, caplog):
    caplog.set_level("INFO", "gradprobe.model.batches")
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise error
        return batch

    found = list(run_in_batches([10] * 16, 160, run))
    assert sorted(i for batch, _ in found for i in batch) == list(range(16))
    assert all(batch == result for batch, result in found)
    assert sizes[:4] == [16, 8, 4, 2]
    assert max(sizes[3:]) == 2
    (record,) = [r for r in caplog.records if r.levelname == "INFO"]
    assert "halving" in record.getMessage()


def test_other_errors_and_single_sequences_are_not_retried():
    with pytest.raises(RuntimeError, match="a fault"):
        list(run_in_batches([10] * 4, 40, lambda batch: (_ for _ in ()).throw(RuntimeError("a fault"))))
    with pytest.raises(MemoryError):
        list(run_in_batches([10], 40, lambda batch: (_ for _ in ()).throw(MemoryError())))


def test_gradients_and_samples_survive_running_out_of_memory(monkeypatch):
    model = tiny_model(4)
    prompts, responses = random_rollouts(12, seed=5)
    positions = [np.arange(len(response)) for response in responses]
    expected = engine_rows(model, TARGETS, prompts, responses, positions, batch_tokens=10_000)
    uniforms = lambda p, s: rollout_uniforms(0, p, s, 9)  # noqa: E731
    sampled = list(sample_responses(model, prompts, uniforms, Sampling(2, 9), max_rows=24))
    forward = type(model.base_model).forward

    def limited(self, input_ids=None, **options):
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model.base_model), "forward", limited)
    found = engine_rows(model, TARGETS, prompts, responses, positions, batch_tokens=10_000)
    assert found.keys() == expected.keys()
    assert max(relative_error(found[key], expected[key]) for key in expected) < 1e-5
    again = list(sample_responses(model, prompts, uniforms, Sampling(2, 9), max_rows=24))
    assert [r for batch in again for r in batch] == [r for batch in sampled for r in batch]


@pytest.mark.slow
def test_one_rollout_of_4096_tokens_on_the_demo_model_fits_in_4_gib():
    """In a process of its own, whose address space is measured, not limited: torch reserves far more than it uses."""
    program = """
import resource, torch, numpy as np
from gradprobe.model.checkpoint import load_checkpoint
from gradprobe.rollouts.score import score_responses
from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.targets import Target
torch.set_num_threads(1)
model = load_checkpoint("demo/base", torch.device("cpu"), torch.float32).model
response = np.random.default_rng(0).integers(256, size=4096).tolist()
list(score_responses(model, [[1] * 30], [response], 4096))
engine = GradientEngine(model, [Target(4, "mlp.down_proj.weight", 0)])
rows = [r for _, _, (r,) in engine.batches([[1] * 30], [response], [np.array([9, 2000, 4095])], 4096)]
assert sum(map(len, rows)) == 3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(result.stdout) < 4.0
