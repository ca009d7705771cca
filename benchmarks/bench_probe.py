#!/usr/bin/env python3
"""The probe's two slow parts, sampling with scoring and differentiating, against the plain way, in one process.

The plain way: per-prompt `generate`, one rollout at a time through the whole model, per-position
`torch.autograd.grad` of the full weight, of which the row is picked afterwards. Both ways take the same rollouts
and positions; they take turns, and every figure is a median with its range over the repeats.

The demo model on a CPU (about ten minutes on two cores):

    python benchmarks/bench_probe.py

What a step costs beside gradients, by CPU seconds:

    python benchmarks/bench_probe.py --step-to demo/trained --num-prompts 32 --repeats 3 --skip-plain --skip-scaling

The shape of Qwen2.5-1.5B with random weights, on a GPU; the plain way on some of the rollouts, compared per row:

    python benchmarks/bench_probe.py --config qwen2.5-1.5b --random-init --num-prompts 64 --max-new-tokens 512 \\
        --plain-prompts 2 --plain-rollouts 2 --repeats 5

A table for people goes to stdout, and one line of JSON for programs behind it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_scaling import QWEN_1_5B, Shape, peak_memory, reset_peak_memory, wait_for  # noqa: E402

from gradprobe.dump.buckets import bucket_of, choose_positions, fit_edges  # noqa: E402
from gradprobe.gradients.chosen import Chosen  # noqa: E402
from gradprobe.gradients.engine import GradientEngine  # noqa: E402
from gradprobe.gradients.step import along_step, subtract  # noqa: E402
from gradprobe.gradients.targets import Projection, Target, expand_projected  # noqa: E402
from gradprobe.model.checkpoint import load_checkpoint, resolve_device, resolve_dtype  # noqa: E402
from gradprobe.model.decoder import layer_list  # noqa: E402
from gradprobe.model.identity import hardware_of  # noqa: E402
from gradprobe.probe.settings import BATCH_TOKENS  # noqa: E402
from gradprobe.problems.data_set import load_problems, shard_of_study  # noqa: E402
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses  # noqa: E402
from gradprobe.rollouts.score import score_responses  # noqa: E402

SHAPES = {
    "qwen2.5-1.5b": QWEN_1_5B,
    "small": Shape("small", 4, 64, 176, 4, 2, 16, vocab=512, has_qk_norm=False),
}
SUFFIX = "mlp.down_proj.weight"
BINS, POSITIONS_PER_BIN = 5, 4


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", default=str(ROOT / "demo" / "base"), help="checkpoint to load (default: the demo's base)")
    add("--config", choices=SHAPES, help="build this shape instead; needs --random-init")
    add("--random-init", action="store_true", help="weights are random: nothing is loaded")
    add("--num-prompts", type=int, default=16)
    add("--num-samples", type=int, default=8)
    add("--max-new-tokens", type=int, default=128)
    add("--prompt-tokens", type=int, default=128, help="length of random prompts (default: %(default)s)")
    add("--plain-prompts", type=int, help="prompts that the plain sampling takes (default: all)")
    add("--plain-rollouts", type=int, help="rollouts that the plain differentiation takes (default: all)")
    add("--repeats", type=int, default=5)
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    add("--batch-tokens", type=int, help="default: the probe's own")
    add("--sample-rows", type=int, default=512)
    add("--skip-plain", action="store_true", help="only ours")
    add("--step-to", metavar="CKPT", help="time the step from --model-path to this checkpoint, too")
    add("--skip-scaling", action="store_true", help="leave out many targets and pooled gradients")
    args = parser.parse_args(argv)
    if (args.config is None) == args.random_init:
        parser.error("--config and --random-init go together")
    if args.config is not None and args.step_to is not None:
        parser.error("--step-to goes with --model-path")
    return args


@dataclass
class Bench:
    """The model, what it is asked, and the clock."""

    model: nn.Module
    prompts: list[list[int]]
    end_ids: frozenset[int]
    args: argparse.Namespace
    peak_bytes: dict[str, int] = field(default_factory=dict)
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    def seconds(self, name: str, work: Callable[[], Any]) -> tuple[float, Any]:
        """Wall-clock seconds of `work`, its result; its peak memory is noted under `name`."""
        reset_peak_memory(self.model.device)
        start = time.perf_counter()
        result = work()
        wait_for(self.model.device)
        elapsed = time.perf_counter() - start
        self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak_memory(self.model.device))
        return elapsed, result

    def show(self, name: str, values: list[float], unit: str = "") -> None:
        """One line of the table, median and range, also kept for programs."""
        median, low, high = statistics.median(values), min(values), max(values)
        self.results[name] = {"median": median, "min": low, "max": high}
        print(f"{name:<58} {median:>10.4g}  [{low:.4g}, {high:.4g}] {unit}", flush=True)


def build(args: argparse.Namespace) -> Bench:
    """The model and the prompts of the benchmark."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    args.batch_tokens = args.batch_tokens or BATCH_TOKENS[device.type]
    if args.config is not None:
        shape = SHAPES[args.config]
        prompts = np.random.default_rng(0).integers(shape.vocab, size=(args.num_prompts, args.prompt_tokens)).tolist()
        return Bench(shape.model(device.type, dtype), prompts, frozenset(), args)
    checkpoint = load_checkpoint(args.model_path, device, dtype)
    problems = load_problems(ROOT / "demo" / "problems.jsonl").problems
    chosen = [problems[i].prompt for i in shard_of_study(len(problems), args.num_prompts, seed=0)]
    prompts = checkpoint.tokenizer(chosen, add_special_tokens=False)["input_ids"]
    return Bench(checkpoint.model, prompts, checkpoint.end_ids, args)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this machine, the best of several: the ceiling of both ways."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


