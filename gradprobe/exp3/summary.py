"""Exp 3's results as `exp3_summary.json` has them, and as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..analysis.differences import study_of
from ..analysis.jackknife import prompts_to_tell
from ..analysis.replication import spread_of
from ..analysis.text import Table, estimate, number, replication_table, share, share_estimate
from ..dump.format import Dump, model_name
from ..dump.on_policy import is_chosen_by_prefix
from .measure import DumpSignal
from .signal import CLAIMED_SHARE, SEEN, Exp3, reason_of
from .step import LEAST_T, StepSignal

SUMMARY = "exp3_summary.json"
MAX_READINGS = 10
READ_AT = (0.1, 0.2, 0.3)
REPLICATED = {
    "signal_z": lambda numbers: numbers["signal"]["z"],
    "noise_scale_prompts": lambda numbers: numbers["noise_scale_prompts"]["value"],
    "top_20_percent_signal_share": lambda numbers: numbers["at_20_percent"]["top"]["signal_share"]["value"],
    "top_20_percent_cosine": lambda numbers: numbers["at_20_percent"]["top"]["cosine"]["value"],
    "top_20_percent_noise_scale_ratio": lambda numbers: numbers["at_20_percent"]["top"]["noise_scale_ratio"]["value"],
}


def numbers_of(dumps: Sequence[Dump], of_first: DumpSignal, others: Sequence[Exp3]) -> dict[str, Any]:
    """One tag's numbers: its first target's, and how those of pooled gradients vary over all of them.

    Args:
        dumps: the targets.
        of_first: all of the first one.
        others: of every other one, what its gradients say.
    """
    manifest = dumps[0].manifest
    summary = {
        "bucket_by": manifest.get("bucket_by", "entropy"),
        "is_chosen_by_prefix": is_chosen_by_prefix(manifest),
        "edges": manifest["entropy_edges"],
        "on_policy": asdict(of_first.on_policy),
        "study": study_of(manifest),
    }
    if of_first.signal is not None:
        numbers = signal_numbers(of_first.signal)
        for bucket, found in zip(numbers["per_bucket"].values(), of_first.on_policy_by_bucket, strict=True):
            bucket["on_policy"] = asdict(found)
        summary |= numbers
        if others:
            summary["replication"] = _replication(dumps, [numbers, *map(signal_numbers, others)])
    if of_first.step is not None:
        summary["step"] = step_numbers(of_first.step, of_first.words, manifest)
    return summary


def step_numbers(result: StepSignal, words: Sequence[str], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that come from the step; no NaN in it.

    Args:
        result: of the rollouts.
        words: by their codes.
        manifest: of the dump.
    """
    step = manifest["step"]
    ends = [end for end in ("from", "to") if step["identities"][end] == manifest.get("model_identity")]
    found = asdict(result)
    buckets, rare, z = (found.pop(key) for key in ("buckets", "n_rare", "score_mean_z"))
    correlation, slope = found.pop("linearity")
    return found | {
        "from": model_name(step["from"]),
        "to": model_name(step["to"]),
        "at": ends[0] if ends else "between",
        "gain": found["gain"] | {"reason": reason_of_step(result)},
        "measured_gain": None,
        "linearity": {"correlation": correlation, "slope": slope},
        "per_bucket": {
            str(index): {"n_rare": n_rare, "score_mean": {"z": of_z}, **part}
            for index, (part, n_rare, of_z) in enumerate(zip(buckets, rare, z, strict=True))
        },
        "tokens": [{"text": words[code], "n": n, **part} for code, n, part in found["tokens"]],
    }


def with_measured_gains(
    numbers: Mapping[str, dict[str, Any]], dumps: Mapping[str, Sequence[Dump]], found: Mapping[str, DumpSignal]
) -> dict[str, dict[str, Any]]:
    """With what the step gained as measured: the end's mean outcome less the start's, where both are among the tags."""
    identity_of = {tag: of_tag[0].manifest.get("model_identity") for tag, of_tag in dumps.items()}
    for tag, one in numbers.items():
        if "step" in one:
            ends = dumps[tag][0].manifest["step"]["identities"]
            means = [
                next((found[other].mean_outcome for other, own in identity_of.items() if own == ends[end]), None)
                for end in ("to", "from")
            ]
            one["step"]["measured_gain"] = None if None in means else means[0] - means[1]
    return dict(numbers)


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
    tables = _step_tables(tag, numbers["step"]) if "step" in numbers else []
    if "signal" not in numbers:
        return tables
    name = f"{tag}: {numbers['objective']} of the {numbers['outcome']}, buckets by {numbers['bucket_by']}"
    if numbers["signal"]["verdict"] != SEEN:
        tables.append(_within_table(name, numbers))
    else:
        kept = list(numbers["at_20_percent"].items())
        curve = [(share(one["share_of_tokens"]), one) for one in readings(numbers["keep_top"])]
        tables += [
            _kept_table(f"{name}; {CLAIMED_SHARE:.0%} of the tokens kept", "which", kept, notes=[_facts(numbers)]),
            _kept_table(f"{name}; the highest kept", "tokens", curve),
            _bucket_table(name, numbers),
            *_kind_tables(name, "signal", numbers.get("by_weight")),
        ]
    if "replication" in numbers:
        spreads = {one.replace("_", " "): numbers["replication"][one] for one in REPLICATED}
        tables.append(replication_table(tag, spreads))
    return tables


