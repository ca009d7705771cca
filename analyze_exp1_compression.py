#!/usr/bin/env python3
"""Exp 1: how many independent directions do the gradients of each entropy bucket span, and do buckets share them?

Reads one dump per tag and takes participation ratios, ranks and leading directions of each bucket's gradients (not
centred, float64) with their intervals, ceilings and nulls; docs/methods.md says what each means. The first tag is
what the others are compared with. Writes `exp1_summary.json`, `exp1_arrays.npz` (what the headline figures need
beside it), `exp1_cumulative_energy.png`, `exp1_cross_bucket_cosine.png` and `exp1_norms.png`; the tables go to stdout.
Reads the gradients block by block: memory is a few matrices of d × d numbers, or of a bucket's rows if these are fewer.

The study's dumps, results in out/exp12/exp12_figures:
    python analyze_exp1_compression.py base=out/exp12/exp12_base trained=out/exp12/exp12_trained

Two small dumps that come with the tests (a few seconds):
    python analyze_exp1_compression.py --output-dir /tmp/exp1 \\
        s0=tests/data/golden/aligned/s0 s1=tests/data/golden/aligned/s1
"""

import argparse
import sys
from pathlib import Path

from gradprobe.analysis.bucket import DEVICES, device_for
from gradprobe.analysis.differences import say_differences
from gradprobe.analysis.inputs import default_output_dir, fingerprints_of, first_targets, open_dumps, warn
from gradprobe.analysis.summaries import sealed, seals_of
from gradprobe.common.console import add_common_flags, parse_tagged_dumps, printable, script_main
from gradprobe.common.files import make_directory, write_json
from gradprobe.exp1.measure import measure_dumps, refusal, replication_of, sample_rollouts
from gradprobe.exp1.summary import SUMMARY, comparison_of, comparison_report, report, summary_of
from gradprobe.figures.exp1 import draw_analysis
from gradprobe.figures.inputs import EXP1_ARRAYS, compression_of, write_compression
from gradprobe.figures.look import add_format_flag, drawn_from, save


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


@script_main
def main(argv: list[str] | None = None) -> int:
    """Read the dumps, compute every number, then write the summary, the figures and the tables."""
    args = parse_args(argv)
    device = device_for(args.device)
    paths = parse_tagged_dumps(args.dumps)
    targets = {tag: list(map(sample_rollouts, found)) for tag, found in open_dumps(paths, refusal).items()}
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    make_directory(output_dir)
    warn(targets)
    differences = say_differences(targets)

    dumps, fingerprints = first_targets(targets), fingerprints_of(targets)
    results, compared = measure_dumps(dumps, device=device)
    summary = {tag: summary_of(dump, results[tag], fingerprints[tag]) for tag, dump in dumps.items()}
    for tag, of_tag in targets.items():
        if len(of_tag) > 1:
            summary[tag]["replication"] = replication_of(of_tag, summary[tag]["per_bucket"], device)
    first_tag = next(iter(dumps))
    for tag, found in compared.items():
        summary[tag] |= comparison_of(first_tag, found)
        differences[tag] += [found.warning] if found.warning else []
    summary = sealed({tag: numbers | {"differences": differences[tag]} for tag, numbers in summary.items()})
    drawn = draw_analysis(dumps, results)

    for_figures = {tag: compression_of(dump, results[tag], device) for tag, dump in dumps.items()}
    write_compression(output_dir / EXP1_ARRAYS, for_figures, fingerprints, seals_of(summary))
    write_json(output_dir / SUMMARY, summary)
    written = [SUMMARY, EXP1_ARRAYS]
    for name, figure in drawn.items():
        written += save(figure, output_dir / name, drawn_from(SUMMARY, summary), args.figure_format)
    for tag, numbers in summary.items():
        print(report(tag, numbers, results[tag]), end="\n\n")
    for tag, found in compared.items():
        print(comparison_report(first_tag, tag, found), end="\n\n")
    print("\n".join(printable(f"wrote {output_dir / name}") for name in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
