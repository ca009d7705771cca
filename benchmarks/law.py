#!/usr/bin/env python3
"""A law that real models obey, held against the toolkit: the same problems sampled again and again.

Where rollouts are the model's own, log π + H has mean zero, correct and incorrect rollouts are exactly opposed, and no
bucket can be `aligned`. Each re-sampling probes all of a set of problems, token by token and pooled. Then the same
model is sampled in ways that are not its own, and log π + H must tell.

Along a step each bucket's sum of derivatives has mean zero, too, and outcomes dealt out at random give p < 0.05 in one
of 20. That takes no gradients: ten minutes on one core for 20 re-samplings of the demo's base model:

    python benchmarks/law.py --model demo/base --step-to demo/trained --num-prompts 64 --output out/law_step.jsonl

The demo's trained model, 20 re-samplings of 128 problems (tens of minutes on one core), a line for each:

    python benchmarks/law.py --model demo/trained --output out/law_trained.jsonl

What such files say (docs/methods.md):

    python benchmarks/law.py --report out/law_base.jsonl out/law_trained.jsonl
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import probe_grad_vectors  # noqa: E402
from gradprobe.analysis.inputs import pooled_of  # noqa: E402
from gradprobe.analysis.opposition import rho_over_sums  # noqa: E402
from gradprobe.dump.buckets import buckets_of, fit_edges  # noqa: E402
from gradprobe.dump.on_policy import Tokens  # noqa: E402
from gradprobe.dump.records import Rollout, iter_rollouts  # noqa: E402
from gradprobe.exp2.measure import Exp2Settings, directions_of_dump  # noqa: E402
from gradprobe.exp3.step import Along, step_signal  # noqa: E402
from gradprobe.library import load_dump  # noqa: E402
from gradprobe.rollouts import sample as sampling  # noqa: E402

BINS = 5
OTHER_WAYS = ("temperature 0.9", "temperature 0.7", "top-p 0.95", "top-k 20")
SIZES = (32, 64, 128, 256, 512, 1024)
"""Numbers of rollouts at which log π + H is asked about other ways to sample."""
SHUFFLES = 10
"""Of each re-sampling's outcomes, within prompts."""


def main(argv: list[str] | None = None) -> int:
    """Re-sample one model, or report what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to sample")
    parser.add_argument("--report", nargs="+", type=Path, metavar="F", help="say what these files hold")
    parser.add_argument("--output", type=Path, default=Path("out/law.jsonl"), help="lines are added to it")
    parser.add_argument("--resamplings", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1, help="to add re-samplings to those there are")
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--step-to", metavar="CKPT", help="only along the step to this checkpoint, without gradients")
    args = parser.parse_args(argv)
    if args.report:
        report(args.report)
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a", encoding="utf-8") as stream:
        for seed in range(args.first_seed, args.first_seed + args.resamplings):
            for found in resampled(args, seed):
                print(json.dumps({"model": Path(args.model).name, "seed": seed, **found}), file=stream, flush=True)
    return 0


def resampled(args: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """What one re-sampling says, and what one of the other ways to sample says with the same seed."""
    lines = (ROOT / "demo" / "problems.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        problems = directory / "problems.jsonl"
        study = np.random.default_rng(0).permutation(len(lines))[: args.num_prompts]
        problems.write_text("".join(lines[i] for i in study), encoding="utf-8")
        sampled = ["--dataset", problems, "--num-prompts", args.num_prompts, "--num-samples", args.num_samples]
        sampled += ["--max-new-tokens", 256, "--seed", seed, "--min-mixed-prompts", 0]
        if args.step_to:
            probe(args, directory / "step", *sampled, "--step-to", args.step_to, "--sample-only")
            yield {"step": along_step(list(iter_rollouts(directory / "step" / "rollouts.jsonl")), seed)}
            return
        picked, pooled = directory / "picked", directory / "pooled"
        probe(args, picked, *sampled, "--pos-per-bin-per-rollout", 4)
        probe(args, pooled, "--rollouts", picked, "--pool", "bucket")
        yield measured(picked, pooled)
        if seed <= len(OTHER_WAYS):
            way, other = OTHER_WAYS[seed - 1], directory / "other"
            with drawn_by(way):
                probe(args, other, *sampled, "--sample-only")
            yield {"way": way, "detected": detected(list(iter_rollouts(other / "rollouts.jsonl")))}


def probe(args: argparse.Namespace, directory: Path, *flags: Any) -> None:
    """A dump of the model's rollouts."""
    always = ("--model-path", args.model, "--output-dir", directory, "--layer", args.layer, "--bins", BINS)
    with redirect_stdout(sys.stderr):
        probe_grad_vectors.main([*map(str, always + flags), "--device", "cpu", "--dtype", "float32", "-q"])


