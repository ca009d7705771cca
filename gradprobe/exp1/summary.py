"""Exp 1's results as tables, and its one sentence: what the bucket of highest entropy says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.jackknife import MIN_PROMPTS, prompts_to_tell
from ..analysis.text import MISSING, Table, estimate, number, replication_table, share, share_estimate, with_interval
from ..common.files import bytes_aside
from .compression import CANT_TELL
from .proxies import ALL, ENTROPY, NEEDED, TOP_SHARE

SUMMARY = "exp1_summary.json"
ARRAYS = "exp1_arrays.npz"
TRUSTED = "participation_ratio_unit_norm"
NORMAL_95 = 1.96


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write `exp1_arrays.npz`, for people's own figures, and return its name."""
    with bytes_aside(directory / ARRAYS) as file:
        np.savez(file, **arrays)
    return ARRAYS


def random_span(n: int, dim: int) -> float:
    """The participation ratio of n isotropic directions in `dim` dimensions (the denominator in expectation)."""
    return n / (1 + (n - 1) / dim)


def top_bucket(numbers: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The bucket of highest entropy and its numbers."""
    return list(numbers["per_bucket"].items())[-1]


def span(bucket: Mapping[str, Any]) -> str:
    """A bucket's unit-norm participation ratio, `20.3 [19.4, 21.3]`, or why it has none."""
    if bucket[TRUSTED] is None:
        return "no gradients" if bucket["n"] == 0 else "all gradients are zero"
    return with_interval(bucket[TRUSTED], bucket[f"{TRUSTED}_ci95"], 1)


def share_of_random(numbers: Mapping[str, Any], bucket: Mapping[str, Any]) -> str:
    """A bucket's unit-norm participation ratio, which it has, over that of as many random directions: `6%`."""
    return share(bucket[TRUSTED] / random_span(bucket["n"], numbers["row_dim"]))


def compared(numbers: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None, Mapping[str, Any]] | None:
    """Which tag one is compared with, the ratio of each bucket (None: not compared), and how prompts were paired."""
    if "compared_with" not in numbers:
        return None
    ((first, ratios),) = numbers["compared_with"].items()
    return first, ratios, numbers["paired_with"][first]


def verdict_of(ratio: Mapping[str, Any] | None) -> str:
    """`smaller`, `larger`, `can't tell`, or `no number`."""
    return "no number" if ratio is None else ratio["verdict"]


def ratio_in_words(ratio: Mapping[str, Any] | None) -> str:
    """`1.069 [1.013, 1.126], larger`."""
    value = "" if ratio is None else f"{with_interval(ratio['ratio'], ratio['ci95'], 3)}, "
    return value + verdict_of(ratio)


def what_would_tell(ratio: Mapping[str, Any] | None) -> str | None:
    """What it would take to decide an undecided ratio; None of others."""
    if ratio is None or ratio["verdict"] != CANT_TELL:
        return None
    if ratio["ci95"] is None:
        return f"no interval from {ratio['n_prompts']} common prompts"
    value, low, high = np.log([ratio["ratio"], *ratio["ci95"]])
    z = float(2 * NORMAL_95 * abs(value) / (high - low)) if high > low else None
    return prompts_to_tell(ratio["n_prompts"], z)


def tables_of(tag: str, numbers: Mapping[str, Any]) -> list[Table]:
    """One tag's tables: buckets, the comparison with the first tag, proxies of the norms, the spread over targets."""
    tables = [_bucket_table(tag, numbers)]
    found = compared(numbers)
    if found is not None:
        tables.append(_comparison_table(tag, *found))
    tables.append(_proxy_table(tag, numbers))
    if "replication" in numbers:
        replication = numbers["replication"]
        spreads = {f"unit-norm PR, bucket {bucket}": one for bucket, one in replication[TRUSTED].items()}
        for name, groups in replication["proxies"].items():
            spreads |= {f"rank correlation of {name}, {group_name(group)}": one for group, one in groups.items()}
        tables.append(replication_table(tag, spreads))
    return tables


def _bucket_table(tag: str, numbers: Mapping[str, Any]) -> Table:
    top, of_top = top_bucket(numbers)
    note = f"bucket {top}, of highest entropy: {span(of_top)}"
    if of_top[TRUSTED] is not None:
        note += f" directions, {share_of_random(numbers, of_top)} of what random ones would span"
    intervals = [(bucket, one["participation_ratio_ci95"], one) for bucket, one in numbers["per_bucket"].items()]
    beyond = [
        b for b, ends, one in intervals if ends and not ends[0] <= one["participation_ratio_isotropic"] <= ends[1]
    ]
    notes = [note, f"buckets in which PR is not what their norms alone would give: {', '.join(beyond) or 'none'}"]
    halves, repeats = numbers["cross_bucket_ceiling"], numbers["cross_bucket_top1_repeats"]
    rows = [
        [
            bucket,
            number(found["n"]),
            span(found),
            with_interval(found["participation_ratio"], found["participation_ratio_ci95"]),
            number(found["ess"], 1),
            number(found["participation_ratio_isotropic"], 1),
            number(found["rank95"]),
            number(found["effective_rank"], 1),
            MISSING if repeat is None else f"{repeat} ({number(half, 2)})",
        ]
        for (bucket, found), half, repeat in zip(numbers["per_bucket"].items(), halves, repeats, strict=True)
    ]
    header = ["bucket", "n", "unit-norm PR [95%]", "PR [95%]", "ESS", "PR if isotropic", "rank95", "effective rank"]
    header.append("leading direction repeats")
    return Table(
        f"{tag}: how many directions the gradients of each entropy bucket span, in {numbers['row_dim']:,} dimensions",
        header,
        rows,
        notes,
    )


def group_name(group: str) -> str:
    """`all rows`, `bucket 4`."""
    return "all rows" if group == ALL else f"bucket {group}"


def _proxy_table(tag: str, numbers: Mapping[str, Any]) -> Table:
    known = {name: groups for name, groups in numbers["proxies"].items() if groups is not None}
    rows = [
        [
            group_name(group),
            *(estimate(groups[group]["rank_correlation"]) for groups in known.values()),
            *(share_estimate(groups[group]["top_overlap"]) for groups in known.values()),
        ]
        for group in known[ENTROPY]
    ]
    unknown, of_all = numbers["proxies"].keys() - known.keys(), known[ENTROPY][ALL]["rank_correlation"]
    told = {
        f"{'; '.join(sorted(unknown))}: {CANT_TELL}, {NEEDED}": unknown,
        f"{CANT_TELL}: at least {MIN_PROMPTS} prompts, and norms that differ, are needed": of_all["ci95"] is None,
        "norms are those of the projected gradients": numbers["projection"],
    }
    return Table(
        f"{tag}: rank correlation (Spearman) of proxies with the gradient norm, and how much the top {TOP_SHARE:.0%} "
        f"by both have in common (by chance {TOP_SHARE:.0%})",
        ["", *known, *(f"top {TOP_SHARE:.0%}: {name}" for name in known)],
        rows,
        [note for note, is_so in told.items() if is_so],
    )


def _comparison_table(tag: str, first: str, ratios: Mapping[str, Any] | None, paired: Mapping[str, Any]) -> Table:
    caption, header = f"{tag} over {first}: unit-norm PR at equal n", ["bucket", "n", "ratio [95%]", "verdict"]
    if ratios is None:
        return Table(caption, header, [], [f"not compared: {paired['reason']}"])
    rows = [
        [bucket, *([MISSING] * 2 if one is None else [number(one["n"]), with_interval(one["ratio"], one["ci95"], 3)])]
        for bucket, one in ratios.items()
    ]
    rows = [[*row, verdict_of(one)] for row, one in zip(rows, ratios.values(), strict=True)]
    notes = [f"bucket {bucket}: {told}" for bucket, one in ratios.items() if (told := what_would_tell(one))]
    return Table(
        f"{caption}, over the {paired['n_prompts']:,} prompts of both, paired by {paired['by']}", header, rows, notes
    )
