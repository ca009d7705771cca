"""Exp 1's results as `exp1_summary.json` has them, and as tables for people."""

from dataclasses import asdict
from typing import Any

import numpy as np

from ..analysis.text import MISSING, format_number, format_replication, format_table, format_with_interval
from ..common.console import printable
from ..dump.format import Dump, model_of, shown_projection, target_name
from .compression import DrawnNumber, drawn_number
from .measure import REPLICATED, Comparison, Exp1, chance_outside_null, place_in_null

SUMMARY = "exp1_summary.json"
RANKS = ("rank50", "rank90", "rank95", "rank99")
OVERLAP_SHOWN = 10
NULL_MARKS = {-1: "<", 0: " ", 1: ">"}


def summary_of(dump: Dump, result: Exp1, fingerprints: list[str]) -> dict[str, Any]:
    """One tag's part of `exp1_summary.json`. `fingerprints`: of the dumps of all its targets."""
    return {
        "n_positions": len(dump.grads),
        "row_dim": dump.row_dim,
        "target": dump.manifest["target"],
        "row_idx": dump.manifest["row_idx"],
        "projection": shown_projection(dump.manifest),
        "model": model_of(dump.manifest),
        "manifest_sha256": fingerprints,
        **numbers_of(result),
    }


def numbers_of(result: Exp1) -> dict[str, Any]:
    """The keys of `exp1_summary.json` that come from here; no NaN in it."""
    tree = nested({path: _table(values) for path, values in result.cross.items()})
    ceilings = [{path: _drawn_json(values) for path, values in ceiling.items()} for ceiling in result.ceilings]
    null = {path: _drawn_table(values) for path, values in result.null.items()}
    return {
        "per_bucket": {str(index): asdict(numbers) for index, numbers in enumerate(result.buckets)},
        "cross_bucket_top1_cosine": tree["top1_cosine"],
        "cross_bucket_ceiling": [
            None if ceiling["top1_cosine"] is None else ceiling["top1_cosine"]["mean"] for ceiling in ceilings
        ],
        "cross_bucket_top1_repeats": result.top1_repeats(),
        "cross_bucket_overlap": tree["overlap"],
        "cross_bucket_captured_energy": tree["captured"],
        "cross_bucket_ceiling_detail": [nested(ceiling) for ceiling in ceilings],
        "cross_bucket_null": nested(null),
        "draws": result.settings.to_dict(),
    }


def nested(by_path: dict[str, Any]) -> dict[str, Any]:
    """{"top1_cosine": x, "overlap/5": y} as {"top1_cosine": x, "overlap": {"5": y}}."""
    tree: dict[str, Any] = {}
    for path, value in by_path.items():
        name, _, size = path.partition("/")
        if size:
            tree.setdefault(name, {})[size] = value
        else:
            tree[name] = value
    return tree


def _table(values: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in values]


def _drawn_json(values: np.ndarray) -> dict[str, Any] | None:
    found: DrawnNumber | None = drawn_number(values)
    return None if found is None else asdict(found)


def _drawn_table(values: np.ndarray) -> list[list[dict[str, Any] | None]]:
    return [[_drawn_json(values[:, i, j]) for j in range(values.shape[2])] for i in range(values.shape[1])]


def report(tag: str, numbers: dict[str, Any], result: Exp1) -> str:
    """One tag's results as tables for people."""
    source = printable(f"{tag}: {numbers['model']}, {target_name(numbers)}")
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
        f"|cos| between the buckets' top-1 right singular vectors; halves: the same between halves of one bucket's "
        f"prompts, mean [95%] of {draws['ceiling']};\n"
        f"no bound: halves hold half the gradients, so two buckets may come out higher\n"
        f"< below, > above the 95% range of {draws['null']} shuffles of bucket labels within rollouts "
        f"(either by chance: about {chance_outside_null(draws['null']):.0%})\n"
        f"repeats: are the halves above random directions' |cos|? where it is not, a low |cos| says nothing\n"
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
    """One measure between buckets, beside each its place in the null, and between halves of every bucket."""
    numbers, null = result.cross[measure], result.null[measure]
    rows = []
    for i, ceiling in enumerate(result.ceilings):
        cells = [
            format_number(value if np.isfinite(value) else None) + NULL_MARKS[place_in_null(value, null[:, i, j])]
            for j, value in enumerate(numbers[i])
        ]
        rows.append([str(i), *cells, _drawn(_drawn_json(ceiling[measure]), 3)])
    columns = [name, *(f"{index} " for index in range(len(numbers))), "halves [95%]"]
    if measure == "top1_cosine":
        columns.append("repeats")
        rows = [[*row, repeats or MISSING] for row, repeats in zip(rows, result.top1_repeats(), strict=True)]
    return format_table(columns, rows)


def comparison_report(first_tag: str, tag: str, found: Comparison) -> str:
    """One tag against the first as a table for people."""
    title = printable(f"{tag} over {first_tag}: unit-norm participation ratio at equal n")
    if found.ratios is None:
        return f"{title}: not compared, {found.reason}"
    rows = []
    for index, ratio in enumerate(found.ratios):
        if ratio is None:
            rows.append([str(index), MISSING, MISSING, MISSING, "no number"])
            continue
        with_interval = format_with_interval(ratio.ratio, ratio.ci95, 3)
        rows.append([str(index), str(ratio.n), str(ratio.n_prompts), with_interval, ratio.verdict])
    table = format_table(["bucket", "n", "prompts", "ratio [95%]", "verdict"], rows)
    return f"{title}, over the {found.pairs.n_prompts} prompts of both, paired by {found.pairs.by}\n{table}"


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


def comparison_of(first_tag: str, found: Comparison) -> dict[str, Any]:
    """The keys of one tag's part that compare it with the first."""
    ratios = None
    if found.ratios is not None:
        ratios = {str(index): None if ratio is None else asdict(ratio) for index, ratio in enumerate(found.ratios)}
    paired = asdict(found.pairs) | {"reason": found.reason}
    return {"compared_with": {first_tag: ratios}, "paired_with": {first_tag: paired}}


def _drawn(number: dict[str, Any] | None, decimals: int) -> str:
    return format_number(None) if number is None else format_with_interval(number["mean"], number["ci95"], decimals)
