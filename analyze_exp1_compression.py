#!/usr/bin/env python3
"""Exp 1: how many independent directions do the gradients of each entropy bucket span, and do buckets share them?

Reads one dump per tag and takes participation ratios, ranks and leading directions of each bucket's gradients (not
centred, float64) with their intervals, ceilings and nulls; docs/methods.md says what each means. The first tag is
what the others are compared with. Writes `exp1_summary.json`, `exp1_arrays.npz` (what the headline figures need
beside it), `exp1_cumulative_energy.png`, `exp1_cross_bucket_cosine.png` and `exp1_norms.png`; the tables go to stdout.
Reads the gradients block by block: memory is a few matrices of d × d numbers, or of a bucket's rows if these are fewer.

The study's dumps, results in out/exp12/exp12_figures:
    python analyze_exp1_compression.py base=out/exp12/exp12_base trained=out/exp12/exp12_trained

Two small dumps that come with the tests (a few seconds):
    python analyze_exp1_compression.py --output-dir /tmp/exp1 \\
        s0=tests/data/golden/aligned/s0 s1=tests/data/golden/aligned/s1
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.analysis.gram import DEVICES, HOST, Arithmetic, arithmetic_for
from gradprobe.analysis.inputs import (
    MISSING,
    default_output_dir,
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
from gradprobe.common.files import make_directory, write_json
from gradprobe.dump.format import Dump
from gradprobe.exp1.compression import (
    Ratio,
    compare_buckets,
    drawn_number,
    rollout_codes,
    row_squared_norms,
    sums_of_rows,
)
from gradprobe.exp1.measure import (
    Draws,
    Exp1,
    chance_outside_null,
    measure_dump,
    n_steps,
    place_in_null,
    smallest_bucket,
)
from gradprobe.exp1.spectrum import project_to_plane, smaller_gram, spectrum_of_gram
from gradprobe.figures import exp1 as figures_compression
from gradprobe.figures import look as figures
from gradprobe.figures.inputs import EXP1_ARRAYS, Compression, fingerprint, write_compression

SUMMARY = "exp1_summary.json"
CUMULATIVE_ENERGY = "exp1_cumulative_energy.png"
CROSS_BUCKET_COSINE = "exp1_cross_bucket_cosine.png"
NORMS = "exp1_norms.png"
RANKS = ("rank50", "rank90", "rank95", "rank99")
REPLICATED = ("participation_ratio", "participation_ratio_unit_norm", "rank95")
OVERLAP_SHOWN = str(figures_compression.OVERLAP_SHOWN)
NULL_MARKS = {-1: "<", 0: " ", 1: ">"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="+", metavar="TAG=DUMP", help="a name for the results, and a dump's directory")
    parser.add_argument(
        "--output-dir", type=Path, metavar="D", help="made if needed (default: exp12_figures beside the first dump)"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="where matrices are multiplied and decomposed (default: cpu)"
    )
    add_common_flags(parser)
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Read the dumps, compute every number, then write the summary, the figures and the tables."""
    args = parse_args(argv)
    arithmetic = arithmetic_for(args.device)
    paths = parse_tagged_dumps(args.dumps)
    all_targets = open_dumps(paths)
    output_dir = args.output_dir or default_output_dir(next(iter(paths.values())))
    make_directory(output_dir)
    warn(all_targets)

    dumps = first_targets(all_targets)
    results, compared = measure_dumps(dumps, arithmetic=arithmetic)
    fingerprints = {tag: [fingerprint(dump.path) for dump in targets] for tag, targets in all_targets.items()}
    summary = {tag: summary_of(dump, results[tag], fingerprints[tag]) for tag, dump in dumps.items()}
    for tag, targets in all_targets.items():
        if len(targets) > 1:
            summary[tag]["replication"] = replication_of(tag, targets, summary[tag]["per_bucket"], arithmetic)
    first_tag = next(iter(dumps))
    for tag, ratios in compared.items():
        summary[tag]["compared_with"] = {first_tag: _by_bucket(ratios)}
    drawn = draw(dumps, results)

    for_figures = {tag: figure_inputs(dump, results[tag]) for tag, dump in dumps.items()}
    write_compression(output_dir / EXP1_ARRAYS, for_figures, fingerprints)
    write_json(output_dir / SUMMARY, summary)
    for name, figure in drawn.items():
        figures.save(figure, output_dir / name)
    for tag, numbers in summary.items():
        print(report(tag, numbers, results[tag]), end="\n\n")
    for tag, ratios in compared.items():
        print(comparison_report(first_tag, tag, ratios), end="\n\n")
    print("\n".join(printable(f"wrote {output_dir / name}") for name in (SUMMARY, EXP1_ARRAYS, *drawn)))
    return 0


