"""Exp 2's results as `exp2_summary.json` has them, and as tables for people."""

from dataclasses import asdict
from typing import Any

import numpy as np

from ..analysis.inputs import directory_name
from ..analysis.replication import spread_of
from ..analysis.text import format_number, format_p_value, format_replication, format_table, format_with_interval
from ..common.console import printable
from ..dump.format import Dump, model_of, shown_projection, target_name
from ..dump.on_policy import LARGEST_Z
from .direction import (
    MIN_RARE_TOKENS,
    MIN_ROLLOUTS_OF_EACH_KIND,
    MIN_TOKENS_OF_EACH_KIND,
    ORTHOGONAL_WITHIN,
    reason_of,
    summarise,
)
from .measure import BucketDirections

SUMMARY = "exp2_summary.json"
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
  theory       -1: what rho is, signal or no signal, where rollouts are the model's own at temperature 1 (the score has
               mean zero); an estimate differs by noise, by picked tokens and means in the place of sums, by prompts of
               different difficulty, by rare tokens that did not come up
  rare         rare tokens to be expected behind the less sampled mean, the sum of 1 - max π
  log π + H    nats per token over all of the bucket's tokens, zero on-policy; |z| > {LARGEST_Z:g}: off-policy
  verdict      aligned, opposed: the interval lies above, below 0; orthogonal: it holds 0 and lies inside
               ±{ORTHOGONAL_WITHIN}; underpowered: can't tell; unsampled: fewer than {MIN_RARE_TOKENS} rare tokens to be
               expected, so that what did not come up may decide the mean
  C            |sum of advantage × gradient|² / sum of |advantage × gradient|², mean over prompts with both kinds: 1
               where rollouts are orthogonal, less where they cancel; null: advantages permuted within each prompt"""


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
        "model": model_of(dump.manifest),
        "target": dump.manifest["target"],
        "row_idx": dump.manifest["row_idx"],
        "projection": shown_projection(dump.manifest),
        "bucket": dump.bins - 1,
        "n_prompts": top.directions.n_prompts,
        "bucket_by": dump.manifest.get("bucket_by", "entropy"),
        "on_policy_all_tokens": dump.manifest.get("on_policy"),
        **measures_of(top),
        "draws": top.settings.to_dict(),
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
        "alignment": asdict(result.alignment) | {"reason": reason_of(result.alignment, result.n_rare)},
        "n_rare": result.n_rare,
        "on_policy": result.on_policy and asdict(result.on_policy),
        "rho_over_sums": result.rho_over_sums and asdict(result.rho_over_sums),
        "reference": result.reference,
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
    sources = [printable(f"{name}: {n['model']}, {target_name(n)}") for name, n in named.items()]
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
    columns += ["rho [95%]", "theory", "p (n)", "detectable", "rare", "log π + H (z)", "verdict"]
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
    return "\n".join([alignments, *reasons_by_bucket(buckets), "", cancellations])


def reasons_by_bucket(buckets: dict[str, dict[str, Any]]) -> list[str]:
    """`buckets 0, 1: underpowered: no prompt ...`, a line for each reason why a verdict tells nothing."""
    named: dict[str, list[str]] = {}
    for index, numbers in buckets.items():
        found = numbers["alignment"]
        if found.get("reason"):
            named.setdefault(f"{found['verdict']}: {found['reason']}", []).append(index)
    return [f"bucket{'s' * (len(own) > 1)} {', '.join(own)}: {why}" for why, own in named.items()]


def _alignment_row(bucket: str, numbers: dict[str, Any]) -> list[str]:
    parts = ("correct_vs_incorrect", "control_within_group", "control_within_group_by_rollout")
    found = numbers["alignment"]
    return [
        bucket,
        str(numbers["n_prompts_usable"]),
        *(format_number(numbers[part]["mean"]) for part in parts),
        format_with_interval(found["ci95"] and found["rho"], found["ci95"]),  # without one it is no number
        format_number(numbers["reference"], 0),
        format_p_value(found["p_value"], found["n_prompts"]),
        format_number(found["min_detectable"], 2),
        format_number(numbers["n_rare"], 1),
        _excess(numbers["on_policy"]),
        found["verdict"],
    ]


def _excess(found: dict[str, Any] | None) -> str:
    """`-0.002 (-0.4)`: mean and z of log π + H."""
    return format_number(None) if found is None else f"{format_number(found['mean'])} ({format_number(found['z'], 1)})"


def _cancellation_cells(found: dict[str, Any]) -> list[str]:
    return [
        format_number(found["ratio"], 2),
        format_with_interval(found["null_mean"], found["null_ci95"]),
        format_p_value(found["p_value"], found["n_prompts"]),
    ]
