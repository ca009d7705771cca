#!/usr/bin/env python3
"""Exp 2: do correct and incorrect rollouts of a prompt push the weights the same way?

+1: they would cancel under advantages of ±1; 0: orthogonal. Per entropy bucket: the cosine between the mean gradients
of both kinds (prompts with at least 2 tokens of each), with controls by halves of the tokens and of the rollouts of
one prompt and kind; rho, that cosine with the noise removed, with its interval, test and verdict; and whether the
update cancels. Writes `exp2_summary.json`, `exp2_arrays.npz` (of tagged dumps: what the headline figures need beside
it), `exp2_alignment.png` (rho in every bucket) and `exp2_direction_cosine_hist.png` (cosines in the bucket of highest
entropy); tables go to stdout. Reads the gradients of one prompt at a time.

The study's dumps, results in out/exp12/exp12_figures:
    python analyze_exp2_direction.py base=out/exp12/exp12_base trained=out/exp12/exp12_trained

One dump (the summary is then not keyed by tag); this one comes with the tests (seconds):
    python analyze_exp2_direction.py --output-dir /tmp/exp2 tests/data/golden/aligned/s0
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
from gradprobe.exp2.measure import measure_dumps
from gradprobe.exp2.summary import SUMMARY, report, summary_over_targets
from gradprobe.figures.exp2 import draw_analysis
from gradprobe.figures.inputs import EXP2_ARRAYS, write_directions
from gradprobe.figures.look import add_format_flag, drawn_from, save


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
    """Read the dumps, compare the groups of every prompt, then write the summary, the figure and the table."""
    args = parse_args(argv)
    device = device_for(args.device)
    paths = parse_tagged_dumps(args.dumps, allow_untagged=True)
    dumps = open_dumps(paths)
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    make_directory(output_dir)
    warn(dumps)
    differences = say_differences(dumps)

    results, top_of_others = measure_dumps(dumps, device=device)
    fingerprints = fingerprints_of(dumps)
    summary = sealed(
        {
            tag: {
                **summary_over_targets(targets, results[tag], top_of_others[tag]),
                "differences": differences[tag],
                "manifest_sha256": fingerprints[tag],
            }
            for tag, targets in dumps.items()
        }
    )
    drawn = draw_analysis(first_targets(dumps), list(results.values()))

    written = [SUMMARY]
    if None not in dumps:
        of_top = {tag: found[-1] for tag, found in results.items()}
        write_directions(output_dir / EXP2_ARRAYS, of_top, fingerprints, seals_of(summary))
        written.append(EXP2_ARRAYS)
    write_json(output_dir / SUMMARY, summary.get(None, summary))
    for name, figure in drawn.items():
        written += save(figure, output_dir / name, drawn_from(SUMMARY, summary), args.figure_format)
    print(report(summary), end="\n\n")
    print("\n".join(printable(f"wrote {output_dir / name}") for name in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