# ---- sampling and scoring ---------------------------------------------------------------------------------------


def our_sampling(bench: Bench) -> tuple[list[list[int]], list[np.ndarray]]:
    """Responses (flat, samples of a prompt in a row) and the entropies of their tokens."""
    args = bench.args
    batches = sample_responses(
        bench.model,
        bench.prompts,
        lambda p, s: rollout_uniforms(0, p, s, args.max_new_tokens),
        Sampling(args.num_samples, args.max_new_tokens, 1.0, bench.end_ids),
        max_rows=args.sample_rows,
    )
    responses = [response for batch in batches for samples in batch for response in samples]
    scores: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for batch in score_responses(bench.model, repeated(bench), responses, args.batch_tokens):
        scores.update(batch)
    return responses, [scores[i][0] for i in range(len(responses))]


def repeated(bench: Bench) -> list[list[int]]:
    """The prompt of every response."""
    return [prompt for prompt in bench.prompts for _ in range(bench.args.num_samples)]


def plain_sampling(bench: Bench) -> int:
    """Per-prompt `generate`, then one rollout at a time through the whole model; the number of response tokens."""
    args, n_tokens = bench.args, 0
    ends = sorted(bench.end_ids) or None
    for prompt in bench.prompts[: args.plain_prompts]:
        ids = torch.tensor([prompt], device=bench.model.device)
        full_softmax = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        size = {"num_return_sequences": args.num_samples, "max_new_tokens": args.max_new_tokens}
        mask = torch.ones_like(ids)
        sampled = bench.model.generate(
            ids, attention_mask=mask, eos_token_id=ends, pad_token_id=0, **full_softmax, **size
        )
        for row in sampled:
            response = row[len(prompt) :]
            if ends is not None:
                ended = torch.isin(response, torch.tensor(ends, device=bench.model.device)).nonzero()
                response = response[: int(ended[0]) + 1] if len(ended) else response
            n_tokens += len(response)
            with torch.no_grad():
                logits = bench.model(input_ids=row[None, : len(prompt) + len(response)]).logits[0, len(prompt) - 1 : -1]
                log_probs = torch.log_softmax(logits.float(), -1)
                (-(log_probs.exp() * log_probs).sum(-1)).cpu()
    return n_tokens


# ---- gradients --------------------------------------------------------------------------------------------------


def choose(entropies: list[np.ndarray]) -> list[np.ndarray]:
    """Up to 4 positions per bucket and rollout, as in the study."""
    edges = fit_edges(np.concatenate(entropies), BINS)
    return [
        choose_positions(bucket_of(e, edges), BINS, POSITIONS_PER_BIN, np.random.default_rng(i))
        for i, e in enumerate(entropies)
    ]


def our_gradients(
    bench: Bench, targets: list[Target], responses: list[list[int]], positions: list[np.ndarray]
) -> dict[tuple[int, int], np.ndarray]:
    """The first target's rows by (rollout, position)."""
    found = {}
    engine = GradientEngine(bench.model, targets)
    prompts = repeated(bench)[: len(responses)]
    places = [(i, int(p)) for i, of_rollout in enumerate(positions) for p in of_rollout]
    for _, rows, gradients in engine.batches(prompts, responses, positions, bench.args.batch_tokens):
        found.update(zip([places[row] for row in rows], gradients[0].cpu().numpy(), strict=True))
    return found


