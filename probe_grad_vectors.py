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
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import gradprobe
from gradprobe.common.console import add_common_flags, is_verbose, log, printable, progress, script_main
from gradprobe.common.errors import InputError, raise_if_any
from gradprobe.common.files import locked, make_directory, read_json, sha256_of, write_json
from gradprobe.dump import format as contract
from gradprobe.dump.buckets import bucket_of, choose_positions, fit_edges
from gradprobe.dump.check import checksums_of
from gradprobe.dump.growing import Record
from gradprobe.dump.records import Position, Rollout, write_records
from gradprobe.gradients.engine import RowGradients
from gradprobe.gradients.targets import Target, expand_targets
from gradprobe.model.batches import Budget
from gradprobe.model.checkpoint import (
    Checkpoint,
    CheckpointSource,
    checkpoint_identity,
    end_token_ids,
    load_checkpoint,
    load_skeleton,
    load_tokenizer,
    resolve_attention,
    resolve_device,
    resolve_dtype,
)
from gradprobe.model.decoder import context_length
from gradprobe.model.placement import Placement, input_device, read_placement
from gradprobe.probe.output import (
    FaultyRows,
    GrowingGradients,
    GrowingRollouts,
    prepare,
    refuse_foreign_dump,
    refuse_other_settings,
)
from gradprobe.problems.load import ProblemSet, load_problems, shard_of_study
from gradprobe.problems.templates import preview, read_template, render_prompts
from gradprobe.problems.verify import RunningVerifier, Verifier, load_verifier
from gradprobe.rollouts.foreign import read_rollouts
from gradprobe.rollouts.sample import chunks_of
from gradprobe.rollouts.score import score_responses
from gradprobe.rollouts.server import connect, mean_logprob_gap
from gradprobe.rollouts.shapes import FORMATS
from gradprobe.rollouts.sources import (
    GivenRollouts,
    SampledRollouts,
    SamplingSettings,
    Source,
    described_server,
    judged,
)

