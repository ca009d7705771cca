#!/usr/bin/env python3
"""The step on a device: d_t of 1,000 tokens at a model's shape, how long it takes, and how far it is from float64.

    python benchmarks/bench_step.py --shape qwen2.5-1.5b --device cuda
    python benchmarks/bench_step.py --shape small --device cpu

Weights and step are random; nothing is loaded. float32 and bfloat16, each against float64 of the very same weights, all
layers of them, at the first tokens of one rollout: 25 GB for Qwen2.5-1.5B. Exit status 1 where one is too far off.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_probe import SHAPES  # noqa: E402
from bench_scaling import peak_memory, reset_peak_memory, table  # noqa: E402

from gradprobe.gradients.step import along_step  # noqa: E402
from gradprobe.model.checkpoint import resolve_device  # noqa: E402
from gradprobe.rollouts.score import score_responses  # noqa: E402

N_ROLLOUTS, PROMPT, RESPONSE, BATCH_TOKENS = 4, 64, 250, 2048
IN_FLOAT64 = 32
"""So many tokens of the first rollout."""
STEP = 0.01
"""Its length, as a share of each weight's."""
LARGEST = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""‖d − d of float64‖ / ‖d of float64‖ at most; 2e-7 and 0.01 at the small shape on a CPU."""


def timed(batches: Iterable[dict[int, Any]]) -> tuple[float, dict[int, Any]]:
    """Wall-clock seconds of batches, which end on the host, and all of them."""
    found, began = {}, time.perf_counter()
    for batch in batches:
        found.update(batch)
    return time.perf_counter() - began, found


def measure(shape_name: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of scoring and of the step for 1,000 tokens, the step's peak in bytes, and its error."""
    shape = SHAPES[shape_name]
    model = shape.model(device.type, torch.float32).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    step = {
        name: STEP * weight.std() * torch.randn(weight.shape, generator=generator, dtype=dtype, device=device)
        for name, weight in model.named_parameters()
    }
    rng = np.random.default_rng(0)
    prompts, responses = (rng.integers(shape.vocab, size=(N_ROLLOUTS, n)).tolist() for n in (PROMPT, RESPONSE))
    asked = prompts, responses, BATCH_TOKENS
    for _ in range(2):  # the first time is not measured
        scoring, _ = timed(score_responses(model, *asked))
        reset_peak_memory(device)
        seconds, found = timed(along_step(model, step, *asked))
        peak = peak_memory(device)
    model.double()
    wide = {name: delta.double() for name, delta in step.items()}
    _, exact = timed(along_step(model, wide, prompts[:1], [responses[0][:IN_FLOAT64]], BATCH_TOKENS))
    error = float(np.linalg.norm(found[0][:IN_FLOAT64] - exact[0]) / np.linalg.norm(exact[0]))
    return {"scoring_s": scoring, "step_s": seconds, "peak_bytes": peak, "error": error}


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    found, cells = {}, []
    for dtype, largest in LARGEST.items():
        name = str(dtype).removeprefix("torch.")
        of = found[name] = measure(args.shape, resolve_device(args.device), dtype)
        ratio = of["step_s"] / of["scoring_s"]
        seconds = [f"{of['scoring_s']:.3g}", f"{of['step_s']:.3g}", f"{ratio:.2f}", f"{of['peak_bytes'] / 2**30:.2f}"]
        cells.append([name, *seconds, f"{of['error']:.2g}", f"{largest:.2g}", "yes" if of["error"] < largest else "NO"])
    table("1,000 tokens in | scoring, s | along the step, s | ratio | peak GiB | error | limit | holds", cells)
    print(json.dumps({"shape": args.shape} | found))
    return 0 if all(found[str(dtype).removeprefix("torch.")]["error"] < of for dtype, of in LARGEST.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
