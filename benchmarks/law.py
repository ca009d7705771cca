#!/usr/bin/env python3
"""A law that real models obey, held against the toolkit: the same problems sampled again and again.

Where rollouts are the model's own, log π + H has mean zero, correct and incorrect rollouts are exactly opposed, and no
bucket can be `aligned`. Each re-sampling takes all of a set of problems, picks tokens as a study does, pools them too,
and asks Exp 2. Then the same model is sampled in ways that are not its own, and log π + H must tell.

The demo's trained model, 20 re-samplings of 128 problems (tens of minutes on one core), a line for each:

    python benchmarks/law.py --model demo/trained --output out/law_trained.jsonl

The tables of docs/law.md from such files:

    python benchmarks/law.py --report out/law_base.jsonl out/law_trained.jsonl --output docs/law.md
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gradprobe.analysis.bucket import Bucket  # noqa: E402
from gradprobe.analysis.opposition import rho_over_sums  # noqa: E402
from gradprobe.analysis.pooled import Pooled  # noqa: E402
from gradprobe.dump.buckets import choose_positions, fit_edges  # noqa: E402
from gradprobe.dump.on_policy import OFF_POLICY, Tokens  # noqa: E402
from gradprobe.dump.pooled import buckets_of, pooled_tokens  # noqa: E402
from gradprobe.dump.records import Rollout  # noqa: E402
from gradprobe.exp2.measure import Exp2Settings, directions_of_bucket  # noqa: E402
from gradprobe.gradients.chosen import Chosen  # noqa: E402
from gradprobe.gradients.engine import GradientEngine  # noqa: E402
from gradprobe.gradients.targets import Target  # noqa: E402
from gradprobe.model.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from gradprobe.problems.boxed import is_correct  # noqa: E402
from gradprobe.problems.data_set import load_problems, shard_of_study  # noqa: E402
from gradprobe.problems.templates import encode_prompts  # noqa: E402
from gradprobe.rollouts import sample as sampling  # noqa: E402
from gradprobe.rollouts.score import score_responses  # noqa: E402
from gradprobe.rollouts.sources import SampledRollouts, SamplingSettings  # noqa: E402

BINS, PICKED, BATCH_TOKENS = 5, 4, 4096
OTHER_WAYS = ("temperature 0.9", "temperature 0.7", "top-p 0.95", "top-k 20")
SIZES = (32, 64, 128, 256, 512, 1024)
"""Numbers of rollouts at which log π + H is asked about other ways to sample."""


def main(argv: list[str] | None = None) -> int:
    """Re-sample one model, or report what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to sample")
    parser.add_argument("--report", nargs="+", type=Path, metavar="F", help="make tables of these files")
    parser.add_argument("--output", type=Path, required=True, help="lines are added to it; with --report: the page")
    parser.add_argument("--resamplings", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1, help="to add re-samplings to those there are")
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--layer", type=int, default=4)
    args = parser.parse_args(argv)
    if args.report:
        args.output.write_text(page(args.report), encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(args.model, torch.device("cpu"), torch.float32)
    with args.output.open("a", encoding="utf-8") as stream:
        for found in measured(checkpoint, args):
            print(json.dumps({"model": Path(args.model).name, **found}), file=stream, flush=True)
    return 0


def measured(checkpoint: Checkpoint, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line for each re-sampling, and for each other way to sample."""
    for seed in range(args.first_seed, args.first_seed + args.resamplings):
        start = time.perf_counter()
        rollouts = rollouts_of(checkpoint, args, seed)
        found = resampling(checkpoint, args.layer, rollouts)
        yield {"seed": seed, **found, "seconds": round(time.perf_counter() - start, 1)}
        if seed <= len(OTHER_WAYS):
            way = OTHER_WAYS[seed - 1]
            yield {"seed": seed, "way": way, "detected": detected(rollouts_of(checkpoint, args, seed, way))}


def rollouts_of(checkpoint: Checkpoint, args: argparse.Namespace, seed: int, way: str = "") -> list[Rollout]:
    """Every prompt's rollouts, judged and scored. `way`: another way to draw a token than from the full softmax."""
    problem_set = load_problems(str(ROOT / "demo" / "problems.jsonl"), None, None, None)
    shard = shard_of_study(len(problem_set.problems), args.num_prompts, 0, 0, 1)
    settings = SamplingSettings(args.num_samples, 256, 1.0, seed)
    problems = [problem_set.problems[i] for i in shard]
    prompts = encode_prompts(problems, checkpoint.tokenizer, checkpoint.model.config.vocab_size, None)
    source = SampledRollouts(problems, prompts, settings)
    plain = sampling.sample_from
    sampling.sample_from = drawn_by(way, plain)
    try:
        sampled = source.opened(checkpoint, 512)(range(len(shard)))
    finally:
        sampling.sample_from = plain
    scores: dict[int, Any] = {}
    prompts, responses = [r.prompt_ids for r in sampled], [r.response_ids for r in sampled]
    for batch in score_responses(checkpoint.model, prompts, responses, BATCH_TOKENS):
        scores.update(batch)
    return [
        replace(
            r,
            correct=is_correct(r.response, r.ground_truth),
            entropies=scores[i].entropies.tolist(),
            logprobs=scores[i].logprobs.tolist(),
            tail_mass=scores[i].tail_mass.tolist(),
        )
        for i, r in enumerate(sampled)
    ]


def drawn_by(way: str, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A sampler in the place of `plain`: from a softmax at another temperature, or cut to its likeliest words."""
    kind, _, value = way.partition(" ")

    def sample(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
        if kind == "temperature":
            return plain(logits, uniforms, float(value))
        order = logits.argsort(dim=-1, descending=True)
        if kind == "top-k":
            dropped = order[:, int(value) :]
            return plain(logits.scatter(-1, dropped, -torch.inf), uniforms, temperature)
        probabilities = torch.softmax(logits, -1).gather(-1, order)
        is_dropped = probabilities.cumsum(-1) - probabilities >= float(value)
        cut = torch.zeros_like(is_dropped).scatter(-1, order, is_dropped)
        return plain(logits.masked_fill(cut, -torch.inf), uniforms, temperature)

    return sample if way else plain


def resampling(checkpoint: Checkpoint, layer: int, rollouts: list[Rollout]) -> dict[str, Any]:
    """log π + H, and ρ of picked tokens and over sums, bucket by bucket."""
    tokens = Tokens.of(rollouts)
    edges = fit_edges(tokens.score, BINS)
    rng = np.random.default_rng(0)
    buckets = [buckets_of(rollout, edges) for rollout in rollouts]
    picked = [choose_positions(of_rollout, BINS, PICKED, rng) for of_rollout in buckets]
    engine = GradientEngine(checkpoint.model, [Target(layer, "mlp.down_proj.weight", 0)])
    singly = gradients_of(engine, rollouts, [Chosen.each(positions) for positions in picked])
    sums = gradients_of(engine, rollouts, [Chosen.pooled(of_rollout) for of_rollout in buckets])
    opposition = rho_over_sums(as_pooled(rollouts, edges, sums))
    return {
        "n_correct": sum(r.correct for r in rollouts),
        "on_policy": asdict(tokens.test(True)),
        "on_policy_by_bucket": [one.z for one in tokens.test_by_bucket(edges, True)],
        "rho": [asdict(one) for one in picked_rho(rollouts, buckets, picked, singly)],
        "n_rare": [float(tokens.tail_mass[np.concatenate(buckets) == index].sum()) for index in range(BINS)],
        "rho_over_sums": [asdict(one) for one in (*opposition.by_bucket, opposition.all_tokens)],
    }


def gradients_of(engine: GradientEngine, rollouts: list[Rollout], chosen: list[Chosen]) -> np.ndarray:
    """[n, d] in the order of rollouts and gradients."""
    starts = np.concatenate([[0], np.cumsum([one.n_gradients for one in chosen])])
    found = None
    prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    for members, ks, (part,) in engine.batches(prompts, responses, chosen, BATCH_TOKENS):
        found = np.zeros((starts[-1], part.shape[1]), np.float32) if found is None else found
        found[starts[members] + ks] = part.numpy()
    return found


def as_pooled(rollouts: list[Rollout], edges: np.ndarray, sums: np.ndarray) -> Pooled:
    """What a pooled dump of these rollouts would hold."""
    lines = list(pooled_tokens(rollouts, edges))
    codes = {key: code for code, key in enumerate(dict.fromkeys(r.prompt_idx for r in rollouts))}
    correct = np.array([r.correct for r in rollouts])
    return Pooled(
        grads=sums,
        prompt=np.array([codes[line.prompt_idx] for line in lines]),
        sample=np.array([line.sample_idx for line in lines]),
        bucket=np.array([line.bin for line in lines]),
        n_tokens=np.array([line.n_tokens for line in lines]),
        rare=np.array([line.rare for line in lines]),
        rollout_prompt=np.array([codes[r.prompt_idx] for r in rollouts]),
        rollout_sample=np.array([r.sample_idx for r in rollouts]),
        outcome=correct.astype(float),
        correct=correct,
        n_response_tokens=np.array([len(r.response_ids) for r in rollouts]),
        n_buckets=BINS,
    )


def picked_rho(
    rollouts: list[Rollout], buckets: list[np.ndarray], picked: list[np.ndarray], gradients: np.ndarray
) -> Iterator[Any]:
    """Exp 2's alignment of each bucket's picked tokens."""
    codes = {key: code for code, key in enumerate(dict.fromkeys(r.prompt_idx for r in rollouts))}
    rollout = np.repeat(np.arange(len(rollouts)), list(map(len, picked)))
    prompt = np.array([codes[r.prompt_idx] for r in rollouts])[rollout]
    correct = np.array([r.correct for r in rollouts])[rollout]
    bucket = np.concatenate([b[p] for b, p in zip(buckets, picked, strict=True)])
    tail = np.concatenate([np.array(r.tail_mass)[p] for r, p in zip(rollouts, picked, strict=True)])
    for index in range(BINS):
        rows = np.flatnonzero(bucket == index)
        some = Bucket(gradients, rows, prompt[rows], rollout[rows], "cpu")
        settings = Exp2Settings(bootstrap=200, permutations=0)
        yield directions_of_bucket(some, correct[rows], len(codes), settings, tail[rows]).alignment


def detected(rollouts: list[Rollout]) -> dict[str, float | None]:
    """z of log π + H over the first so many rollouts, taken evenly from all prompts."""
    by_sample = sorted(rollouts, key=lambda r: r.sample_idx)
    return {str(n): Tokens.of(by_sample[:n]).test(True).z for n in SIZES if n <= len(rollouts)}


# ---- the page ---------------------------------------------------------------------------------------------------


def page(files: list[Path]) -> str:
    """docs/law.md: what was found, in tables."""
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    models = list(dict.fromkeys(line["model"] for line in lines))
    parts = [HEAD]
    for model in models:
        plain = [line for line in lines if line["model"] == model and "way" not in line]
        parts.append(_model_part(model, plain))
    others = [line for line in lines if "way" in line]
    parts.append(_others_part(others))
    return "\n".join(parts)


HEAD = """# The law: the same problems, sampled again and again

Written by `python benchmarks/law.py --report ...`. 128 problems of the demo × 8 rollouts, temperature 1, full softmax;
each re-sampling has uniform numbers of its own. Where rollouts are the model's own, theory fixes what must come out
(docs/methods.md): log π + H has mean zero; correct and incorrect rollouts oppose each other (ρ = −1), so no bucket can
be aligned.

Buckets with few rare tokens to be expected show why `unsampled` is a verdict: what is given for them here, before it
is withheld, is the absence of tokens that did not come up. *Aligned but for that*: the interval of ρ lies above 0.
"""


def _model_part(model: str, lines: list[dict[str, Any]]) -> str:
    z = np.array([line["on_policy"]["z"] for line in lines])
    by_bucket = np.array([line["on_policy_by_bucket"] for line in lines], dtype=float)
    verdicts = Counter(one["verdict"] for line in lines for one in line["rho"])
    total = sum(verdicts.values())
    rows = []
    for index in range(BINS):
        found = [line["rho"][index] for line in lines]
        counts = Counter(one["verdict"] for one in found)
        rho = [one["rho"] for one in found if one["ci95"] is not None]
        sums = [line["rho_over_sums"][index] for line in lines]
        rare = float(np.median([line["n_rare"][index] for line in lines]))
        high = sum(one["ci95"] is not None and one["ci95"][0] > 0 for one in found)
        rows.append(
            f"| {index} | {rare:,.1f} | {_counts(counts)} | {high} | {_spread(rho)} | {_holding(sums)} | "
            f"{np.mean(np.abs(by_bucket[:, index]) > 2):.0%} |"
        )
    everything = [line["rho_over_sums"][BINS] for line in lines]
    return "\n".join(
        [
            f"\n## {model}: {len(lines)} re-samplings\n",
            f"log π + H over all tokens: |z| > 2 in {np.mean(np.abs(z) > 2):.0%}, mean of z {z.mean():+.2f}, standard "
            f"deviation {z.std(ddof=1):.2f}. Verdicts on ρ of picked tokens, {total} buckets: {_counts(verdicts)}. "
            f"ρ over sums of all tokens: {_holding(everything)}.\n",
            "| bucket | rare tokens expected, median | verdicts on ρ | aligned but for that "
            "| ρ where it has an interval | ρ over sums | log π + H: &#124;z&#124; > 2 |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _counts(counts: Counter) -> str:
    return ", ".join(f"{word} {n}" for word, n in sorted(counts.items(), key=lambda item: -item[1]))


def _spread(values: list[float]) -> str:
    return f"{np.median(values):+.2f} ({min(values):+.2f} to {max(values):+.2f}, n {len(values)})" if values else "none"


def _holding(estimates: list[dict[str, Any]]) -> str:
    given = [one for one in estimates if one["ci95"] is not None]
    if not given:
        return "never an interval"
    holds = sum(one["ci95"][0] <= -1 <= one["ci95"][1] for one in given)
    middle = float(np.median([one["value"] for one in given]))
    return f"{holds} of {len(given)} intervals hold −1, median {middle:+.2f}"


def _others_part(lines: list[dict[str, Any]]) -> str:
    header = "| sampled by | model | " + " | ".join(f"{n} rollouts" for n in SIZES) + " | off-policy from |"
    rows = []
    for line in sorted(lines, key=lambda line: (OTHER_WAYS.index(line["way"]), line["model"])):
        z = {int(n): value for n, value in line["detected"].items()}
        found = [n for n in sorted(z) if all(abs(z[m] or 0) > 4 for m in z if m >= n)]
        cells = " | ".join("–" if z.get(n) is None else f"{z[n]:+.1f}" for n in SIZES)
        rows.append(f"| {line['way']} | {line['model']} | {cells} | {found[0] if found else 'not by ' + str(max(z))} |")
    return "\n".join(
        [
            "\n## Sampled in other ways\n",
            f"z of log π + H; the verdict is *{OFF_POLICY}* beyond ±4.\n",
            header,
            "| --- | --- | " + "| ".join(["--- "] * len(SIZES)) + "| --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