DEFAULT_DATASET = Path(__file__).parent / "demo" / "problems.jsonl"
SAMPLING_DEFAULTS = {"num_prompts": 64, "num_samples": 8, "max_new_tokens": 1024, "temperature": 1.0}
DEFAULT_VERIFIER = "boxed"
ROLLOUT_FLAGS = ("rollouts_format", "correct_from", "correct_above")
LARGEST_LOGPROB_GAP = 0.1
"""Nats per token between a server's log-probs and ours: rounding gives hundredths at most, another model more."""
SECONDS_FOR_A_LOST_NODE = 150
LEAST = {
    **dict.fromkeys(("num_prompts", "num_samples", "max_new_tokens", "num_shards"), 1),
    **dict.fromkeys(("batch_tokens", "sample_rows", "server_requests"), 1),
    **dict.fromkeys(("shard_index", "seed", "pos_per_bin_per_rollout"), 0),
    "bins": 2,
}
MOST = {"num_samples": 10**6, "max_new_tokens": 10**7}
"""Beyond these a typo is likelier than a study, and arrays of that length would be made."""
BATCH_TOKENS = {"cuda": 16_384, "cpu": 4096}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; values that can be judged without reading anything are checked here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what to read and where to write").add_argument
    add("--model-path", required=True, metavar="M", help="checkpoint: a directory, or a name on the Hub")
    add("--revision", metavar="REV", help="branch, tag or commit of a name on the Hub (default: its default branch)")
    add(
        "--adapter", metavar="A", help="PEFT adapter (LoRA), merged into the weights: a directory, or a name on the Hub"
    )
    add("--trust-remote-code", action="store_true", help="let code that comes with the checkpoint run (default: never)")
    add("--output-dir", required=True, type=Path, metavar="D", help="directory of the new dump")
    add(
        "--dataset",
        metavar="F",
        help="problems: .jsonl, .json, .parquet, a directory of datasets.save_to_disk, or hf:NAME[:CONFIG][:SPLIT] "
        "(default: the demo's)",
    )
    add("--check-only", action="store_true", help="check all that can be known without the weights; write nothing")
    add("--overwrite", action="store_true", help="start afresh where the output directory holds a dump")
    add = parser.add_argument_group("problems into prompts").add_argument
    add(
        "--problem-key",
        metavar="KEY",
        help="field of the problem, dotted if nested (default: the first of prompt, problem, question)",
    )
    add(
        "--answer-key",
        metavar="KEY",
        help="field of the answer (default: the first of ground_truth, reward_model.ground_truth, final_answer, "
        "answer, solution)",
    )
    add(
        "--id-key",
        metavar="KEY",
        help="field of the id; none: row numbers (default: the first of id, unique_id, extra_info.index)",
    )
    add(
        "--prompt-template",
        metavar="FILE|TEXT",
        help="text with {problem}, or a file of it; other braces stay (default: the problem itself)",
    )
    add("--chat-template", action="store_true", help="put the problem into the tokenizer's own chat template")
    add("--system-prompt", metavar="TEXT", help="system message of the chat template (default: the template's own)")
    add = parser.add_argument_group("sampling (not with --rollouts)").add_argument
    add("--num-prompts", type=int, metavar="N", help="prompts of the whole study, over all shards (default: 64)")
    add("--num-samples", type=int, metavar="N", help="rollouts per prompt (default: 8)")
    add("--max-new-tokens", type=int, metavar="N", help="tokens at most in a response (default: 1024)")
    add("--temperature", type=float, metavar="T", help="divides the logits while sampling (default: 1.0)")
    add(
        "--sampler", default="own", choices=["own", "openai"], help="openai: ask the server at --base-url for responses"
    )
    add("--base-url", metavar="URL", help="of a vLLM, SGLang or llama.cpp server that runs this checkpoint")
    add("--server-model", metavar="NAME", help="model to ask for (default: the only one that the server lists)")
    add(
        "--server-requests", type=int, default=16, metavar="N", help="requests under way at once (default: %(default)s)"
    )
    add = parser.add_argument_group("rollouts from elsewhere (docs/rollouts.md)").add_argument
    add(
        "--rollouts",
        type=Path,
        metavar="F",
        help="probe these instead of sampling: a dump, its rollouts.jsonl, or a file of vLLM, an OpenAI-shaped server, "
        "TRL or verl",
    )
    add(
        "--rollouts-format",
        default="auto",
        choices=["auto", *FORMATS],
        help="shape of --rollouts (default: by its keys)",
    )
    add(
        "--correct-from",
        default="auto",
        metavar="NAME",
        help="verdicts of --rollouts: auto (a true or false 'correct' or 'acc', else the reward), a key of the file, "
        "or verifier to judge anew (default: %(default)s)",
    )
    add("--correct-above", type=float, metavar="REWARD", help="a reward above this is a correct answer")
    add = parser.add_argument_group("verdicts").add_argument
    add(
        "--verifier",
        default=DEFAULT_VERIFIER,
        help="boxed: the last box, exactly; numeric: by value; math-verify; or module:function, which takes response "
        "and ground truth and returns a bool (default: %(default)s)",
    )
    add(
        "--verifier-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="time limit of one answer, for math-verify and functions (default: %(default)g)",
    )
    add = parser.add_argument_group(
        "shards (default: by torchrun's or srun's tasks, if there are several)"
    ).add_argument
    add("--shard-index", type=int, metavar="I", help="this shard, from 0 (default: 0)")
    add("--num-shards", type=int, metavar="N", help="shards of the study (default: 1)")
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
    add(
        "--device-map",
        metavar="auto|FILE",
        help="spread the weights: auto over all GPUs, then the CPU's memory, then the disk; or a JSON file of module: "
        'number of a GPU, "cpu" or "disk"; needs accelerate (default: all on --device)',
    )
    add(
        "--max-memory",
        metavar="0=70GiB,cpu=200GiB",
        help="weights at most on each device with --device-map auto; a device not named is not used "
        "(default: what is free, less a tenth)",
    )
    add(
        "--offload-dir",
        type=Path,
        metavar="D",
        help="for weights on the disk that can't be read from the checkpoint as they are (mixtures of experts)",
    )
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
    add_common_flags(parser)
    args = parser.parse_args(argv)
    take_shard_from_environment(args, os.environ)
    _check_values(args)
    return args


