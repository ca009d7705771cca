#!/usr/bin/env python3
"""How far bfloat16 gradient rows are from float32 ones, on the same rollouts and positions.

    python benchmarks/bf16_rows.py --model-path demo/base --rollouts out/exp12/exp12_base

Per entropy bucket: the relative error ‖g_bf16 − g_f32‖ / ‖g_f32‖ and the cosine between both, median and range of
the central 90%.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gradprobe.dump.consistency import load_dump  # noqa: E402
from gradprobe.dump.format import find_rollouts  # noqa: E402
from gradprobe.dump.records import iter_rollouts  # noqa: E402
from gradprobe.gradients.engine import GradientEngine  # noqa: E402
from gradprobe.gradients.targets import Target  # noqa: E402
from gradprobe.model.checkpoint import load_checkpoint, resolve_device  # noqa: E402
from gradprobe.model.decoder import layer_list  # noqa: E402


def rows_of(model, target: Target, rollouts: list, positions: list[np.ndarray]) -> np.ndarray:
    """Gradient rows in the order of rollouts and positions, float64."""
    engine = GradientEngine(model, [target])
    starts = np.concatenate([[0], np.cumsum([len(p) for p in positions])])
    found = np.empty((starts[-1], target.row_dim(model)))
    prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    for members, ks, (rows,) in engine.batches(prompts, responses, positions, 4096):
        found[starts[members] + ks] = rows.cpu().numpy()
    return found


def main(argv: list[str] | None = None) -> int:
    """Differentiate twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--rollouts", required=True, type=Path, help="a dump of this model")
    parser.add_argument("--num-rollouts", type=int, default=128)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    dump = load_dump(args.rollouts)
    rollouts = list(iter_rollouts(find_rollouts(args.rollouts)))[: args.num_rollouts]
    positions, buckets = [], []
    for rollout in rollouts:
        mine = (dump.prompt == dump.prompt_keys.index(rollout.prompt_idx)) & (dump.sample_idx == rollout.sample_idx)
        order = np.argsort(dump.pos[mine])
        positions.append(dump.pos[mine][order])
        buckets.append(dump.bin[mine][order])
    bucket = np.concatenate(buckets)
    device = resolve_device(args.device)
    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_checkpoint(args.model_path, device, dtype).model
        target = Target(len(layer_list(model)[1]) // 2, "mlp.down_proj.weight", 0)
        rows[dtype] = rows_of(model, target, rollouts, positions)
    exact, rounded = rows[torch.float32], rows[torch.bfloat16]
    norms = np.linalg.norm(exact, axis=1)
    error = np.linalg.norm(rounded - exact, axis=1) / norms
    cosine = (exact * rounded).sum(axis=1) / (norms * np.linalg.norm(rounded, axis=1))
    print("bucket     n   relative error: median [5%, 95%]      cosine: median [5%, 95%]")
    for b in [*range(dump.bins), None]:
        chosen = np.ones(len(bucket), bool) if b is None else bucket == b
        figures = [np.quantile(values[chosen], [0.5, 0.05, 0.95]) for values in (error, cosine)]
        name = "all" if b is None else str(b)
        print(f"{name:<6} {chosen.sum():>5}  " + "   ".join("{:.4f} [{:.4f}, {:.4f}]".format(*f) for f in figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