def measure_dumps(
    dumps: Mapping[str, Dump], draws: Draws | None = None, arithmetic: Arithmetic = HOST
) -> tuple[dict[str, Exp1], dict[str, list[Ratio | None] | None]]:
    """Exp 1 of every dump, at the smallest bucket of all, with progress on stderr; and further tags against the first.

    What only comparisons need is kept of the first dump alone: of many checkpoints it would outgrow all else.
    """
    keys = sorted({key for dump in dumps.values() for key in dump.prompt_keys}, key=str)
    code = {key: number for number, key in enumerate(keys)}  # the same prompt has the same number in all dumps
    common_n = smallest_bucket(dump.bin for dump in dumps.values())
    results: dict[str, Exp1] = {}
    compared = {}
    for tag, dump in dumps.items():
        total = n_steps(dump.bins, draws)
        steps = progress(range(total), f"{tag}: Exp 1", total, "steps")
        next(steps)
        prompt = np.array([code[key] for key in dump.prompt_keys], dtype=int)[dump.prompt]
        result = measure_dump(
            dump.grads, dump.bin, dump.bins, prompt, rollout_codes(dump.prompt, dump.sample_idx), common_n,
            draws=draws, on_step=lambda steps=steps: next(steps, None), arithmetic=arithmetic,
        )  # fmt: skip
        if results:
            compared[tag] = compare(next(iter(results.values())), result)
            result = replace(result, sums=[])
        results[tag] = result
    return results, compared


def compare(first: Exp1, result: Exp1) -> list[Ratio | None] | None:
    """One dump's buckets against the first's; None where these have another number of buckets."""
    if len(first.sums) != len(result.sums):
        return None
    return [compare_buckets(one, other) for one, other in zip(first.sums, result.sums, strict=True)]


def figure_inputs(dump: Dump, result: Exp1) -> Compression:
    """What the headline figures need of one dump."""
    projection = project_to_plane(dump.grads, np.arange(len(dump.grads)))
    energies = [spectrum.energies for spectrum in result.spectra]
    return Compression(result.buckets, energies, projection, dump.bin[projection.rows])


def draw(dumps: Mapping[str, Dump], results: Mapping[str, Exp1]) -> dict[str, figures.Figure]:
    """The figures by file name."""
    subjects, found = subjects_of(dumps), list(results.values())
    rows = [
        figures_compression.Rows(
            dump.bin,
            np.sqrt(row_squared_norms(dump.grads, np.arange(len(dump.grads)))),
            None if dump.logprob is None else -dump.logprob,
        )
        for dump in dumps.values()
    ]
    return {
        CUMULATIVE_ENERGY: figures_compression.draw_cumulative_energy(subjects, [result.spectra for result in found]),
        CROSS_BUCKET_COSINE: figures_compression.draw_cross_bucket(subjects, found),
        NORMS: figures_compression.draw_norms(subjects, found, rows),
    }


def summary_of(dump: Dump, result: Exp1, fingerprints: list[str]) -> dict[str, Any]:
    """One tag's part of `exp1_summary.json`. `fingerprints`: of the dumps of all its targets."""
    return {
        "n_positions": len(dump.grads),
        "row_dim": dump.row_dim,
        "target": dump.manifest["target"],
        "row_idx": dump.manifest["row_idx"],
        "model": dump.manifest["model_path"],
        "manifest_sha256": fingerprints,
        **result.as_json(),
    }


def replication_of(
    tag: str, dumps: list[Dump], first: dict[str, dict[str, Any]], arithmetic: Arithmetic = HOST
) -> dict[str, Any]:
    """How a tag's numbers vary over its targets. `first`: the first target's `per_bucket`."""
    others = (replicated_numbers(dump, arithmetic) for dump in dumps[1:])
    further = progress(others, f"{tag}: further targets", len(dumps) - 1, "targets")
    numbers = [first, *further]
    return {
        "targets": [dump.path.name for dump in dumps],
        **{
            measure: {bucket: spread_of([target[bucket][measure] for target in numbers]) for bucket in first}
            for measure in REPLICATED
        },
    }


def replicated_numbers(dump: Dump, arithmetic: Arithmetic = HOST) -> dict[str, dict[str, float | int | None]]:
    """Of each bucket what `REPLICATED` names: no draws, and one Gram matrix each."""
    rollout = rollout_codes(dump.prompt, dump.sample_idx)
    found = {}
    for index in range(dump.bins):
        rows = dump.rows_of_bucket(index)
        gram = smaller_gram(dump.grads, rows, arithmetic) if len(rows) else np.zeros((0, 0))
        spectrum, _ = spectrum_of_gram(dump.grads, rows, gram, n_vectors=1, arithmetic=arithmetic)
        row_gram, columns = (gram, None) if len(rows) < dump.row_dim else (None, gram)
        sums = sums_of_rows(
            dump.grads, rows, rollout[rows], dump.prompt[rows], row_gram, columns=columns, arithmetic=arithmetic
        )
        unit_norm = float(sums.unit_norm_participation_ratios(np.ones((1, len(sums.n))))[0])
        values = (spectrum.participation_ratio, unit_norm if np.isfinite(unit_norm) else None, spectrum.rank(0.95))
        found[str(index)] = dict(zip(REPLICATED, values, strict=True))
    return found


