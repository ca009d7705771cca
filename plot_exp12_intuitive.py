#!/usr/bin/env python3
"""What the study found: its three answers, one page with every figure, and what only several checkpoints can show.

Reads the summaries and figures that the analyses left in the output directory; where those of Exp 1 or 2 are missing,
or are of other dumps, it runs that analysis first. Writes `report.html`, one page to read or mail that opens with the
answers and shows, from `rollouts.jsonl`, two rollouts as text shaded by entropy and the commonest tokens of each
bucket; with Exp 3's part where `exp3_summary.json` of the same rollouts lies there. With three or more checkpoints also
`exp12_trajectory.png` (unit-norm participation ratio, rho and the share of correct rollouts, in the order given), and
where several targets were probed `exp12_replication.png` (the headline numbers over all of them). The answers go to
stdout.

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

import analyze_exp1_compression
import analyze_exp2_direction
from gradprobe.analysis.differences import other_study, refuse_different_targets, say_differences, study_of
from gradprobe.analysis.inputs import fingerprints_of
from gradprobe.analysis.summaries import Summary, read_summary
from gradprobe.common.console import add_common_flags, add_format_flag, log, parse_tagged_dumps, script_main
from gradprobe.common.errors import InputError, raise_if_any
from gradprobe.common.files import make_directory, read_json, write_text
from gradprobe.dump.consistency import load_manifest
from gradprobe.dump.format import target_directories


@dataclass(frozen=True)
class Source:
    """One target's dump, of which only the manifest is read."""

    path: Path
    manifest: dict[str, Any]


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
    """Read the summaries, or have them made; draw what needs several, write the report, print the answers."""
    args = parse_args(argv)
    output_dir, formats = args.output_dir, args.figure_format
    paths = dump_paths(args.dumps, {"base": args.base, "trained": args.trained})
    from gradprobe.exp1.summary import SUMMARY as EXP1_SUMMARY  # scipy, and below matplotlib and jinja2
    from gradprobe.exp2.summary import SUMMARY as EXP2_SUMMARY
    from gradprobe.exp3.summary import SUMMARY as EXP3_SUMMARY
    from gradprobe.figures.answers import answers_of, summed_up
    from gradprobe.figures.look import save
    from gradprobe.figures.report import REPORT, render_report
    from gradprobe.figures.rollouts import see_rollouts
    from gradprobe.figures.step_weights import SUMMARY as STEP_SUMMARY

    targets = read_sources(paths)
    sources = {tag: found[0] for tag, found in targets.items()}
    refuse_different_buckets(sources)
    refuse_different_targets(targets)
    make_directory(output_dir)
    say_differences(targets)

    fingerprints = fingerprints_of(targets)
    for name, analysis in ((EXP1_SUMMARY, analyze_exp1_compression), (EXP2_SUMMARY, analyze_exp2_direction)):
        if read_summary(output_dir / name, fingerprints) is None:
            log.info(f"{name} of these dumps is not there: running that analysis")
            analysis.analyse(paths, output_dir, formats=formats)
    exp1, exp2 = (read_summary(output_dir / name, fingerprints) or {} for name in (EXP1_SUMMARY, EXP2_SUMMARY))
    exp3 = exp3_of_this_study(output_dir / EXP3_SUMMARY, sources)
    written = save(draw_several(exp1, exp2, sources), output_dir, formats)

    answers, manifests = answers_of(exp1, exp2, exp3), {tag: source.manifest for tag, source in sources.items()}
    beside = [name for summary in (exp1, exp2, exp3) for one in summary.values() for name in one["files"]]
    beside += files_of_step(output_dir / STEP_SUMMARY, exp3)
    names = sorted({name for name in (*beside, *written) if name.endswith(".png")})
    pictures = {name: (output_dir / name).read_bytes() for name in names if (output_dir / name).exists()}
    seen = {tag: see_rollouts(one.path, one.manifest, entropy_edges(exp3.get(tag))) for tag, one in sources.items()}
    write_text(output_dir / REPORT, render_report(answers, exp1, exp2, exp3, manifests, pictures, seen))
    print("\n\n".join([summed_up(answers), *(answer.text() for answer in answers)]))
    log.info(f"wrote {output_dir}: {', '.join([*written, REPORT])}")
    return 0


