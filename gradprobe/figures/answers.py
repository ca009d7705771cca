"""What a study found, in sentences: every word is picked by the numbers of the summaries.

Three questions, each with an answer in short and a statement per tag: a verdict and the numbers with intervals that it
rests on. Then what limits them. A number without an interval is not said where it would need one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis.summaries import Summary
from ..analysis.text import CANT_TELL, counted, estimate, number, share, share_estimate, with_interval
from ..dump.format import model_name
from ..dump.on_policy import MIN_RARE_TOKENS, OFF_POLICY, ON_POLICY
from ..exp1.summary import TRUSTED, compared, random_span, span, top_bucket, what_would_tell
from ..exp3.signal import CLAIMED_SHARE, SEEN
from ..exp3.summary import at, said_of_noise
from .look import shortened

NOT_MEASURED = "which tokens carry the signal was not measured"
OTHER_REASONS = (
    "Why an estimate of ρ differs from the −1 that theory fixes: noise; at most a few positions of a rollout and "
    "bucket, and means in the place of sums; prompts of different difficulty pooled; rare tokens that did not come up."
)

Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Statement:
    """On one tag: whose it is, the verdict, the numbers it rests on."""

    of: str
    verdict: str
    numbers: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """To one question of the study: in short, and what each tag's numbers say."""

    question: str
    in_short: str
    statements: Sequence[Statement]

    def text(self) -> str:
        """For a terminal."""
        lines = [f"  {one.of}: {one.verdict}. {'. '.join(one.numbers)}" for one in self.statements]
        return "\n".join([self.question, *lines])


@dataclass(frozen=True)
class Limit:
    """What an answer hangs on, in a few words and a sentence."""

    name: str
    text: str


def answers_of(exp1: Summary, exp2: Summary, exp3: Summary) -> list[Answer]:
    """The study's three answers; `exp3` is empty where it was not measured."""
    return [
        Answer(
            "How many directions do the gradients of high-entropy tokens span?",
            _directions_in_short(exp1),
            [Statement(tag, *_directions(numbers)) for tag, numbers in exp1.items()],
        ),
        Answer(
            "Would the updates of correct and incorrect rollouts cancel?",
            _by_verdict(exp2, lambda one: one["cancellation"]["verdict"], "updates of correct and incorrect rollouts"),
            [Statement(tag, *_cancel(numbers)) for tag, numbers in exp2.items()],
        ),
        Answer(
            "Which tokens carry the signal of the update?",
            "; ".join(f"{tag}: {_signal(one)[0]}" for tag, one in exp3.items()) or NOT_MEASURED,
            [Statement(tag, *_signal(numbers)) for tag, numbers in exp3.items()],
        ),
    ]


def summed_up(answers: Sequence[Answer]) -> str:
    """The study in one sentence."""
    said = "; ".join(answer.in_short for answer in answers)
    return f"{said[:1].upper()}{said[1:]}."


def _directions_in_short(exp1: Summary) -> str:
    said = [
        f"{tag} spans {_directions(numbers)[0]}"
        for tag, numbers in exp1.items()
        if len(exp1) == 1 or compared(numbers)
    ]
    return f"in the bucket of highest entropy {'; '.join(said)}"


def _directions(numbers: Numbers) -> tuple[str, list[str]]:
    """A further tag is told against the first; of one alone there is the number, and no verdict to give."""
    bucket, found = top_bucket(numbers)
    said = f"bucket {bucket}, {counted(found['n'], 'gradient')}: {span(found)}"
    if found[TRUSTED] is None:
        return CANT_TELL, [said]
    random = number(random_span(found["n"], numbers["row_dim"]), 1)
    said += f" directions, each gradient scaled to length 1; random ones would span {random}"
    return _against(numbers) or f"{span(found)} directions", [said]


def _against(numbers: Numbers) -> str:
    """What a tag is against the first in the bucket of highest entropy; empty for the first itself."""
    known = compared(numbers)
    if known is None:
        return ""
    first, ratios, paired = known
    found = (ratios or {}).get(top_bucket(numbers)[0])
    if found is None or found["ci95"] is None:
        why = paired["reason"] or what_would_tell(found) or "no number"
        return f"more or fewer directions than {first}? {CANT_TELL}: {why}"
    words = {"larger": f"more directions than {first}", "smaller": f"fewer directions than {first}"}
    times = f"{with_interval(found['ratio'], found['ci95'], 3)} times {first}'s at equal n"
    undecided = f"; {what_would_tell(found)}" if found["verdict"] not in words else ""
    return f"{words.get(found['verdict'], f'as many directions as {first} as far as can be told')}: {times}{undecided}"


