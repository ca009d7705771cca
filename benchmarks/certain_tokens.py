#!/usr/bin/env python3
"""How exact are gradients of tokens of which the model is certain? Against float64 of the same model, by bucket.

    python benchmarks/certain_tokens.py --model-path demo/trained --rollouts out/exp12/exp12_trained
    python benchmarks/certain_tokens.py --model-path demo/trained --rollouts ... --sharpen 2 --dtype bfloat16

`--sharpen` is a factor on the final norm, as sharp as larger models are; such a model samples rollouts of its own. The
table says how far rows are off and how many point elsewhere, by entropy bucket and by 1 − π of the token drawn, and
the unit-norm participation ratio as found and exact; the same of pooled and of pooled and projected gradients.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gradprobe.dump.buckets import bucket_of, choose_positions, fit_edges  # noqa: E402
from gradprobe.dump.records import iter_rollouts  # noqa: E402
from gradprobe.gradients.chosen import Chosen  # noqa: E402
from gradprobe.gradients.engine import GradientEngine  # noqa: E402
from gradprobe.gradients.targets import Projection, expand_projected, expand_targets  # noqa: E402
from gradprobe.model.checkpoint import DTYPES, Checkpoint, CheckpointSource, load_checkpoint  # noqa: E402
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses  # noqa: E402
from gradprobe.rollouts.score import score_responses  # noqa: E402

BINS = 5
NEVER = np.finfo(np.float64).tiny


def sharpened(source: CheckpointSource, dtype: torch.dtype, factor: float) -> Checkpoint:
    checkpoint = load_checkpoint(source, torch.device("cpu"), dtype)
    with torch.no_grad():
        checkpoint.model.base_model.norm.weight.mul_(factor)
    return checkpoint


def gradients(model, targets, prompts, responses, chosen, by_hand: bool) -> list[np.ndarray]:
    """[n, dim] float64 for every target, in the order of rollouts and gradients."""
    engine = GradientEngine(model, targets, by_hand)
    parts = [[] for _ in targets]
    order = []
    for _, rows, found in engine.batches(prompts, responses, chosen, 2048):
        order += rows.tolist()
        for part, of_target in zip(parts, found, strict=True):
            part.append(of_target.double().numpy())
    return [np.concatenate(part)[np.argsort(order)] for part in parts]


def unit_norm_pr(rows: np.ndarray) -> float:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    return len(unit) ** 2 / np.linalg.norm(unit.T @ unit) ** 2


def told(name: str, found: np.ndarray, exact: np.ndarray) -> None:
    """One line of the table."""
    if len(found) == 0:
        return
    size = np.linalg.norm(exact, axis=1)
    off = np.linalg.norm(found - exact, axis=1) / np.maximum(size, NEVER)
    cosine = (found * exact).sum(1) / np.maximum(np.linalg.norm(found, axis=1) * size, NEVER)
    quantiles = " / ".join(f"{x:.1e}" for x in (np.median(off), np.quantile(off, 0.95), off.max()))
    turned = f"{np.mean(cosine < 0.9):.1%}, least {cosine.min():.2f}"
    print(f"| {name} | {len(found)} | {quantiles} | {turned} | {unit_norm_pr(found):.2f}, {unit_norm_pr(exact):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=ROOT / "demo/trained", type=Path)
    parser.add_argument("--rollouts", type=Path, required=True, help="a dump: its prompts, and its rollouts")
    parser.add_argument("--adapter")
    parser.add_argument("--sharpen", type=float, default=1.0)
    parser.add_argument("--num-rollouts", type=int, default=200)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    rollouts = list(iter_rollouts(args.rollouts / "rollouts.jsonl"))[: args.num_rollouts]
    prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    source = CheckpointSource(str(args.model_path), adapter=args.adapter)
    checkpoint = sharpened(source, DTYPES[args.dtype], args.sharpen)
    narrow, wide = checkpoint.model, sharpened(source, torch.float64, args.sharpen).model
    if args.sharpen != 1:
        sampling = Sampling(1, 64, end_ids=checkpoint.end_ids)
        batches = sample_responses(narrow, prompts, lambda p, s: rollout_uniforms(0, p, s, 64), sampling)
        responses = [samples[0] for batch in batches for samples in batch]
    scores = {i: s for batch in score_responses(wide, prompts, responses, 2048) for i, s in batch.items()}
    edges = fit_edges(np.concatenate([scores[i].entropies for i in range(len(prompts))]), BINS)
    buckets, rng = [bucket_of(scores[i].entropies, edges) for i in range(len(prompts))], np.random.default_rng(0)
    picked = [choose_positions(of_rollout, BINS, 4, rng) for of_rollout in buckets]
    bucket = np.concatenate([of_rollout[p] for of_rollout, p in zip(buckets, picked, strict=True)])
    missing = np.concatenate([-np.expm1(scores[i].logprobs[p]) for i, p in enumerate(picked)])
    each = [Chosen.each(p) for p in picked]
    pooled = list(map(Chosen.pooled, buckets))
    pooled_bucket = np.concatenate(list(map(np.unique, buckets)))
    rows = expand_targets(wide, None, "mlp.down_proj.weight", "0", 0)
    weights = expand_projected(wide, None, "mlp.down_proj.weight", Projection(16, 16, 0))
    print(f"{args.model_path}, final norm x {args.sharpen:g}, {args.dtype}, {len(prompts)} rollouts\n")
    print("| | rows | off by: median / 95% / most | cosine < 0.9 | unit-norm PR: found, exact |")
    print("| --- | --- | --- | --- | --- |")
    (exact,) = gradients(wide, rows, prompts, responses, each, True)
    for by_hand in (True, False):
        (found,) = gradients(narrow, rows, prompts, responses, each, by_hand)
        for b in range(BINS):
            told(f"bucket {b}, {'by hand' if by_hand else 'by autograd'}", found[bucket == b], exact[bucket == b])
        if by_hand:
            for low in range(-16, 0, 2):
                chosen = (missing >= 10.0**low) & (missing < 10.0 ** (low + 2))
                told(f"1 − π in 1e{low} to 1e{low + 2}", found[chosen], exact[chosen])
    for name, targets in (("pooled", rows), ("pooled, projected", weights)):
        (exact,) = gradients(wide, targets, prompts, responses, pooled, True)
        (found,) = gradients(narrow, targets, prompts, responses, pooled, True)
        for b in range(BINS):
            told(f"{name}, bucket {b}", found[pooled_bucket == b], exact[pooled_bucket == b])


if __name__ == "__main__":
    main()