def take_shard_from_environment(args: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Without flags that say otherwise, each task of torchrun or srun takes a shard, a directory and a GPU of its own.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; srun sets SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID. (A
    batch script, which is no task, sees SLURM_PROCID and SLURM_NTASKS, but not the number of tasks of a step.)
    """
    if args.shard_index is not None or args.num_shards is not None:
        args.shard_index, args.num_shards = args.shard_index or 0, 1 if args.num_shards is None else args.num_shards
        return
    args.shard_index, args.num_shards = 0, 1
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if environment.get(size, "1") == "1":
            continue
        try:
            args.shard_index, args.num_shards = int(environment[rank]), int(environment[size])
            gpu = int(environment.get(local, 0))
        except (KeyError, ValueError) as error:
            raise InputError(f"{rank}, {size} and {local} in the environment are not numbers: {error}") from error
        args.output_dir = args.output_dir.with_name(f"{args.output_dir.name}_s{args.shard_index}")
        n_gpus = torch.cuda.device_count()
        if args.device in ("auto", "cuda") and n_gpus > 1:
            args.device = f"cuda:{gpu % n_gpus}"
        log.info(f"shard {args.shard_index} of {args.num_shards}, by {rank} and {size}: {args.output_dir}")
        return


def _check_values(args: argparse.Namespace) -> None:
    problems = []
    if args.rollouts is not None:
        for name in (*SAMPLING_DEFAULTS, "base_url", "server_model"):
            if getattr(args, name) is not None:
                problems.append(f"{flag(name)} can't go with --rollouts, which brings its own")
        if args.sampler != "own":
            problems.append("--sampler can't go with --rollouts, which brings its own")
    else:
        problems += [
            f"{flag(name)} says something of --rollouts only" for name in ROLLOUT_FLAGS if is_given(args, name)
        ]
        for name, value in SAMPLING_DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        args.dataset = args.dataset or str(DEFAULT_DATASET)
        if not (math.isfinite(args.temperature) and args.temperature > 0):
            problems.append(f"--temperature {args.temperature}: must be above 0")
    if (args.sampler == "openai") != (args.base_url is not None):
        problems.append("--sampler openai and --base-url need each other")
    if not (math.isfinite(args.verifier_seconds) and args.verifier_seconds > 0):
        problems.append(f"--verifier-seconds {args.verifier_seconds}: must be above 0")
    problems += placement_problems(args)
    if args.system_prompt is not None and not args.chat_template:
        problems.append("--system-prompt: only a chat template has a place for it; add --chat-template")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            problems.append(f"{flag(name)} {value}: must be at least {least}")
        most = MOST.get(name, 2**31 - 1)
        if value is not None and value > most:
            problems.append(f"{flag(name)} {value}: must be at most {most}")
    if args.num_shards >= 1 and args.shard_index >= args.num_shards:
        problems.append(f"--shard-index {args.shard_index}: must be below --num-shards {args.num_shards}")
    raise_if_any(problems)


def placement_problems(args: argparse.Namespace) -> list[str]:
    """What can't go with --device-map, or not without."""
    if args.device_map is None:
        return [
            f"{flag(name)} says something of --device-map only"
            for name in ("max_memory", "offload_dir")
            if getattr(args, name) is not None
        ]
    problems = []
    if args.device != "auto":
        problems.append(f"--device {args.device} can't go with --device-map, which says where the weights are")
    if args.adapter is not None:
        problems.append("--adapter can't go with --device-map; merge it into a checkpoint first")
    if args.device_map == "auto" and args.num_shards > 1 and "LOCAL_RANK" in os.environ:
        problems.append("--device-map auto takes all GPUs: not in several tasks of torchrun at once")
    return problems


def flag(name: str) -> str:
    """`num_prompts` -> `--num-prompts`."""
    return "--" + name.replace("_", "-")


def is_given(args: argparse.Namespace, name: str) -> bool:
    """Whether a flag of --rollouts has another value than its default."""
    return getattr(args, name) not in (None, "auto")


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


def checkpoint_source(args: argparse.Namespace) -> CheckpointSource:
    """Which checkpoint the flags name."""
    return CheckpointSource(args.model_path, args.revision, args.adapter, args.trust_remote_code)


def read_source(
    args: argparse.Namespace, skeleton: torch.nn.Module, verifier: Verifier
) -> tuple[Source, dict[str, Any]]:
    """Where this shard's rollouts come from, and what settings and manifest say of it."""
    if args.rollouts is not None:
        return read_given_rollouts(args, skeleton, verifier)
    problem_set = read_problems(args)
    shard = shard_of_study(len(problem_set.problems), args.num_prompts, args.seed, args.shard_index, args.num_shards)
    problems = [problem_set.problems[i] for i in shard]
    log.info(f"for example {preview(problems[0])}")
    settings = SamplingSettings(args.num_samples, args.max_new_tokens, args.temperature, args.seed)
    server = connect(args.base_url, args.server_model) if args.sampler == "openai" else None
    source = SampledRollouts(problems, settings, server, args.server_requests)
    method = {"method": "inverse CDF of Philox(seed, prompt_idx, sample_idx)"}
    description = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "num_samples_per_prompt": args.num_samples,
        "dataset": problem_set.description,
        **({"prompts": problem_set.rendering} if problem_set.rendering else {}),
        "sampling": {
            "distribution": "full softmax",
            **(method if server is None else described_server(server)),
            "temperature": args.temperature,
            "max_new_tokens": args.max_new_tokens,
            "num_samples_per_prompt": args.num_samples,
            "seed": args.seed,
            "num_prompts_of_study": args.num_prompts,
            "verifier": described_verifier(args, verifier),
        },
    }
    return source, description


