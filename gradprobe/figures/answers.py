"""What a study found, in sentences: every word is picked by the numbers of the summaries.

Three questions, each with a statement per tag: a verdict and the numbers with intervals that it rests on. Then what
limits them. A number without an interval is not said where it would need one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis.text import typeset_estimate, typeset_interval, typeset_number, typeset_sentence, typeset_share
from ..dump.on_policy import MIN_RARE_TOKENS, OFF_POLICY, ON_POLICY
from ..exp2.direction import ALIGNED, OPPOSED, ORTHOGONAL, UNDERPOWERED, UNSAMPLED
from ..exp3.signal import CLAIMED_SHARE, SEEN
from .look import shortened

CANT_TELL = "can't tell"
SIGNIFICANT = 0.05
CANCEL_WORDS = {
    ALIGNED: "yes: aligned",
    OPPOSED: "no: opposed",
    ORTHOGONAL: "no: orthogonal",
    UNDERPOWERED: f"{CANT_TELL}: underpowered",
    UNSAMPLED: f"{CANT_TELL}: unsampled",
}
OTHER_REASONS = (
    "Why an estimate of ρ differs from the −1 that theory fixes: noise; at most a few positions of a rollout and "
    "bucket, and means in the place of sums; prompts of different difficulty pooled; rare tokens that did not come up."
)
WITHIN_A_HUB = re.compile(r"[\w.-]+/[^/\\]+|[^/\\]+")

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Statement:
    """A verdict on one tag: whose it is, the word, the numbers it rests on."""

    of: str
    verdict: str
    numbers: str


@dataclass(frozen=True)
class Limit:
    """What an answer hangs on, in a few words and a sentence."""

    name: str
    text: str


def model_name(path: str) -> str:
    """A model as a reader knows it: `owner/name` of a hub, or the last part of a path."""
    return shortened(path if WITHIN_A_HUB.fullmatch(path) else re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path, 80)


def named_model(tag: str, path: str) -> str:
    """`base = Qwen2.5-1.5B`; the tag alone where it is the model's name."""
    name = model_name(path)
    return tag if tag == name else f"{tag} = {name}"


def directions_statements(exp1: Summary) -> list[Statement]:
    """How many directions does the bucket of highest entropy span? A statement per tag."""
    return [Statement(tag, *_directions(numbers)) for tag, numbers in exp1.items()]


def _directions(numbers: Summary) -> tuple[str, str]:
    bucket, found = list(numbers["per_bucket"].items())[-1]
    ratio, interval = found["participation_ratio_unit_norm"], found.get("participation_ratio_unit_norm_ci95")
    gradients = f"{found['n']:,} gradients of bucket {bucket}"
    if ratio is None or interval is None:
        return CANT_TELL, f"{gradients}: no interval for their participation ratio"
    random = found["n"] / (1 + (found["n"] - 1) / numbers["row_dim"])
    verdict = CANT_TELL
    if interval[1] < random:
        verdict = "fewer than random directions"
    elif interval[0] > random:
        verdict = "more than random directions"
    said = f"{gradients}, scaled to one length, span {typeset_number(ratio, 1)} {_interval(interval, 1)} directions;"
    said += f" random ones in {numbers['row_dim']:,} dimensions would span {typeset_number(random, 1)}"
    return verdict, said + "".join(_comparison(other, found) for other, found in _comparisons(numbers))


def _comparisons(numbers: Summary) -> list[tuple[str, Summary | None]]:
    """Of each other tag, its comparison in the bucket of highest entropy."""
    top = str(len(numbers["per_bucket"]) - 1)
    return [(other, (buckets or {}).get(top)) for other, buckets in numbers.get("compared_with", {}).items()]


def _comparison(other: str, found: Summary | None) -> str:
    if found is None or found["ci95"] is None:
        return ""
    number = f"{typeset_number(found['ratio'])} {typeset_interval(found['ci95'])}"
    return f". Over {other}'s, at equal n: {number}, {found['verdict']}"


def cancel_statements(exp2: Summary) -> list[Statement]:
    """Would updates of correct and incorrect rollouts cancel? A statement per tag."""
    return [
        Statement(tag, CANCEL_WORDS[numbers["alignment"]["verdict"]], _cancel(numbers)) for tag, numbers in exp2.items()
    ]


