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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.analysis.gram import DEVICES, HOST, Arithmetic, arithmetic_for
from gradprobe.analysis.inputs import (
    default_output_dir,
    directory_name,
    first_targets,
    format_number,
    format_replication,
    format_table,
    format_with_interval,
    open_dumps,
    subjects_of,
    warn,
)
from gradprobe.analysis.replication import spread_of
from gradprobe.common.console import add_common_flags, parse_tagged_dumps, printable, progress, script_main
from gradprobe.common.errors import InputError
from gradprobe.common.files import make_directory, write_json
from gradprobe.dump.format import META, Dump
from gradprobe.exp2.direction import (
    MIN_ROLLOUTS_OF_EACH_KIND,
    MIN_TOKENS_OF_EACH_KIND,
    ORTHOGONAL_WITHIN,
    BucketDirections,
    directions_of_bucket,
    summarise,
)
from gradprobe.figures import exp2 as figures_direction
from gradprobe.figures import look as figures
from gradprobe.figures.inputs import EXP2_ARRAYS, fingerprint, write_directions

SUMMARY = "exp2_summary.json"
HISTOGRAM = "exp2_direction_cosine_hist.png"
ALIGNMENT = "exp2_alignment.png"
REPLICATED = {
    "mean_cosine": ("correct_vs_incorrect", "mean"),
    "control_mean": ("control_within_group", "mean"),
    "rho": ("alignment", "rho"),
}
COLUMNS = f"""\
Cosines: +1 same direction (would cancel under advantages of ±1), 0 orthogonal, -1 opposed.
  mean cos     of the mean gradients of correct and incorrect tokens of a prompt, where there are
               {MIN_TOKENS_OF_EACH_KIND} of each; noise pulls it to 0
  controls     the same between random halves of one prompt and kind: halves of its tokens, halves of its rollouts
  rho          mean cos with the noise removed, over prompts with {MIN_ROLLOUTS_OF_EACH_KIND} rollouts of each
               kind; not cut at ±1; no interval where what the rollouts of a kind share is not above 0 at the 95% level
  p (n)        under labels that mean nothing: correctness permuted over a prompt's rollouts, two-sided, n prompts;
               this is no test of rho = 0: rollouts that all share one direction obey it
  detectable   the least |rho| found with 80% power at the 5% level
  verdict      aligned, opposed: the interval lies above, below 0; orthogonal: it holds 0 and lies inside
               ±{ORTHOGONAL_WITHIN}; underpowered: can't tell
  C            |sum of advantage × gradient|² / sum of |advantage × gradient|², mean over prompts with both kinds: 1
               where rollouts are orthogonal, less where they cancel; null: advantages permuted within each prompt"""


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
    add_common_flags(parser)
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Read the dumps, compare the groups of every prompt, then write the summary, the figure and the table."""
    args = parse_args(argv)
    arithmetic = arithmetic_for(args.device)
    paths = parse_tagged_dumps(args.dumps, allow_untagged=True)
    dumps = open_dumps(paths)
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    make_directory(output_dir)
    warn(dumps)

    results, others = measure_dumps(dumps, arithmetic)
    fingerprints = {tag: [fingerprint(dump.path) for dump in targets] for tag, targets in dumps.items()}
    summary = {tag: summary_over_targets(dumps[tag], results[tag], others[tag]) for tag in dumps}
    for tag, numbers in summary.items():
        numbers["manifest_sha256"] = fingerprints[tag]
    drawn = draw(first_targets(dumps), list(results.values()))

    written = [SUMMARY, *drawn]
    if None not in dumps:
        write_directions(output_dir / EXP2_ARRAYS, {tag: found[-1] for tag, found in results.items()}, fingerprints)
        written.insert(1, EXP2_ARRAYS)
    write_json(output_dir / SUMMARY, summary.get(None, summary))
    for name, figure in drawn.items():
        figures.save(figure, output_dir / name)
    print(report(summary), end="\n\n")
    print("\n".join(printable(f"wrote {output_dir / name}") for name in written))
    return 0


def measure_dumps(
    dumps: Mapping[str | None, list[Dump]], arithmetic: Arithmetic = HOST
) -> tuple[dict[str | None, list[BucketDirections]], dict[str | None, list[BucketDirections]]]:
    """Of each tag, every bucket of its first target, and the bucket of highest entropy of its others."""
    wanted = {
        tag: [(targets[0], bucket) for bucket in range(targets[0].bins)] + [(d, d.bins - 1) for d in targets[1:]]
        for tag, targets in dumps.items()
    }
    total = sum(map(len, wanted.values()))
    steps = progress(range(total), "Exp 2", total, "buckets")
    next(steps)
    found: dict[str | None, list[BucketDirections]] = {tag: [] for tag in wanted}
    for tag, pairs in wanted.items():
        for dump, bucket in pairs:
            found[tag].append(bucket_directions(dump, bucket, arithmetic))
            next(steps, None)
    n_buckets = {tag: targets[0].bins for tag, targets in dumps.items()}
    return {tag: one[: n_buckets[tag]] for tag, one in found.items()}, {
        tag: one[n_buckets[tag] :] for tag, one in found.items()
    }


def bucket_directions(dump: Dump, bucket: int, arithmetic: Arithmetic = HOST) -> BucketDirections:
    """All of Exp 2 at the tokens of one entropy bucket.

    Raises:
        InputError: a rollout is called both correct and incorrect.
    """
    rows = dump.rows_of_bucket(bucket)
    try:
        return directions_of_bucket(
            dump.grads, rows, dump.prompt, dump.sample_idx, dump.correct, len(dump.prompt_keys), arithmetic=arithmetic
        )
    except ValueError as error:
        raise InputError(f"{dump.path / META}: {_mixed_rollout(dump, rows) or error}; probe again") from error


def _mixed_rollout(dump: Dump, rows: np.ndarray) -> str | None:
    """Name a rollout that has both correct and incorrect rows among `rows`, as the file does."""
    first: dict[tuple[int, int], bool] = {}
    for row in rows:
        code, sample, correct = int(dump.prompt[row]), int(dump.sample_idx[row]), bool(dump.correct[row])
        if first.setdefault((code, sample), correct) != correct:
            where = f"prompt_idx {dump.prompt_keys[code]}, sample_idx {sample}"
            return f"the rollout of {where} is called both correct and incorrect"
    return None


def draw(dumps: dict[str | None, Dump], results: list[list[BucketDirections]]) -> dict[str, figures.Figure]:
    """Both figures by file name. `results`: per dump, per bucket."""
    subjects = subjects_of(dumps)
    alignments = [[bucket.alignment for bucket in buckets] for buckets in results]
    return {
        ALIGNMENT: figures_direction.draw_alignment(subjects, alignments),
        HISTOGRAM: figures_direction.draw_direction_histogram(subjects, [buckets[-1] for buckets in results]),
    }


def summary_over_targets(
    dumps: list[Dump], of_first: list[BucketDirections], top_of_others: list[BucketDirections]
) -> dict[str, Any]:
    """One tag's part of `exp2_summary.json`: its first target, and how its numbers vary over all of them.

    Args:
        dumps: the targets.
        of_first: the first target's buckets.
        top_of_others: the bucket of highest entropy of every other target.
    """
    summary = summary_of(dumps[0], of_first)
    if len(dumps) == 1:
        return summary
    numbers = [summary, *map(measures_of, top_of_others)]
    replication = {
        "targets": [dump.path.name for dump in dumps],
        **{name: spread_of([target[part][key] for target in numbers]) for name, (part, key) in REPLICATED.items()},
    }
    return {**summary, "replication": replication}


def summary_of(dump: Dump, buckets: list[BucketDirections]) -> dict[str, Any]:
    """The numbers of one target: those of its bucket of highest entropy, and of every bucket under `by_bucket`."""
    top = buckets[-1]
    return {
        "run_dir": directory_name(dump.path),
        "model": dump.manifest["model_path"],
        "target": dump.manifest["target"],
        "row_idx": dump.manifest["row_idx"],
        "bucket": dump.bins - 1,
        "n_prompts": top.directions.n_prompts,
        **measures_of(top),
        "draws": {"bootstrap": top.n_bootstrap, "permutations": top.n_permutations},
        "per_prompt": [
            {
                "prompt_idx": dump.prompt_keys[prompt.prompt],
                "n_correct_tokens": prompt.n_correct_tokens,
                "n_incorrect_tokens": prompt.n_incorrect_tokens,
                "cos_correct_vs_incorrect": prompt.cosine,
            }
            for prompt in top.directions.per_prompt
        ],
        "by_bucket": {str(index): measures_of(result) for index, result in enumerate(buckets)},
    }


def measures_of(result: BucketDirections) -> dict[str, Any]:
    """The numbers of one bucket."""
    directions = result.directions
    numbers = asdict(summarise(directions.cosines))
    return {
        "n_prompts_usable": len(directions.per_prompt),
        "n_prompts_zero_mean": len(directions.per_prompt) - numbers.pop("n"),
        "correct_vs_incorrect": numbers,
        "control_within_group": _control(directions.control_cosines, len(directions.control)),
        "control_within_group_by_rollout": _control(result.control_by_rollout_cosines, len(result.control_by_rollout)),
        "alignment": asdict(result.alignment),
        "cancellation": {
            **asdict(result.cancellation),
            "group_normalised": asdict(result.cancellation_group_normalised),
        },
    }


def _control(cosines: np.ndarray, n_halved: int) -> dict[str, Any]:
    """A control's part of the summary; `n_halved` counts those without a cosine too."""
    control = summarise(cosines)
    return {"mean": control.mean, "median": control.median, "n": control.n, "n_zero_mean": n_halved - control.n}


