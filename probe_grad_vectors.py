#!/usr/bin/env python3
"""Sample rollouts, bucket their tokens by entropy, and dump exact gradients of log π on one weight row.

Rollouts come from the model's full softmax at the stated temperature. Every response token is scored by one
teacher-forced pass; entropy edges are fitted over all of them; of each bucket up to --pos-per-bin-per-rollout
tokens per rollout are chosen, and for each the gradient of its log-prob with respect to W[row, :] is written.

On a laptop, with the demo model (about 10 seconds):

    python probe_grad_vectors.py --model-path demo/base --output-dir out/by_hand --num-prompts 8 --max-new-tokens 128

Qwen2.5-1.5B on one GPU, the first of two shards of 128 prompts:

    python probe_grad_vectors.py --model-path Qwen/Qwen2.5-1.5B --dataset problems.jsonl --output-dir out/base_s0 \\
        --num-prompts 128 --shard-index 0 --num-shards 2

The same tokens once more, through another checkpoint:

    python probe_grad_vectors.py --model-path demo/trained --rollouts out/by_hand --output-dir out/same_tokens
"""

import argparse
import json
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import gradprobe
from gradprobe import dump as contract
from gradprobe.buckets import bucket_of, choose_positions, fit_edges
from gradprobe.check import checksums_of
from gradprobe.console import progress, say, script_main
from gradprobe.dump import Position, PromptKey, Rollout
from gradprobe.errors import InputError, raise_if_any
from gradprobe.files import locked, make_directory, read_json, sha256_of, write_json
from gradprobe.growing import Record
from gradprobe.models import (
    Budget,
    Checkpoint,
    checkpoint_identity,
    context_length,
    load_checkpoint,
    load_skeleton,
    resolve_attention,
    resolve_device,
    resolve_dtype,
)
from gradprobe.probe_output import (
    FaultyRows,
    GrowingGradients,
    GrowingRollouts,
    prepare,
    refuse_foreign_dump,
    refuse_other_settings,
)
from gradprobe.problems import Problem, load_problems, shard_of_study
from gradprobe.rollouts import chunks_of, rollout_uniforms, sample_responses, score_responses
from gradprobe.row_gradients import RowGradients, Target, expand_targets
from gradprobe.verify import is_correct

