#!/usr/bin/env python3
"""Exp 1: how many independent directions do the gradients of each entropy bucket span, and do buckets share them?

Reads one dump per tag and takes participation ratios, ranks and leading directions of each bucket's gradients (not
centred, float64) with their intervals, ceilings and nulls, and holds proxies of the gradient norm against it;
docs/methods.md says what each means. The first tag is what the others are compared with. Writes `exp1_summary.json`,
`exp1_arrays.npz` (spectra and principal components, for figures of your own), `exp1_headline.png`,
`exp1_bin4_energy.png`, `exp1_cumulative_energy.png`, `exp1_cross_bucket_cosine.png` and `exp1_norms.png`; the tables go
to stdout.
Reads the gradients block by block: memory is a few matrices of d × d numbers, or of a bucket's rows if these are fewer.

The study's dumps, results in out/exp12/exp12_figures:
    python analyze_exp1_compression.py base=out/exp12/exp12_base trained=out/exp12/exp12_trained

Two small dumps that come with the tests (a few seconds):
    python analyze_exp1_compression.py --output-dir /tmp/exp1 \\
        s0=tests/data/golden/aligned/s0 s1=tests/data/golden/aligned/s1
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
    parser.add_argument("dumps", nargs="+", metavar="TAG=DUMP", help="a name for the results, and a dump's directory")
    parser.add_argument(
        "--output-dir", type=Path, metavar="D", help="made if needed (default: exp12_figures beside the first dump)"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="where matrices are multiplied and decomposed (default: cpu)"
    )
    add_format_flag(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


def analyse(
    paths: Mapping[str, Path], output_dir: Path, device: str = "cpu", formats: Sequence[str] = ("png",)
) -> tuple[list[Table], list[str]]:
    """Read the dumps, compute every number, write arrays, figures and the summary.

    Returns:
        The tables, and the names of all files.
    """
    from gradprobe.exp1.measure import measure_dumps, refusal, sample_rollouts  # scipy, and below matplotlib
    from gradprobe.exp1.summary import SUMMARY, tables_of, write_arrays
    from gradprobe.figures.exp1 import draw_exp1
    from gradprobe.figures.look import save

    dumps = {tag: list(map(sample_rollouts, targets)) for tag, targets in open_dumps(paths, refusal).items()}
    make_directory(output_dir)  # what can't be written to is told before minutes of work
    warn(dumps)
    differences = say_differences(dumps)

    found = measure_dumps(dumps, device=device)
    summary = about_study(found.numbers, dumps, {tag: differences[tag] + found.warnings[tag] for tag in dumps})

    def write_others() -> list[str]:
        return [write_arrays(output_dir, found.arrays), *save(draw_exp1(summary, found.arrays), output_dir, formats)]

    written = write_results(output_dir, SUMMARY, summary, write_others)
    return [table for tag, one in summary.items() for table in tables_of(tag, one)], written


@script_main
def main(argv: list[str] | None = None) -> int:
    """Analyse the dumps and print the tables."""
    args = parse_args(argv)
    device, paths = device_for(args.device), parse_tagged_dumps(args.dumps)
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    tables, written = analyse(paths, output_dir, device, args.figure_format)
    print_results(tables, output_dir, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