def read_problems(args: argparse.Namespace) -> ProblemSet:
    """The data set with its prompts rendered; what was read is said."""
    problem_set = load_problems(args.dataset, args.problem_key, args.answer_key, args.id_key)
    template = None if args.prompt_template is None else read_template(args.prompt_template)
    tokenizer = load_tokenizer(checkpoint_source(args)) if args.chat_template else None
    problem_set = render_prompts(problem_set, template, args.chat_template, args.system_prompt, tokenizer)
    log.info(problem_set.summary)
    for note in problem_set.notes:
        log.info(f"note: {note}")
    return problem_set


def described_verifier(args: argparse.Namespace, verifier: Verifier) -> str | dict[str, Any]:
    """What settings and manifest say of the verifier."""
    if verifier.name == DEFAULT_VERIFIER:
        return verifier.name
    return {**verifier.description, "seconds": args.verifier_seconds}


def read_given_rollouts(
    args: argparse.Namespace, skeleton: torch.nn.Module, verifier: Verifier
) -> tuple[Source, dict[str, Any]]:
    """This shard's part of the rollouts that --rollouts names; what was read is said."""
    file = args.rollouts if args.rollouts.is_file() else contract.find_rollouts(args.rollouts)
    if file is None:
        raise InputError(f"--rollouts {args.rollouts}: no {contract.ROLLOUTS} there")
    if file.resolve() == (args.output_dir / contract.ROLLOUTS).resolve():
        raise InputError(f"--rollouts {args.rollouts}: is the output directory's own; choose another --output-dir")
    tokenizer = load_tokenizer(checkpoint_source(args))
    found = read_rollouts(
        file,
        tokenizer,
        skeleton.config.get_text_config().vocab_size,
        end_token_ids(skeleton, tokenizer),
        file_format=args.rollouts_format,
        problems=None if args.dataset is None else read_problems(args).problems,
        correct_from=args.correct_from,
        correct_above=args.correct_above,
        context=context_length(skeleton),
    )
    for line in found.report.lines():
        log.info(line)
    prompts = list(dict.fromkeys(rollout.prompt_idx for rollout in found.rollouts))
    if len(prompts) < args.num_shards:
        raise InputError(f"--num-shards {args.num_shards}: {file} has {len(prompts)} prompts")
    mine = {prompts[i] for i in np.array_split(np.arange(len(prompts)), args.num_shards)[args.shard_index]}
    source = GivenRollouts([rollout for rollout in found.rollouts if rollout.prompt_idx in mine])
    # The manifest beside it says how they were sampled; without one that stays unknown.
    manifest_file = file.with_name(contract.MANIFEST)
    origin = read_json(manifest_file) if manifest_file.is_file() else {}
    judge = {} if found.report.n_to_verify == 0 else {"verifier": described_verifier(args, verifier)}
    description = {
        "max_new_tokens": origin.get("max_new_tokens"),
        "temperature": origin.get("temperature"),
        "num_samples_per_prompt": origin.get("num_samples_per_prompt", max(source.rows_per_prompt)),
        "dataset": origin.get("dataset"),
        "sampling": origin.get("sampling"),
        "rollouts_from": {
            "path": str(file),
            "sha256": sha256_of(file),
            "model_path": origin.get("model_path"),
            "identity": origin.get("model_identity"),
            **found.report.as_dict(),
            "correct_from": args.correct_from,
            "correct_above": args.correct_above,
            **judge,
        },
    }
    return source, description


