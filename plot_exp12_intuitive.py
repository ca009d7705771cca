#!/usr/bin/env python3
"""The headline figures of both experiments, checkpoints beside each other.

Draws what the two analyses left in the output directory (their summaries, `exp1_arrays.npz` and `exp2_arrays.npz`), and
computes it from the dumps where they have not run, or on other dumps. Writes `exp1_headline.png` (participation ratios
and rank95 per bucket with intervals, a 2-D PCA of each), `exp1_bin4_energy.png` (cumulative energy of the
highest-entropy bucket; the file keeps its name where there are not 5 buckets) and `exp2_headline.png` (rho with its
verdict, cosines of correct and incorrect gradients with their controls' bands); with three or more checkpoints also
`exp12_trajectory.png` (unit-norm participation ratio, rho and the share of correct rollouts over them, in the order
given). Where several targets were probed these show the first, and `exp12_replication.png` shows each headline number
over all of them. From the summaries and all figures, those of Exp 3 too where `exp3_summary.json` lies there, it writes
`report.html`, one page to read or mail that leads with the answers and shows, from `rollouts.jsonl`, two rollouts as
text shaded by entropy and the commonest tokens of each bucket. The numbers drawn go to stdout.

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
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprobe.analysis.differences import other_study, refuse_different_targets, say_differences, study_of
from gradprobe.analysis.inputs import fingerprints_of, first_targets
from gradprobe.analysis.summaries import read_summary
from gradprobe.common.console import add_common_flags, log, parse_tagged_dumps, printable, script_main
from gradprobe.common.errors import InputError, raise_if_any
from gradprobe.common.files import make_directory, write_text
from gradprobe.dump.consistency import load_manifest
from gradprobe.dump.format import target_directories
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
from gradprobe.figures.look import Figure, add_format_flag, drawn_from, read_picture, save, subjects_of
from gradprobe.figures.replication import draw_replication
from gradprobe.figures.report import REPLICATION, render_report
from gradprobe.figures.rollouts import see_rollouts

REPORT = "report.html"
FIGURES_OF = {
    EXP1_SUMMARY: (CUMULATIVE_ENERGY, CROSS_BUCKET_COSINE, NORMS),
    EXP2_SUMMARY: (HISTOGRAM, ALIGNMENT),
    EXP3_SUMMARY: (EXP3_HEADLINE, KEEP_TOP, EXP3_TRAJECTORY),
}
"""What each analysis draws beside its summary."""


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
    add_format_flag(parser)
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
    refuse_different_targets(targets)
    fingerprints, summaries = fingerprints_of(targets), [read_summary(output_dir / name) for name in FIGURES_OF]
    *summaries, exp3 = summaries
    make_directory(output_dir)
    say_differences(targets)

    found = headlines_of(output_dir, paths, summaries, fingerprints)
    drawn = draw_headlines(sources, found)
    have_summaries = all(is_about(summary, fingerprints) for summary in summaries)
    if have_summaries:
        drawn |= draw_targets(summaries, targets)

    if have_summaries:
        exp3 = of_this_study(exp3, sources)
        pictures = pictures_of(output_dir, dict(zip(FIGURES_OF, (*summaries, exp3), strict=True)))
        seen = {tag: see_rollouts(one.path, one.manifest, entropy_edges(exp3.get(tag))) for tag, one in sources.items()}
    written = []
    for name, figure in drawn.items():
        written += save(figure, output_dir / name, {"manifest_sha256": fingerprints}, args.figure_format)
    print(headline_tables(found), end="\n\n")
    if have_summaries:
        pictures |= {name: (output_dir / name).read_bytes() for name in drawn}
        manifests = {tag: source.manifest for tag, source in sources.items()}
        page = render_report(*summaries, manifests, dict(sorted(pictures.items())), exp3, seen)
        write_text(output_dir / REPORT, page)
    else:
        tagged = " ".join(f"{tag}=..." for tag in paths)
        log.warning(
            f"{REPORT} is not written, nor {REPLICATION} drawn: they need {EXP1_SUMMARY} and {EXP2_SUMMARY} "
            f"of these dumps in {output_dir}; run both analyses with {tagged} first"
            + (f". The {REPORT} that lies there is of an earlier run" if (output_dir / REPORT).exists() else "")
        )
    written += [REPORT] if have_summaries else []
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


def pictures_of(output_dir: Path, summaries: Mapping[str, dict[str, Any]]) -> dict[str, bytes]:
    """The analyses' figures that were drawn from these very summaries; any other that lies there is named and left out.

    Raises:
        InputError: one is no PNG.
    """
    found = {}
    for summary, names in FIGURES_OF.items():
        for name in names if summaries[summary] else ():
            if not os.path.lexists(output_dir / name):
                continue
            content, about = read_picture(output_dir / name)
            if about == drawn_from(summary, summaries[summary]):
                found[name] = content
            else:
                log.warning(
                    f"{name} is left out of {REPORT}: it is of another run than {summary}; run that analysis again"
                )
    return found


def of_this_study(exp3: dict[str, Any], sources: Mapping[str, Source]) -> dict[str, Any]:
    """Exp 3's summary where each of its tags is of the same model and rollouts as here; else empty, and why is said."""
    reasons = []
    for tag, numbers in exp3.items():
        if tag not in sources:
            reasons.append(f"{tag} is none of the dumps given")
            continue
        differing = other_study(study_of(sources[tag].manifest), numbers["study"])
        reasons += [f"{tag} has another {', '.join(differing)}"] if differing else []
    if reasons:
        log.warning(
            f"{EXP3_SUMMARY} and its figures are left out of {REPORT}, as they are not of these rollouts: "
            f"{'; '.join(reasons)}"
        )
    return {} if reasons else exp3


def entropy_edges(signal: Mapping[str, Any] | None) -> list[float] | None:
    """Those of one tag's Exp 3; None where it has none, or chose tokens by something else."""
    return signal["edges"] if signal and signal["bucket_by"] == "entropy" else None


def refuse_different_buckets(sources: dict[str, Source]) -> None:
    """Raise `InputError` unless all dumps have the same number of buckets."""
    if len({source.bins for source in sources.values()}) > 1:
        counts = ", ".join(f"{source.path} has {source.bins}" for source in sources.values())
        raise InputError(f"buckets can only be compared where their number is the same: {counts}")


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
