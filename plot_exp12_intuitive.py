#!/usr/bin/env python3
"""The headline figures of both experiments, checkpoints beside each other.

Draws what the two analyses left in the output directory (their summaries, `exp1_arrays.npz` and `exp2_arrays.npz`), and
computes it from the dumps where they have not run, or on other dumps. Writes `exp1_headline.png` (participation ratios
and rank95 per bucket with intervals, a 2-D PCA of each), `exp1_bin4_energy.png` (cumulative energy of the
highest-entropy bucket; the file keeps its name where there are not 5 buckets) and `exp2_headline.png` (rho with its
verdict, cosines of correct and incorrect gradients with their controls); with three or more checkpoints also
`exp12_trajectory.png` (unit-norm participation ratio, rho and the share of correct rollouts over them, in the order
given). Where several targets were probed these show the first, and `exp12_replication.png` shows each headline number
over all of them. From the summaries and all figures it writes `report.html`, one page to read or mail. The numbers
drawn go to stdout.

The study's dumps:
    python plot_exp12_intuitive.py --base out/exp12/exp12_base --trained out/exp12/exp12_trained \\
        --output-dir out/exp12/exp12_figures

Any number of checkpoints; the first is what the others are compared with:
    python plot_exp12_intuitive.py --output-dir out/exp12/exp12_figures base=out/exp12/exp12_base \\
        step100=out/exp12/exp12_step100 step500=out/exp12/exp12_step500

Two small dumps that come with the tests (a few seconds):
    python plot_exp12_intuitive.py --base tests/data/golden/aligned/s0 --trained tests/data/golden/aligned/s1 \\
        --output-dir /tmp/exp12_figures
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyze_exp1_compression import CROSS_BUCKET_COSINE, CUMULATIVE_ENERGY, NORMS, comparison_report, figure_inputs
from analyze_exp1_compression import SUMMARY as EXP1_SUMMARY
from analyze_exp1_compression import measure_dumps as measure_compression
from analyze_exp2_direction import ALIGNMENT, HISTOGRAM, bucket_directions, format_p_value
from analyze_exp2_direction import SUMMARY as EXP2_SUMMARY
from gradprobe.analysis.inputs import (
    first_targets,
    format_number,
    format_table,
    format_with_interval,
    open_dumps,
    subjects_of,
    warn,
)
from gradprobe.common.console import add_common_flags, log, parse_tagged_dumps, printable, script_main
from gradprobe.common.errors import InputError, raise_if_any
from gradprobe.common.files import make_directory, read_json, write_text
from gradprobe.dump.format import Dump, load_manifest, target_directories
from gradprobe.exp1.compression import Ratio
from gradprobe.exp1.measure import BucketNumbers, Draws
from gradprobe.exp2.direction import BucketDirections, summarise
from gradprobe.figures import exp1 as figures_compression
from gradprobe.figures import exp2 as figures_direction
from gradprobe.figures import look as figures
from gradprobe.figures import trajectory as figures_trajectory
from gradprobe.figures.inputs import (
    EXP1_ARRAYS,
    EXP2_ARRAYS,
    Compression,
    NotTheseDumps,
    fingerprint,
    is_about,
    read_compression,
    read_directions,
)
from gradprobe.figures.report import REPLICATION, TRAJECTORY, render_report

EXP1_HEADLINE = "exp1_headline.png"
TOP_BUCKET_ENERGY = "exp1_bin4_energy.png"
EXP2_HEADLINE = "exp2_headline.png"
COMPRESSION_COLUMNS = ("n", "PR [95%]", "unit-norm PR [95%]", "rank95 at equal n")
REPORT = "report.html"
ANALYSES_FIGURES = (CUMULATIVE_ENERGY, CROSS_BUCKET_COSINE, NORMS, HISTOGRAM, ALIGNMENT)
MIN_OF_TRAJECTORY = 3
Comparisons = dict[str, list[Ratio | None] | None]


@dataclass(frozen=True)
class Source:
    """One target's dump, of which only the manifest is read.

    Attributes:
        path: its directory.
        manifest: `manifest.json` as it stands.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def bins(self) -> int:
        """The number of entropy buckets."""
        return self.manifest["bins"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="*", metavar="TAG=DUMP", help="any number of dumps, with a name for each")
    parser.add_argument("--base", type=Path, metavar="DUMP", help="dump of the base model: short for base=DUMP")
    parser.add_argument("--trained", type=Path, metavar="DUMP", help="dump of the RL-trained model, with --base")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="D", help="made if needed")
    add_common_flags(parser)
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Take what the analyses computed, or compute it; then draw the figures, print the table and write the report."""
    args = parse_args(argv)
    paths = dump_paths(args)
    targets = read_sources(paths)
    sources = {tag: found[0] for tag, found in targets.items()}
    refuse_different_buckets(sources)
    make_directory(args.output_dir)
    for difference in differences(sources):
        log.warning(difference)

    fingerprints = {tag: [fingerprint(source.path) for source in found] for tag, found in targets.items()}
    summaries = read_summaries(args.output_dir)
    found, compared, directions = numbers_of(args.output_dir, paths, summaries, fingerprints)
    drawn = draw(sources, found, compared, directions)
    have_summaries = all(is_about(summary, fingerprints) for summary in summaries)
    if have_summaries:
        drawn |= draw_replication(summaries, targets)

    for name, figure in drawn.items():
        figures.save(figure, args.output_dir / name)
    print(report(found, compared, directions), end="\n\n")
    if have_summaries:
        write_report(args.output_dir, sources, summaries, list(drawn))
    else:
        tagged = " ".join(f"{tag}=..." for tag in paths)
        log.warning(
            f"{REPORT} is not written, nor {REPLICATION} drawn: they need {EXP1_SUMMARY} and {EXP2_SUMMARY} "
            f"of these dumps in {args.output_dir}; run both analyses with {tagged} first"
        )
    written = [*drawn, *([REPORT] if have_summaries else [])]
    print("\n".join(printable(f"wrote {args.output_dir / name}") for name in written))
    return 0


def dump_paths(args: argparse.Namespace) -> dict[str, Path]:
    """The dumps by tag, in the order given.

    Raises:
        InputError: both ways to name them are used, or neither, or --base without --trained.
    """
    short = {"base": args.base, "trained": args.trained}
    given = {tag: path for tag, path in short.items() if path is not None}
    if given and args.dumps:
        flags = " and ".join(f"--{tag}" for tag in given)
        raise InputError(f"{flags} and {args.dumps[0]!r} are given: name all dumps by TAG=DUMP, or two by these flags")
    if args.dumps:
        return parse_tagged_dumps(args.dumps)
    raise_if_any(f"--{tag} is missing; give --base and --trained, or TAG=DUMP ..." for tag in short if tag not in given)
    return given


def read_sources(paths: Mapping[str, Path]) -> dict[str, list[Source]]:
    """Every tag's targets, by their manifests.

    Raises:
        InputError: with the problems of all.
    """
    found: dict[str, list[Source]] = {}
    problems: list[str] = []
    for tag, path in paths.items():
        try:
            found[tag] = [Source(directory, load_manifest(directory)) for directory in target_directories(path)]
        except InputError as error:
            problems.extend(error.problems)
    raise_if_any(dict.fromkeys(problems))
    return found


def read_summaries(output_dir: Path) -> list[dict[str, Any]]:
    """Those of both analyses in `output_dir`; empty where there is none."""
    files = [output_dir / name for name in (EXP1_SUMMARY, EXP2_SUMMARY)]
    return [read_json(file) if file.is_file() else {} for file in files]


def numbers_of(
    output_dir: Path,
    paths: Mapping[str, Path],
    summaries: list[dict[str, Any]],
    fingerprints: dict[str, list[str]],
) -> tuple[dict[str, Compression], Comparisons, dict[str, BucketDirections]]:
    """Both experiments of every tag, from the analyses' files where these are about these dumps, else computed."""
    found = directions = None
    missing = []
    try:
        found, compared = read_compression(output_dir / EXP1_ARRAYS, summaries[0], fingerprints)
    except NotTheseDumps as reason:
        missing.append(f"Exp 1 ({reason})")
    try:
        directions = read_directions(output_dir / EXP2_ARRAYS, summaries[1], fingerprints)
    except NotTheseDumps as reason:
        missing.append(f"Exp 2 ({reason})")
    if missing:
        log.info(f"computing anew what the analyses did not leave about these dumps: {', '.join(missing)}")
        opened = open_dumps(paths)
        warn(opened)
        dumps = first_targets(opened)
    if found is None:
        found, compared = compute_compression(dumps)
    if directions is None:
        directions = {tag: bucket_directions(dump, dump.bins - 1) for tag, dump in dumps.items()}
    return found, compared, directions


