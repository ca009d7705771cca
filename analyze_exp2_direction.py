#!/usr/bin/env python3
"""Exp 2: do correct and incorrect rollouts of a prompt push the weights the same way?

+1: they would cancel under advantages of ±1; 0: orthogonal. Per entropy bucket: whether the update cancels, against
advantages dealt out at random; the cosine between the mean gradients of both kinds (prompts with at least 2 tokens of
each), with controls by halves of the tokens and of the rollouts of one prompt and kind; and rho, that cosine with the
noise removed, with its interval and verdict; of dumps of tokens also where updates of two rollouts meet, by token.
Writes `exp2_summary.json`, `exp2_headline.png`, `exp2_alignment.png` (rho in every bucket) and
`exp2_direction_cosine_hist.png` (cosines in the bucket of highest entropy); tables go to stdout. Reads the gradients of
one prompt at a time.

The study's dumps, results in out/exp12/exp12_figures:
    python analyze_exp2_direction.py base=out/exp12/exp12_base trained=out/exp12/exp12_trained

One dump (the summary is then not keyed by tag); this one comes with the tests (seconds):
    python analyze_exp2_direction.py --output-dir /tmp/exp2 tests/data/golden/aligned/s0
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradprobe.analysis.bucket import DEVICES, device_for
from gradprobe.analysis.differences import say_differences
from gradprobe.analysis.inputs import about_study, default_output_dir, open_dumps, print_results, warn
from gradprobe.analysis.summaries import write_results
from gradprobe.analysis.text import Table
from gradprobe.common.console import add_common_flags, add_format_flag, parse_tagged_dumps, script_main
from gradprobe.common.files import make_directory


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "dumps", nargs="+", metavar="DUMP | TAG=DUMP", help="one dump's directory, or any number with a name for each"
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="D", help="made if needed (default: exp12_figures beside the first dump)"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="where gradients are multiplied (default: cpu)"
    )
    add_format_flag(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Read the dumps, compare the groups of every prompt, write the summary and the figures, print the tables."""
    args = parse_args(argv)
    device = device_for(args.device)
    paths = parse_tagged_dumps(args.dumps, allow_untagged=True)
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    tables, written = analyse(paths, output_dir, device, args.figure_format)
    print_results(tables, output_dir, written)
    return 0


def analyse(
    paths: Mapping[str | None, Path], output_dir: Path, device: str = "cpu", formats: Sequence[str] = ("png",)
) -> tuple[list[Table], list[str]]:
    """All of Exp 2 of these dumps, by tag; an untagged one alone under None.

    Returns:
        The tables, and the names of the files written to `output_dir`, which is made if needed.
    """
    from gradprobe.exp2.measure import measure_dumps  # scipy, and below matplotlib
    from gradprobe.exp2.summary import SUMMARY, numbers_of, tables_of
    from gradprobe.figures.exp2 import draw_exp2
    from gradprobe.figures.look import save

    dumps = open_dumps(paths)
    make_directory(output_dir)  # before minutes of work
    warn(dumps)
    differences = say_differences(dumps)
    results, top_of_others, meetings = measure_dumps(dumps, device)
    numbers = {
        tag: numbers_of(targets, results[tag], top_of_others[tag], meetings[tag]) for tag, targets in dumps.items()
    }
    summary = about_study(numbers, dumps, differences)
    written = write_results(output_dir, SUMMARY, summary, lambda: save(draw_exp2(summary), output_dir, formats))
    return [table for tag, one in summary.items() for table in tables_of(tag, one)], written


if __name__ == "__main__":
    sys.exit(main())
