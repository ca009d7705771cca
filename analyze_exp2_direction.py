#!/usr/bin/env python3
"""Exp 2: at high-entropy tokens, do correct and incorrect rollouts of a prompt push the weights the same way?

For every prompt with at least 2 top-bucket tokens of correct and 2 of incorrect rollouts: the cosine between the
mean gradients of both kinds (+1: they would cancel under advantages of ±1; 0: orthogonal). The control, the cosine
between random halves of one prompt's tokens of one kind, is the noise floor. Writes `exp2_summary.json` and
`exp2_direction_cosine_hist.png`; the table goes to stdout.

The study's dumps, results in out/exp12/exp12_figures:
    python analyze_exp2_direction.py base=out/exp12/exp12_base trained=out/exp12/exp12_trained

One dump (the summary is then not keyed by tag); this one comes with the tests (a second):
    python analyze_exp2_direction.py --output-dir /tmp/exp2 tests/data/golden/aligned/s0
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradprobe import figures
from gradprobe.analysis_inputs import (
    default_output_dir,
    directory_name,
    first_targets,
    format_number,
    format_replication,
    format_table,
    open_dumps,
    subjects_of,
    warn,
)
from gradprobe.console import parse_tagged_dumps, printable, script_main
from gradprobe.direction import Directions, compare_groups, summarise
from gradprobe.dump import Dump, make_directory, write_json
from gradprobe.replication import spread_of

SUMMARY = "exp2_summary.json"
HISTOGRAM = "exp2_direction_cosine_hist.png"
REPLICATED = {
    "mean_cosine": ("correct_vs_incorrect", "mean"),
    "control_mean": ("control_within_group", "mean"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "dumps", nargs="+", metavar="DUMP | TAG=DUMP", help="one dump's directory, or any number with a name for each"
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="D", help="made if needed (default: exp12_figures beside the first dump)"
    )
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Read the dumps, compare the groups of every prompt, then write the summary, the figure and the table."""
    args = parse_args(argv)
    paths = parse_tagged_dumps(args.dumps, allow_untagged=True)
    dumps = open_dumps(paths)
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    make_directory(output_dir)
    warn(dumps)

    directions = {tag: [top_bucket_directions(dump) for dump in targets] for tag, targets in dumps.items()}
    summary = {tag: summary_over_targets(dumps[tag], directions[tag]) for tag in dumps}
    subjects = subjects_of(first_targets(dumps))
    histogram = figures.draw_direction_histogram(subjects, [targets[0] for targets in directions.values()])

    write_json(output_dir / SUMMARY, summary.get(None, summary))
    figures.save(histogram, output_dir / HISTOGRAM)
    print(report(summary), end="\n\n")
    print("\n".join(f"wrote {output_dir / name}" for name in (SUMMARY, HISTOGRAM)))
    return 0


def top_bucket_directions(dump: Dump) -> Directions:
    """Correct against incorrect, and the control, at the tokens of the highest entropy bucket."""
    rows = dump.rows_of_bucket(dump.bins - 1)
    return compare_groups(dump.grads, rows, dump.prompt, dump.correct, len(dump.prompt_keys))


def summary_over_targets(dumps: list[Dump], directions: list[Directions]) -> dict[str, Any]:
    """One tag's part of `exp2_summary.json`: its first target, and how its numbers vary over all of them."""
    numbers = [summary_of(dump, result) for dump, result in zip(dumps, directions, strict=True)]
    if len(dumps) == 1:
        return numbers[0]
    replication = {
        "targets": [dump.path.name for dump in dumps],
        **{name: spread_of([target[part][key] for target in numbers]) for name, (part, key) in REPLICATED.items()},
    }
    return {**numbers[0], "replication": replication}


def summary_of(dump: Dump, directions: Directions) -> dict[str, Any]:
    """The numbers of one target."""
    numbers = asdict(summarise(directions.cosines))
    control = summarise(directions.control_cosines)
    return {
        "run_dir": directory_name(dump.path),
        "model": dump.manifest["model_path"],
        "target": dump.manifest["target"],
        "row_idx": dump.manifest["row_idx"],
        "bucket": dump.bins - 1,
        "n_prompts": directions.n_prompts,
        "n_prompts_usable": len(directions.per_prompt),
        "n_prompts_zero_mean": len(directions.per_prompt) - numbers.pop("n"),
        "correct_vs_incorrect": numbers,
        "control_within_group": {
            "mean": control.mean,
            "median": control.median,
            "n": control.n,
            "n_zero_mean": len(directions.control) - control.n,
        },
        "per_prompt": [
            {
                "prompt_idx": dump.prompt_keys[prompt.prompt],
                "n_correct_tokens": prompt.n_correct_tokens,
                "n_incorrect_tokens": prompt.n_incorrect_tokens,
                "cos_correct_vs_incorrect": prompt.cosine,
            }
            for prompt in directions.per_prompt
        ],
    }


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
    return "\n".join([*sources, "", groups, "", controls, *left_out, *replication])


if __name__ == "__main__":
    sys.exit(main())
