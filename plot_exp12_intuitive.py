#!/usr/bin/env python3
"""The headline figures of both experiments, checkpoints beside each other.

Draws what the two analyses left in the output directory (their summaries, `exp1_arrays.npz` and `exp2_arrays.npz`), and
computes it from the dumps where they have not run, or on other dumps. Writes `exp1_headline.png` (participation ratios
and rank95 per bucket with intervals, a 2-D PCA of each), `exp1_bin4_energy.png` (cumulative energy of the
highest-entropy bucket; the file keeps its name where there are not 5 buckets) and `exp2_headline.png` (rho with its
verdict, cosines of correct and incorrect gradients with their controls); with three or more checkpoints also
`exp12_trajectory.png` (unit-norm participation ratio, rho and the share of correct rollouts over them, in the order
given). Where several targets were probed these show the first, and `exp12_replication.png` shows each headline number
over all of them. From the summaries and all figures, those of Exp 3 too where `exp3_summary.json` lies there, it writes
`report.html`, one page to read or mail that leads with the answers. The numbers drawn go to stdout.

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

from gradprobe.analysis.inputs import fingerprints_of, first_targets
from gradprobe.common.console import add_common_flags, log, parse_tagged_dumps, printable, script_main
from gradprobe.common.errors import InputError, raise_if_any
from gradprobe.common.files import make_directory, read_json, write_text
from gradprobe.dump.format import load_manifest, target_directories
from gradprobe.exp1.summary import SUMMARY as EXP1_SUMMARY
from gradprobe.exp2.summary import SUMMARY as EXP2_SUMMARY
from gradprobe.exp3.summary import SUMMARY as EXP3_SUMMARY
from gradprobe.figures.exp1 import CROSS_BUCKET_COSINE, CUMULATIVE_ENERGY, NORMS
from gradprobe.figures.exp2 import ALIGNMENT, HISTOGRAM
from gradprobe.figures.exp3 import HEADLINE as EXP3_HEADLINE
from gradprobe.figures.exp3 import KEEP_TOP
from gradprobe.figures.exp3 import TRAJECTORY as EXP3_TRAJECTORY
from gradprobe.figures.headlines import draw_headlines, headline_tables
from gradprobe.figures.inputs import headlines_of, is_about
from gradprobe.figures.look import Figure, save, subjects_of
from gradprobe.figures.replication import draw_replication
from gradprobe.figures.report import REPLICATION, render_report

REPORT = "report.html"
ANALYSES_FIGURES = (CUMULATIVE_ENERGY, CROSS_BUCKET_COSINE, NORMS, HISTOGRAM, ALIGNMENT)
EXP3_FIGURES = (EXP3_HEADLINE, KEEP_TOP, EXP3_TRAJECTORY)


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
    output_dir, paths = args.output_dir, dump_paths(args.dumps, {"base": args.base, "trained": args.trained})
    targets = read_sources(paths)
    sources = first_targets(targets)
    refuse_different_buckets(sources)
    make_directory(output_dir)
    for difference in differences(sources):
        log.warning(difference)

    fingerprints, summaries = fingerprints_of(targets), read_summaries(output_dir)
    found = headlines_of(output_dir, paths, summaries, fingerprints)
    drawn = draw_headlines(sources, found)
    have_summaries = all(is_about(summary, fingerprints) for summary in summaries)
    if have_summaries:
        drawn |= draw_targets(summaries, targets)

    for name, figure in drawn.items():
        save(figure, output_dir / name)
    print(headline_tables(found), end="\n\n")
    if have_summaries:
        write_report(output_dir, sources, summaries, list(drawn))
    else:
        tagged = " ".join(f"{tag}=..." for tag in paths)
        log.warning(
            f"{REPORT} is not written, nor {REPLICATION} drawn: they need {EXP1_SUMMARY} and {EXP2_SUMMARY} "
            f"of these dumps in {output_dir}; run both analyses with {tagged} first"
        )
    written = [*drawn, *([REPORT] if have_summaries else [])]
    print("\n".join(printable(f"wrote {output_dir / name}") for name in written))
    return 0


def dump_paths(tagged: list[str], short: Mapping[str, Path | None]) -> dict[str, Path]:
    """The dumps by tag, in the order given: as TAG=DUMP, or by the flags named like the tags of `short`.

    Raises:
        InputError: both ways to name them are used, or neither, or --base without --trained.
    """
    given = {tag: path for tag, path in short.items() if path is not None}
    if given and tagged:
        flags = " and ".join(f"--{tag}" for tag in given)
        raise InputError(f"{flags} and {tagged[0]!r} are given: name all dumps by TAG=DUMP, or two by these flags")
    if tagged:
        return parse_tagged_dumps(tagged)
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


def write_report(
    output_dir: Path, sources: dict[str, Source], summaries: list[dict[str, Any]], drawn: list[str]
) -> None:
    """Write `report.html` with the analyses' figures and those just `drawn`; what else lies there is of another run."""
    exp3 = read_exp3(output_dir)
    names = sorted({*ANALYSES_FIGURES, *drawn, *(EXP3_FIGURES if exp3 else ())})
    pictures = {name: (output_dir / name).read_bytes() for name in names if (output_dir / name).is_file()}
    manifests = {tag: source.manifest for tag, source in sources.items()}
    write_text(output_dir / REPORT, render_report(*summaries, manifests, pictures, exp3))


def read_exp3(output_dir: Path) -> dict[str, Any]:
    """`exp3_summary.json`, where its every tag says which dumps it is about; empty otherwise."""
    file = output_dir / EXP3_SUMMARY
    found = read_json(file) if file.is_file() else {}
    is_told = all(isinstance(one, dict) and isinstance(one.get("manifest_sha256"), list) for one in found.values())
    return found if is_told else {}


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


def draw_targets(summaries: list[dict[str, Any]], targets: dict[str, list[Source]]) -> dict[str, Figure]:
    """`exp12_replication.png` from the summaries where several targets were probed."""
    names = [[source.path.name for source in found] for found in targets.values()]
    if min(map(len, names)) < 2:
        return {}
    tables = [[summary[tag].get("replication", {}) for tag in targets] for summary in summaries]
    if any([table.get("targets") for table in of_all] != names for of_all in tables):
        log.warning(f"{REPLICATION} is not drawn: the summaries are about other targets; run both analyses again")
        return {}
    subjects = subjects_of({tag: found[0] for tag, found in targets.items()})
    return {REPLICATION: draw_replication(subjects, *tables)}


if __name__ == "__main__":
    sys.exit(main())
