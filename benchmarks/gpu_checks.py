#!/usr/bin/env python3
"""Is what a device computes right? Gradients against plain autograd there, sampling against the full softmax.

    python benchmarks/gpu_checks.py --device cuda

A row a check: what was measured, its limit, and whether it holds; then a line of JSON. Exit status 1 if one does not.
The model is a random Qwen2 of 6 layers; nothing is loaded.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_scaling import Shape  # noqa: E402

from gradprobe.gradients.chosen import Chosen  # noqa: E402
from gradprobe.gradients.engine import GradientEngine  # noqa: E402
from gradprobe.gradients.targets import (  # noqa: E402
    AnyTarget,
    Projection,
    Target,
    expand_projected,
    full_name,
    linears_of,
    signs,
)
from gradprobe.model.checkpoint import resolve_device  # noqa: E402
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses  # noqa: E402

VOCABULARY = 512
SHAPE = Shape("checked", 6, 256, 704, 4, 2, 64, vocab=VOCABULARY, has_qk_norm=False)
SUFFIX, LAYER, ROW = "mlp.down_proj.weight", 3, 5
N_BUCKETS = 3
LARGEST_FLOAT32 = 1e-4
"""Relative error of a float32 gradient against float64; 1e-6 to 1e-5 on a CPU."""
MOST_OF_PLAIN = 1.5
"""Times the error that plain autograd in bfloat16 makes itself."""
LEAST_P = 1e-4

Gradients = dict[tuple[int, int], torch.Tensor]


@dataclass(frozen=True)
class Check:
    """One measured number and its limit."""

    name: str
    value: float
    limit: float
    is_sound: bool


def below(name: str, value: float, limit: float) -> Check:
    """A number that must lie below its limit; NaN does not."""
    return Check(name, value, limit, value < limit)


class Case:
    """A model, rollouts and their buckets."""

    def __init__(self, device: torch.device, dtype: torch.dtype, n_rollouts: int):
        self.model = SHAPE.model("cpu", torch.float32).to(device, dtype)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(VOCABULARY, size=rng.integers(5, 40)).tolist() for _ in range(n_rollouts)]
        self.responses = [rng.integers(VOCABULARY, size=rng.integers(8, 60)).tolist() for _ in range(n_rollouts)]
        self.buckets = [rng.integers(N_BUCKETS, size=len(r)) for r in self.responses]

    def ours(self, target: AnyTarget, chosen: list[Chosen]) -> Gradients:
        """By (rollout, number of the gradient in it), on the CPU in float64."""
        batches = GradientEngine(self.model, [target]).batches(self.prompts, self.responses, chosen, 1024)
        places = [(i, k) for i, of_rollout in enumerate(chosen) for k in range(of_rollout.n_gradients)]
        return {places[row]: x.double().cpu() for _, rows, (of,) in batches for row, x in zip(rows, of, strict=True)}

    def plain(self, weights: dict[str, nn.Parameter], i: int, positions: np.ndarray) -> dict[str, torch.Tensor]:
        """∇ Σ log π at positions of rollout i with respect to whole weights, by autograd of the whole model."""
        ids = torch.tensor([self.prompts[i] + self.responses[i]], device=self.model.device)
        log_probs = torch.log_softmax(self.model(input_ids=ids).logits[0].float(), -1)
        at = torch.as_tensor(positions + len(self.prompts[i]), device=self.model.device)
        total = log_probs[at - 1, ids[0, at]].sum()
        found = torch.autograd.grad(total, list(weights.values()))
        return {name: gradient.double().cpu() for name, gradient in zip(weights, found, strict=True)}


def truths(case: Case, target: AnyTarget, chosen: list[Chosen]) -> Gradients:
    """The same as `Case.ours`, by `Case.plain`."""
    linears = {full_name(case.model, w): linear for w, linear in linears_of(case.model, [target]).items()}
    weights = {name: linear.weight.requires_grad_(True) for name, linear in linears.items()}
    found = {}
    for i, of_rollout in enumerate(chosen):
        for k in range(of_rollout.n_gradients):
            whole = case.plain(weights, i, of_rollout.positions[of_rollout.gradient == k])
            if isinstance(target, Target):
                found[i, k] = next(iter(whole.values()))[target.row_idx]
                continue
            parts = []
            for name, gradient in whole.items():
                left, right = (torch.from_numpy(s).double() for s in signs(target.projection, name, linears[name]))
                parts.append((left @ gradient @ right.T).flatten())
            found[i, k] = torch.cat(parts)
    return found


def errors(found: Gradients, expected: Gradients) -> np.ndarray:
    """Relative errors of all gradients. [n]"""
    return np.array([float((found[key] - truth).norm() / truth.norm()) for key, truth in expected.items()])


def gradient_checks(device: torch.device, n_rollouts: int) -> Iterator[Check]:
    """Rows, pooled rows and projected targets, in float32 and bfloat16, against float64 on the CPU."""
    exact = Case(torch.device("cpu"), torch.float64, n_rollouts)
    each = [Chosen.each(np.arange(0, len(r), 7)) for r in exact.responses]
    pooled = [Chosen.pooled(buckets) for buckets in exact.buckets]
    (projected,) = expand_projected(exact.model, str(LAYER), SUFFIX, Projection(8, 8, 0))
    (network,) = expand_projected(exact.model, "all", "all-linear", Projection(4, 4, 0))
    ways = {
        "rows": (Target(LAYER, SUFFIX, ROW), each),
        "pooled rows": (Target(LAYER, SUFFIX, ROW), pooled),
        "projected, pooled": (projected, pooled),
        "all-linear, pooled": (network, pooled),
    }
    for name, (target, chosen) in ways.items():
        truth = truths(exact, target, chosen)
        error = errors(Case(device, torch.float32, n_rollouts).ours(target, chosen), truth)
        yield below(f"{name}, float32: largest error", float(error.max()), LARGEST_FLOAT32)
        case = Case(device, torch.bfloat16, n_rollouts)
        ours, plain = (errors(found, truth) for found in (case.ours(target, chosen), truths(case, target, chosen)))
        yield below(f"{name}, bfloat16: median error", float(np.median(ours)), MOST_OF_PLAIN * float(np.median(plain)))


def sampling_check(device: torch.device, n: int = 20_000) -> Check:
    """First tokens of many responses against the softmax, all rare tokens as one."""
    case = Case(device, torch.float32, 1)
    prompt = case.prompts[0]
    batches = sample_responses(
        case.model, [prompt], lambda p, s: rollout_uniforms(0, p, s, 1), Sampling(n, 1), max_rows=n
    )
    drawn = np.bincount([r[0] for batch in batches for of_prompt in batch for r in of_prompt], minlength=VOCABULARY)
    logits = case.model(input_ids=torch.tensor([prompt], device=device)).logits[0, -1]
    expected = n * torch.softmax(logits.double(), -1).cpu().numpy()
    rare = expected < 5
    groups = [[*x[~rare], x[rare].sum()] if rare.any() else x for x in (drawn, expected)]
    p = float(stats.chisquare(*groups).pvalue)
    return Check("sampling: chi-square p of first tokens", p, LEAST_P, p > LEAST_P)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rollouts", type=int, default=5)
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    print("| check | measured | limit | holds |\n| --- | ---: | ---: | --- |")
    checks = []
    for check in chain(gradient_checks(device, args.rollouts), map(sampling_check, [device])):
        checks.append(check)
        print(f"| {check.name} | {check.value:.3g} | {check.limit:.3g} | {'yes' if check.is_sound else 'NO'} |")
    print(json.dumps({"checks": [asdict(check) for check in checks]}))
    return 0 if all(check.is_sound for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
