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
import os
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import transformers

from gradprobe.common.console import add_common_flags, is_verbose, log, printable, script_main
from gradprobe.common.files import locked, make_directory
from gradprobe.dump.buckets import BUCKET, NO_POOLING
from gradprobe.probe.output import prepare, refuse_other_settings
from gradprobe.probe.plan import make_plan
from gradprobe.probe.rules import RULES
from gradprobe.probe.run import run_probe
from gradprobe.probe.settings import BATCH_TOKENS, ProbeSettings, settings_of_task
from gradprobe.probe.stopwatch import Stopwatch
from gradprobe.rollouts.formats import FORMATS

SECONDS_FOR_A_LOST_NODE = 150


def parse_args(argv: list[str] | None) -> ProbeSettings:
    """The command line, judged as far as that can be done without reading anything."""
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
        help="problems: .jsonl, .json, .parquet, a directory of datasets.save_to_disk, hf:NAME[:CONFIG][:SPLIT], or "
        "gym:NAME[:key=value,...] of reasoning-gym (default: the demo's)",
    )
    add(
        "--min-mixed-prompts",
        type=int,
        metavar="N",
        help="after the sampling, stop unless so many of this probe's prompts have correct and incorrect rollouts; the "
        "rollouts are kept (default: 1; 0 with fewer than 16 prompts or one rollout each)",
    )
    add(
        "--sample-only",
        action="store_true",
        help="stop after the sampling; the same command without it goes on with the gradients",
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
    add("--stop", metavar="TEXT", help="ends a response as an end token does (base models, few-shot prompts)")
    add("--sampler", choices=["own", "openai"], help="openai: ask the server at --base-url for responses")
    add("--base-url", metavar="URL", help="of a vLLM, SGLang or llama.cpp server that runs this checkpoint")
    add("--server-model", metavar="NAME", help="model to ask for (default: the only one that the server lists)")
    add("--server-requests", type=int, metavar="N", help="requests under way at once (default: %(default)s)")
    add(
        "--api-key-env",
        metavar="NAME",
        help="environment variable that holds the server's API key (default: none is sent); never the key itself",
    )
    add = parser.add_argument_group("rollouts from elsewhere (docs/rollouts.md)").add_argument
    add(
        "--rollouts",
        type=Path,
        nargs="+",
        metavar="F",
        help="probe these instead of sampling: a dump, its rollouts.jsonl, or files of vLLM, an OpenAI-shaped server, "
        "TRL (also a folder with the completions of one step) or verl",
    )
    add(
        "--rollouts-format",
        choices=["auto", *FORMATS],
        help="shape of --rollouts (default: by its keys)",
    )
    add(
        "--correct-from",
        metavar="NAME",
        help="verdicts of --rollouts: auto (a true or false 'correct' or 'acc', else the reward), a key of the file, "
        "or verifier to judge anew (default: %(default)s)",
    )
    add("--correct-above", type=float, metavar="REWARD", help="a reward above this is a correct answer")
    add = parser.add_argument_group("verdicts").add_argument
    add(
        "--verifier",
        help="boxed: the last box, exactly; numeric: by value; math-verify; gym: reasoning-gym's scorer; or "
        "module:function, which takes response and ground truth and returns a bool (default: %(default)s)",
    )
    add(
        "--verifier-seconds",
        type=float,
        metavar="S",
        help="time limit of one answer, of all but boxed (default: %(default)g)",
    )
    add = parser.add_argument_group(
        "shards (default: by torchrun's or srun's tasks, if there are several)"
    ).add_argument
    add("--shard-index", type=int, metavar="I", help="this shard, from 0 (default: 0)")
    add("--num-shards", type=int, metavar="N", help="shards of the study (default: 1)")
    add = parser.add_argument_group("target: lists separated by commas give one dump for each combination").add_argument
    add("--layer", metavar="LAYER[,...]", help="layer, from 0 (default: the middle one, 14 of Qwen2.5-1.5B's 28)")
    add("--param-suffix", help="linear weight inside it (default: %(default)s)")
    add("--row-idx", help="row, from 0; also first, mid, last, random:K (default: %(default)s)")
    add(
        "--project",
        metavar="KxL",
        help="whole weights in the place of rows, seen through random signs from both sides, e.g. 16x16; then also "
        "--layer all and --param-suffix all-linear, which is all linear weights in one dump",
    )
    add = parser.add_argument_group("tokens and buckets").add_argument
    add(
        "--pool",
        choices=[NO_POOLING, BUCKET],
        help="bucket: one gradient for each rollout and bucket, summed over all its tokens there, as Exp 3 needs it "
        "(default: %(default)s: one for each picked token)",
    )
    add(
        "--bucket-by",
        metavar="RULE",
        help=f"of pooled tokens: {', '.join(RULES)}, or score:KEY, a list of numbers per token in --rollouts "
        "(default: %(default)s)",
    )
    add("--bins", type=int, help="buckets of equal size (default: %(default)s)")
    add(
        "--pos-per-bin-per-rollout",
        type=int,
        help="positions of each bucket and rollout; 0: every response token (default: %(default)s)",
    )
    add("--entropy-edges", type=Path, metavar="MANIFEST", help="take the edges of another dump's manifest.json")
    add("--seed", type=int, help="of prompts, sampling and positions (default: %(default)s)")
    add = parser.add_argument_group("computing").add_argument
    add("--device", help="auto, cuda or cpu (default: %(default)s)")
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
    add("--dtype", choices=["auto", "bfloat16", "float32"], help="auto: bfloat16 on GPUs that have it")
    add(
        "--attention",
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
        help="responses sampled at once; halves by itself when memory runs out (default: %(default)s)",
    )
    add_common_flags(parser)
    parser.set_defaults(
        **{field.name: field.default for field in fields(ProbeSettings) if field.default is not MISSING}
    )
    given = ProbeSettings(**vars(parser.parse_args(argv)))
    given.check()
    settings = settings_of_task(given, os.environ).filled()
    if settings.output_dir != given.output_dir:
        log.info(f"shard {settings.shard_index} of {settings.num_shards}, as a task: {settings.output_dir}")
    return settings


@script_main
def main(argv: list[str] | None = None) -> int:
    """Probe one shard of one model."""
    settings = parse_args(argv)
    if is_verbose():
        transformers.utils.logging.set_verbosity_info()
    watch = Stopwatch()
    with watch.phase("load"):
        plan = make_plan(settings)
    if settings.check_only:
        if not settings.overwrite:
            refuse_other_settings(settings.output_dir, plan.identity)
        print(json.dumps(plan.in_numbers()))  # for the launcher
        return 0
    make_directory(settings.output_dir)
    # A lost node may hold the lock on a shared file system for a while after Slurm has queued the shard again.
    patience = SECONDS_FOR_A_LOST_NODE if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0
    with locked(settings.output_dir, patience):
        computing = prepare(settings.output_dir, plan.directories, plan.identity, plan.computing, settings.overwrite)
        if computing is None:
            log.info(f"{settings.output_dir}: this dump is finished already, nothing to do (--overwrite starts afresh)")
            return 0
        for dump in run_probe(replace(plan, computing=computing), watch):
            row = "" if dump.row_idx is None else f"[{dump.row_idx}]"
            print(printable(f"{dump.directory}: {dump.num_positions} gradients of {dump.weight}{row}"), end=", ")
            print(f"{dump.num_correct_rollouts} of {dump.num_rollouts} rollouts correct")
    if settings.sample_only:
        print(printable(f"{settings.output_dir}: rollouts only, as --sample-only says; no gradient is taken"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