def _step_tables(tag: str, step: Mapping[str, Any]) -> list[Table]:
    """What the highest tokens by each rule carry of the step's gain, every bucket, and the words that carry most."""
    gain, straight, measured = step["gain"], step["linearity"], step["measured_gain"]
    facts = (
        f"t {number(gain['t'], 1)}, p {number(gain['p_value'], 4)}; expected reward, to first order, "
        f"{estimate(step['reward_gain'])}, as measured {number(measured, 2)}; d against the real shift: correlation "
        f"{number(straight['correlation'], 2)}, slope {number(straight['slope'], 2)}"
    )
    name = f"{tag}: along the step from {step['from']} to {step['to']}, {step['objective']}"
    if gain["reason"]:
        return [Table(name, (), (), notes=[facts, f"no share of the gain can be told: {gain['reason']}"])]
    curves = step["keep_top"].items()
    shares = [[rule, *(share_estimate(at(curve, of)["share"]) for of in READ_AT)] for rule, curve in curves]
    buckets = [
        [
            bucket,
            share(found["share_of_tokens"]),
            number(found["n_rare"], 1),
            share_estimate(found["share"]),
            share(found["noise_share"]),
            number(found["score_mean"]["z"], 1),
        ]
        for bucket, found in step["per_bucket"].items()
    ]
    words = [
        [repr(found["text"]), f"{found['n']:,}", share(found["share_of_tokens"]), share_estimate(found["share"])]
        for found in step["tokens"]
    ]
    notes = [facts, *([said_of_noise(step)] if step["noise"] else [])]
    return [
        Table(f"{name}; the highest kept", ["rule", *(f"top {of:.0%}" for of in READ_AT)], shares, notes=notes),
        Table(
            f"{name}: every bucket",
            ["bucket", "tokens", "rare tokens", "share of the gain [95%]", "noise", "score z"],
            buckets,
        ),
        Table(f"{name}: words that carry most", ["word", "n", "tokens", "share of the gain [95%]"], words),
        *_kind_tables(name, "share of the gain", step.get("by_weight")),
    ]


def _kind_tables(name: str, share_of: str, found: Mapping[str, Any] | None) -> list[Table]:
    """What every kind of weight carries; nothing of a single weight."""
    rows = [
        [kind, str(one["n_weights"]), share_estimate(one["share"]), share_estimate(one["noise_share"])]
        for kind, one in (found or {"kinds": {}})["kinds"].items()
    ]
    header = ["kind", "weights", f"{share_of} [95%]", "noise [95%]"]
    return [Table(f"{name}: every kind of weight", header, rows)] if rows else []


def at(curve: Sequence[Mapping[str, Any]], of_tokens: float) -> Mapping[str, Any]:
    """The reading of a curve at a share of the tokens."""
    return min(curve, key=lambda part: abs(part["share_of_tokens"] - of_tokens))


def said_of_noise(step: Mapping[str, Any]) -> str:
    """What would halve the interval, and which of two ways costs fewer rollouts."""
    noise, prompts = step["noise"], step["n_prompts"]
    rollouts = round(noise["rollouts"])
    more, fewer = noise["prompts_for_half_width"], noise["prompts_of_twice_the_rollouts"]
    cheaper = "first" if more <= 2 * fewer else "second"
    return (
        f"half the width ({prompts:,} × {rollouts} now): {more:,} prompts × {rollouts} rollouts, or {fewer:,} × "
        f"{2 * rollouts}; the {cheaper} costs less"
    )


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


def reason_of_step(result: StepSignal) -> str | None:
    """Why no share of the step's gain is a number, in words; None where it is."""
    t = result.gain.t
    if t is not None and abs(t) >= LEAST_T:
        return None
    told = "none of it" if t is None else f"gain not told from 0 (t {number(t, 1)})"
    return f"{told}; {result.n_prompts:,} prompts; {prompts_to_tell(result.n_prompts, None if t is None else abs(t))}"