def report(summary: dict[str | None, dict[str, Any]]) -> str:
    """All dumps' results as tables for people."""
    named = {printable(tag or numbers["run_dir"]): numbers for tag, numbers in summary.items()}
    sources = [printable(f"{name}: {n['model']}, {n['target']}[{n['row_idx']}]") for name, n in named.items()]
    groups = format_table(
        ["correct vs incorrect", "bucket", "usable prompts", "mean cos", "median", "std", "share > 0", "share > 0.5"],
        [
            [name, str(numbers["bucket"]), f"{numbers['n_prompts_usable']} of {numbers['n_prompts']}"]
            + [format_number(value) for value in numbers["correct_vs_incorrect"].values()]
            for name, numbers in named.items()
        ],
    )
    controls = format_table(
        ["control within group", "n", "mean cos", "median"],
        [
            [name, *(format_number(numbers["control_within_group"][key]) for key in ("n", "mean", "median"))]
            for name, numbers in named.items()
        ],
    )
    left_out = [
        f"{name}: left out because a mean gradient is zero: {numbers['n_prompts_zero_mean']} prompts, "
        f"{numbers['control_within_group']['n_zero_mean']} halves"
        for name, numbers in named.items()
        if numbers["n_prompts_zero_mean"] or numbers["control_within_group"]["n_zero_mean"]
    ]
    replicated = {
        f"{name}: {measure.replace('_', ' ')}": numbers["replication"][measure]
        for name, numbers in named.items()
        if "replication" in numbers
        for measure in REPLICATED
    }
    replication = ["", format_replication(replicated)] if replicated else []
    by_bucket = [table for name, numbers in named.items() for table in ("", bucket_tables(name, numbers["by_bucket"]))]
    draws = next(iter(named.values()))["draws"]
    counts = f"{draws['permutations']} permutations, {draws['bootstrap']} bootstrap draws per number."
    return "\n".join([*sources, "", groups, "", controls, *left_out, *by_bucket, "", COLUMNS, counts, *replication])