def compute_compression(dumps: dict[str, Dump]) -> tuple[dict[str, Compression], Comparisons]:
    """What figures show of Exp 1, without what they don't: no ceilings, no nulls."""
    results, compared = measure_compression(dumps, Draws(ceiling=0, null=0))
    return {tag: figure_inputs(dump, results[tag]) for tag, dump in dumps.items()}, compared


def write_report(
    output_dir: Path, sources: dict[str, Source], summaries: list[dict[str, Any]], drawn: list[str]
) -> None:
    """Write `report.html` with the analyses' figures and those just `drawn`; what else lies there is of another run."""
    names = sorted({*ANALYSES_FIGURES, *drawn})
    pictures = {name: (output_dir / name).read_bytes() for name in names if (output_dir / name).is_file()}
    manifests = {tag: source.manifest for tag, source in sources.items()}
    write_text(output_dir / REPORT, render_report(*summaries, manifests, pictures))


def refuse_different_buckets(sources: dict[str, Source]) -> None:
    """Raise `InputError` unless all dumps have the same number of buckets."""
    if len({source.bins for source in sources.values()}) > 1:
        counts = ", ".join(f"{source.path} has {source.bins}" for source in sources.values())
        raise InputError(f"buckets can only be compared where their number is the same: {counts}")