def dump_paths(tagged: list[str], short: Mapping[str, Path | None]) -> dict[str, Path]:
    """The dumps by tag, in the order given: as TAG=DUMP, or by the flags named like the tags of `short`."""
    given = {tag: path for tag, path in short.items() if path is not None}
    if given and tagged:
        flags = " and ".join(f"--{tag}" for tag in given)
        raise InputError(f"{flags} and {tagged[0]!r} are given: name all dumps by TAG=DUMP, or two by these flags")
    if tagged:
        return parse_tagged_dumps(tagged)
    raise_if_any(f"--{tag} is missing; give --base and --trained, or TAG=DUMP ..." for tag in short if tag not in given)
    return given


def read_sources(paths: Mapping[str, Path]) -> dict[str, list[Source]]:
    """Every tag's targets, by their manifests; the problems of all are said together."""
    found: dict[str, list[Source]] = {}
    problems: list[str] = []
    for tag, path in paths.items():
        try:
            found[tag] = [Source(directory, load_manifest(directory)) for directory in target_directories(path)]
        except InputError as error:
            problems.extend(error.problems)
    raise_if_any(dict.fromkeys(problems))
    return found


def refuse_different_buckets(sources: Mapping[str, Source]) -> None:
    """Raise `InputError` unless all dumps have the same number of buckets."""
    if len({source.manifest["bins"] for source in sources.values()}) > 1:
        counts = ", ".join(f"{source.path} has {source.manifest['bins']}" for source in sources.values())
        raise InputError(f"buckets can only be compared where their number is the same: {counts}")


def exp3_of_this_study(file: Path, sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """Exp 3's summary where each of its tags is of the same model and rollouts as here; else empty, and why is said."""
    written = read_json(file) if file.exists() else {}
    found = read_summary(file, {tag: one.get("manifest_sha256", ()) for tag, one in written.items()})
    reasons = ["it is of another layout: run that analysis again"] if found is None else []
    for tag, numbers in (found or {}).items():
        if tag not in sources:
            reasons.append(f"{tag} is none of the dumps given")
            continue
        differing = other_study(study_of(sources[tag].manifest), numbers["study"])
        reasons += [f"{tag} has another {', '.join(differing)}"] if differing else []
    if reasons:
        log.warning(f"{file.name} is left out of report.html: {'; '.join(reasons)}")
    return {} if reasons else found or {}


def files_of_step(file: Path, exp3: Summary) -> list[str]:
    """The figures of the step itself, where it is the one along which Exp 3 looks."""
    found = read_json(file) if file.exists() else {}
    steps = [(one["step"]["from"], one["step"]["to"]) for one in exp3.values() if "step" in one]
    return found["files"] if (found.get("from"), found.get("to")) in steps else []


def entropy_edges(signal: Mapping[str, Any] | None) -> list[float] | None:
    """Those of one tag's pooled gradients; None where it has none, or chose tokens by something else."""
    return signal["edges"] if signal and "signal" in signal and signal["bucket_by"] == "entropy" else None


def draw_several(exp1: Summary, exp2: Summary, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Figures of what only several checkpoints, or several targets of each, can show."""
    from gradprobe.figures.checkpoints import EXP12_TRAJECTORY, MIN_OF_TRAJECTORY, draw_trajectory
    from gradprobe.figures.look import subjects_of
    from gradprobe.figures.replication import REPLICATION, draw_replication

    subjects, drawn = subjects_of(exp1), {}
    if len(subjects) >= MIN_OF_TRAJECTORY:
        correct = [correct_share(source.manifest) for source in sources.values()]
        drawn[EXP12_TRAJECTORY] = draw_trajectory(subjects, list(exp1.values()), list(exp2.values()), correct)
    if all("replication" in one for one in (*exp1.values(), *exp2.values())):
        tables = [[one["replication"] for one in summary.values()] for summary in (exp1, exp2)]
        drawn[REPLICATION] = draw_replication(subjects, *tables)
    return drawn


def correct_share(manifest: Mapping[str, Any]) -> float | None:
    """The share of correct rollouts; None where there are none, or the manifest does not count them."""
    n_correct, n_rollouts = manifest.get("num_correct_rollouts"), manifest["num_rollouts"]
    return None if n_correct is None or n_rollouts == 0 else n_correct / n_rollouts


if __name__ == "__main__":
    sys.exit(main())