def bucket_tables(name: str, buckets: dict[str, dict[str, Any]]) -> str:
    """One dump's alignment and cancellation per bucket."""
    columns = ["usable prompts", "mean cos", "token control", "rollout control"]
    columns += ["rho [95%]", "p (n)", "detectable", "verdict"]
    alignments = format_table([f"{name}: bucket", *columns], list(map(_alignment_row, buckets, buckets.values())))
    of_signs = ["C, advantages ±1", "null [95%]", "p (n)"]
    of_normalised = ["C, group-normalised", "null [95%]", "p (n)"]
    cancellations = format_table(
        [f"{name}: bucket", *of_signs, *of_normalised],
        [
            [index, *_cancellation_cells(found), *_cancellation_cells(found["group_normalised"])]
            for index, found in ((index, numbers["cancellation"]) for index, numbers in buckets.items())
        ],
    )
    return f"{alignments}\n\n{cancellations}"


def _alignment_row(bucket: str, numbers: dict[str, Any]) -> list[str]:
    parts = ("correct_vs_incorrect", "control_within_group", "control_within_group_by_rollout")
    found = numbers["alignment"]
    return [
        bucket,
        str(numbers["n_prompts_usable"]),
        *(format_number(numbers[part]["mean"]) for part in parts),
        format_with_interval(found["rho"], found["ci95"]),
        format_p_value(found["p_value"], found["n_prompts"]),
        format_number(found["min_detectable"], 2),
        found["verdict"],
    ]


def _cancellation_cells(found: dict[str, Any]) -> list[str]:
    return [
        format_number(found["ratio"], 2),
        format_with_interval(found["null_mean"], found["null_ci95"]),
        format_p_value(found["p_value"], found["n_prompts"]),
    ]


def format_p_value(p_value: float | None, n: int) -> str:
    """`0.0002 (44)`: p with the number of prompts behind it."""
    return f"{format_number(p_value, 4)} ({n})"


if __name__ == "__main__":
    sys.exit(main())
