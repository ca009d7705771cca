#!/usr/bin/env python3
"""The headline figures of both experiments, base beside trained.

Computes from the dumps what the two analyses compute, and writes `exp1_headline.png` (participation
ratios and rank95 per bucket with intervals, 2-D PCA of base and of trained), `exp1_bin4_energy.png` (cumulative
energy of the highest-entropy bucket; the file keeps its name where there are not 5 buckets) and `exp2_headline.png`
(rho with its verdict, cosines of correct and incorrect gradients with their controls). Where several targets were
probed these show the first, and `exp12_replication.png` shows each headline number over all of them, from the
summaries that the analyses left in the output directory. From the same summaries and all figures it writes
`report.html`, one page to read or mail. The numbers drawn go to stdout.

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

from analyze_exp1_compression import (
    CROSS_BUCKET_COSINE,
    CUMULATIVE_ENERGY,
    NORMS,
    compare_with_first,
    comparison_report,
    measure_dumps,
)
from analyze_exp1_compression import SUMMARY as EXP1_SUMMARY
from analyze_exp2_direction import ALIGNMENT, HISTOGRAM, bucket_directions, format_p_value
from analyze_exp2_direction import SUMMARY as EXP2_SUMMARY
from gradprobe import figures, figures_compression, figures_direction
from gradprobe.analysis_inputs import (
    first_targets,
    format_number,
    format_table,
    format_with_interval,
    open_dumps,
    subjects_of,
    warn,
)
from gradprobe.compression import Ratio
from gradprobe.console import say, script_main
from gradprobe.direction import BucketDirections, summarise
from gradprobe.dump import Dump, make_directory, read_json, write_text
from gradprobe.errors import InputError
from gradprobe.exp1 import BucketNumbers, Draws, Exp1
from gradprobe.report import render_report
from gradprobe.spectrum import Projection, project_to_plane

EXP1_HEADLINE = "exp1_headline.png"
TOP_BUCKET_ENERGY = "exp1_bin4_energy.png"
EXP2_HEADLINE = "exp2_headline.png"
REPLICATION = "exp12_replication.png"
COMPRESSION_COLUMNS = ("n", "PR [95%]", "unit-norm PR [95%]", "rank95 at equal n")
REPORT = "report.html"
ANALYSES_FIGURES = (CUMULATIVE_ENERGY, CROSS_BUCKET_COSINE, NORMS, HISTOGRAM, ALIGNMENT)


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

    results = measure_dumps(dumps, Draws(ceiling=0, null=0))
    compared = compare_with_first(results)["trained"] or []
    projections = [project_to_plane(dump.grads, np.arange(len(dump.grads))) for dump in dumps.values()]
    directions = [bucket_directions(dump, dump.bins - 1) for dump in dumps.values()]
    drawn = draw(dumps, results, compared, projections, directions)
    summaries = read_summaries(args.output_dir, dumps)
    if summaries is not None:
        drawn |= draw_replication(summaries, all_targets)

    for name, figure in drawn.items():
        figures.save(figure, args.output_dir / name)
    print(report(results, compared, directions), end="\n\n")
    if summaries is not None:
        write_report(args.output_dir, dumps, summaries, list(drawn))
    written = [*drawn, *([] if summaries is None else [REPORT])]
    print("\n".join(f"wrote {args.output_dir / name}" for name in written))
    return 0


def read_summaries(output_dir: Path, dumps: dict[str, Dump]) -> list[dict[str, Any]] | None:
    """What the analyses of these dumps left in `output_dir`; None, and a warning, if it is not there."""
    files = [output_dir / name for name in (EXP1_SUMMARY, EXP2_SUMMARY)]
    summaries = [read_json(file) if file.is_file() else {} for file in files]
    if all(_is_about(summary, dumps) for summary in summaries):
        return summaries
    say(
        f"warning: {REPORT} is not written, nor {REPLICATION} drawn: they need {EXP1_SUMMARY} and {EXP2_SUMMARY} of "
        f"these dumps in {output_dir}; run both analyses with base=... trained=... first"
    )
    return None


def _is_about(summary: dict[str, Any], dumps: dict[str, Dump]) -> bool:
    """Whether a summary holds these dumps' tags, of the same models and targets."""
    return list(summary) == list(dumps) and all(
        summary[tag][key] == dump.manifest[name]
        for tag, dump in dumps.items()
        for key, name in (("model", "model_path"), ("target", "target"), ("row_idx", "row_idx"))
    )


