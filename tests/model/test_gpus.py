"""What is chosen where there are GPUs, by stand-ins for torch's answers."""

import re

import pytest
import torch

from gradprobe.common.errors import InputError
from gradprobe.model.batches import run_in_batches
from gradprobe.model.checkpoint import resolve_device, resolve_dtype
from gradprobe.model.identity import hardware_of
from gradprobe.model.placement import Placement
from gradprobe.probe.settings import BATCH_TOKENS, ProbeSettings, settings_of_task
from gradprobe.rollouts.sample import STEPS_UNSEEN

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index or 0}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def test_devices():
    named = [torch.device(name) for name in ("cuda", "cuda:1", "cpu")]
    assert [resolve_device(name) for name in ("auto", "cuda:1", "cpu")] == named
    with pytest.raises(InputError, match=re.escape("cuda:2: must be auto, cpu, cuda or cuda:N; torch")):
        resolve_device("cuda:2")
    assert hardware_of(named[1]) == "card 1"
    assert Placement("auto").main_device == torch.device("cuda:0")
    assert BATCH_TOKENS.keys() == STEPS_UNSEEN.keys() == {"cuda", "cpu"}


def test_bfloat16_where_a_card_has_it_itself(monkeypatch: pytest.MonkeyPatch):
    assert resolve_dtype("auto", GPU) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert resolve_dtype("auto", GPU) == torch.float32


@pytest.mark.parametrize(
    ("rank", "n_gpus", "device", "expected"),
    [(1, 2, "auto", "cuda:1"), (3, 2, "cuda", "cuda:1"), (1, 1, "auto", "auto"), (1, 2, "cpu", "cpu")],
)
def test_each_task_takes_a_gpu(rank: int, n_gpus: int, device: str, expected: str, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    settings = ProbeSettings(model_path="model", output_dir=tmp_path / "out", device=device)
    environment = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank)}
    assert settings_of_task(settings, environment).device == expected


def test_memory_is_given_back_before_a_smaller_batch(monkeypatch: pytest.MonkeyPatch):
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("given back"))

    def run(batch: list[int]) -> None:
        done.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    list(run_in_batches([5] * 4, 20, run))
    assert done == [4, "given back", 2, 2]