def _cancel(numbers: Summary) -> str:
    found, reference = numbers["alignment"], numbers.get("reference")
    over = f"over {found['n_prompts']} prompts"
    parts = [f"Bucket {numbers['bucket']}: ρ = {rho_with_interval(found)} {over}"]
    if found["ci95"] is None:
        why = _why(found) or f"the signal of a kind is not above 0 at the 95% level, {over}"
        parts = [f"Bucket {numbers['bucket']}: no ρ, as {why}"]
    elif _why(found):
        parts.append(f"Why it tells nothing: {_why(found)}")
    if reference is not None:
        parts.append(f"Rollouts are on-policy: theory fixes ρ at {typeset_number(reference, 0)}{_holds(found)}")
    sums = numbers.get("rho_over_sums")
    if sums and sums["ci95"] is not None:
        parts.append(f"Over sums of all its tokens, ρ = {typeset_estimate(sums)}")
    parts.append(_adds(numbers["cancellation"]))
    return ". ".join(part for part in parts if part)


def _holds(found: Summary) -> str:
    if found["ci95"] is None:
        return ""
    low, high = found["ci95"]
    return ", inside the interval" if low <= -1 <= high else f", {'below' if low > -1 else 'above'} the interval"


def _adds(found: Summary) -> str:
    """What advantages of ±1 make of the rollouts, against advantages shuffled."""
    if found["ratio"] is None or found["null_ci95"] is None:
        return ""
    verdict = CANT_TELL
    if found["p_value"] < SIGNIFICANT:
        verdict = "they add up" if found["ratio"] > found["null_mean"] else "they cancel"
    chance = f"{typeset_number(found['null_mean'], 2)} {typeset_interval(found['null_ci95'])}"
    number = f"C = {typeset_number(found['ratio'], 2)}, by chance {chance}, p = {typeset_number(found['p_value'], 4)}"
    return f"Under advantages of ±1: {number}: {verdict}"


def rho_with_interval(found: Summary) -> str:
    """`−0.63 [−1.33, −0.27]`, or `–`: a rho without an interval is no number."""
    return typeset_estimate({"value": found["rho"], "ci95": found["ci95"]})


def signal_statements(exp3: Summary) -> list[Statement]:
    """Where does the signal of the update sit? A statement per tag."""
    return [Statement(tag, *_signal(numbers)) for tag, numbers in exp3.items()]


def _signal(numbers: Summary) -> tuple[str, str]:
    top = f"top {CLAIMED_SHARE:.0%} of the tokens by {numbers['bucket_by']}"
    signal = numbers["signal"]
    if signal["verdict"] != SEEN:
        return f"{CANT_TELL}: underpowered", f"No update that prompts share is seen: {_why_no_signal(numbers)}"
    kept = numbers["at_20_percent"]["top"]
    share, ratio = kept["signal_share"], kept["noise_scale_ratio"]
    verdict = CANT_TELL
    if share["ci95"] is not None:
        verdict = _above(share["ci95"], CLAIMED_SHARE, "more", "less", CANT_TELL)
        verdict = verdict if verdict == CANT_TELL else f"{verdict} than their share in the {top}"
    parts = [f"The {top} carry {typeset_share(share['value'], share['ci95'])} of the signal"]
    parts[0] += f" and {typeset_share(kept['noise_share'])} of the noise"
    if kept["cosine"]["ci95"] is not None:
        parts.append(f"Their update's cosine with the full one is {typeset_estimate(kept['cosine'])}")
    if ratio["ci95"] is not None:
        need = _above(ratio["ci95"], 1.0, "more", "fewer", CANT_TELL)
        parts.append(f"It needs {typeset_estimate(ratio)} times the prompts: {need}")
    parts.append(_largest(numbers["per_bucket"]))
    if kept["cosine"]["ci95"] is None:
        parts.append(f"What direction they keep: {CANT_TELL}, their own signal is not above 0 at the 95% level")
    return verdict, ". ".join(part for part in parts if part)


def _why_no_signal(numbers: Summary) -> str:
    signal = numbers["signal"]
    z = "" if signal["z"] is None else f", z = {typeset_number(signal['z'], 1)}"
    return _why(signal) or f"{numbers['n_prompts']} prompts{z}"


def _why(found: Summary) -> str | None:
    """Why a verdict tells nothing, with a proper minus; None where it does, or in a summary of before."""
    return typeset_sentence(found.get("reason") or "") or None


def _largest(buckets: Summary) -> str:
    """The bucket that carries most of the signal."""
    shares = {bucket: one["signal_share"] for bucket, one in buckets.items() if one["signal_share"]["ci95"] is not None}
    if not shares:
        return ""
    bucket, found = max(shares.items(), key=lambda item: item[1]["value"])
    tokens = typeset_share(buckets[bucket]["share_of_tokens"])
    share = f"{typeset_share(found['value'], found['ci95'])}, with {tokens} of the tokens"
    return f"The largest part lies in bucket {bucket} of 0 to {len(buckets) - 1}: {share}"


