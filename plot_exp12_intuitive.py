#!/usr/bin/env python3
"""The headline figures of both experiments, base beside trained.

Computes from the dumps what the two analyses compute, and writes `exp1_headline.png` (participation
ratio and rank95 per bucket, 2-D PCA of base and of trained), `exp1_bin4_energy.png` (cumulative energy of the
highest-entropy bucket; the file keeps its name where there are not 5 buckets) and `exp2_headline.png` (cosines of
correct and incorrect gradients with their control). Where several targets were probed these show the first, and
`exp12_replication.png` shows each headline number over all of them, from the summaries that the analyses left in
the output directory. The numbers drawn go to stdout.

The study's dumps:
    python plot_exp12_intuitive.py --base out/exp12/exp12_base --trained out/exp12/exp12_trained \\
        --output-dir out/exp12/exp12_figures

Two small dumps that come with the tests (a few seconds):
    python plot_exp12_intuitive.py --base tests/data/golden/aligned/s0 --trained tests/data/golden/aligned/s1 \\
        --output-dir /tmp/exp12_figures
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from analyze_exp1_compression import SUMMARY as EXP1_SUMMARY
from analyze_exp1_compression import bucket_spectra
from analyze_exp2_direction import SUMMARY as EXP2_SUMMARY
from analyze_exp2_direction import top_bucket_directions
from gradprobe import figures
from gradprobe.analysis_inputs import first_targets, format_number, format_table, open_dumps, subjects_of, warn
from gradprobe.console import say, script_main
from gradprobe.direction import Directions, summarise
from gradprobe.dump import Dump, make_directory, read_json
from gradprobe.errors import InputError
from gradprobe.spectrum import Projection, Spectrum, project_to_plane

EXP1_HEADLINE = "exp1_headline.png"
TOP_BUCKET_ENERGY = "exp1_bin4_energy.png"
EXP2_HEADLINE = "exp2_headline.png"
REPLICATION = "exp12_replication.png"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, metavar="DUMP", help="dump of the base model")
    parser.add_argument("--trained", type=Path, required=True, metavar="DUMP", help="dump of the RL-trained model")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="D", help="made if needed")
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Read both dumps, compute what is drawn, then write the three figures and the table."""
    args = parse_args(argv)
    all_targets = open_dumps({"base": args.base, "trained": args.trained})
    dumps = first_targets(all_targets)
    refuse_different_buckets(dumps)
    make_directory(args.output_dir)
    warn(all_targets)
    for difference in differences(dumps):
        say(f"warning: {difference}")

    spectra = [bucket_spectra(dump, tag) for tag, dump in dumps.items()]
    projections = [project_to_plane(dump.grads, np.arange(len(dump.grads))) for dump in dumps.values()]
    directions = [top_bucket_directions(dump) for dump in dumps.values()]
    drawn = draw(dumps, spectra, projections, directions)
    if all(len(targets) > 1 for targets in all_targets.values()):
        drawn |= draw_replication(args.output_dir, all_targets)

    for name, figure in drawn.items():
        figures.save(figure, args.output_dir / name)
    print(report(list(dumps), spectra, directions), end="\n\n")
    print("\n".join(f"wrote {args.output_dir / name}" for name in drawn))
    return 0


def refuse_different_buckets(dumps: dict[str, Dump]) -> None:
    """Raise `InputError` unless all dumps have the same number of buckets."""
    if len({dump.bins for dump in dumps.values()}) > 1:
        counts = ", ".join(f"{dump.path} has {dump.bins}" for dump in dumps.values())
        raise InputError(f"buckets can only be compared where their number is the same: {counts}")


def differences(dumps: dict[str, Dump]) -> list[str]:
    """What makes base and trained hard to compare, one line each."""
    return [
        f"base and trained differ in {key}: {first!r} and {second!r}"
        for key in ("target", "row_idx", "row_dim", "temperature")
        for first, second in [[dump.manifest.get(key) for dump in dumps.values()]]
        if first != second
    ]


def draw(
    dumps: dict[str, Dump],
    spectra: list[list[Spectrum]],
    projections: list[Projection],
    directions: list[Directions],
) -> dict[str, figures.Figure]:
    """The three figures by file name."""
    subjects = subjects_of(dumps)
    buckets_of_rows = [dump.bin[shown.rows] for dump, shown in zip(dumps.values(), projections, strict=True)]
    return {
        EXP1_HEADLINE: figures.draw_compression_headline(subjects, spectra, projections, buckets_of_rows),
        TOP_BUCKET_ENERGY: figures.draw_top_bucket_energy(subjects, [buckets[-1] for buckets in spectra]),
        EXP2_HEADLINE: figures.draw_direction_headline(subjects, directions),
    }


def draw_replication(output_dir: Path, dumps: dict[str, list[Dump]]) -> dict[str, figures.Figure]:
    """`exp12_replication.png` from the summaries that the analyses left in `output_dir`; nothing if they did not."""
    exp1, exp2 = (replications_in(output_dir / name, dumps) for name in (EXP1_SUMMARY, EXP2_SUMMARY))
    if exp1 is None or exp2 is None:
        say(
            f"warning: {REPLICATION} is not drawn: it needs {EXP1_SUMMARY} and {EXP2_SUMMARY} of these dumps in "
            f"{output_dir}; run both analyses with base=... trained=... first"
        )
        return {}
    return {REPLICATION: figures.draw_replication(subjects_of(first_targets(dumps)), exp1, exp2)}


def replications_in(file: Path, dumps: dict[str, list[Dump]]) -> list[dict[str, Any]] | None:
    """The replication tables of base and trained in a summary; None unless it is there and about these targets."""
    if not file.is_file():
        return None
    summary = read_json(file)
    tables = [summary.get(tag, {}).get("replication", {}) for tag in dumps]
    targets = [[dump.path.name for dump in found] for found in dumps.values()]
    return tables if [table.get("targets") for table in tables] == targets else None


def report(tags: list[str], spectra: list[list[Spectrum]], directions: list[Directions]) -> str:
    """The numbers drawn, as tables for people."""
    measures = {
        "n": lambda spectrum: spectrum.n,
        "participation ratio": lambda spectrum: spectrum.participation_ratio,
        "rank95": lambda spectrum: spectrum.rank(0.95),
    }
    bucket_table = format_table(
        ["bucket", *(f"{measure}, {tag}" for measure in measures for tag in tags)],
        [
            [str(index), *(format_number(number(s), 2) for number in measures.values() for s in both)]
            for index, both in enumerate(zip(*spectra, strict=True))
        ],
    )
    cosines = [(summarise(result.cosines), summarise(result.control_cosines)) for result in directions]
    direction_table = format_table(
        ["highest-entropy bucket", "prompts", "mean cos", "control n", "control mean"],
        [
            [tag, str(group.n), format_number(group.mean), str(control.n), format_number(control.mean)]
            for tag, (group, control) in zip(tags, cosines, strict=True)
        ],
    )
    return f"{bucket_table}\n\n{direction_table}"


if __name__ == "__main__":
    sys.exit(main())