def plain_gradients(
    bench: Bench, target: Target, responses: list[list[int]], positions: list[np.ndarray]
) -> dict[tuple[int, int], np.ndarray]:
    """The same rows by the full weight's gradient, one rollout and one position at a time."""
    weight = layer_list(bench.model)[1][target.layer].get_parameter(target.suffix)
    weight.requires_grad_(True)
    found = {}
    for i, (prompt, response) in enumerate(zip(repeated(bench), responses, strict=False)):
        if not len(positions[i]):
            continue
        ids = torch.tensor([prompt + response], device=bench.model.device)
        log_probs = torch.log_softmax(bench.model(input_ids=ids).logits[0].float(), -1)
        for p in positions[i].tolist():
            log_prob = log_probs[len(prompt) + p - 1, response[p]]
            gradient = torch.autograd.grad(log_prob, weight, retain_graph=True)[0]
            found[i, p] = gradient[target.row_idx].float().cpu().numpy()
    weight.requires_grad_(False)
    return found


def floor_flops(bench: Bench, layer: int, positions: list[np.ndarray]) -> float:
    """2 · (weights above the target) · (t + 1), summed over the positions: one pass back through the activations."""
    blocks = layer_list(bench.model)[1][layer + 1 :]
    n_weights = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    n_inputs = sum(len(prompt) + int(p) for prompt, ps in zip(repeated(bench), positions, strict=True) for p in ps)
    return 2.0 * n_weights * n_inputs


# ---- the comparison ---------------------------------------------------------------------------------------------


def compare_sampling(bench: Bench) -> tuple[list[list[int]], list[np.ndarray]]:
    """Sampling with scoring, ours against plain, by response tokens per second."""
    ours, plain = [], []
    our_sampling(bench)  # what is done once, compiling and allocating, is not measured
    for _ in range(bench.args.repeats):
        elapsed, (responses, entropies) = bench.seconds("sampling, ours", lambda: our_sampling(bench))
        ours.append(sum(map(len, responses)) / elapsed)
        if not bench.args.skip_plain:
            elapsed, n_tokens = bench.seconds("sampling, plain", lambda: plain_sampling(bench))
            plain.append(n_tokens / elapsed)
    bench.show("sampling with scoring, ours", ours, "response tokens/s")
    if plain:
        bench.show("sampling with scoring, plain", plain, "response tokens/s")
        bench.show("sampling with scoring, ours : plain", [a / b for a, b in zip(ours, plain, strict=True)], "×")
    return responses, entropies