def report(tag: str, numbers: dict[str, Any], result: Exp1) -> str:
    """One tag's results as tables for people."""
    source = printable(f"{tag}: {numbers['model']}, {numbers['target']}[{numbers['row_idx']}]")
    draws, common_n = numbers["draws"], numbers["per_bucket"]["0"]["matched_n"]["n"]
    return (
        f"{source}\n"
        f"{numbers['n_positions']} positions of dimension {numbers['row_dim']}; bucket 0 has the lowest entropy; "
        f"[..] hold 95%\n"
        f"PR: participation ratio; unit-norm: of the rows at length 1; isotropic: of random directions with these "
        f"norms; ESS: what PR can't exceed\n"
        f"{_ratio_table(numbers['per_bucket'])}\n\n"
        f"directions by the energy they hold; at n = {common_n}: mean [95%] over subsamples of whole rollouts\n"
        f"{_rank_table(numbers['per_bucket'])}\n\n"
        f"|cos| between the buckets' top-1 right singular vectors; ceiling: the same between halves of one bucket, "
        f"mean [95%] of {draws['ceiling']}\n"
        f"< below, > above the 95% range of {draws['null']} shuffles of bucket labels within rollouts "
        f"(either by chance: about {chance_outside_null(draws['null']):.0%})\n"
        f"repeats: is the ceiling above random directions' |cos|? where it is not, a low |cos| says nothing\n"
        f"{_cross_table(result, 'top1_cosine', '|cos|')}\n\n"
        f"overlap of the top-{OVERLAP_SHOWN} subspaces, in the same way\n"
        f"{_cross_table(result, f'overlap/{OVERLAP_SHOWN}', 'overlap')}"
        f"{replication_report(numbers)}"
    )


def _ratio_table(per_bucket: dict[str, Any]) -> str:
    return format_table(
        ["bucket", "n", "PR [95%]", "unit-norm PR [95%]", "isotropic PR", "ESS [95%]"],
        [
            [
                index,
                str(row["n"]),
                format_with_interval(row["participation_ratio"], row["participation_ratio_ci95"]),
                format_with_interval(row["participation_ratio_unit_norm"], row["participation_ratio_unit_norm_ci95"]),
                format_number(row["participation_ratio_isotropic"], 2),
                format_with_interval(row["ess"], row["ess_ci95"], 1),
            ]
            for index, row in per_bucket.items()
        ],
    )


def _rank_table(per_bucket: dict[str, Any]) -> str:
    matched = ("participation_ratio", "participation_ratio_unit_norm", "rank95")
    return format_table(
        ["bucket", "effective rank", "top-1 energy", *RANKS, "PR at n", "unit-norm PR at n", "rank95 at n"],
        [
            [
                index,
                format_number(row["effective_rank"], 1),
                format_number(row["top1_energy_frac"]),
                *(format_number(row[rank]) for rank in RANKS),
                *(_drawn(row["matched_n"][measure], 1) for measure in matched),
            ]
            for index, row in per_bucket.items()
        ],
    )


def _cross_table(result: Exp1, measure: str, name: str) -> str:
    """One measure between buckets, beside each its place in the null, with every bucket's ceiling."""
    numbers, null = result.cross[measure], result.null[measure]
    rows = []
    for i, ceiling in enumerate(result.ceilings):
        cells = [
            format_number(value if np.isfinite(value) else None) + NULL_MARKS[place_in_null(value, null[:, i, j])]
            for j, value in enumerate(numbers[i])
        ]
        found = drawn_number(ceiling[measure])
        rows.append([str(i), *cells, _drawn(None if found is None else asdict(found), 3)])
    columns = [name, *(f"{index} " for index in range(len(numbers))), "ceiling [95%]"]
    if measure == "top1_cosine":
        columns.append("repeats")
        rows = [[*row, repeats or MISSING] for row, repeats in zip(rows, result.top1_repeats(), strict=True)]
    return format_table(columns, rows)


def comparison_report(first_tag: str, tag: str, ratios: list[Ratio | None] | None) -> str:
    """One tag against the first as a table for people."""
    title = printable(f"{tag} over {first_tag}: unit-norm participation ratio at equal n")
    if ratios is None:
        return f"{title}: not compared, the number of buckets differs"
    rows = []
    for index, ratio in enumerate(ratios):
        if ratio is None:
            rows.append([str(index), MISSING, MISSING, MISSING, "no number"])
            continue
        with_interval = format_with_interval(ratio.ratio, ratio.ci95, 3)
        rows.append([str(index), str(ratio.n), str(ratio.n_prompts), with_interval, ratio.verdict])
    table = format_table(["bucket", "n", "prompts", "ratio [95%]", "verdict"], rows)
    return f"{title}, over the prompts of both\n{table}"


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


def _by_bucket(ratios: list[Ratio | None] | None) -> dict[str, Any] | None:
    if ratios is None:
        return None
    return {str(index): None if ratio is None else asdict(ratio) for index, ratio in enumerate(ratios)}


def _drawn(number: dict[str, Any] | None, decimals: int) -> str:
    return format_number(None) if number is None else format_with_interval(number["mean"], number["ci95"], decimals)


if __name__ == "__main__":
    sys.exit(main())
