"""The whole of Exp 2, for one bucket and for dumps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..analysis.bucket import Bucket, bucket_of
from ..common.console import progress_bar
from ..dump.format import Dump
from .direction import (
    Alignment,
    Cancellation,
    Directions,
    alignment,
    cancellation,
    compare_groups,
    half_split_cosines_by_rollout,
    known,
    rollout_grams,
)

Tag = TypeVar("Tag", bound="str | None")


@dataclass(frozen=True)
class Exp2Settings:
    """How many random draws stand behind each kind of number.

    Attributes:
        bootstrap: for `min_detectable`.
        permutations: for p-values, which can't fall below 2 / (permutations + 1); 0 for none.
        seed: of splits, bootstrap and permutations.
    """

    bootstrap: int = 4000
    permutations: int = 9999
    seed: int = 0

    def to_dict(self) -> dict[str, int]:
        """What the summary says."""
        return {"bootstrap": self.bootstrap, "permutations": self.permutations}


@dataclass(frozen=True)
class BucketDirections:
    """All of Exp 2 on one set of tokens.

    Attributes:
        directions: the original's measures, token-weighted cosines and the half-split of tokens.
        control_by_rollout: half-split cosines by rollout; None where a mean is the zero vector.
        alignment: noise-corrected cosine, its interval, test and verdict.
        cancellation: of advantages ±1.
        cancellation_group_normalised: of GRPO's advantages.
        settings: the draws behind the intervals and p-values.
    """

    directions: Directions
    control_by_rollout: tuple[float | None, ...]
    alignment: Alignment
    cancellation: Cancellation
    cancellation_group_normalised: Cancellation
    settings: Exp2Settings

    @property
    def control_by_rollout_cosines(self) -> np.ndarray:
        """[k] float64, every half-split cosine by rollout there is."""
        return known(self.control_by_rollout)


def directions_of_bucket(
    bucket: Bucket, correct: np.ndarray, n_prompts: int, settings: Exp2Settings | None = None
) -> BucketDirections:
    """All of Exp 2 on some tokens; the same arguments give the same numbers.

    The gradients are read twice, one prompt at a time: for the original's measures and for the rollouts' Gram
    matrices. Each number draws from a random stream of its own, so none hangs on the number of draws of another.

    Args:
        bucket: the tokens looked at (those of one entropy bucket).
        correct: [n] bool, whether each one's rollout was correct.
        n_prompts: prompts in the dump.
        settings: None for the defaults.

    Raises:
        ValueError: a rollout has both correct and incorrect tokens.
    """
    settings = settings or Exp2Settings()
    seed, n_permutations = settings.seed, settings.permutations
    grams = rollout_grams(bucket, correct)
    return BucketDirections(
        directions=compare_groups(bucket, correct, n_prompts, seed),
        control_by_rollout=half_split_cosines_by_rollout(grams, np.random.default_rng([seed, 1])),
        alignment=alignment(
            grams, np.random.default_rng([seed, 2]), n_bootstrap=settings.bootstrap, n_permutations=n_permutations
        ),
        cancellation=cancellation(grams, np.random.default_rng([seed, 3]), n_permutations=n_permutations),
        cancellation_group_normalised=cancellation(
            grams, np.random.default_rng([seed, 3]), n_permutations=n_permutations, group_normalised=True
        ),
        settings=settings,
    )


def bucket_directions(
    dump: Dump, index: int, settings: Exp2Settings | None = None, device: str = "cpu"
) -> BucketDirections:
    """All of Exp 2 at the tokens of one entropy bucket."""
    bucket = bucket_of(dump, index, device)
    return directions_of_bucket(bucket, dump.correct[bucket.rows], len(dump.prompt_keys), settings)


def measure_dumps(
    dumps: Mapping[Tag, list[Dump]], settings: Exp2Settings | None = None, device: str = "cpu"
) -> tuple[dict[Tag, list[BucketDirections]], dict[Tag, list[BucketDirections]]]:
    """Of each tag, every bucket of its first target, and the bucket of highest entropy of its others."""
    found: dict[Tag, list[BucketDirections]] = {}
    top_of_others: dict[Tag, list[BucketDirections]] = {}
    total = sum(targets[0].bins + len(targets) - 1 for targets in dumps.values())
    with progress_bar("Exp 2", total, "buckets") as bar:

        def measured(dump: Dump, index: int) -> BucketDirections:
            result = bucket_directions(dump, index, settings, device)
            bar.update()
            return result

        for tag, (first, *others) in dumps.items():
            found[tag] = [measured(first, index) for index in range(first.bins)]
            top_of_others[tag] = [measured(dump, dump.bins - 1) for dump in others]
    return found, top_of_others