def compare_gradients(bench: Bench, responses: list[list[int]], positions: list[np.ndarray], ceiling: float) -> None:
    """Gradients of one row of the middle layer, ours against plain, by rows per second."""
    target = Target(len(layer_list(bench.model)[1]) // 2, SUFFIX, 0)
    subset = slice(0, bench.args.plain_rollouts)
    n_rows = sum(map(len, positions))
    ours, plain = [], []
    our_gradients(bench, [target], responses[:4], positions[:4])
    for _ in range(bench.args.repeats):
        elapsed, rows = bench.seconds("gradients, ours", lambda: our_gradients(bench, [target], responses, positions))
        ours.append(n_rows / elapsed)
        if not bench.args.skip_plain:
            elapsed, expected = bench.seconds(
                "gradients, plain", lambda: plain_gradients(bench, target, responses[subset], positions)
            )
            plain.append(len(expected) / elapsed)
    flops = floor_flops(bench, target.layer, positions)
    bench.show("gradients, ours", ours, "rows/s")
    bench.show("gradients, floor's share of the measured matmul rate", [flops / n_rows * r / ceiling for r in ours])
    if plain:
        errors = [float(np.linalg.norm(rows[key] - row) / np.linalg.norm(row)) for key, row in expected.items()]
        bench.show("gradients, plain", plain, "rows/s")
        bench.show("gradients, ours : plain", [a / b for a, b in zip(ours, plain, strict=True)], "×")
        bench.show("gradients, ‖ours − plain‖ / ‖plain‖ per row", errors)


def compare_targets(bench: Bench, responses: list[list[int]], positions: list[np.ndarray]) -> None:
    """8 rows × 3 layers against one row of the lowest of these layers."""
    layers = [len(layer_list(bench.model)[1]) * quarter // 4 for quarter in (1, 2, 3)]
    one = [Target(layers[0], SUFFIX, 0)]
    many = [Target(layer, SUFFIX, row) for layer in layers for row in range(8)]
    ratios = []
    for _ in range(bench.args.repeats):
        single, _ = bench.seconds("one target", lambda: our_gradients(bench, one, responses, positions))
        several, _ = bench.seconds("24 targets", lambda: our_gradients(bench, many, responses, positions))
        ratios.append(several / single)
    bench.show(f"8 rows × layers {layers} : one row of layer {layers[0]}", ratios, "× the time")


def compare_pooled(bench: Bench, responses: list[list[int]], entropies: list[np.ndarray]) -> None:
    """Picked tokens against all tokens pooled by bucket, and all linear weights, by tokens covered per second."""
    layer = len(layer_list(bench.model)[1]) // 2
    edges = fit_edges(np.concatenate(entropies), BINS)
    picked = [Chosen.each(positions) for positions in choose(entropies)]
    pooled = [Chosen.pooled(bucket_of(e, edges)) for e in entropies]
    row, projection = [Target(layer, SUFFIX, 0)], Projection(16, 16, 0)
    ways = {
        "picked tokens, one row": (row, picked),
        "pooled, one row": (row, pooled),
        "pooled, one weight 16x16": (expand_projected(bench.model, str(layer), SUFFIX, projection), pooled),
        "pooled, all-linear 16x16": (expand_projected(bench.model, "all", "all-linear", projection), pooled),
    }
    prompts = repeated(bench)[: len(responses)]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(bench.args.repeats):
        for name, (targets, chosen) in ways.items():
            batches = GradientEngine(bench.model, targets).batches(prompts, responses, chosen, bench.args.batch_tokens)
            elapsed, _ = bench.seconds(name, lambda batches=batches: sum(len(rows) for _, rows, _ in batches))
            rates[name].append(sum(len(one.positions) for one in chosen) / elapsed)
    for name, (_, chosen) in ways.items():
        bench.show(f"{name}, tokens covered", rates[name], "tokens/s")
        n_tokens = sum(len(one.positions) for one in chosen) / len(responses)
        bench.show(f"{name}, seconds per rollout", [n_tokens / rate for rate in rates[name]], "s")
    of_picked, of_pooled, *_ = rates.values()
    bench.show("pooled : picked, one row", [b / a for a, b in zip(of_picked, of_pooled, strict=True)], "× tokens/s")


def compare_step(bench: Bench, responses: list[list[int]], entropies: list[np.ndarray]) -> None:
    """CPU seconds per 1,000 response tokens: along a step, with the log-probs of its other end, and of gradients."""
    prompts, n_tokens, batch_tokens = repeated(bench), sum(map(len, responses)), bench.args.batch_tokens
    other = load_checkpoint(bench.args.step_to, bench.model.device, bench.model.dtype).model
    score = lambda: sum(map(len, score_responses(other, prompts, responses, batch_tokens)))  # noqa: E731
    score()
    step = subtract(other, bench.model, into=load_checkpoint(bench.args.step_to, bench.model.device, other.dtype).model)
    layer = len(layer_list(bench.model)[1]) // 2
    row, weight = [Target(layer, SUFFIX, 0)], expand_projected(bench.model, str(layer), SUFFIX, Projection(16, 16, 0))

    def gradients(targets: list[Target], chosen: list[Chosen]) -> int:
        batches = GradientEngine(bench.model, targets).batches(prompts, responses, chosen, batch_tokens)
        return sum(len(rows) for _, rows, _ in batches)

    def pooled(bins: int) -> list[Chosen]:
        edges = fit_edges(np.concatenate(entropies), bins)
        return [Chosen.pooled(bucket_of(e, edges)) for e in entropies]

    picked, of_5, of_20 = [Chosen.each(positions) for positions in choose(entropies)], pooled(BINS), pooled(20)
    ways: dict[str, Callable[[], int]] = {
        "log-probs under the other end": score,
        "along the step": lambda: sum(map(len, along_step(bench.model, step, prompts, responses, batch_tokens))),
        "pooled in 5 buckets, one row": lambda: gradients(row, of_5),
        "pooled in 20 buckets, one weight 16x16": lambda: gradients(weight, of_20),
        "20 picked tokens, one row": lambda: gradients(row, picked),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(bench.args.repeats):
        for name, work in ways.items():
            began = time.process_time()
            bench.seconds(name, work)
            spent[name].append(1000 * (time.process_time() - began) / n_tokens)
    for name, seconds in spent.items():
        bench.show(f"{name}, of {n_tokens:,} response tokens", seconds, "CPU s per 1,000")


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print it."""
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    bench = build(args)
    device, dtype = bench.model.device, bench.model.dtype
    machine = hardware_of(device)
    ceiling = matmul_rate(device, dtype)
    facts = {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "arguments": vars(args),
        "matmul_flops_per_s": ceiling,
    }
    print(f"{machine}, {facts['threads']} threads, torch {torch.__version__}, {facts['dtype']}")
    print(f"measured matmul rate: {ceiling / 1e9:.4g} GFLOP/s\n")
    responses, entropies = compare_sampling(bench)
    positions = choose(entropies)
    compare_gradients(bench, responses, positions, ceiling)
    if not args.skip_scaling:
        compare_targets(bench, responses, positions)
        compare_pooled(bench, responses, entropies)
    if args.step_to:
        compare_step(bench, responses, entropies)
    for name, n_bytes in bench.peak_bytes.items():
        print(f"peak memory, {name:<39} {n_bytes / 2**30:>10.3f} GiB")
    print(json.dumps(facts | bench.results | {"peak_bytes": bench.peak_bytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