def write_report(output_dir: Path, dumps: dict[str, Dump], summaries: list[dict[str, Any]], drawn: list[str]) -> None:
    """Write `report.html` with the analyses' figures and those just `drawn`; what else lies there is of another run."""
    names = sorted({*ANALYSES_FIGURES, *drawn})
    pictures = {name: (output_dir / name).read_bytes() for name in names if (output_dir / name).is_file()}
    manifests = {tag: dump.manifest for tag, dump in dumps.items()}
    write_text(output_dir / REPORT, render_report(*summaries, manifests, pictures))


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
    results: dict[str, Exp1],
    compared: list[Ratio | None],
    projections: list[Projection],
    directions: list[BucketDirections],
) -> dict[str, figures.Figure]:
    """The three figures by file name."""
    subjects = subjects_of(dumps)
    buckets_of_rows = [dump.bin[shown.rows] for dump, shown in zip(dumps.values(), projections, strict=True)]
    return {
        EXP1_HEADLINE: figures_compression.draw_compression_headline(
            subjects, list(results.values()), compared, projections, buckets_of_rows
        ),
        TOP_BUCKET_ENERGY: figures_compression.draw_top_bucket_energy(
            subjects, [result.spectra[-1] for result in results.values()]
        ),
        EXP2_HEADLINE: figures_direction.draw_direction_headline(subjects, directions),
    }


def draw_replication(summaries: list[dict[str, Any]], dumps: dict[str, list[Dump]]) -> dict[str, figures.Figure]:
    """`exp12_replication.png` from the summaries where several targets were probed."""
    targets = [[dump.path.name for dump in found] for found in dumps.values()]
    if min(map(len, targets)) < 2:
        return {}
    tables = [[summary[tag].get("replication", {}) for tag in dumps] for summary in summaries]
    if any([table.get("targets") for table in both] != targets for both in tables):
        say(f"warning: {REPLICATION} is not drawn: the summaries are about other targets; run both analyses again")
        return {}
    return {REPLICATION: figures.draw_replication(subjects_of(first_targets(dumps)), *tables)}


def report(results: dict[str, Exp1], compared: list[Ratio | None], directions: list[BucketDirections]) -> str:
    """The numbers drawn, as tables for people."""
    bucket_table = format_table(
        ["bucket", *(f"{measure}, {tag}" for measure in COMPRESSION_COLUMNS for tag in results)],
        [
            [str(index), *(cell for cells in zip(*map(_compression_cells, both), strict=True) for cell in cells)]
            for index, both in enumerate(zip(*(result.buckets for result in results.values()), strict=True))
        ],
    )
    columns = ["prompts", "mean cos", "control n", "control mean", "rollout control n", "rollout control mean"]
    direction_table = format_table(
        ["highest-entropy bucket", *columns, "rho [95%]", "p (n)", "verdict"],
        [[tag, *_direction_cells(result)] for tag, result in zip(results, directions, strict=True)],
    )
    return f"{bucket_table}\n\n{comparison_report(*results, compared)}\n\n{direction_table}"


def _compression_cells(numbers: BucketNumbers) -> list[str]:
    """What `COMPRESSION_COLUMNS` names."""
    rank = numbers.matched_n.rank95
    return [
        str(numbers.n),
        format_with_interval(numbers.participation_ratio, numbers.participation_ratio_ci95),
        format_with_interval(numbers.participation_ratio_unit_norm, numbers.participation_ratio_unit_norm_ci95),
        format_number(None if rank is None else rank.mean, 1),
    ]


def _direction_cells(result: BucketDirections) -> list[str]:
    group = summarise(result.directions.cosines)
    controls = [summarise(v) for v in (result.directions.control_cosines, result.control_by_rollout_cosines)]
    found = result.alignment
    return [
        str(group.n),
        format_number(group.mean),
        *(cell for control in controls for cell in (str(control.n), format_number(control.mean))),
        format_with_interval(found.rho, found.ci95),
        format_p_value(found.p_value, found.n_prompts),
        found.verdict,
    ]


if __name__ == "__main__":
    sys.exit(main())
