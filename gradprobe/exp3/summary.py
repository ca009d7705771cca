"""Exp 3's results as `exp3_summary.json` has them, and as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..analysis.differences import study_of
from ..analysis.replication import spread_of
from ..analysis.text import Table, estimate, number, replication_table, share, share_estimate
from ..dump.format import Dump
from ..dump.on_policy import is_chosen_by_prefix
from .measure import DumpSignal
from .signal import CLAIMED_SHARE, SEEN, Exp3, reason_of

SUMMARY = "exp3_summary.json"
MAX_READINGS = 10
REPLICATED = {
    "signal_z": lambda numbers: numbers["signal"]["z"],
    "noise_scale_prompts": lambda numbers: numbers["noise_scale_prompts"]["value"],
    "top_20_percent_signal_share": lambda numbers: numbers["at_20_percent"]["top"]["signal_share"]["value"],
    "top_20_percent_cosine": lambda numbers: numbers["at_20_percent"]["top"]["cosine"]["value"],
    "top_20_percent_noise_scale_ratio": lambda numbers: numbers["at_20_percent"]["top"]["noise_scale_ratio"]["value"],
}


def numbers_of(dumps: Sequence[Dump], of_first: DumpSignal, others: Sequence[Exp3]) -> dict[str, Any]:
    """One tag's numbers: its first target's, and how they vary over all of them.

    Args:
        dumps: the targets.
        of_first: all of the first one.
        others: of every other one, what its gradients say.
    """
    manifest = dumps[0].manifest
    numbers = signal_numbers(of_first.signal)
    for bucket, found in zip(numbers["per_bucket"].values(), of_first.on_policy_by_bucket, strict=True):
        bucket["on_policy"] = asdict(found)
    summary = {
        "bucket_by": manifest.get("bucket_by", "entropy"),
        "is_chosen_by_prefix": is_chosen_by_prefix(manifest),
        "edges": manifest["entropy_edges"],
        "on_policy": asdict(of_first.on_policy),
        **numbers,
        "study": study_of(manifest),
    }
    if others:
        summary["replication"] = _replication(dumps, [numbers, *map(signal_numbers, others)])
    return summary


def signal_numbers(result: Exp3) -> dict[str, Any]:
    """The keys that come from the gradients; no NaN in it."""
    summary = asdict(result)
    summary["signal"]["reason"] = reason_of(result)
    buckets = summary.pop("buckets")
    return summary | {"per_bucket": {str(index): numbers for index, numbers in enumerate(buckets)}}


def _replication(dumps: Sequence[Dump], numbers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The headline numbers over targets, and of each target with their intervals."""
    return {
        "targets": [dump.path.name for dump in dumps],
        **{name: spread_of(list(map(read, numbers))) for name, read in REPLICATED.items()},
        "by_target": [
            {key: target[key] for key in ("signal", "noise_scale_prompts", "at_20_percent")} for target in numbers
        ],
    }


def tables_of(tag: str, numbers: Mapping[str, Any]) -> list[Table]:
    """One tag's tables. Where no signal is seen: the one line that says so, and what is known within prompts."""
    name = f"{tag}: {numbers['objective']} of the {numbers['outcome']}, buckets by {numbers['bucket_by']}"
    if numbers["signal"]["verdict"] != SEEN:
        tables = [_within_table(name, numbers)]
    else:
        kept = [(which, one) for which, one in numbers["at_20_percent"].items()]
        curve = [(share(one["share_of_tokens"]), one) for one in readings(numbers["keep_top"])]
        tables = [
            _kept_table(f"{name}; {CLAIMED_SHARE:.0%} of the tokens kept", "which", kept, notes=[_facts(numbers)]),
            _kept_table(f"{name}; the highest kept", "tokens", curve),
            _bucket_table(name, numbers),
        ]
    if "replication" in numbers:
        spreads = {one.replace("_", " "): numbers["replication"][one] for one in REPLICATED}
        tables.append(replication_table(tag, spreads))
    return tables


def _facts(numbers: Mapping[str, Any]) -> str:
    """The full update's own numbers, and whose rollouts these are."""
    counts = f"{numbers['n_prompts']:,} prompts, {numbers['n_prompts_mixed']:,} with both outcomes"
    scale = f"noise scale {estimate(numbers['noise_scale_prompts'], 0)} prompts"
    found = numbers["on_policy"]
    whose = "on-policy or not: not known"
    if found["verdict"]:
        whose = f"{found['verdict']} (log π + H {number(found['mean'], 4)} nats, z {number(found['z'], 1)})"
    return f"signal z {number(numbers['signal']['z'], 1)}, {scale}; {counts}; {whose}"


def _bucket_table(name: str, numbers: Mapping[str, Any]) -> Table:
    header = ["bucket", "tokens", "rare tokens", "signal [95%]", "within prompts [95%]", "noise", "noise scale"]
    rows = [
        [
            bucket,
            share(found["share_of_tokens"]),
            number(found["n_rare"], 1),
            share_estimate(found["signal_share"]),
            share_estimate(found["signal_share_within_prompts"]),
            share(found["noise_share"]),
            number(found["noise_scale_prompts"], 0),
            estimate(found["cosine_with_update"]),
            number(found["score_mean"]["z"], 1),
        ]
        for bucket, found in numbers["per_bucket"].items()
    ]
    return Table(f"{name}: every bucket", [*header, "cosine [95%]", "score z"], rows)


def _within_table(name: str, numbers: Mapping[str, Any]) -> Table:
    """What is known without a signal across prompts; no rows where that is nothing."""
    known = {bucket: found["signal_share_within_prompts"] for bucket, found in numbers["per_bucket"].items()}
    rows = [
        [bucket, share(numbers["per_bucket"][bucket]["share_of_tokens"]), share_estimate(found)]
        for bucket, found in known.items()
        if any(one["ci95"] is not None for one in known.values())
    ]
    why = f"no share across prompts can be told: {numbers['signal']['reason']}"
    return Table(f"{name}: every bucket", ["bucket", "tokens", "signal within prompts [95%]"], rows, notes=[why])


def _kept_table(
    caption: str, column: str, kept: Sequence[tuple[str, Mapping[str, Any]]], notes: Sequence[str] = ()
) -> Table:
    rows = [
        [
            which,
            estimate(found["cosine"]),
            share_estimate(found["signal_share"]),
            share(found["noise_share"]),
            estimate(found["noise_scale_ratio"]),
        ]
        for which, found in kept
    ]
    return Table(caption, [column, "cosine [95%]", "signal [95%]", "noise", "noise scale ratio [95%]"], rows, notes)


def readings(kept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_READINGS` of a curve, evenly, the last one among them."""
    step = -(-len(kept) // MAX_READINGS)
    return list(kept[::-1][::step][::-1])
