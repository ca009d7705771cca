"""Exp 2's results as `exp2_summary.json` has them, and as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..analysis.inputs import directory_name
from ..analysis.prompts import rollouts_of
from ..analysis.replication import spread_of
from ..analysis.text import Table, estimate, number, replication_table, share, with_interval
from ..dump.format import Dump
from .coupling import ANY, DIFFERENT, Coupling, Meetings
from .direction import CENTRAL, Directions
from .measure import DEFAULTS, BucketDirections

SUMMARY = "exp2_summary.json"
REPLICATED = {
    "mean_cosine": ("correct_vs_incorrect", "mean"),
    "control_mean": ("control_within_group", "mean"),
    "rho": ("alignment", "rho"),
}


def numbers_of(
    dumps: Sequence[Dump],
    of_first: Sequence[BucketDirections],
    top_of_others: Sequence[BucketDirections],
    meetings: Meetings | None,
) -> dict[str, Any]:
    """One tag's numbers: its first target's bucket of highest entropy, every bucket's, and how targets vary.

    Args:
        dumps: the targets.
        of_first: the first target's buckets.
        top_of_others: the bucket of highest entropy of every other target.
        meetings: coupling by token of the first target; None where it is not known.
    """
    dump, manifest = dumps[0], dumps[0].manifest
    coupled = [None] * dump.bins if meetings is None else list(map(_coupling, meetings.by_bucket))
    by_bucket = [measures_of(one) | {"coupling": of_bucket} for one, of_bucket in zip(of_first, coupled, strict=True)]
    summary = {
        "run_dir": directory_name(dump.path),
        "bucket": dump.bins - 1,
        "n_prompts": len(dump.prompt_keys),
        "bucket_by": manifest.get("bucket_by", "entropy"),
        "on_policy_all_tokens": manifest.get("on_policy"),
        **by_bucket[-1],
        "coupling_all_tokens": meetings and _coupling(meetings.all_tokens),
        "shared_tokens": meetings and _shared_tokens(dump, meetings),
        "draws": {"bootstrap": DEFAULTS.bootstrap, "permutations": DEFAULTS.permutations, "ids": DEFAULTS.ids},
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


def _coupling(found: Coupling) -> dict[str, Any]:
    """By kind: what holds whatever the outcomes, and, apart, where they are the same and where not."""
    apart = {kind: {name: asdict(pairs) for name, pairs in own.items()} for kind, own in found.items()}
    return {kind: own.pop(ANY) | own for kind, own in apart.items()}


def _shared_tokens(dump: Dump, meetings: Meetings) -> list[dict[str, Any]]:
    """With what each token reads; None where texts were not kept."""
    texts = dict.fromkeys(meetings.shared_tokens)
    for rollout in rollouts_of(dump):
        if None not in texts.values() or not rollout.token_texts:
            break
        texts |= {i: text for i, text in zip(rollout.response_ids, rollout.token_texts, strict=True) if i in texts}
    return [{"token_id": i, "text": texts[i], **asdict(found)} for i, found in meetings.shared_tokens.items()]


def measures_of(found: BucketDirections) -> dict[str, Any]:
    """The numbers of one bucket; no NaN in it."""
    cosines = found.directions.cosines
    return {
        "n_prompts_usable": len(cosines),
        "n_prompts_zero_mean": int(np.isnan(cosines).sum()),
        "correct_vs_incorrect": summarise(cosines),
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


def summarise(cosines: np.ndarray) -> dict[str, float | None]:
    """Numbers on [n] cosines, those that are NaN left out; `std` is that of the population (divides by n)."""
    cosines = cosines[~np.isnan(cosines)]
    if len(cosines) == 0:
        return dict.fromkeys(("mean", "median", "std", "frac_positive", "frac_gt_0p5"))
    return {
        "mean": float(np.mean(cosines)),
        "median": float(np.median(cosines)),
        "std": float(np.std(cosines)),
        "frac_positive": float(np.mean(cosines > 0)),
        "frac_gt_0p5": float(np.mean(cosines > 0.5)),
    }


def _control(halves: np.ndarray) -> dict[str, Any]:
    """Of half-split cosines; `band`: their central 95%."""
    numbers, n_zero_mean = summarise(halves), int(np.isnan(halves).sum())
    n = len(halves) - n_zero_mean
    band = np.nanquantile(halves, CENTRAL).tolist() if n else None
    return {"mean": numbers["mean"], "median": numbers["median"], "n": n, "n_zero_mean": n_zero_mean, "band": band}


def tables_of(tag: str | None, numbers: Mapping[str, Any]) -> list[Table]:
    """One tag's tables: whether updates cancel, per bucket, and what the cosines are; over targets, where several.

    A bucket without a number has no row.
    """
    name, buckets = tag or numbers["run_dir"], numbers["by_bucket"]
    answers = ["bucket", "prompts", "C", "null [95%]", "p", "verdict of C", "rho [95%]", "verdict of rho", "theory"]
    header = ["bucket", "prompts", "mean cos", "control: tokens", "control: rollouts", "log π + H (z)"]
    header += ["C, group-normalised", "null [95%]", "p"]
    header += [] if numbers["rho_over_sums"] is None else ["rho over sums [95%]"]
    rows = [[bucket, *_answer_cells(one)] for bucket, one in buckets.items() if one["cancellation"]["n_prompts"] > 0]
    cosine_rows = [[bucket, *_cosine_cells(one)] for bucket, one in buckets.items() if _has_cosine(one)]
    asked = f"{name}: do updates of correct and incorrect rollouts cancel?"
    tables = [Table(asked, [*answers, "rare tokens"], rows, notes=untold(buckets))]
    if cosine_rows:
        caption = f"{name}: cosines of correct and incorrect gradients"
        tables.append(Table(caption, header, cosine_rows, notes=_left_out(numbers)))
    if numbers["rho_over_sums"] is None:  # a dump of tokens
        tables += _coupling_tables(name, numbers)
    if "replication" in numbers:
        spreads = {one.replace("_", " "): numbers["replication"][one] for one in REPLICATED}
        tables.append(replication_table(name, spreads))
    return tables


def _coupling_tables(name: str, numbers: Mapping[str, Any]) -> list[Table]:
    """Where updates of two rollouts meet, of all tokens and per bucket; and on which tokens those of both kinds do."""
    caption = f"{name}: where do updates of two rollouts of a prompt meet?"
    if numbers["coupling"] is None:
        return [Table(caption, (), (), notes=["can't be told: not every line of meta.jsonl has token_id and logprob"])]
    buckets = {bucket: one["coupling"] for bucket, one in reversed(numbers["by_bucket"].items())}
    header = ["pairs", "coupling [95%]", "cosine [95%]", "part of C [95%]"]
    rows = [
        [f"{bucket}: {kind.replace('_token', ' token,').replace('_', ' ')}", *_pair_cells(found), *_null_cells(found)]
        for bucket, coupling in ({"all": numbers["coupling_all_tokens"]} | buckets).items()
        for kind, found in coupling.items()
        if found["n_pairs"]
    ]
    notes = ["coupling: Σ |⟨g, g'⟩| over pairs of tokens of different rollouts; uncertain: π < ½; C: 1 and all parts"]
    columns = ["bucket: kind of pair", *header, "other outcome: cosine", "ids dealt anew", "p"]
    tables = [Table(caption, columns, rows, notes=notes if rows else ["no prompt has gradients of two rollouts"])]
    if numbers["shared_tokens"]:
        caption = f"{name}: tokens on which correct and incorrect rollouts meet, of their coupling in bucket"
        tokens = [[repr(one["text"] or one["token_id"]), *_pair_cells(one, True)] for one in numbers["shared_tokens"]]
        tables.append(Table(f"{caption} {numbers['bucket']}", ["token", *header], tokens))
    return tables


def _pair_cells(found: Mapping[str, Any], is_counted: bool = False) -> list[str]:
    part, coupling = found["part_of_c"], found["share_of_coupling"]
    return [
        number(found["n_pairs"]) if is_counted else share(found["share_of_pairs"], None, 1),
        share(coupling["value"], coupling["ci95"], 1),
        with_interval(found["mean_cosine"], found["mean_cosine_ci95"]),
        with_interval(part["value"], part["ci95"]),
    ]


def _null_cells(found: Mapping[str, Any]) -> list[str]:
    other = with_interval(found[DIFFERENT]["mean_cosine"], found[DIFFERENT]["mean_cosine_ci95"])
    null = found["null"] or {"mean": None, "ci95": None, "p_value": None}
    return [other, share(null["mean"], null["ci95"], 1), number(null["p_value"], 3)]


def _has_cosine(found: Mapping[str, Any]) -> bool:
    return found["n_prompts_usable"] + found["control_within_group"]["n"] > 0


def _answer_cells(found: Mapping[str, Any]) -> list[str]:
    c, rho = found["cancellation"], found["alignment"]
    about_rho = [with_interval(rho["rho"], rho["ci95"]), rho["verdict"], number(found["reference"], 0)]
    return [number(c["n_prompts"]), *_cells_of_c(c), c["verdict"], *about_rho, number(found["n_rare"], 1)]


def _cosine_cells(found: Mapping[str, Any]) -> list[str]:
    parts = ("correct_vs_incorrect", "control_within_group", "control_within_group_by_rollout")
    test, over_sums = found["on_policy"], found["rho_over_sums"]
    return [
        number(found["n_prompts_usable"]),
        *(number(found[part]["mean"]) for part in parts),
        number(None) if test is None else f"{number(test['mean'])} ({number(test['z'], 1)})",
        *_cells_of_c(found["cancellation"]["group_normalised"]),
        *([] if over_sums is None else [estimate(over_sums)]),
    ]


def _cells_of_c(found: Mapping[str, Any]) -> list[str]:
    null = with_interval(found["null_mean"], found["null_ci95"])
    return [number(found["ratio"], 2), null, number(found["p_value"], 4)]


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


def _left_out(numbers: Mapping[str, Any]) -> list[str]:
    prompts, halves = numbers["n_prompts_zero_mean"], numbers["control_within_group"]["n_zero_mean"]
    said = f"bucket {numbers['bucket']}: left out because a mean gradient is zero: {prompts} prompts, {halves} halves"
    return [said] if prompts or halves else []
