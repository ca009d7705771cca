#!/usr/bin/env python3
"""Exp 3: which tokens carry the expected update, which its noise, and what does keeping only the top 20% do?

Along the step that RL took, of dumps whose rollouts tell of it (`probe_grad_vectors.py --step-to`, `--step-from`): the
gain of the objective to first order, and which share of it the highest tokens by each rule, each bucket and each word
carry; `exp3_step.png`. Of pooled dumps (`--pool bucket`), read a prompt at a time: each bucket's share of the signal
(the update that prompts share, freed of noise) and of the noise, and with the highest, the lowest or random tokens kept
the cosine with the full update and the prompts that a batch needs; `exp3_headline.png`, `exp3_keep_top.png` and, of
three or more checkpoints, `exp3_trajectory.png`. Of several weights (`all-linear`, `--step-by-weight`) which of them
carry it; `exp3_weights.png`. All with 95% intervals over prompts; no share is given where no signal is seen. Writes
`exp3_summary.json`; tables go to stdout.

The study's dumps, results in out/exp12/exp12_figures:
    python analyze_exp3_signal.py base=out/exp12/exp12_base trained=out/exp12/exp12_trained

Rules to choose tokens by, side by side: the same rollouts pooled with other --bucket-by:
    python analyze_exp3_signal.py --output-dir out/rules entropy=out/e surprisal=out/s position=out/p random=out/r
"""

import argparse
import sys
from pathlib import Path

from gradprobe.analysis.differences import say_differences
from gradprobe.analysis.inputs import about_study, default_output_dir, open_dumps, print_results, warn
from gradprobe.analysis.summaries import write_results
from gradprobe.common.console import add_common_flags, add_format_flag, parse_tagged_dumps, script_main
from gradprobe.common.files import make_directory
from gradprobe.exp3.weights import OBJECTIVES


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="+", metavar="TAG=DUMP", help="dumps along a step, or pooled, each with a name")
    parser.add_argument(
        "--output-dir", type=Path, metavar="D", help="made if needed (default: exp12_figures beside the first dump)"
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="dapo",
        help="whose update: dapo, advantage over the standard deviation, all tokens alike; grpo, the same over the "
        "response's length; dr-grpo, advantage alone; reinforce, reward alone (default: dapo)",
    )
    add_format_flag(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Read the dumps, measure signal and noise, write the summary and the figures, print the tables."""
    args = parse_args(argv)
    paths = parse_tagged_dumps(args.dumps)
    from gradprobe.exp3.measure import measure_dumps, refusal  # scipy, and below matplotlib
    from gradprobe.exp3.summary import SUMMARY, numbers_of, tables_of, with_measured_gains
    from gradprobe.figures.exp3 import draw_exp3
    from gradprobe.figures.look import save

    dumps = open_dumps(paths, refusal)
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    make_directory(output_dir)  # before minutes of work
    warn(dumps)
    differences = say_differences(dumps)

    results, others = measure_dumps(dumps, args.objective)
    numbers = {tag: numbers_of(targets, results[tag], others[tag]) for tag, targets in dumps.items()}
    summary = about_study(with_measured_gains(numbers, dumps, results), dumps, differences)
    written = write_results(
        output_dir, SUMMARY, summary, lambda: save(draw_exp3(summary), output_dir, args.figure_format)
    )
    print_results([table for tag, one in summary.items() for table in tables_of(tag, one)], output_dir, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