def _by_verdict(summary: Summary, verdict: Callable[[Numbers], str], what: str) -> str:
    """`updates ... add up in base and trained`."""
    tags: dict[str, list[str]] = {}
    for tag, numbers in summary.items():
        tags.setdefault(verdict(numbers).removeprefix("they "), []).append(tag)
    return f"{what}: {'; '.join(f'{words} in {_listed(of)}' for words, of in tags.items())}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _cancel(numbers: Numbers) -> tuple[str, list[str]]:
    """C against advantages dealt out at random, and as a second line what the two kinds share."""
    c, rho, bucket = numbers["cancellation"], numbers["alignment"], numbers["bucket"]
    said = [f"bucket {bucket}: no prompt has both kinds of rollouts"]
    if c["ratio"] is not None and c["null_ci95"] is not None:
        said = [
            f"bucket {bucket}, {counted(c['n_prompts'], 'prompt')}: C = {number(c['ratio'], 2)}, by chance "
            f"{with_interval(c['null_mean'], c['null_ci95'])}, p = {number(c['p_value'], 4)}"
        ]
    if rho["reason"]:
        said.append(f"ρ {CANT_TELL}: {rho['reason']}")
    else:
        fixed = "" if numbers["reference"] is None else f"; theory fixes it at {number(numbers['reference'], 0)} here"
        said.append(f"ρ = {with_interval(rho['rho'], rho['ci95'])}: {rho['verdict']}{fixed}")
    sums = numbers["rho_over_sums"]
    if sums and sums["ci95"] is not None:
        said.append(f"over sums of all its tokens ρ = {estimate(sums)}")
    return c["verdict"], said


def _signal(numbers: Numbers) -> tuple[str, list[str]]:
    """Along RL's step where there is one, with what pooled gradients say beside it; else these alone."""
    if "step" not in numbers:
        return _pooled(numbers)
    verdict, said = _step(numbers["step"])
    if "signal" in numbers:
        beside, _ = _pooled(numbers)
        said.append(f"pooled gradients, without the step: {beside}")
    return verdict, said


def _step(step: Numbers) -> tuple[str, list[str]]:
    gain, curve = step["gain"], step["keep_top"]["entropy"]
    looks_ahead = step["at"] != "to"
    where = f"along the step to {step['to']}" if looks_ahead else f"going on along the step from {step['from']}"
    if gain["reason"]:
        verdict = f"{CANT_TELL} which tokens carry it: {where} no gain is seen"
        return verdict, [gain["reason"]]
    top = share_estimate(at(curve, CLAIMED_SHARE)["share"])
    what = "gain" if gain["t"] > 0 else "loss"
    verdict = f"the top {CLAIMED_SHARE:.0%} of the tokens by entropy carry {top} of the {what} {where}"
    others = ", ".join(f"{share_estimate(at(curve, of)['share'])} by {of:.0%}" for of in (0.1, 0.3))
    by_rule = ", ".join(
        f"{share_estimate(at(of_rule, CLAIMED_SHARE)['share'])} by {rule}"
        for rule, of_rule in step["keep_top"].items()
        if rule not in ("entropy", "random")
    )
    said = [
        f"t = {number(gain['t'], 1)} over {counted(step['n_prompts'], 'prompt')}, p = {number(gain['p_value'], 4)}",
        f"{others} of the tokens",
        f"the top {CLAIMED_SHARE:.0%} by other rules: {by_rule}",
    ]
    if step["measured_gain"] is not None:
        said.append(
            f"in expected reward {estimate(step['reward_gain'])} to first order, {number(step['measured_gain'], 2)} "
            "as measured between its ends"
        )
    return verdict, said


def _pooled(numbers: Numbers) -> tuple[str, list[str]]:
    top = f"the top {CLAIMED_SHARE:.0%} of the tokens by {numbers['bucket_by']}"
    if numbers["signal"]["verdict"] != SEEN:
        return f"{CANT_TELL} which tokens carry it", [numbers["signal"]["reason"]]
    kept = numbers["at_20_percent"]["top"]
    carried, ratio = kept["signal_share"], kept["noise_scale_ratio"]
    verdict = f"{top} carry {share_estimate(carried)} of it"
    said = [f"of the noise {share(kept['noise_share'])}"]
    if kept["cosine"]["ci95"] is None:
        said.append(f"their update's cosine with the full one: {CANT_TELL}, their own signal is not above 0")
    else:
        said.append(f"their update's cosine with the full one: {estimate(kept['cosine'])}")
    if ratio["ci95"] is not None:
        said.append(f"it needs {estimate(ratio)} times the prompts")
    shares = {bucket: one for bucket, one in numbers["per_bucket"].items() if one["signal_share"]["ci95"] is not None}
    if shares:
        bucket, largest = max(shares.items(), key=lambda item: item[1]["signal_share"]["value"])
        said.append(
            f"the largest part lies in bucket {bucket} of 0 to {numbers['bins'] - 1}: "
            f"{share_estimate(largest['signal_share'])}, with {share(largest['share_of_tokens'])} of the tokens"
        )
    return verdict, said


