#!/usr/bin/env python3
"""A law that real models obey, held against the toolkit: the same problems sampled again and again.

Where rollouts are the model's own, log π + H has mean zero, correct and incorrect rollouts are exactly opposed, and no
bucket can be `aligned`. Each re-sampling probes all of a set of problems, token by token and pooled. Then the same
model is sampled in ways that are not its own, and log π + H must tell.

The demo's trained model, 20 re-samplings of 128 problems (tens of minutes on one core), a line for each:

    python benchmarks/law.py --model demo/trained --output out/law_trained.jsonl

The tables that docs/methods.md sums up, from such files:

    python benchmarks/law.py --report out/law_base.jsonl out/law_trained.jsonl --output out/law.md
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
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
from gradprobe.dump.on_policy import OFF_POLICY, Tokens  # noqa: E402
from gradprobe.dump.records import Rollout, iter_rollouts  # noqa: E402
from gradprobe.exp2.measure import Exp2Settings, directions_of_dump  # noqa: E402
from gradprobe.library import load_dump  # noqa: E402
from gradprobe.rollouts import sample as sampling  # noqa: E402

BINS = 5
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


def detected(rollouts: list[Rollout]) -> dict[str, float | None]:
    """z of log π + H over the first so many rollouts, taken evenly from all prompts."""
    by_sample = sorted(rollouts, key=lambda r: r.sample_idx)
    return {str(n): Tokens.of(by_sample[:n]).test(True).z for n in SIZES if n <= len(rollouts)}


# ---- the page ---------------------------------------------------------------------------------------------------


HEAD = """# The law: the same problems, sampled again and again

Written by `python benchmarks/law.py --report ...`. 128 problems of the demo × 8 rollouts, temperature 1, full softmax;
each re-sampling has uniform numbers of its own. Where rollouts are the model's own, theory fixes what must come out
(docs/methods.md): log π + H has mean zero; correct and incorrect rollouts oppose each other (ρ = −1), so no bucket can
be aligned.

Buckets with few rare tokens to be expected show why `unsampled` is a verdict: what is given for them here, before it
is withheld, is the absence of tokens that did not come up. *Aligned but for that*: the interval of ρ lies above 0.
"""


def page(files: list[Path]) -> str:
    """What was found, in tables."""
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    plain = [line for line in lines if "way" not in line]
    models = dict.fromkeys(line["model"] for line in lines)
    parts = [part_of(model, [line for line in plain if line["model"] == model]) for model in models]
    return "\n".join([HEAD, *parts, part_of_others([line for line in lines if "way" in line])])


def part_of(model: str, lines: list[dict[str, Any]]) -> str:
    """What came of one model's own rollouts."""
    z = np.array([line["on_policy"]["z"] for line in lines])
    verdicts = [one for line in lines for one in line["rho"]]
    text = f"""
## {model}: {len(lines)} re-samplings

log π + H over all tokens: |z| > 2 in {np.mean(np.abs(z) > 2):.0%}, mean of z {z.mean():+.2f}, standard deviation \
{z.std(ddof=1):.2f}. Verdicts on ρ of picked tokens, {len(verdicts)} buckets: {counted(verdicts)}. \
ρ over sums of all tokens: {holding([line["rho_over_sums"][BINS] for line in lines])}.

| bucket | rare tokens expected, median | verdicts on ρ | aligned but for that | ρ where it has an interval \
| ρ over sums | log π + H: &#124;z&#124; > 2 |
| --- | --- | --- | --- | --- | --- | --- |"""
    for index in range(BINS):
        found = [line["rho"][index] for line in lines]
        given = [one for one in found if one["ci95"] is not None]
        of_bucket = np.array([line["on_policy_by_bucket"][index] for line in lines], dtype=float)
        text += (
            f"\n| {index} | {np.median([line['n_rare'][index] for line in lines]):,.1f} "
            f"| {counted(found)} | {sum(one['ci95'][0] > 0 for one in given)} "
            f"| {spread([one['rho'] for one in given])} | {holding([line['rho_over_sums'][index] for line in lines])} "
            f"| {np.mean(np.abs(of_bucket) > 2):.0%} |"
        )
    return text


def counted(found: list[dict[str, Any]]) -> str:
    """Verdicts, the most frequent first."""
    return ", ".join(f"{verdict} {n}" for verdict, n in Counter(one["verdict"] for one in found).most_common())


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{np.median(values):+.2f} ({min(values):+.2f} to {max(values):+.2f}, n {len(values)})" if values else "none"


def holding(estimates: list[dict[str, Any]]) -> str:
    """How many intervals hold what theory says."""
    given = [one for one in estimates if one["ci95"] is not None]
    if not given:
        return "never an interval"
    holds = sum(one["ci95"][0] <= -1 <= one["ci95"][1] for one in given)
    return f"{holds} of {len(given)} intervals hold −1, median {np.median([one['value'] for one in given]):+.2f}"


def part_of_others(lines: list[dict[str, Any]]) -> str:
    """What came of other ways to sample."""
    text = f"\n## Sampled in other ways\n\nz of log π + H; the verdict is *{OFF_POLICY}* beyond ±4.\n\n"
    text += f"| sampled by | model | {' | '.join(f'{n} rollouts' for n in SIZES)} | off-policy from |\n"
    text += "| --- | --- | " + "| ".join(["--- "] * len(SIZES)) + "| --- |\n"
    for line in sorted(lines, key=lambda line: (OTHER_WAYS.index(line["way"]), line["model"])):
        z = {int(n): value for n, value in line["detected"].items()}
        found = [n for n in z if all(abs(z[m] or 0) > 4 for m in z if m >= n)]
        cells = " | ".join("–" if z.get(n) is None else f"{z[n]:+.1f}" for n in SIZES)
        text += f"| {line['way']} | {line['model']} | {cells} | {found[0] if found else f'not by {max(z)}'} |\n"
    return text


if __name__ == "__main__":
    sys.exit(main())
