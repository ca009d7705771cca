"""The whole of Exp 3 for dumps: where their signal sits, along RL's step and in pooled gradients; whose rollouts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..analysis.inputs import is_judged_anew, on_policy_by_bucket, pooled_of
from ..analysis.prompts import rollouts_of
from ..analysis.tokens import logit_norm
from ..common.console import progress_bar
from ..common.errors import InputError
from ..dump.buckets import buckets_of
from ..dump.format import Dump, find_rollouts
from ..dump.on_policy import OnPolicy, Tokens, claims_on_policy
from ..dump.records import Rollout, iter_rollouts
from .signal import Exp3, signal_of_pooled
from .step import Along, StepSignal, step_signal

NOT_TESTED = OnPolicy(None, None, None)


@dataclass(frozen=True)
class DumpSignal:
    """Exp 3 of one dump.

    Attributes:
        signal: all that comes from pooled gradients; None of a dump of single tokens.
        step: all that comes from RL's step; None where the rollouts tell nothing of one.
        words: what the tokens of `step` read, by their codes.
        mean_outcome: of all rollouts, where there is a step.
        on_policy: of all response tokens; without numbers where no `rollouts.jsonl` tells of them.
        on_policy_by_bucket: of each bucket's; without numbers too where the rule looks at the tokens drawn.
    """

    signal: Exp3 | None
    step: StepSignal | None
    words: tuple[str, ...]
    mean_outcome: float | None
    on_policy: OnPolicy
    on_policy_by_bucket: tuple[OnPolicy, ...]


def refusal(dump: Dump) -> str | None:
    """Why Exp 3 can't read a dump; None where it can."""
    has_rollouts, has_step = find_rollouts(dump.path) is not None, "step" in dump.manifest
    if dump.is_pooled or (has_step and has_rollouts):
        return None
    if has_step:
        return "its rollouts.jsonl, which tells of the step, is not there"
    return "neither pooled (`pool` bucket) nor along a step (`step_to`, `step_from`), of which Exp 3 needs one"


def measure_dumps(
    dumps: Mapping[str, list[Dump]], objective: str = "dapo"
) -> tuple[dict[str, DumpSignal], dict[str, list[Exp3]]]:
    """Of each tag, all of its first target, and what the pooled gradients of its others say.

    Args:
        objective: as of `weights`.
    """
    found: dict[str, DumpSignal] = {}
    others: dict[str, list[Exp3]] = {}
    with progress_bar("Exp 3", sum(map(len, dumps.values())), "dumps") as bar:

        def measured(dump: Dump) -> Exp3 | None:
            result = signal_of_pooled(pooled_of(dump), objective) if dump.is_pooled else None
            bar.update()
            return result

        for tag, (first, *rest) in dumps.items():
            signal, (along, words) = measured(first), along_of(first)
            step = None if along is None else step_signal(along, objective)
            mean = None if along is None else float(along.outcome.mean())
            found[tag] = DumpSignal(signal, step, words, mean, *on_policy_of(first))
            others[tag] = [result for result in map(measured, rest) if result is not None]
    return found, others


def on_policy_of(dump: Dump) -> tuple[OnPolicy, tuple[OnPolicy, ...]]:
    """The test of all response tokens, and of those of each bucket."""
    file = find_rollouts(dump.path)
    of_all = NOT_TESTED if file is None else Tokens.of(iter_rollouts(file)).test(claims_on_policy(dump.manifest))
    return of_all, tuple(found or NOT_TESTED for found in on_policy_by_bucket(dump))


def along_of(dump: Dump) -> tuple[Along | None, tuple[str, ...]]:
    """The dump's rollouts along its step, and what their tokens read; None where it has no step."""
    file = find_rollouts(dump.path) if "step" in dump.manifest else None
    if file is None:
        return None, ()
    rollouts = list(rollouts_of(dump))
    keys = {key: code for code, key in enumerate(sorted({rollout.prompt_idx for rollout in rollouts}))}
    d, logprobs, other = (_tokens(rollouts, name) for name in ("step", "logprobs", "step_logprobs"))
    shift = other - logprobs if dump.manifest["step"]["logprobs_of"] == "to" else logprobs - other
    names = dump.manifest["step"].get("weights", [])
    if any(len(rollout.step_by_weight) != len(names) for rollout in rollouts):
        raise InputError(f"{file}: step_by_weight is not of the manifest's {len(names)} weights")
    rewards = [rollout.reward for rollout in rollouts]
    is_rewarded = None not in rewards and not is_judged_anew(dump.manifest)
    words, token = np.unique(np.concatenate([_words(rollout) for rollout in rollouts]), return_inverse=True)
    along = Along(
        d=d,
        n_tokens=np.array([len(rollout.response_ids) for rollout in rollouts]),
        prompt=np.array([keys[rollout.prompt_idx] for rollout in rollouts]),
        outcome=np.array(rewards if is_rewarded else [rollout.correct for rollout in rollouts], np.float64),
        shift=shift,
        bucket=np.concatenate([buckets_of(r, np.array(dump.manifest["entropy_edges"])) for r in rollouts]),
        n_buckets=dump.bins,
        tail_mass=_tokens(rollouts, "tail_mass"),
        rules=rules_of(rollouts, dump, shift),
        token=token,
        by_weight=np.array([rollout.step_by_weight for rollout in rollouts]),
        weights=tuple(names),
    )
    return along, tuple(words.tolist())


def rules_of(rollouts: list[Rollout], dump: Dump, shift: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by which tokens may be kept, [T] each; those that only other files have are left out."""
    surprisal = -_tokens(rollouts, "logprobs")
    rules = {"entropy": _tokens(rollouts, "entropies"), "surprisal": surprisal}
    if all(rollout.sum_p2 for rollout in rollouts if rollout.response_ids):
        rules["‖onehot − π‖"] = logit_norm(-surprisal, _tokens(rollouts, "sum_p2"))
    if dump.manifest.get("bucket_by", "entropy").startswith("score:"):
        rules[dump.manifest["bucket_by"]] = _tokens(rollouts, "bucket_scores")
    rules["|Δ log π|"] = np.abs(shift)
    rules["position"] = np.concatenate([np.arange(len(rollout.response_ids)) for rollout in rollouts]).astype(float)
    rules["random"] = np.random.default_rng(0).random(len(shift))
    return rules


def _tokens(rollouts: list[Rollout], name: str) -> np.ndarray:
    """[T] float64, one number per token of all rollouts."""
    return np.concatenate([np.array(getattr(rollout, name), np.float64) for rollout in rollouts])


def _words(rollout: Rollout) -> list[str]:
    return rollout.token_texts or [str(token) for token in rollout.response_ids]
