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
import gc
import json
import os
import sys

from gradprobe.common.console import add_common_flags, is_verbose, log, printable, script_main
from gradprobe.common.files import locked, make_directory
from gradprobe.probe.settings import ProbeSettings, add_flags, settings_of_task
from gradprobe.probe.stopwatch import Stopwatch

SECONDS_FOR_A_LOST_NODE = 150


def parse_args(argv: list[str] | None) -> ProbeSettings:
    """The command line, judged as far as that can be done without reading anything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_flags(parser)
    add_common_flags(parser)
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
    gc.disable()  # what modules define stays: a search for garbage in it takes a seventh of the time
    import transformers  # with torch it takes seconds: a command line that can't be is refused before

    from gradprobe.probe.output import prepare, refuse_other_settings
    from gradprobe.probe.plan import make_plan
    from gradprobe.probe.run import run_probe

    gc.enable()
    if is_verbose():
        transformers.utils.logging.set_verbosity_info()
    watch = Stopwatch()
    with watch.phase("load"):
        plan = make_plan(settings)
    if settings.check_only:
        if not settings.overwrite:
            refuse_other_settings(plan)
        print(json.dumps(plan.in_numbers()))  # for the launcher
        return 0
    make_directory(settings.output_dir)
    # A lost node may hold the lock on a shared file system for a while after Slurm has queued the shard again.
    patience = SECONDS_FOR_A_LOST_NODE if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0
    with locked(settings.output_dir, patience):
        plan = prepare(plan)
        if plan is None:
            log.info(f"{settings.output_dir}: this dump is finished already, nothing to do (--overwrite starts afresh)")
            return 0
        for directory, manifest in run_probe(plan, watch):
            row = "" if manifest["row_idx"] is None else f"[{manifest['row_idx']}]"
            target = f"{directory}: {manifest['num_positions']} gradients of {manifest['target']}{row}"
            correct = f"{manifest['num_correct_rollouts']} of {manifest['num_rollouts']} rollouts correct"
            print(printable(f"{target}, {correct}"))
    if settings.sample_only:
        print(printable(f"{settings.output_dir}: rollouts only, as --sample-only says; no gradient is taken"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
