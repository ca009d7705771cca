#!/usr/bin/env python3
"""Exp 1: how many independent directions do the gradients of each entropy bucket span, and do buckets share them?

Reads one dump per tag, takes the singular values of each bucket's gradients (not centred, float64), and writes
`exp1_summary.json`, `exp1_cumulative_energy.png` and `exp1_cross_bucket_cosine.png`; the table goes to stdout.

The study's dumps, results in out/exp12/exp12_figures:
    python analyze_exp1_compression.py base=out/exp12/exp12_base trained=out/exp12/exp12_trained

Two small dumps that come with the tests (a second):
    python analyze_exp1_compression.py --output-dir /tmp/exp1 \\
        s0=tests/data/golden/aligned/s0 s1=tests/data/golden/aligned/s1
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from gradprobe import figures
from gradprobe.analysis_inputs import (
    default_output_dir,
    first_targets,
    format_number,
    format_replication,
    format_table,
    open_dumps,
    subjects_of,
    warn,
)
from gradprobe.console import parse_tagged_dumps, printable, progress, script_main
from gradprobe.dump import Dump, make_directory, write_json
from gradprobe.replication import spread_of
from gradprobe.spectrum import Spectrum, cross_cosines, iter_bucket_spectra

SUMMARY = "exp1_summary.json"
CUMULATIVE_ENERGY = "exp1_cumulative_energy.png"
CROSS_BUCKET_COSINE = "exp1_cross_bucket_cosine.png"
RANK_PERCENTS = (50, 90, 95, 99)
REPLICATED = ("participation_ratio", "rank95")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="+", metavar="TAG=DUMP", help="a name for the results, and a dump's directory")
    parser.add_argument(
        "--output-dir", type=Path, metavar="D", help="made if needed (default: exp12_figures beside the first dump)"
    )
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Read the dumps, compute every spectrum, then write the summary, the figures and the table."""
    args = parse_args(argv)
    paths = parse_tagged_dumps(args.dumps)
    dumps = open_dumps(paths)
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    make_directory(output_dir)
    warn(dumps)

    spectra = {tag: [bucket_spectra(dump, tag) for dump in targets] for tag, targets in dumps.items()}
    summary = {tag: summary_over_targets(dumps[tag], spectra[tag]) for tag in dumps}
    subjects = subjects_of(first_targets(dumps))
    cosines = [numbers["cross_bucket_top1_cosine"] for numbers in summary.values()]
    drawn = {
        CUMULATIVE_ENERGY: figures.draw_cumulative_energy(subjects, [targets[0] for targets in spectra.values()]),
        CROSS_BUCKET_COSINE: figures.draw_cross_bucket_cosine(subjects, cosines),
    }

    write_json(output_dir / SUMMARY, summary)
    for name, figure in drawn.items():
        figures.save(figure, output_dir / name)
    for tag, numbers in summary.items():
        print(report(tag, numbers), end="\n\n")
    print("\n".join(f"wrote {output_dir / name}" for name in (SUMMARY, *drawn)))
    return 0


def bucket_spectra(dump: Dump, tag: str) -> list[Spectrum]:
    """The spectrum of every bucket of `dump`, with progress on stderr."""
    buckets = iter_bucket_spectra(dump.grads, dump.bin, dump.bins)
    return list(progress(buckets, f"{tag}: spectra", dump.bins, "buckets"))


def summary_over_targets(dumps: list[Dump], spectra: list[list[Spectrum]]) -> dict[str, Any]:
    """One tag's part of `exp1_summary.json`: its first target, and how its numbers vary over all of them."""
    numbers = [summary_of(dump, buckets) for dump, buckets in zip(dumps, spectra, strict=True)]
    if len(dumps) == 1:
        return numbers[0]
    replication = {
        "targets": [dump.path.name for dump in dumps],
        **{
            measure: {
                bucket: spread_of([target["per_bucket"][bucket][measure] for target in numbers])
                for bucket in numbers[0]["per_bucket"]
            }
            for measure in REPLICATED
        },
    }
    return {**numbers[0], "replication": replication}


def summary_of(dump: Dump, spectra: list[Spectrum]) -> dict[str, Any]:
    """The numbers of one target."""
    return {
        "n_positions": len(dump.grads),
        "row_dim": dump.row_dim,
        "target": dump.manifest["target"],
        "row_idx": dump.manifest["row_idx"],
        "model": dump.manifest["model_path"],
        "per_bucket": {str(index): bucket_numbers(spectrum) for index, spectrum in enumerate(spectra)},
        "cross_bucket_top1_cosine": cross_cosines([spectrum.top_direction for spectrum in spectra]),
    }


def bucket_numbers(spectrum: Spectrum) -> dict[str, float | int | None]:
    """One bucket's part of `exp1_summary.json`."""
    return {
        "n": spectrum.n,
        "participation_ratio": spectrum.participation_ratio,
        "top1_energy_frac": spectrum.top1_energy_frac,
        **{f"rank{percent}": spectrum.rank(percent / 100) for percent in RANK_PERCENTS},
    }


def report(tag: str, numbers: dict[str, Any]) -> str:
    """One tag's results as tables for people."""
    per_bucket, cosines = numbers["per_bucket"], numbers["cross_bucket_top1_cosine"]
    ranks = [f"rank{percent}" for percent in RANK_PERCENTS]
    spectra_table = format_table(
        ["bucket", "n", "participation ratio", "top-1 energy", *ranks],
        [
            [index, str(row["n"]), format_number(row["participation_ratio"], 2)]
            + [format_number(row[measure]) for measure in ("top1_energy_frac", *ranks)]
            for index, row in per_bucket.items()
        ],
    )
    cosine_table = format_table(
        ["|cos|", *per_bucket],
        [[index, *map(format_number, row)] for index, row in zip(per_bucket, cosines, strict=True)],
    )
    source = printable(f"{tag}: {numbers['model']}, {numbers['target']}[{numbers['row_idx']}]")
    return (
        f"{source}\n"
        f"{numbers['n_positions']} positions of dimension {numbers['row_dim']}; bucket 0 has the lowest entropy\n"
        f"{spectra_table}\n"
        f"|cos| between the buckets' top-1 right singular vectors\n{cosine_table}"
        f"{replication_report(numbers)}"
    )


def replication_report(numbers: dict[str, Any]) -> str:
    """A tag's table over its targets; empty where there is one."""
    if "replication" not in numbers:
        return ""
    spreads = {
        f"{measure}, bucket {bucket}": spread
        for measure in REPLICATED
        for bucket, spread in numbers["replication"][measure].items()
    }
    return f"\n\n{format_replication(spreads)}"


if __name__ == "__main__":
    sys.exit(main())