def limits_of(exp1: Summary, exp2: Summary, exp3: Summary, manifests: Summary) -> list[Limit]:
    """What the answers hang on: prompts, rare tokens, whose rollouts these are, huge gradients."""
    limits = [Limit("prompts", _sentences(exp2, _prompts))]
    pooled = {tag: one for tag, one in exp3.items() if "signal" in one}
    if pooled:
        limits.append(Limit("prompts for the signal", _sentences(pooled, _prompts_of_signal)))
    steps = {tag: one["step"] for tag, one in exp3.items() if "step" in one}
    if steps:
        limits.append(Limit("the step", _sentences(steps, _straight)))
    limits.append(Limit("rare tokens", _sentences(exp2, _rare)))
    limits.append(Limit("on-policy?", _sentences(manifests, _policy)))
    looking = sorted({one["bucket_by"] for one in exp3.values() if one["is_chosen_by_prefix"] is False})
    if looking:
        text = f"Buckets by {' and '.join(looking)} are chosen by the very tokens drawn: their scores' mean is not 0."
        limits.append(Limit("rules", text))
    lines = (line for summary in (exp1, exp2, exp3) for one in summary.values() for line in one["differences"])
    differences = list(dict.fromkeys(lines))
    if differences:
        limits.append(Limit("differences beside the weights", " ".join(f"{line}." for line in differences)))
    limits.append(Limit("huge gradients", _sentences(exp1, _huge)))
    if any(numbers["reference"] is not None for numbers in exp2.values()):
        limits.append(Limit("−1", OTHER_REASONS))
    return limits


def _sentences(summaries: Summary, sentence: Callable[[Numbers], str]) -> str:
    return " ".join(f"{tag}: {sentence(numbers)}." for tag, numbers in summaries.items())


def _prompts(numbers: Numbers) -> str:
    found = numbers["alignment"]
    least = found["min_detectable"]
    detectable = "" if least is None else f", |ρ| from {number(least, 2)} on would be found with 80% power"
    return f"{found['n_prompts']} of {numbers['n_prompts']} prompts have 2 rollouts of each kind{detectable}"


def _prompts_of_signal(numbers: Numbers) -> str:
    scale = numbers["noise_scale_prompts"]
    needs = f"; signal equals noise at {estimate(scale, 0)}" if scale["ci95"] is not None else ""
    return f"{counted(numbers['n_prompts'], 'prompt')}, {numbers['n_prompts_mixed']} with both outcomes{needs}"


def _straight(step: Numbers) -> str:
    straight, noise = step["linearity"], f"; {said_of_noise(step)}" if step["noise"] else ""
    return (
        f"d against the real change of log π: correlation {number(straight['correlation'], 2)}, slope "
        f"{number(straight['slope'], 2)}{noise}"
    )


def _rare(numbers: Numbers) -> str:
    known = {bucket: found["n_rare"] for bucket, found in numbers["by_bucket"].items()}
    if all(count is None for count in known.values()):
        return "not known, the rollouts don't tell 1 − max π"
    few = [bucket for bucket, count in known.items() if count is not None and count < MIN_RARE_TOKENS]
    named = f"bucket{'s' * (len(few) > 1)} {', '.join(few)}" if few else "no bucket"
    return f"{named} of {len(known)} with fewer than {MIN_RARE_TOKENS} to be expected behind a mean"


def _policy(manifest: Numbers) -> str:
    found = manifest.get("on_policy") or {"mean": None, "z": None, "verdict": None}
    words = {ON_POLICY: "yes", OFF_POLICY: "no, and −1 is no reference", None: "not known"}[found["verdict"]]
    if found["z"] is None:
        return words
    return f"{words}, log π + H is {number(found['mean'], 4)} nats a token, z = {number(found['z'], 1)}"


def _huge(numbers: Numbers) -> str:
    known = {b: one for b, one in numbers["per_bucket"].items() if one["ess"] is not None and one["n"]}
    if not known:
        return "no gradient"
    bucket, found = min(known.items(), key=lambda item: item[1]["ess"] / item[1]["n"])
    said = f"the norms of bucket {bucket} count as {number(found['ess'], 1)} of its {found['n']:,} gradients"
    return f"{said} (ESS), which its raw PR cannot exceed"


def named_model(tag: str, path: str) -> str:
    """`base = Qwen2.5-1.5B`; the tag alone where it is the model's name."""
    name = shortened(model_name(path), 80)
    return tag if tag == name else f"{tag} = {name}"