@dataclass(frozen=True)
class Plan:
    """All that is decided before a weight is loaded."""

    targets: list[Target]
    row_dims: list[int]
    source: Source
    description: dict[str, Any]
    verifier: Verifier
    edges: dict[str, Any] | None
    device: torch.device
    placement: Placement | None
    dtype: torch.dtype
    attention: str
    settings: dict[str, Any]
    directories: list[Path]

    def positions_at_most(self, args: argparse.Namespace) -> int:
        """The most rows that the dump of one target can have."""
        of_buckets = sum(self.source.rows_per_prompt) * args.bins * args.pos_per_bin_per_rollout
        n_tokens = self.source.n_tokens_at_most
        return n_tokens if args.pos_per_bin_per_rollout == 0 else min(of_buckets, n_tokens)

    def bytes_at_most(self, args: argparse.Namespace) -> int:
        """The most that all targets' `grads.npy` can take on disk."""
        return self.positions_at_most(args) * 4 * sum(self.row_dims)


def make_plan(args: argparse.Namespace) -> Plan:
    """Resolve and check everything that can be known without the weights; nothing is written."""
    checkpoint = checkpoint_source(args)
    skeleton = load_skeleton(checkpoint)
    targets, row_dims = expand_targets(skeleton, args.layer, args.param_suffix, args.row_idx, args.seed)
    edges, verifier = given_edges(args), load_verifier(args.verifier)
    source, description = read_source(args, skeleton, verifier)
    placement = None
    if args.device_map is not None:
        placement = read_placement(args.device_map, args.max_memory, args.offload_dir, skeleton)
    device = resolve_device(args.device) if placement is None else placement.main_device
    args.batch_tokens = args.batch_tokens or BATCH_TOKENS[device.type]
    dtype, attention = resolve_dtype(args.dtype, device), resolve_attention(args.attention, skeleton)
    described = {
        key: {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else value
        for key, value in description.items()
    }
    # All that changes the bytes of the dump, paths left out: a moved file is the same file.
    settings = {
        "format_version": contract.FORMAT_VERSION,
        "model": checkpoint_identity(checkpoint, skeleton),
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
    return Plan(
        targets,
        row_dims,
        source,
        description,
        verifier,
        edges,
        device,
        placement,
        dtype,
        attention,
        settings,
        directories,
    )


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
    if not isinstance(edges, list) or len(edges) != args.bins + 1 or not contract.are_edges(edges):
        raise InputError(f"--entropy-edges {file}: no {args.bins + 1} increasing entropy_edges (--bins {args.bins})")
    return {
        "entropy_edges": edges,
        "entropy_edges_over": manifest.get("entropy_edges_over", "dumped_positions"),
        "entropy_edges_from": str(file),
    }


def dump_directories(output_dir: Path, targets: list[Target]) -> list[Path]:
    """Where each target's dump goes: a single target's is the output directory itself."""
    return [output_dir] if len(targets) == 1 else [output_dir / target.directory for target in targets]


def collect_rollouts(
    args: argparse.Namespace, plan: Plan, checkpoint: Checkpoint, record: Record, watch: Stopwatch
) -> tuple[list[Rollout], dict[str, Any]]:
    """All of this shard's rollouts, sampled (or taken from elsewhere), judged and scored, written chunk by chunk.

    Returns:
        The rollouts, and what the manifest says of how it went.
    """
    growing = GrowingRollouts(args.output_dir / contract.ROLLOUTS, record)
    for notes in growing.notes:
        watch.add(notes["seconds"])
    chunks = list(chunks_of(plan.source.rows_per_prompt, args.sample_rows))
    if growing.n_chunks_kept:
        log.info(f"continuing: {growing.n_chunks_kept} of {len(chunks)} batches of rollouts are there")
    left = chunks[growing.n_chunks_kept :]
    if left:
        rollouts_of = plan.source.opened(checkpoint, args.sample_rows)
        tokens = Budget(args.batch_tokens)
        with RunningVerifier(plan.verifier, args.verifier_seconds) as running:
            for chunk in progress(left, "sampling and scoring", sum(map(len, left)), "prompts", len):
                before = dict(watch.seconds)
                with watch.phase("sample"):
                    sampled = rollouts_of(chunk)
                    rollouts = judged(sampled, running)
                with watch.phase("score"):
                    rollouts = score(checkpoint, rollouts, tokens)
                notes = {"seconds": watch.since(before), "unverified": len(sampled) - len(rollouts)}
                growing.append(rollouts, notes | server_gap(plan.source, sampled, rollouts))
    rollouts = growing.finish()
    if not rollouts:
        raise InputError(f"--verifier {args.verifier}: no rollout is left")
    return rollouts, summed(growing.notes)


def server_gap(source: Source, sampled: list[Rollout], scored: list[Rollout]) -> dict[str, float]:
    """How far a server's log-probs are from ours, in nats per token; nothing where no server told any."""
    answers = source.answers if isinstance(source, SampledRollouts) else []
    logprobs = {(r.prompt_idx, r.sample_idx): r.logprobs for r in scored}
    pairs = [
        (answer, logprobs[key])
        for answer, r in zip(answers, sampled, strict=False)
        if (key := (r.prompt_idx, r.sample_idx)) in logprobs
    ]
    gap = mean_logprob_gap([a for a, _ in pairs], [ours for _, ours in pairs]) if pairs else None
    if gap is not None and gap > LARGEST_LOGPROB_GAP:
        log.warning(f"the server's log-probs are {gap:.2f} nats per token from this checkpoint's: another model's?")
    return {} if gap is None else {"logprob_gap": gap}


def summed(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of all chunks together."""
    gaps = [note["logprob_gap"] for note in notes if "logprob_gap" in note]
    return {
        "num_unverified_rollouts": sum(note["unverified"] for note in notes),
        **({"server_logprob_gap": float(np.mean(gaps))} if gaps else {}),
    }


def score(checkpoint: Checkpoint, rollouts: list[Rollout], batch_tokens: Budget) -> list[Rollout]:
    """The rollouts with entropy and log-prob of every response token under `checkpoint`.

    Raises:
        InputError: the model gives one that is not finite.
    """
    batches = score_responses(
        checkpoint.model, [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], batch_tokens
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
        done=growing.items_kept,
    )
    n_left = int(starts[-1]) - sum(len(rows_of_items[item]) for item in growing.items_kept)
    if growing.items_kept:
        log.info(f"continuing: {int(starts[-1]) - n_left} of {int(starts[-1])} gradient rows are there")
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
    device = input_device(checkpoint.model)
    return {
        "model_path": args.model_path,
        "num_prompts": len(prompt_idxs),
        "num_rollouts": len(rollouts),
        **plan.description,
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
        "device_map": getattr(checkpoint.model, "hf_device_map", None) if plan.placement else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
    }


@script_main
def main(argv: list[str] | None = None) -> int:
    """Probe one shard of one model."""
    args = parse_args(argv)
    if is_verbose():
        transformers.utils.logging.set_verbosity_info()
    watch = Stopwatch()
    with watch.phase("load"):
        plan = make_plan(args)
    if args.check_only:
        report_plan(args, plan)
        return 0
    make_directory(args.output_dir)
    # A lost node may hold the lock on a shared file system for a while after Slurm has queued the shard again.
    patience = SECONDS_FOR_A_LOST_NODE if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0
    with locked(args.output_dir, patience):
        if not prepare(args.output_dir, plan.directories, plan.settings, args.overwrite):
            log.info(f"{args.output_dir}: this dump is finished already, nothing to do (--overwrite starts afresh)")
            return 0
        probe(args, plan, watch)
    return 0


def probe(args: argparse.Namespace, plan: Plan, watch: Stopwatch) -> None:
    """Sample, score, choose, differentiate and write, from wherever an earlier run ended."""
    with watch.phase("load"):
        checkpoint = load_checkpoint(checkpoint_source(args), plan.device, plan.dtype, plan.attention, plan.placement)
    with closing(Record(args.output_dir / contract.RECORD)) as record:
        rollouts, notes = collect_rollouts(args, plan, checkpoint, record, watch)
        edges = plan.edges or edges_of(rollouts, args.bins)
        chosen = choose(rollouts, edges["entropy_edges"], args)
        engine = RowGradients(checkpoint.model, plan.targets)
        faulty = write_gradients(args, plan.directories, engine, rollouts, chosen, record, watch)
    lines = positions_of(rollouts, chosen, edges["entropy_edges"])
    common = manifest_of(args, plan, checkpoint, edges, rollouts)
    for directory, target, row_dim, rows in zip(plan.directories, plan.targets, plan.row_dims, faulty, strict=True):
        write_records(directory / contract.META, lines)
        weight = engine.weight_name(target)
        manifest = {
            "target": weight,
            "row_idx": target.row_idx,
            "row_dim": row_dim,
            "num_positions": len(lines),
            **common,
            **asdict(rows),
            **rows.counts(),
            **notes,
            "checksums": checksums_of(directory),
            "seconds": watch.total(),
        }
        write_json(directory / contract.MANIFEST, manifest)
        for warning in rows.warnings():
            log.warning(f"{directory}: {warning}")
        print(printable(f"{directory}: {len(lines)} gradients of {weight}[{target.row_idx}]"), end=", ")
        print(f"{common['num_correct_rollouts']} of {len(rollouts)} rollouts correct")
    (args.output_dir / contract.RECORD).unlink()


if __name__ == "__main__":
    sys.exit(main())