def drawn_by(way: str) -> Any:
    """While it is entered, tokens are drawn from a softmax at another temperature, or cut to its likeliest words."""
    plain = sampling._next_logits
    kind, _, value = way.partition(" ")

    def logits_of(*args: Any) -> torch.Tensor:
        logits = plain(*args)
        if kind == "temperature":
            return logits / float(value)
        order = logits.argsort(dim=-1, descending=True)
        if kind == "top-k":
            return logits.scatter(-1, order[:, int(value) :], -torch.inf)
        probabilities = torch.softmax(logits, -1).gather(-1, order)
        is_dropped = probabilities.cumsum(-1) - probabilities >= float(value)
        return logits.masked_fill(torch.zeros_like(is_dropped).scatter(-1, order, is_dropped), -torch.inf)

    return mock.patch.object(sampling, "_next_logits", logits_of)


def measured(picked: Path, pooled: Path) -> dict[str, Any]:
    """log π + H, and ρ of picked tokens and over sums, bucket by bucket."""
    rollouts = list(iter_rollouts(picked / "rollouts.jsonl"))
    of_buckets = directions_of_dump(load_dump(picked), Exp2Settings(bootstrap=200, permutations=0))
    sums = load_dump(pooled)
    opposition = rho_over_sums(pooled_of(sums))
    return {
        "n_correct": sum(r.correct for r in rollouts),
        "on_policy": asdict(Tokens.of(rollouts).test(True)),
        "on_policy_by_bucket": [one.on_policy.z for one in of_buckets],
        "rho": [asdict(one.alignment) for one in of_buckets],
        "n_rare": np.bincount(sums.bin, sums.rare, BINS).tolist(),
        "rho_over_sums": [asdict(one) for one in (*opposition.by_bucket, opposition.all_tokens)],
    }


def along_step(rollouts: list[Rollout], seed: int) -> dict[str, Any]:
    """Of each bucket z of Σ d_t, of the true outcomes t, and of outcomes shuffled within prompts each time p."""
    d, entropies, tail_mass = (
        np.concatenate([getattr(rollout, name) for rollout in rollouts]) for name in ("step", "entropies", "tail_mass")
    )
    prompts = sorted({rollout.prompt_idx for rollout in rollouts})
    edges, nothing = fit_edges(entropies, BINS), np.zeros(len(d), int)
    along = Along(
        d=d,
        n_tokens=np.array([len(rollout.response_ids) for rollout in rollouts]),
        prompt=np.array([prompts.index(rollout.prompt_idx) for rollout in rollouts]),
        outcome=np.array([rollout.correct for rollout in rollouts], float),
        shift=nothing.astype(float),
        bucket=np.concatenate([buckets_of(rollout, edges) for rollout in rollouts]),
        n_buckets=BINS,
        tail_mass=tail_mass,
        rules={},
        token=nothing,
    )
    found, rng = step_signal(along), np.random.default_rng(seed)
    null = [step_signal(replace(along, outcome=shuffled(along, rng)), seed=i).gain for i in range(SHUFFLES)]
    return {
        "score_mean_z": found.score_mean_z,
        "n_rare": found.n_rare,
        "t": found.gain.t,
        "p_value": found.gain.p_value,
        "shuffled_p_values": [one.p_value for one in null],
        "shuffled_ts": [one.t for one in null],
    }


