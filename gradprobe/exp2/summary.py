"""Exp 2's results as `exp2_summary.json` has them, and as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..analysis.inputs import directory_name
from ..analysis.replication import spread_of
from ..analysis.text import Table, estimate, number, replication_table, with_interval
from ..dump.format import Dump
from .direction import CENTRAL, Directions
from .measure import DEFAULTS, BucketDirections

SUMMARY = "exp2_summary.json"
REPLICATED = {
    "mean_cosine": ("correct_vs_incorrect", "mean"),
    "control_mean": ("control_within_group", "mean"),
    "rho": ("alignment", "rho"),
}


def numbers_of(
    dumps: Sequence[Dump], of_first: Sequence[BucketDirections], top_of_others: Sequence[BucketDirections]
) -> dict[str, Any]:
    """One tag's numbers: its first target's bucket of highest entropy, every bucket's, and how targets vary.

    Args:
        dumps: the targets.
        of_first: the first target's buckets.
        top_of_others: the bucket of highest entropy of every other target.
    """
    dump, manifest = dumps[0], dumps[0].manifest
    by_bucket = list(map(measures_of, of_first))
    summary = {
        "run_dir": directory_name(dump.path),
        "bucket": dump.bins - 1,
        "n_prompts": len(dump.prompt_keys),
        "bucket_by": manifest.get("bucket_by", "entropy"),
        "on_policy_all_tokens": manifest.get("on_policy"),
        **by_bucket[-1],
        "draws": {"bootstrap": DEFAULTS.bootstrap, "permutations": DEFAULTS.permutations},
        "per_prompt": _per_prompt(dump, of_first[-1].directions),
        "by_bucket": {str(index): measures for index, measures in enumerate(by_bucket)},
    }
    if top_of_others:
        targets = [by_bucket[-1], *map(measures_of, top_of_others)]
        spreads = {name: spread_of([one[part][key] for one in targets]) for name, (part, key) in REPLICATED.items()}
        summary["replication"] = {"targets": [dump.path.name for dump in dumps], **spreads}
    return summary


def _per_prompt(dump: Dump, found: Directions) -> list[dict[str, Any]]:
    return [
        {
            "prompt_idx": dump.prompt_keys[prompt],
            "n_correct_tokens": n_correct,
            "n_incorrect_tokens": n_incorrect,
            "cos_correct_vs_incorrect": None if np.isnan(cosine) else cosine,
        }
        for prompt, (n_correct, n_incorrect), cosine in zip(
            found.prompt.tolist(), found.n_tokens.tolist(), found.cosines.tolist(), strict=True
        )
    ]


def measures_of(found: BucketDirections) -> dict[str, Any]:
    """The numbers of one bucket; no NaN in it."""
    cosines = _known(found.directions.cosines)
    return {
        "n_prompts_usable": len(found.directions.cosines),
        "n_prompts_zero_mean": len(found.directions.cosines) - len(cosines),
        "correct_vs_incorrect": {
            **_middle(cosines),
            "std": float(np.std(cosines)) if len(cosines) else None,
            "frac_positive": float(np.mean(cosines > 0)) if len(cosines) else None,
            "frac_gt_0p5": float(np.mean(cosines > 0.5)) if len(cosines) else None,
        },
        "control_within_group": _control(found.directions.control),
        "control_within_group_by_rollout": _control(found.control_by_rollout),
        "alignment": asdict(found.alignment),
        "n_rare": found.n_rare,
        "on_policy": found.on_policy and asdict(found.on_policy),
        "rho_over_sums": found.rho_over_sums and asdict(found.rho_over_sums),
        "reference": found.reference,
        "cancellation": {
            **asdict(found.cancellation),
            "group_normalised": asdict(found.cancellation_group_normalised),
        },
    }


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _middle(values: np.ndarray) -> dict[str, float | None]:
    is_some = len(values) > 0
    return {
        "mean": float(np.mean(values)) if is_some else None,
        "median": float(np.median(values)) if is_some else None,
    }


def _control(halves: np.ndarray) -> dict[str, Any]:
    """Of half-split cosines; `band`: their central 95%, `n_zero_mean`: of those without a cosine."""
    cosines = _known(halves)
    band = np.quantile(cosines, CENTRAL).tolist() if len(cosines) else None
    return {**_middle(cosines), "n": len(cosines), "n_zero_mean": len(halves) - len(cosines), "band": band}


def tables_of(tag: str | None, numbers: Mapping[str, Any]) -> list[Table]:
    """One tag's tables: whether updates cancel, per bucket, and what the cosines are; over targets, where several."""
    name = tag or numbers["run_dir"]
    buckets: Mapping[str, Any] = numbers["by_bucket"]
    answers = ["bucket", "prompts", "C", "null [95%]", "p", "verdict of C", "rho [95%]", "verdict of rho", "theory"]
    cosines = ["bucket", "prompts", "mean cos", "control: tokens", "control: rollouts", "log π + H (z)"]
    cosines += ["C, group-normalised", "null [95%]", "p"]
    tables = [
        Table(
            f"{name}: do updates of correct and incorrect rollouts cancel?",
            [*answers, "rare tokens"],
            [
                [
                    bucket,
                    number(found["cancellation"]["n_prompts"]),
                    *_cancellation_cells(found["cancellation"]),
                    found["cancellation"]["verdict"],
                    with_interval(found["alignment"]["rho"], found["alignment"]["ci95"]),
                    found["alignment"]["verdict"],
                    number(found["reference"], 0),
                    number(found["n_rare"], 1),
                ]
                for bucket, found in buckets.items()
            ],
            notes=untold(buckets),
        ),
        Table(
            f"{name}: cosines of correct and incorrect gradients",
            [*cosines, *["rho over sums [95%]"] * (numbers["rho_over_sums"] is not None)],
            [
                [
                    bucket,
                    number(found["n_prompts_usable"]),
                    number(found["correct_vs_incorrect"]["mean"]),
                    number(found["control_within_group"]["mean"]),
                    number(found["control_within_group_by_rollout"]["mean"]),
                    _excess(found["on_policy"]),
                    *_cancellation_cells(found["cancellation"]["group_normalised"]),
                    *[estimate(one) for one in (found["rho_over_sums"],) if one is not None],
                ]
                for bucket, found in buckets.items()
            ],
            notes=_left_out(numbers),
        ),
    ]
    if "replication" in numbers:
        spreads = {one.replace("_", " "): numbers["replication"][one] for one in REPLICATED}
        tables.append(replication_table(name, spreads))
    return tables


