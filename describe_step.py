#!/usr/bin/env python3
"""What is the step between two checkpoints like? Of each weight its size, what stayed as it was, its directions.

Of every parameter: the length of the change over that of the weight, the share of entries that did not change at the
checkpoints' own precision, and of matrices the share of the change's energy in its first singular direction and how
many directions hold 95% of it. Writes `step_summary.json` and `step_weights.png` (layers by kinds of weight); a table
by kinds goes to stdout. Both checkpoints are in memory at once, on the CPU.

The demo pair (seconds):
    python describe_step.py --from demo/base --to demo/trained --output-dir out/step
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from gradprobe.analysis.inputs import print_results
from gradprobe.analysis.summaries import LAYOUT, write_results
from gradprobe.common.console import add_common_flags, add_format_flag, progress, script_main
from gradprobe.dump.format import model_name


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for end, words in (("from", "where the step begins"), ("to", "where it ends")):
        parser.add_argument(f"--{end}", dest=f"step_{end}", required=True, metavar="CKPT", help=words)
        parser.add_argument(f"--{end}-adapter", dest=f"{end}_adapter", metavar="A", help="PEFT adapter merged into it")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="D", help="made if needed")
    parser.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="after which spectra are left out (default: 120)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let code that comes with a checkpoint run")
    add_format_flag(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Load both checkpoints, look at every parameter, write the summary and the figure, print the table."""
    args = parse_args(argv)
    import torch  # which takes seconds, as do the others

    from gradprobe.figures.look import save
    from gradprobe.figures.step_weights import SUMMARY, WEIGHTS, draw_weights, table_by_kind
    from gradprobe.gradients.step import refuse_other_parameters
    from gradprobe.gradients.step_weights import weights_of_step
    from gradprobe.model.checkpoint import load_checkpoint, load_skeleton
    from gradprobe.model.source import CheckpointSource

    ends = {"from": (args.step_from, args.from_adapter), "to": (args.step_to, args.to_adapter)}
    sources = {
        end: CheckpointSource(path, adapter=adapter, trust_remote_code=args.trust_remote_code)
        for end, (path, adapter) in ends.items()
    }
    start, end = (
        load_checkpoint(source, torch.device("cpu"), load_skeleton(source).config.dtype or torch.float32).model
        for source in sources.values()
    )
    refuse_other_parameters(start, end, f"`to` {args.step_to}")
    found = dict(
        progress(weights_of_step(start, end, args.seconds), "weights", len(list(start.parameters())), "weights")
    )
    names = {end: model_name(adapter or path) for end, (path, adapter) in ends.items()}
    weights = {name: asdict(found[name]) for name, _ in start.named_parameters()}
    step = {"layout": LAYOUT, **names, "weights": weights}
    figures = {WEIGHTS: draw_weights(step)}
    written = write_results(
        args.output_dir, SUMMARY, {None: step}, lambda: save(figures, args.output_dir, args.figure_format)
    )
    print_results([table_by_kind(step)], args.output_dir, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