def shuffled(along: Along, rng: np.random.Generator) -> np.ndarray:
    """[m] outcomes, permuted over the rollouts of each prompt."""
    outcome = along.outcome.copy()
    for code in np.unique(along.prompt):
        own = along.prompt == code
        outcome[own] = rng.permutation(outcome[own])
    return outcome


def detected(rollouts: list[Rollout]) -> dict[str, float | None]:
    """z of log π + H over the first so many rollouts, taken evenly from all prompts."""
    by_sample = sorted(rollouts, key=lambda r: r.sample_idx)
    return {str(n): Tokens.of(by_sample[:n]).test(True).z for n in SIZES if n <= len(rollouts)}


# ---- what was found ---------------------------------------------------------------------------------------------


def report(files: list[Path]) -> None:
    """For each model and bucket how often theory held, and z by way of sampling and number of rollouts."""
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for model in dict.fromkeys(line["model"] for line in lines):
        report_step(model, [line["step"] for line in lines if line["model"] == model and "step" in line])
        plain = [line for line in lines if line["model"] == model and "on_policy" in line]
        if not plain:
            continue
        z = np.array([line["on_policy"]["z"] for line in plain])
        outside = f"log π + H: |z| > 2 in {np.mean(np.abs(z) > 2):.0%}, mean {z.mean():+.2f}"
        print(f"\n{model}: {len(plain)} re-samplings; {outside}")
        print(f"ρ over sums of all tokens: {holding([line['rho_over_sums'][BINS] for line in plain])}")
        for index in range(BINS):
            found = [line["rho"][index] for line in plain]
            rare = np.median([line["n_rare"][index] for line in plain])
            verdicts = ", ".join(
                f"{verdict} {n}" for verdict, n in Counter(one["verdict"] for one in found).most_common()
            )
            above = sum(one["ci95"] is not None and one["ci95"][0] > 0 for one in found)
            sums = holding([line["rho_over_sums"][index] for line in plain])
            print(f"bucket {index}: {rare:,.1f} rare tokens; {verdicts}; above 0 {above}; ρ over sums: {sums}")
    for line in lines:
        if "way" in line:
            z = ", ".join(f"{n}: {value or 0:+.1f}" for n, value in line["detected"].items())
            print(f"{line['model']} sampled by {line['way']}: z over rollouts {z}")


def report_step(model: str, steps: list[dict[str, Any]]) -> None:
    """How often scores along a step have mean zero, and shuffled outcomes a small p."""
    if not steps:
        return
    z = np.array([one["score_mean_z"] for one in steps], float)  # of an unsampled bucket none
    p = np.concatenate([one["shuffled_p_values"] for one in steps])
    t = np.array([one["t"] for one in steps])
    n_known, n_within = np.sum(np.isfinite(z)), np.sum(np.abs(z) < 3)
    print(f"\n{model}, along the step: {len(steps)} re-samplings; t of the gain {t.mean():.1f} ± {t.std():.1f}")
    print(f"sums of d within 3 standard errors of 0: {n_within} of {n_known} buckets ({n_within / n_known:.0%})")
    print(f"outcomes shuffled within prompts: p < 0.05 in {np.mean(p < 0.05):.1%} of {len(p)}")
    for index, of_bucket in enumerate(z.T):
        told = of_bucket[np.isfinite(of_bucket)]
        rare = np.median([one["n_rare"][index] for one in steps])
        said = f"z {told.mean():+.2f} ± {told.std():.2f}, the largest {np.abs(told).max():.2f}" if len(told) else ""
        print(f"bucket {index}: {rare:,.1f} rare tokens; {said or 'unsampled'}")


def holding(estimates: list[dict[str, Any]]) -> str:
    """How many intervals hold what theory says."""
    given = [one for one in estimates if one["ci95"] is not None]
    holds = sum(one["ci95"][0] <= -1 <= one["ci95"][1] for one in given)
    return f"{holds} of {len(given)} intervals hold −1"


if __name__ == "__main__":
    sys.exit(main())