def _above(interval: Sequence[float], value: float, above: str, below: str, else_: str) -> str:
    return above if interval[0] > value else below if interval[1] < value else else_


def limits_of(exp1: Summary, exp2: Summary, exp3: Summary, manifests: Summary) -> list[Limit]:
    """What the answers hang on: prompts, rare tokens, whose rollouts these are, huge gradients."""
    limits = [Limit("prompts", _sentences(exp2, _prompts))]
    if exp3:
        limits.append(Limit("prompts for the signal", _sentences(exp3, _prompts_of_signal)))
    limits.append(Limit("rare tokens", _sentences(exp2, _rare)))
    limits.append(Limit("on-policy?", _sentences(manifests, _policy)))
    if exp3:
        limits.append(Limit("on-policy? (the signal's rollouts)", _sentences(exp3, _policy)))
    looking = sorted({one["bucket_by"] for one in exp3.values() if one.get("is_chosen_by_prefix") is False})
    if looking:
        text = f"Buckets by {' and '.join(looking)} are chosen by the very tokens drawn: their scores' mean is not 0."
        limits.append(Limit("rules", text))
    differences = _differences(exp1, exp2, exp3)
    if differences:
        limits.append(Limit("differences beside the weights", " ".join(f"{line}." for line in differences)))
    limits.append(Limit("huge gradients", _sentences(exp1, _huge)))
    if any(numbers.get("reference") is not None for numbers in exp2.values()):
        limits.append(Limit("−1", OTHER_REASONS))
    return limits


def _differences(*experiments: Summary) -> list[str]:
    """What tags differ in, each line once."""
    lines = (line for summary in experiments for numbers in summary.values() for line in numbers.get("differences", ()))
    return list(dict.fromkeys(lines))


def _sentences(summaries: Summary, sentence: Any) -> str:
    return " ".join(f"{tag}: {sentence(numbers)}." for tag, numbers in summaries.items())


def _prompts(numbers: Summary) -> str:
    found = numbers["alignment"]
    detectable = (
        "" if found["min_detectable"] is None else f", |ρ| from {typeset_number(found['min_detectable'], 2)} on"
    )
    detectable = detectable and f"{detectable} would be found with 80% power"
    return f"{found['n_prompts']} of {numbers['n_prompts']} prompts have 2 rollouts of each kind{detectable}"


def _prompts_of_signal(numbers: Summary) -> str:
    scale = numbers["noise_scale_prompts"]
    needs = f"; signal equals noise at {typeset_estimate(scale, 0)}" if scale["ci95"] is not None else ""
    return f"{numbers['n_prompts']} prompts, {numbers['n_prompts_mixed']} with both outcomes{needs}"


def _rare(numbers: Summary) -> str:
    known = {bucket: found.get("n_rare") for bucket, found in numbers["by_bucket"].items()}
    if all(count is None for count in known.values()):
        return "not known, the rollouts don't tell 1 − max π"
    few = [bucket for bucket, count in known.items() if count is not None and count < MIN_RARE_TOKENS]
    named = f"bucket{'s' * (len(few) > 1)} {', '.join(few)}" if few else "no bucket"
    return f"{named} of {len(known)} with fewer than {MIN_RARE_TOKENS} to be expected behind a mean"


def _policy(manifest: Summary) -> str:
    found = manifest.get("on_policy") or {"mean": None, "z": None, "verdict": None}
    words = {ON_POLICY: "yes", OFF_POLICY: "no, and −1 is no reference", None: "not known"}[found["verdict"]]
    if found["z"] is None:
        return words
    return f"{words}, log π + H is {typeset_number(found['mean'], 4)} nats a token, z = {typeset_number(found['z'], 1)}"


def _huge(numbers: Summary) -> str:
    known = {b: one for b, one in numbers["per_bucket"].items() if one["ess"] is not None and one["n"]}
    if not known:
        return "no gradient"
    bucket, found = min(known.items(), key=lambda item: item[1]["ess"] / item[1]["n"])
    said = f"the norms of bucket {bucket} count as {typeset_number(found['ess'], 1)} of its {found['n']:,} gradients"
    return f"{said} (ESS), which its raw PR cannot exceed"


def _interval(bounds: Sequence[float], decimals: int) -> str:
    return f"[{', '.join(typeset_number(bound, decimals) for bound in bounds)}]"
