"""The whole of Exp 2, for one bucket and for dumps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ..analysis.bucket import Bucket, bucket_of
from ..analysis.inputs import on_policy_by_bucket, pooled_of
from ..analysis.jackknife import NO_ESTIMATE, Estimate
from ..analysis.opposition import rho_over_sums
from ..common.console import progress_bar
from ..dump.format import Dump
from ..dump.on_policy import MIN_RARE_TOKENS, ON_POLICY, OnPolicy, is_chosen_by_prefix
from .coupling import UNCERTAIN_BELOW, Meetings, Tokens, meetings_of
from .direction import (
    MIN_ROLLOUTS_OF_EACH_KIND,
    Alignment,
    Cancellation,
    Directions,
    RolloutGrams,
    alignment,
    cancellations,
    compare_groups,
    half_split_cosines_by_rollout,
    rollout_grams,
)

Tag = TypeVar("Tag", bound="str | None")
REFERENCE = -1.0


@dataclass(frozen=True)
class Exp2Settings:
    """How many random draws stand behind each kind of number.

    Attributes:
        bootstrap: for `min_detectable`.
        permutations: for p-values, which can't fall below 2 / (permutations + 1); 0 for none.
        seed: of splits, bootstrap, permutations and deals.
        ids: deals of token ids behind the null of coupling; 0 for none.
    """

    bootstrap: int = 4000
    permutations: int = 9999
    seed: int = 0
    ids: int = 999


@dataclass(frozen=True)
class BucketDirections:
    """All of Exp 2 on one set of tokens.

    Attributes:
        directions: the original's measures, token-weighted cosines and the half-split of tokens.
        control_by_rollout: half-split cosines by rollout; NaN where a mean is the zero vector.
        alignment: noise-corrected cosine, its interval, test and verdict.
        cancellation, cancellation_group_normalised: of advantages ±1, and of GRPO's.
        n_rare: see `rare_tokens`; where it is below 30, verdicts on ρ and C are "unsampled".
        on_policy: of all response tokens of this bucket, picked or not; None where the rollouts are not at hand.
        rho_over_sums: see `analysis.opposition`; None of single tokens.
        reference: -1 where theory fixes ρ, else None.
    """

    directions: Directions
    control_by_rollout: np.ndarray
    alignment: Alignment
    cancellation: Cancellation
    cancellation_group_normalised: Cancellation
    n_rare: float | None
    on_policy: OnPolicy | None = None
    rho_over_sums: Estimate | None = None
    reference: float | None = None


DEFAULTS = Exp2Settings()


def directions_of_bucket(
    bucket: Bucket, correct: np.ndarray, settings: Exp2Settings = DEFAULTS, tail_mass: np.ndarray | None = None
) -> BucketDirections:
    """All of Exp 2 on some tokens; the same arguments give the same numbers.

    Each number draws from a random stream of its own, so none hangs on the number of draws of another.

    Args:
        bucket: the tokens looked at (those of one entropy bucket).
        correct: [n] bool, whether each one's rollout was correct.
        settings: how many draws.
        tail_mass: [n] 1 - max π at each one's token, or their sum; None: not known.

    Raises:
        ValueError: a rollout has both correct and incorrect tokens.
    """
    grams = rollout_grams(bucket, correct)
    n_rare = rare_tokens(grams, tail_mass, bucket, correct)
    is_unsampled = n_rare is not None and n_rare < MIN_RARE_TOKENS
    splits, of_rho, of_labels = (np.random.default_rng([settings.seed, stream]) for stream in (1, 2, 3))
    n = settings.permutations
    return BucketDirections(
        compare_groups(bucket, correct, settings.seed),
        half_split_cosines_by_rollout(grams, splits),
        alignment(grams, of_rho, is_unsampled, n_bootstrap=settings.bootstrap, n_permutations=n),
        *cancellations(grams, of_labels, is_unsampled, n_permutations=n),
        n_rare,
    )


def rare_tokens(grams: RolloutGrams, tail_mass: np.ndarray | None, bucket: Bucket, correct: np.ndarray) -> float | None:
    """The rare tokens to be expected behind the less sampled of the two mean gradients that ρ compares.

    A token drawn where the likeliest word has 1 - ε is rare with chance ε, and has a gradient some 1/ε times as long as
    the others': Σ ε counts those to be expected. Only prompts with 2 rollouts of each kind have a part in ρ; None
    without any. `tail_mass`: [n] ε of each gradient, a sum where tokens are pooled; None: not known.
    """
    usable = grams.with_rollouts_of_each_kind(MIN_ROLLOUTS_OF_EACH_KIND).prompts
    if tail_mass is None or len(usable) == 0:
        return None
    has_part = np.isin(bucket.prompt, usable)
    return float(min(tail_mass[has_part & kind].sum() for kind in (correct, ~correct)))


def bucket_directions(
    dump: Dump, index: int, settings: Exp2Settings = DEFAULTS, device: str = "cpu"
) -> BucketDirections:
    """What Exp 2 takes from the gradients of one bucket."""
    bucket = bucket_of(dump, index, device)
    tails = None if dump.tail_masses is None else dump.tail_masses[bucket.rows]
    return directions_of_bucket(bucket, dump.correct[bucket.rows], settings, tails)


def directions_of_dump(
    dump: Dump, settings: Exp2Settings = DEFAULTS, device: str = "cpu", on_bucket: Callable[[], Any] = int
) -> list[BucketDirections]:
    """All of Exp 2 of one dump, bucket by bucket. `on_bucket` is called after each."""
    tests = on_policy_by_bucket(dump)
    sums = sampled_rho_over_sums(dump) if dump.is_pooled else [None] * dump.bins
    reference = reference_of(dump)
    found = []
    for index, (test, rho) in enumerate(zip(tests, sums, strict=True)):
        of_bucket = bucket_directions(dump, index, settings, device)
        found.append(replace(of_bucket, on_policy=test, rho_over_sums=rho, reference=reference))
        on_bucket()
    return found


def sampled_rho_over_sums(dump: Dump) -> list[Estimate]:
    """ρ over sums of each bucket of a pooled dump; none where fewer than 30 rare tokens were to be expected."""
    found = rho_over_sums(pooled_of(dump)).by_bucket
    if dump.rare is None:
        return list(found)
    kinds = (dump.correct, ~dump.correct)
    n_rare = np.minimum(*(np.bincount(dump.bin[kind], dump.rare[kind], dump.bins) for kind in kinds))
    return [rho if rare >= MIN_RARE_TOKENS else NO_ESTIMATE for rho, rare in zip(found, n_rare, strict=True)]


def reference_of(dump: Dump) -> float | None:
    """-1, what ρ is where rollouts are the model's own and buckets are chosen by the prefix alone; else None."""
    is_on_policy = (dump.manifest.get("on_policy") or {}).get("verdict") == ON_POLICY
    return REFERENCE if is_on_policy and is_chosen_by_prefix(dump.manifest) else None


