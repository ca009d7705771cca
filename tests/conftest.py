"""Tiny checkpoints with random weights: the same classes as the real ones, seconds to make."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import Float64Throughout, tiny_checkpoint

torch.set_num_threads(1)


@pytest.fixture
def float64_throughout() -> Iterator[None]:
    """See `tiny.Float64Throughout`."""
    with Float64Throughout():
        yield


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 whose generation config asks for near-greedy decoding, as a trap."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture(scope="session")
def problems_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve problems of unequal length; random responses never solve them."""
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    prompts = [f"{i % 7}+2" * (i % 4 + 1) for i in range(12)]
    records = [{"id": f"p{i}", "prompt": prompt, "ground_truth": "3", "meta": {}} for i, prompt in enumerate(prompts)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