def differences(sources: dict[str, Source]) -> list[str]:
    """What makes dumps hard to compare with the first, one line each."""
    (first_tag, first), *others = sources.items()
    return [
        f"{first_tag} and {tag} differ in {key}: {first.manifest.get(key)!r} and {source.manifest.get(key)!r}"
        for tag, source in others
        for key in ("target", "row_idx", "row_dim", "temperature")
        if first.manifest.get(key) != source.manifest.get(key)
    ]


def draw(
    sources: Mapping[str, Source | Dump],
    found: dict[str, Compression],
    compared: Comparisons,
    directions: dict[str, BucketDirections],
) -> dict[str, figures.Figure]:
    """The headline figures by file name, and the trajectory's where there are enough checkpoints."""
    subjects, of_subjects = subjects_of(sources), list(found.values())
    drawn = {
        EXP1_HEADLINE: figures_compression.draw_compression_headline(
            subjects, of_subjects, [ratios or [] for ratios in compared.values()]
        ),
        TOP_BUCKET_ENERGY: figures_compression.draw_top_bucket_energy(
            subjects, [one.spectrum(-1) for one in of_subjects]
        ),
        EXP2_HEADLINE: figures_direction.draw_direction_headline(subjects, list(directions.values())),
    }
    if len(subjects) >= MIN_OF_TRAJECTORY:
        drawn[TRAJECTORY] = figures_trajectory.draw_trajectory(
            subjects,
            [one.buckets for one in of_subjects],
            [result.alignment for result in directions.values()],
            [correct_share(source.manifest) for source in sources.values()],
        )
    return drawn


def correct_share(manifest: dict[str, Any]) -> float | None:
    """The share of correct rollouts; None where there are none, or the manifest does not count them."""
    n_correct, n_rollouts = manifest.get("num_correct_rollouts"), manifest["num_rollouts"]
    return None if n_correct is None or n_rollouts == 0 else n_correct / n_rollouts


def draw_replication(summaries: list[dict[str, Any]], targets: dict[str, list[Source]]) -> dict[str, figures.Figure]:
    """`exp12_replication.png` from the summaries where several targets were probed."""
    names = [[source.path.name for source in found] for found in targets.values()]
    if min(map(len, names)) < 2:
        return {}
    tables = [[summary[tag].get("replication", {}) for tag in targets] for summary in summaries]
    if any([table.get("targets") for table in of_all] != names for of_all in tables):
        log.warning(f"{REPLICATION} is not drawn: the summaries are about other targets; run both analyses again")
        return {}
    subjects = subjects_of({tag: found[0] for tag, found in targets.items()})
    return {REPLICATION: figures.draw_replication(subjects, *tables)}


def report(found: dict[str, Compression], compared: Comparisons, directions: dict[str, BucketDirections]) -> str:
    """The numbers drawn, as tables for people."""
    bucket_table = format_table(
        ["bucket", "tag", *COMPRESSION_COLUMNS],
        [
            [str(index), tag, *_compression_cells(numbers)]
            for index, of_all in enumerate(zip(*(one.buckets for one in found.values()), strict=True))
            for tag, numbers in zip(found, of_all, strict=True)
        ],
    )
    columns = ["prompts", "mean cos", "control n", "control mean", "rollout control n", "rollout control mean"]
    direction_table = format_table(
        ["highest-entropy bucket", *columns, "rho [95%]", "p (n)", "verdict"],
        [[tag, *_direction_cells(result)] for tag, result in directions.items()],
    )
    first = next(iter(found))
    comparisons = [comparison_report(first, tag, ratios) for tag, ratios in compared.items()]
    return "\n\n".join([bucket_table, *comparisons, direction_table])


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