def meetings_of_dump(dump: Dump, settings: Exp2Settings = DEFAULTS, device: str = "cpu") -> Meetings | None:
    """Coupling by token; None of pooled dumps, and of those of the original scripts, which lack ids and log-probs."""
    if dump.token_id is None or dump.logprob is None:
        return None
    bucket = bucket_of(dump, device=device)
    is_uncertain = dump.logprob < np.log(UNCERTAIN_BELOW)
    tokens = Tokens(bucket.rollout, dump.bin, dump.token_id, is_uncertain, dump.correct)
    return meetings_of(bucket, tokens, dump.bins, np.random.default_rng([settings.seed, 4]), settings.ids)


def measure_dumps(
    dumps: Mapping[Tag, list[Dump]], device: str = "cpu"
) -> tuple[dict[Tag, list[BucketDirections]], dict[Tag, list[BucketDirections]], dict[Tag, Meetings | None]]:
    """Of each tag every bucket of its first target, the bucket of highest entropy of its others, and the coupling."""
    found: dict[Tag, list[BucketDirections]] = {}
    tops: dict[Tag, list[BucketDirections]] = {}
    meetings = {tag: meetings_of_dump(targets[0], device=device) for tag, targets in dumps.items()}
    total = sum(targets[0].bins + len(targets) - 1 for targets in dumps.values())
    with progress_bar("Exp 2", total, "buckets") as bar:
        for tag, (first, *others) in dumps.items():
            found[tag], tops[tag] = directions_of_dump(first, device=device, on_bucket=bar.update), []
            for dump in others:
                tops[tag].append(bucket_directions(dump, dump.bins - 1, device=device))
                bar.update()
    return found, tops, meetings
