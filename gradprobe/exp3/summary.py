"""Exp 3's results as `exp3_summary.json` has them, and as tables for people."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..analysis.differences import study_of
from ..analysis.replication import spread_of
from ..analysis.text import format_number, format_replication, format_share, format_table, format_with_interval
from ..common.console import printable
from ..dump.format import Dump, model_of, shown_projection, target_name
from ..dump.on_policy import is_chosen_by_prefix
from .measure import DumpSignal
from .signal import CLAIMED_SHARE, SEEN, Exp3, reason_of

SUMMARY = "exp3_summary.json"
MAX_READINGS = 10
KEPT = ("top", "bottom", "random")
REPLICATED = {
    "signal_z": lambda numbers: numbers["signal"]["z"],
    "noise_scale_prompts": lambda numbers: numbers["noise_scale_prompts"]["value"],
    "top_20_percent_signal_share": lambda numbers: numbers["at_20_percent"]["top"]["signal_share"]["value"],
    "top_20_percent_cosine": lambda numbers: numbers["at_20_percent"]["top"]["cosine"]["value"],
    "top_20_percent_noise_scale_ratio": lambda numbers: numbers["at_20_percent"]["top"]["noise_scale_ratio"]["value"],
}
COLUMNS = """\
Shares are parts of the whole update: they add up to 1, and one can be below 0.
  n_rare          rare tokens to be expected, sum of 1 - max π; where it is small, tokens that did not come up may
                  carry what is missing
  signal          of the expected update, across prompts; [..] hold 95% over prompts, none where the whole update's
                  squared length is not above 0 at that level
  within prompts  the same of Cov(outcome, gradient) of every prompt on its own
  noise           of the update's variance over prompts
  noise scale     the prompts at which this part's signal equals its noise
  cosine          of this part's expected update and the whole one, noise removed; not cut at ±1
  score z         is a rollout's summed score 0 in the mean, as it must where rollouts are the model's own and buckets
                  are chosen by the prefix alone?
  ratio           the noise scale of what is kept over that of the whole: below 1, fewer prompts give the same
                  precision"""


def summary_over_targets(
    dumps: Sequence[Dump], of_first: DumpSignal, others: Sequence[Exp3], fingerprints: Sequence[str]
) -> dict[str, Any]:
    """One tag's part of `exp3_summary.json`: its first target, and how its numbers vary over all of them.

    Args:
        dumps: the targets.
        of_first: all of the first one.
        others: of every other one, what its gradients say.
        fingerprints: of their manifests.
    """
    manifest = dumps[0].manifest
    numbers = summary_of(of_first.signal)
    for bucket, found in zip(numbers["per_bucket"].values(), of_first.on_policy_by_bucket, strict=True):
        bucket["on_policy"] = asdict(found)
    summary = {
        "model": model_of(manifest),
        "target": manifest["target"],
        "row_idx": manifest["row_idx"],
        "projection": shown_projection(manifest),
        "bucket_by": manifest.get("bucket_by", "entropy"),
        "is_chosen_by_prefix": is_chosen_by_prefix(manifest),
        "edges": manifest["entropy_edges"],
        "on_policy": asdict(of_first.on_policy),
        **numbers,
        "study": study_of(manifest),
        "manifest_sha256": list(fingerprints),
    }
    if others:
        summary["replication"] = _replication(dumps, [numbers, *map(summary_of, others)])
    return summary


def summary_of(result: Exp3) -> dict[str, Any]:
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


def report(summary: dict[str, dict[str, Any]]) -> str:
    """All dumps' results as tables for people."""
    parts = [part for tag, numbers in summary.items() for part in _parts_of(printable(tag), numbers)]
    replicated = {
        f"{printable(tag)}: {name.replace('_', ' ')}": numbers["replication"][name]
        for tag, numbers in summary.items()
        if "replication" in numbers
        for name in REPLICATED
    }
    return "\n\n".join([*parts, COLUMNS, *([format_replication(replicated)] if replicated else [])])


def _parts_of(tag: str, numbers: dict[str, Any]) -> list[str]:
    return [_sentences(tag, numbers), _bucket_table(tag, numbers), _kept_table(tag, numbers)]


def _sentences(tag: str, numbers: dict[str, Any]) -> str:
    """What it is about, the full update, and its reading at 20% of the tokens."""
    signal, found = numbers["signal"], numbers["on_policy"]
    source = f"{numbers['model']}, {target_name(numbers)}, buckets by {numbers['bucket_by']}"
    source += f", {numbers['objective']} of '{numbers['outcome']}'"
    counts = f"{numbers['n_prompts']} prompts, {numbers['n_prompts_mixed']} of them mixed"
    counts += f"; {numbers['n_rollouts']} rollouts, {found['verdict'] or 'on-policy or not: not known'}"
    counts += f" (mean {format_number(found['mean'], 4)} nats, z {format_number(found['z'], 1)})"
    scale = format_with_interval(*numbers["noise_scale_prompts"].values(), 0)
    lines = [
        printable(f"{tag}: {source}"),
        counts,
        f"signal {signal['verdict']}, z {format_number(signal['z'], 1)}; noise scale {scale} prompts"
        + (f"\nunderpowered: {signal['reason']}" if signal["reason"] else ""),
    ]
    if signal["verdict"] == SEEN:
        lines += [_kept_sentence(kept, numbers["at_20_percent"][kept]) for kept in KEPT]
    return "\n".join(lines)


def _kept_sentence(which: str, kept: dict[str, Any]) -> str:
    return (
        f"{which} {CLAIMED_SHARE:.0%} of the tokens: cosine {format_with_interval(*kept['cosine'].values())}, "
        f"signal {format_share(*kept['signal_share'].values())}, noise {format_share(kept['noise_share'])}, "
        f"noise scale ratio {format_with_interval(*kept['noise_scale_ratio'].values())}"
    )


def _bucket_table(tag: str, numbers: dict[str, Any]) -> str:
    header = ["tokens", "n_rare", "signal [95%]", "within prompts [95%]", "noise", "noise scale", "cosine [95%]"]
    return format_table(
        [f"{tag}: bucket", *header, "score z"],
        [
            [
                index,
                format_share(found["share_of_tokens"]),
                format_number(found["n_rare"], 1),
                format_share(*found["signal_share"].values()),
                format_share(*found["signal_share_within_prompts"].values()),
                format_share(found["noise_share"]),
                format_number(found["noise_scale_prompts"], 0),
                format_with_interval(*found["cosine_with_update"].values()),
                format_number(found["score_mean"]["z"], 1),
            ]
            for index, found in numbers["per_bucket"].items()
        ],
    )


def _kept_table(tag: str, numbers: dict[str, Any]) -> str:
    return format_table(
        [f"{tag}: top tokens kept", "cosine [95%]", "signal [95%]", "noise", "ratio [95%]"],
        [
            [
                format_share(kept["share_of_tokens"]),
                format_with_interval(*kept["cosine"].values()),
                format_share(*kept["signal_share"].values()),
                format_share(kept["noise_share"]),
                format_with_interval(*kept["noise_scale_ratio"].values()),
            ]
            for kept in readings(numbers["keep_top"])
        ],
    )


def readings(kept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_READINGS` of a curve, evenly, the last one among them."""
    step = -(-len(kept) // MAX_READINGS)
    return list(kept[::-1][::step][::-1])