DEFAULT_DATASET = Path(__file__).parent / "demo" / "problems.jsonl"
SAMPLING_DEFAULTS = {"num_prompts": 64, "num_samples": 8, "max_new_tokens": 1024, "temperature": 1.0}
VERIFIER = "boxed"
LEAST = {
    **dict.fromkeys(("num_prompts", "num_samples", "max_new_tokens", "num_shards", "batch_tokens", "sample_rows"), 1),
    **dict.fromkeys(("shard_index", "seed", "pos_per_bin_per_rollout"), 0),
    "bins": 2,
}
BATCH_TOKENS = {"cuda": 16_384, "cpu": 4096}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; values that can be judged without reading anything are checked here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what to read and where to write").add_argument
    add("--model-path", required=True, help="checkpoint: a directory, or a name on the Hub")
    add("--output-dir", required=True, type=Path, help="directory of the new dump")
    add("--dataset", type=Path, help="JSONL with id, prompt (fully rendered), ground_truth (default: the demo's)")
    add("--rollouts", type=Path, help="probe the rollouts of this dump (or rollouts.jsonl) instead of sampling")
    add("--check-only", action="store_true", help="check all that can be known without the weights; write nothing")
    add("--overwrite", action="store_true", help="start afresh where the output directory holds a dump")
    add = parser.add_argument_group("sampling (not with --rollouts)").add_argument
    add("--num-prompts", type=int, help="prompts of the whole study, over all shards (default: 64)")
    add("--num-samples", type=int, help="rollouts per prompt (default: 8)")
    add("--max-new-tokens", type=int, help="tokens at most in a response (default: 1024)")
    add("--temperature", type=float, help="divides the logits while sampling (default: 1.0)")
    add = parser.add_argument_group("shards").add_argument
    add("--shard-index", type=int, default=0, metavar="I", help="this shard, from 0 (default: %(default)s)")
    add("--num-shards", type=int, default=1, metavar="N", help="shards of the study (default: %(default)s)")
    add = parser.add_argument_group("target: lists separated by commas give one dump for each combination").add_argument
    add("--layer", metavar="LAYER[,...]", help="layer, from 0 (default: the middle one, 14 of Qwen2.5-1.5B's 28)")
    add("--param-suffix", default="mlp.down_proj.weight", help="linear weight inside it (default: %(default)s)")
    add("--row-idx", default="0", help="row, from 0; also first, mid, last, random:K (default: %(default)s)")
    add = parser.add_argument_group("positions").add_argument
    add("--bins", type=int, default=5, help="entropy buckets of equal size (default: %(default)s)")
    add(
        "--pos-per-bin-per-rollout",
        type=int,
        default=4,
        help="positions of each bucket and rollout; 0: every response token (default: %(default)s)",
    )
    add("--entropy-edges", type=Path, metavar="MANIFEST", help="take the edges of another dump's manifest.json")
    add("--seed", type=int, default=0, help="of prompts, sampling and positions (default: %(default)s)")
    add = parser.add_argument_group("computing").add_argument
    add("--device", default="auto", help="auto, cuda or cpu (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: bfloat16 on GPUs that have it")
    add(
        "--attention",
        default="auto",
        choices=["auto", "sdpa", "eager", "flash_attention_2"],
        help="auto: sdpa where the architecture has it, else eager (default: %(default)s)",
    )
    add(
        "--batch-tokens",
        type=int,
        help="tokens in one scoring or gradient pass; halves by itself when memory runs out "
        f"(default: {BATCH_TOKENS['cuda']:,} on a GPU, {BATCH_TOKENS['cpu']:,} on a CPU)",
    )
    add(
        "--sample-rows",
        type=int,
        default=256,
        help="responses sampled at once; halves by itself when memory runs out (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    _check_values(args)
    return args


def _check_values(args: argparse.Namespace) -> None:
    problems = []
    given = [name for name in (*SAMPLING_DEFAULTS, "dataset") if getattr(args, name) is not None]
    if args.rollouts is not None:
        problems += [f"--{name.replace('_', '-')} can't go with --rollouts, which brings its own" for name in given]
    else:
        for name, value in SAMPLING_DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        args.dataset = args.dataset or DEFAULT_DATASET
        if not (math.isfinite(args.temperature) and args.temperature > 0):
            problems.append(f"--temperature {args.temperature}: must be above 0")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            problems.append(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.num_shards >= 1 and args.shard_index >= args.num_shards:
        problems.append(f"--shard-index {args.shard_index}: must be below --num-shards {args.num_shards}")
    raise_if_any(problems)


@dataclass
class Stopwatch:
    """Seconds by phase, for the manifest."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str):
        """Add the time of the `with` block to phase `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what an earlier run spent."""
        for name, value in seconds.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + value, 3)

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """What the phases have taken since they stood at `before`."""
        return {name: round(value - before.get(name, 0.0), 3) for name, value in self.seconds.items()}

    def total(self) -> dict[str, float]:
        """All phases asked for so far, and the time since the start."""
        return {**self.seconds, "total": round(time.perf_counter() - self.started, 3)}


@dataclass(frozen=True)
class Source:
    """What is probed: problems to sample from, or the rollouts of another dump; and what the manifest says of it."""

    problems: list[Problem]
    rollouts: list[Rollout]
    description: dict[str, Any]
    num_samples: int = 0

    def rollouts_by_prompt(self) -> list[list[Rollout]]:
        """The rollouts of each prompt, in the order in which prompts first occur."""
        by_prompt: dict[PromptKey, list[Rollout]] = {}
        for rollout in self.rollouts:
            by_prompt.setdefault(rollout.prompt_idx, []).append(rollout)
        return list(by_prompt.values())

    def chunks(self, max_rows: int) -> list[range]:
        """Stretches of prompts that are sampled, scored and written together."""
        counts = [len(group) for group in self.rollouts_by_prompt()] or [self.num_samples] * len(self.problems)
        return list(chunks_of(counts, max_rows))


def read_source(args: argparse.Namespace) -> Source:
    """This shard's problems, or its part of the rollouts of another dump."""
    if args.rollouts is None:
        problem_set = load_problems(args.dataset)
        shard = shard_of_study(
            len(problem_set.problems), args.num_prompts, args.seed, args.shard_index, args.num_shards
        )
        description = {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "num_samples_per_prompt": args.num_samples,
            "dataset": {
                "path": str(args.dataset),
                "sha256": problem_set.sha256,
                "num_problems": len(problem_set.problems),
            },
            "sampling": {
                "distribution": "full softmax",
                "method": "inverse CDF of Philox(seed, prompt_idx, sample_idx)",
                "temperature": args.temperature,
                "max_new_tokens": args.max_new_tokens,
                "num_samples_per_prompt": args.num_samples,
                "seed": args.seed,
                "num_prompts_of_study": args.num_prompts,
                "verifier": VERIFIER,
            },
        }
        return Source([problem_set.problems[i] for i in shard], [], description, args.num_samples)
    return _read_rollouts(args)


def _read_rollouts(args: argparse.Namespace) -> Source:
    file = args.rollouts if args.rollouts.is_file() else contract.find_rollouts(args.rollouts)
    if file is None:
        raise InputError(f"--rollouts {args.rollouts}: no {contract.ROLLOUTS} there")
    rollouts = list(contract.iter_rollouts(file))
    prompts = list(dict.fromkeys(rollout.prompt_idx for rollout in rollouts))
    if len(prompts) < args.num_shards:
        raise InputError(f"--num-shards {args.num_shards}: {file} has {len(prompts)} prompts")
    mine = {prompts[i] for i in np.array_split(np.arange(len(prompts)), args.num_shards)[args.shard_index]}
    rollouts = [rollout for rollout in rollouts if rollout.prompt_idx in mine]
    # The manifest beside it says how they were sampled; without one that stays unknown.
    manifest_file = file.with_name(contract.MANIFEST)
    origin = read_json(manifest_file) if manifest_file.is_file() else {}
    samples = max(Counter(rollout.prompt_idx for rollout in rollouts).values())
    description = {
        "max_new_tokens": origin.get("max_new_tokens"),
        "temperature": origin.get("temperature"),
        "num_samples_per_prompt": origin.get("num_samples_per_prompt", samples),
        "dataset": origin.get("dataset"),
        "sampling": origin.get("sampling"),
        "rollouts_from": {
            "path": str(file),
            "sha256": sha256_of(file),
            "model_path": origin.get("model_path"),
            "identity": origin.get("model_identity"),
        },
    }
    return Source([], rollouts, description)


@dataclass(frozen=True)
class Plan:
    """All that is decided before a weight is loaded."""

    targets: list[Target]
    row_dims: list[int]
    source: Source
    edges: dict[str, Any] | None
    device: torch.device
    dtype: torch.dtype
    attention: str
    settings: dict[str, Any]
    directories: list[Path]

    def positions_at_most(self, args: argparse.Namespace) -> int:
        """The most rows that the dump of one target can have."""
        n_rollouts = len(self.source.rollouts) or len(self.source.problems) * args.num_samples
        of_buckets = n_rollouts * args.bins * args.pos_per_bin_per_rollout
        n_tokens = sum(len(r.response_ids) for r in self.source.rollouts) or n_rollouts * (args.max_new_tokens or 0)
        return n_tokens if args.pos_per_bin_per_rollout == 0 else min(of_buckets, n_tokens)

    def bytes_at_most(self, args: argparse.Namespace) -> int:
        """The most that all targets' `grads.npy` can take on disk."""
        return self.positions_at_most(args) * 4 * sum(self.row_dims)


def make_plan(args: argparse.Namespace) -> Plan:
    """Resolve and check everything that can be known without the weights; nothing is written."""
    skeleton = load_skeleton(args.model_path)
    targets, row_dims = expand_targets(skeleton, args.layer, args.param_suffix, args.row_idx, args.seed)
    source, edges = read_source(args), given_edges(args)
    device = resolve_device(args.device)
    args.batch_tokens = args.batch_tokens or BATCH_TOKENS[device.type]
    dtype, attention = resolve_dtype(args.dtype, device), resolve_attention(args.attention, skeleton)
    described = {
        key: {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else value
        for key, value in source.description.items()
    }
    # All that changes the bytes of the dump, paths left out: a moved file is the same file.
    settings = {
        "format_version": contract.FORMAT_VERSION,
        "model": checkpoint_identity(args.model_path, skeleton),
        "targets": [target.directory for target in targets],
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "device": device.type,
        "shard": {"index": args.shard_index, "num_shards": args.num_shards},
        "bins": args.bins,
        "pos_per_bin_per_rollout": args.pos_per_bin_per_rollout,
        "seed": args.seed,
        "entropy_edges": edges and edges["entropy_edges"],
        **described,
    }
    directories = dump_directories(args.output_dir, targets)
    return Plan(targets, row_dims, source, edges, device, dtype, attention, settings, directories)


def report_plan(args: argparse.Namespace, plan: Plan) -> None:
    """What --check-only prints: one JSON object for the launcher.

    Raises:
        InputError: the output directory holds something else.
    """
    if not args.overwrite:
        refuse_other_settings(args.output_dir, plan.settings)
        refuse_foreign_dump(args.output_dir)
    plan_in_numbers = {
        "bytes_at_most": plan.bytes_at_most(args),
        "positions_at_most": plan.positions_at_most(args),
        "row_dims": plan.row_dims,
        "targets": len(plan.targets),
    }
    print(json.dumps(plan_in_numbers))


def given_edges(args: argparse.Namespace) -> dict[str, Any] | None:
    """Edges, and over what they were fitted, from the manifest named by --entropy-edges."""
    if args.entropy_edges is None:
        return None
    file = args.entropy_edges / contract.MANIFEST if args.entropy_edges.is_dir() else args.entropy_edges
    manifest = read_json(file)
    edges = manifest.get("entropy_edges")
    if not isinstance(edges, list) or len(edges) != args.bins + 1 or sorted(set(edges)) != edges:
        raise InputError(f"--entropy-edges {file}: no {args.bins + 1} increasing entropy_edges (--bins {args.bins})")
    return {
        "entropy_edges": edges,
        "entropy_edges_over": manifest.get("entropy_edges_over", "dumped_positions"),
        "entropy_edges_from": str(file),
    }


def dump_directories(output_dir: Path, targets: list[Target]) -> list[Path]:
    """Where each target's dump goes: a single target's is the output directory itself."""
    return [output_dir] if len(targets) == 1 else [output_dir / target.directory for target in targets]


def encoded_prompts(problems: list[Problem], checkpoint: Checkpoint) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        InputError: a prompt has no tokens, or leaves no room in the model's context.
    """
    context = context_length(checkpoint.model)
    prompts = [checkpoint.tokenizer(problem.prompt, add_special_tokens=False)["input_ids"] for problem in problems]
    raise_if_any(
        f"problem '{problem.id}': its prompt has {len(ids)} tokens, "
        + ("at least 1 is needed" if not ids else f"the model's context {context}")
        for problem, ids in zip(problems, prompts, strict=True)
        if not ids or (context is not None and len(ids) >= context)
    )
    return prompts


def collect_rollouts(
    args: argparse.Namespace, source: Source, checkpoint: Checkpoint, record: Record, watch: Stopwatch
) -> list[Rollout]:
    """All of this shard's rollouts, sampled (or taken from the source) and scored, written chunk by chunk."""
    growing = GrowingRollouts(args.output_dir / contract.ROLLOUTS, record)
    for notes in growing.notes:
        watch.add(notes["seconds"])
    chunks = source.chunks(args.sample_rows)
    if growing.n_chunks_kept:
        say(f"continuing: {growing.n_chunks_kept} of {len(chunks)} batches of rollouts are there")
    if growing.n_chunks_kept < len(chunks):
        make_chunk = scored_again(source) if source.rollouts else sampler(args, source.problems, checkpoint)
        tokens, left = Budget(args.batch_tokens), chunks[growing.n_chunks_kept :]
        for chunk in progress(left, "sampling and scoring", sum(map(len, left)), "prompts", len):
            before = dict(watch.seconds)
            with watch.phase("sample"):
                rollouts = make_chunk(chunk)
            with watch.phase("score"):
                rollouts = score(checkpoint, rollouts, tokens)
            growing.append(rollouts, {"seconds": watch.since(before)})
    return growing.finish()


def scored_again(source: Source) -> Callable[[range], list[Rollout]]:
    """Gives the source's rollouts of a stretch of its prompts."""
    by_prompt = source.rollouts_by_prompt()
    return lambda chunk: [rollout for index in chunk for rollout in by_prompt[index]]


def sampler(
    args: argparse.Namespace, problems: list[Problem], checkpoint: Checkpoint
) -> Callable[[range], list[Rollout]]:
    """Samples and verifies rollouts of a stretch of `problems`; entropies and log-probs are still to come."""
    prompts, context = encoded_prompts(problems, checkpoint), context_length(checkpoint.model)
    if context is not None and max(map(len, prompts)) + args.max_new_tokens > context:
        say(f"note: responses end at the model's context of {context} tokens")
    rows = Budget(args.sample_rows)

    def sample(chunk: range) -> list[Rollout]:
        batches = sample_responses(
            checkpoint.model,
            [prompts[i] for i in chunk],
            args.num_samples,
            lambda p, s: rollout_uniforms(args.seed, problems[chunk[p]].idx, s, args.max_new_tokens),
            args.temperature,
            args.max_new_tokens,
            checkpoint.end_ids,
            max_rows=rows,
            context=context,
            report=say,
        )
        responses = [of_prompt for batch in batches for of_prompt in batch]
        return [
            _verified(problems[i], prompts[i], sample_idx, response_ids, checkpoint.tokenizer)
            for i, samples in zip(chunk, responses, strict=True)
            for sample_idx, response_ids in enumerate(samples)
        ]

    return sample


def _verified(
    problem: Problem, prompt_ids: list[int], sample_idx: int, response_ids: list[int], tokenizer: Any
) -> Rollout:
    text = tokenizer.decode(response_ids, skip_special_tokens=True)
    return Rollout(
        prompt_idx=problem.idx,
        sample_idx=sample_idx,
        problem_id=problem.id,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        entropies=[],
        logprobs=[],
        response=text,
        ground_truth=problem.ground_truth,
        correct=is_correct(text, problem.ground_truth),
    )


def score(checkpoint: Checkpoint, rollouts: list[Rollout], batch_tokens: Budget) -> list[Rollout]:
    """The rollouts with entropy and log-prob of every response token under `checkpoint`.

    Raises:
        InputError: the model gives one that is not finite.
    """
    batches = score_responses(
        checkpoint.model, [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], batch_tokens, say
    )
    scores: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for batch in batches:
        scores.update(batch)
    if not all(np.isfinite(values).all() for of_rollout in scores.values() for values in of_rollout):
        raise InputError("the model gives log-probs that are not finite: is the checkpoint sound?")
    return [replace(r, entropies=scores[i][0].tolist(), logprobs=scores[i][1].tolist()) for i, r in enumerate(rollouts)]


def edges_of(rollouts: list[Rollout], bins: int) -> dict[str, Any]:
    """Edges fitted over all response tokens of these rollouts.

    Raises:
        InputError: there are fewer response tokens than buckets.
    """
    entropies = np.concatenate([np.asarray(r.entropies, dtype=np.float64) for r in rollouts])
    if len(entropies) < bins:
        raise InputError(f"--bins {bins}: the rollouts have {len(entropies)} response tokens in all")
    return {"entropy_edges": fit_edges(entropies, bins).tolist(), "entropy_edges_over": "response_tokens"}


def choose(rollouts: list[Rollout], edges: list[float], args: argparse.Namespace) -> list[np.ndarray]:
    """The positions to differentiate of each rollout: a pure function of rollout, edges and seed."""
    chosen = []
    for rollout in rollouts:
        key = rollout.prompt_idx if isinstance(rollout.prompt_idx, tuple) else (rollout.prompt_idx,)
        rng = np.random.default_rng([args.seed, *key, rollout.sample_idx])
        buckets = bucket_of(np.asarray(rollout.entropies), np.asarray(edges))
        chosen.append(choose_positions(buckets, args.bins, args.pos_per_bin_per_rollout, rng))
    return chosen


def write_gradients(
    args: argparse.Namespace,
    directories: list[Path],
    engine: RowGradients,
    rollouts: list[Rollout],
    chosen: list[np.ndarray],
    record: Record,
    watch: Stopwatch,
) -> list[FaultyRows]:
    """Differentiate and write `grads.npy` of every target, rows in the order of rollouts and positions.

    Returns:
        For each target, the rows that no analysis can use.
    """
    starts = np.concatenate([[0], np.cumsum([len(positions) for positions in chosen])])
    rows_of_items = [range(starts[i] + ks.start, starts[i] + ks.stop) for i, ks in engine.work_items(chosen)]
    item_of_row = np.repeat(np.arange(len(rows_of_items)), list(map(len, rows_of_items)))
    growing = GrowingGradients(directories, engine.row_dims, int(starts[-1]), rows_of_items, record)
    budget = Budget(growing.batch_tokens_kept or args.batch_tokens)
    batches = engine.batches(
        [r.prompt_ids for r in rollouts],
        [r.response_ids for r in rollouts],
        chosen,
        budget,
        say,
        done=growing.items_kept,
    )
    n_left = int(starts[-1]) - sum(len(rows_of_items[item]) for item in growing.items_kept)
    if growing.items_kept:
        say(f"continuing: {int(starts[-1]) - n_left} of {int(starts[-1])} gradient rows are there")
    watch.add({"gradients": growing.seconds_kept})
    with watch.phase("gradients"):
        for members, passes, gradients in progress(batches, "gradients", n_left, "rows", lambda batch: len(batch[0])):
            rows = starts[members] + passes
            items = np.unique(item_of_row[rows]).tolist()
            growing.append(items, rows, [g.cpu().numpy() for g in gradients], budget.tokens)
    return growing.finish()


def positions_of(rollouts: list[Rollout], chosen: list[np.ndarray], edges: list[float]) -> list[Position]:
    """The lines of `meta.jsonl`, in the order of the gradient rows."""
    lines: list[Position] = []
    for rollout, positions in zip(rollouts, chosen, strict=True):
        buckets = bucket_of(np.asarray(rollout.entropies), np.asarray(edges))
        lines += [
            Position(
                row=len(lines) + k,
                prompt_idx=rollout.prompt_idx,
                sample_idx=rollout.sample_idx,
                pos=p,
                bin=int(buckets[p]),
                entropy=rollout.entropies[p],
                correct=rollout.correct,
                token_id=rollout.response_ids[p],
                logprob=rollout.logprobs[p],
            )
            for k, p in enumerate(positions.tolist())
        ]
    return lines


def manifest_of(
    args: argparse.Namespace, plan: Plan, checkpoint: Checkpoint, edges: dict[str, Any], rollouts: list[Rollout]
) -> dict[str, Any]:
    """What all targets' manifests have in common."""
    prompt_idxs = sorted({r.prompt_idx for r in rollouts})
    device = checkpoint.model.device
    return {
        "model_path": args.model_path,
        "num_prompts": len(prompt_idxs),
        "num_rollouts": len(rollouts),
        **plan.source.description,
        **edges,
        "bins": args.bins,
        "pos_per_bin_per_rollout": args.pos_per_bin_per_rollout,
        "seed": args.seed,
        "num_correct_rollouts": sum(r.correct for r in rollouts),
        "prompt_idxs": prompt_idxs,
        "num_response_tokens": sum(len(r.response_ids) for r in rollouts),
        "format_version": contract.FORMAT_VERSION,
        "model_identity": plan.settings["model"],
        "dtype": plan.settings["dtype"],
        "attention": plan.settings["attention"],
        "end_ids": sorted(checkpoint.end_ids),
        "shard": plan.settings["shard"],
        "batch_tokens": args.batch_tokens,
        "sample_rows": args.sample_rows,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gradprobe": gradprobe.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
    }


@script_main
def main(argv: list[str] | None = None) -> int:
    """Probe one shard of one model."""
    args = parse_args(argv)
    watch = Stopwatch()
    with watch.phase("load"):
        plan = make_plan(args)
    if args.check_only:
        report_plan(args, plan)
        return 0
    make_directory(args.output_dir)
    with locked(args.output_dir):
        if not prepare(args.output_dir, plan.directories, plan.settings, args.overwrite):
            say(f"{args.output_dir}: this dump is finished already, nothing to do (--overwrite starts afresh)")
            return 0
        probe(args, plan, watch)
    return 0


def probe(args: argparse.Namespace, plan: Plan, watch: Stopwatch) -> None:
    """Sample, score, choose, differentiate and write, from wherever an earlier run ended."""
    with watch.phase("load"):
        checkpoint = load_checkpoint(args.model_path, plan.device, plan.dtype, plan.attention)
    with closing(Record(args.output_dir / contract.RECORD)) as record:
        rollouts = collect_rollouts(args, plan.source, checkpoint, record, watch)
        edges = plan.edges or edges_of(rollouts, args.bins)
        chosen = choose(rollouts, edges["entropy_edges"], args)
        engine = RowGradients(checkpoint.model, plan.targets)
        faulty = write_gradients(args, plan.directories, engine, rollouts, chosen, record, watch)
    lines = positions_of(rollouts, chosen, edges["entropy_edges"])
    common = manifest_of(args, plan, checkpoint, edges, rollouts)
    for directory, target, row_dim, rows in zip(plan.directories, plan.targets, plan.row_dims, faulty, strict=True):
        contract.write_records(directory / contract.META, lines)
        weight = engine.weight_name(target)
        manifest = {
            "target": weight,
            "row_idx": target.row_idx,
            "row_dim": row_dim,
            "num_positions": len(lines),
            **common,
            **asdict(rows),
            **rows.counts(),
            "checksums": checksums_of(directory),
            "seconds": watch.total(),
        }
        write_json(directory / contract.MANIFEST, manifest)
        for warning in rows.warnings():
            say(f"warning: {directory}: {warning}")
        print(f"{directory}: {len(lines)} gradients of {weight}[{target.row_idx}], ", end="")
        print(f"{common['num_correct_rollouts']} of {len(rollouts)} rollouts correct")
    (args.output_dir / contract.RECORD).unlink()


if __name__ == "__main__":
    sys.exit(main())