def untold(buckets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each reason why verdicts tell nothing: `buckets 0 to 2: unsampled: ...`."""
    named: dict[str, list[int]] = {}
    for measure in ("cancellation", "alignment"):
        for bucket, numbers in buckets.items():
            found = numbers[measure]
            of = named.setdefault(f"{found['verdict']}: {found['reason']}", []) if found["reason"] else []
            if int(bucket) not in of:  # both may be unsampled
                of.append(int(bucket))
    return [f"{named_buckets(own)}: {why}" for why, own in named.items()]


def named_buckets(numbers: Sequence[int]) -> str:
    """`bucket 3`, `buckets 0 to 2, 4`."""
    runs: list[list[int]] = []
    for index in sorted(numbers):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"bucket{'s' * (len(numbers) > 1)} {', '.join(shown)}"


def _cancellation_cells(found: Mapping[str, Any]) -> list[str]:
    null = with_interval(found["null_mean"], found["null_ci95"])
    return [number(found["ratio"], 2), null, number(found["p_value"], 4)]


def _excess(found: Mapping[str, Any] | None) -> str:
    """`-0.002 (-0.4)`: mean and z of log π + H."""
    return number(None) if found is None else f"{number(found['mean'])} ({number(found['z'], 1)})"


def _left_out(numbers: Mapping[str, Any]) -> list[str]:
    prompts, halves = numbers["n_prompts_zero_mean"], numbers["control_within_group"]["n_zero_mean"]
    said = f"bucket {numbers['bucket']}: left out because a mean gradient is zero: {prompts} prompts, {halves} halves"
    return [said] if prompts or halves else []
