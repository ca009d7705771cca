"""The whole of Exp 1: every number with its interval, its null and its ceiling.

    results, compared = measure_dumps({tag: sample_rollouts(dump) for tag, dump in dumps.items()})
    summary[tag] |= exp1.summary.numbers_of(results[tag])

A dump's buckets are taken one after the other. Each makes its Gram matrix, takes from it all that a bucket has to say,
its halves included, and leaves behind its leading directions, which is all that comparisons across buckets need.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.special import betaincinv

from ..analysis.bucket import Bucket, bucket_of, rollout_codes
from ..analysis.prompts import Pairs, number_prompts
from ..analysis.replication import spread_of
from ..common.console import progress_bar
from ..dump.format import Dump
from .compression import (
    HALF_DRAWS,
    LARGE_GRAM,
    MATCHED_DRAWS,
    Interval,
    MatchedN,
    Ratio,
    Sums,
    compare_buckets,
    drawn_number,
    half_sample_interval,
    matched_n,
    sums_of,
)
from .spectrum import Spectrum
from .subspaces import (
    CEILING_DRAWS,
    NULL_DRAWS,
    compare,
    directions_of,
    measures_of,
    shuffled_labels,
    shuffled_null,
    split_half_ceiling,
)

log = logging.getLogger(__name__)
RANK_PERCENTS = (50, 90, 95, 99)
RANK_DRAWS_OF_LARGE = 3
MAX_ROLLOUTS = 2048
"""Sums over pairs of more rollouts would outgrow all else."""
REPLICATED = ("participation_ratio", "participation_ratio_unit_norm", "rank95")
EXACT = 1e-10
"""Tolerance of a bucket's own directions: they are compared with those of the original scripts."""
ROUNDING_OF_MEASURES = 1e-5


@dataclass(frozen=True)
class Exp1Settings:
    """How many random draws stand behind each kind of number.

    Attributes:
        halves: halves of prompts, for intervals.
        matched: subsamples at equal n, for participation ratios.
        matched_rank: of these, those that are decomposed for the rank.
        matched_rank_of_large: the same where n and d both exceed 1,024: each takes seconds there.
        ceiling: halves of prompts, for the ceilings of measures across buckets.
        null: shuffles of bucket labels.
        seed: of all draws.
    """

    halves: int = HALF_DRAWS
    matched: int = MATCHED_DRAWS
    matched_rank: int = MATCHED_DRAWS
    matched_rank_of_large: int = RANK_DRAWS_OF_LARGE
    ceiling: int = CEILING_DRAWS
    null: int = NULL_DRAWS
    seed: int = 0

    def ranks_of(self, n: int, dim: int) -> int:
        """How many subsamples of n gradients of length `dim` are decomposed."""
        return self.matched_rank_of_large if min(n, dim) > LARGE_GRAM else self.matched_rank

    def to_dict(self) -> dict[str, int]:
        """What the summary says."""
        return asdict(self)


@dataclass(frozen=True)
class BucketNumbers:
    """What one bucket has to say; see docs/methods.md for each. None: no number.

    The intervals are those of `compression.half_sample_interval`.
    """

    n: int
    participation_ratio: float | None
    participation_ratio_ci95: Interval | None
    top1_energy_frac: float | None
    rank50: int | None
    rank90: int | None
    rank95: int | None
    rank99: int | None
    effective_rank: float | None
    ess: float | None
    ess_ci95: Interval | None
    participation_ratio_unit_norm: float | None
    participation_ratio_unit_norm_ci95: Interval | None
    participation_ratio_isotropic: float | None
    matched_n: MatchedN


@dataclass(frozen=True)
class Exp1:
    """Exp 1 of one dump.

    Attributes:
        dim: d.
        spectra: of each bucket, for figures.
        sums: of each bucket, for `compression.compare_buckets`; empty once all comparisons are made.
        buckets: the numbers of each bucket.
        cross: each measure of `subspaces.measures_of`, [B, B] with NaN for no number.
        ceilings: per bucket, the same measures, [draws] each.
        null: the same measures, [draws, B, B] each.
        settings: how many were drawn of what.
    """

    dim: int
    spectra: list[Spectrum]
    sums: list[Sums]
    buckets: list[BucketNumbers]
    cross: dict[str, np.ndarray]
    ceilings: list[dict[str, np.ndarray]]
    null: dict[str, np.ndarray]
    settings: Exp1Settings

    def top1_repeats(self) -> list[str | None]:
        """Per bucket: does its leading direction come up in both halves of its prompts? None: no ceiling.

        "yes" where the ceiling's 95% range lies above, "no" where it lies below what the |cos| of two random
        directions stays under 95% of the time (cos² of those is Beta(1/2, (d-1)/2)), else "can't tell".
        """
        random = float(np.sqrt(betaincinv(0.5, (self.dim - 1) / 2, 0.95))) if self.dim > 1 else 1.0
        found = [drawn_number(ceiling["top1_cosine"]) for ceiling in self.ceilings]
        return [
            None if one is None else "yes" if one.ci95[0] > random else "no" if one.ci95[1] < random else "can't tell"
            for one in found
        ]


@dataclass(frozen=True)
class Comparison:
    """One dump's buckets over the first's, paired by prompt.

    Attributes:
        ratios: of each bucket, None where either has no number; None in place of all where nothing can be compared.
        pairs: how prompts were paired.
        reason: why there are no ratios, else None.
        warning: what the reader must be told of the pairing, else None.
    """

    ratios: list[Ratio | None] | None
    pairs: Pairs
    reason: str | None = None
    warning: str | None = field(default=None, compare=False)


def place_in_null(value: float, null: np.ndarray) -> int:
    """-1 below, 1 above the central 95% of `null`, [draws], 0 inside or where either has no number."""
    null = null[np.isfinite(null)]
    if len(null) == 0 or not np.isfinite(value):
        return 0
    low, high = np.quantile(null, [0.025, 0.975])
    return int(value > high + ROUNDING_OF_MEASURES) - int(value < low - ROUNDING_OF_MEASURES)


def chance_outside_null(draws: int) -> float:
    """About how often `place_in_null` of `draws` is not 0 where the value is one more draw of the same null.

    The quantiles lie between the outermost two of the draws, at 0.025 (draws - 1) of the way, and one more draw falls
    with equal chance between any two neighbours.
    """
    return min(1.0, 2 * (1 + 0.025 * (draws - 1)) / (draws + 1))


def smallest_bucket(buckets: Iterable[np.ndarray]) -> int:
    """The fewest gradients of any bucket that has some, over all dumps. `buckets`: the labels, [n], of each dump."""
    counts = [count for labels in buckets for count in np.unique(labels, return_counts=True)[1]]
    return int(min(counts, default=0))


def refusal(dump: Dump) -> str | None:
    """Why Exp 1 can't read a dump; None where it can."""
    return "a pooled dump; Exp 1 reads token dumps only" if dump.is_pooled else None


def sample_rollouts(dump: Dump, most: int = MAX_ROLLOUTS, seed: int = 0) -> Dump:
    """The dump, or a random `most` of its rollouts, of which its `warnings` then tell.

    Dumps of the same prompts and samples keep the same ones.
    """
    rollout = rollout_codes(dump.prompt, dump.sample_idx)
    count = int(rollout.max(initial=-1)) + 1
    if count <= most:
        return dump
    chosen = np.random.default_rng(seed).permutation(count)[:most]
    said = f"{dump.path}: Exp 1 takes {most:,} of the {count:,} rollouts, drawn at random"
    return replace(dump.only(np.flatnonzero(np.isin(rollout, chosen))), warnings=(*dump.warnings, said))


def measure_dumps(
    dumps: Mapping[str, Dump], settings: Exp1Settings | None = None, device: str = "cpu"
) -> tuple[dict[str, Exp1], dict[str, Comparison]]:
    """Exp 1 of every dump, at the smallest bucket of all, with progress on stderr; and further tags against the first.

    What only comparisons need is kept of the first dump alone: of many checkpoints it would outgrow all else.
    """
    settings = settings or Exp1Settings()
    numbers, pairs = number_prompts(dumps)
    warnings = {tag: _warning_of(next(iter(dumps)), tag, found) for tag, found in pairs.items()}
    for warning in filter(None, warnings.values()):
        log.warning(warning)
    common_n = smallest_bucket(dump.bin for dump in dumps.values())
    results: dict[str, Exp1] = {}
    compared = {}
    for tag, dump in dumps.items():
        whole = bucket_of(dump, device=device)
        whole.prompt = numbers[tag][dump.prompt]
        with progress_bar(f"{tag}: Exp 1", dump.bins + settings.null, "steps") as bar:
            result = measure_dump(whole, dump.bin, dump.bins, common_n, settings, bar.update)
        if results:
            compared[tag] = _compare(next(iter(results.values())), result, pairs[tag], warnings[tag])
            result = replace(result, sums=[])
        results[tag] = result
    return results, compared


def _compare(first: Exp1, result: Exp1, pairs: Pairs, warning: str | None) -> Comparison:
    """One dump's buckets against the first's; no ratios where their number differs or no prompt is common."""
    if len(first.sums) != len(result.sums):
        return Comparison(None, pairs, "the number of buckets differs", warning)
    if pairs.n_prompts == 0:
        return Comparison(None, pairs, f"no prompt is common to both, by {pairs.by}", warning)
    ratios = [compare_buckets(one, other) for one, other in zip(first.sums, result.sums, strict=True)]
    return Comparison(ratios, pairs, None, warning)


def _warning_of(first: str | None, tag: str | None, pairs: Pairs) -> str | None:
    """What a reader of the comparison must know: a pairing that is a guess, or leaves nothing."""
    if not pairs.is_certain:
        return (
            f"{first} and {tag} are paired by prompt_idx alone, as they don't tell their prompts' token ids or data "
            "set: what is said over the prompts of both is wrong if these are other problems, or in another order"
        )
    if pairs.n_prompts == 0:
        return f"{first} and {tag} have no prompt in common, by {pairs.by}: they are not compared"
    return None


def measure_dump(
    whole: Bucket,
    label: np.ndarray,
    n_buckets: int,
    common_n: int,
    settings: Exp1Settings | None = None,
    on_step: Callable[[], Any] = lambda: None,
) -> Exp1:
    """All of Exp 1 for one dump.

    Args:
        whole: all gradients. For comparisons across dumps, equal `prompt` numbers must mean equal prompts.
        label: [n] entropy bucket, 0 .. n_buckets - 1.
        n_buckets: how many there are, empty ones included.
        common_n: the n at which buckets are compared, `smallest_bucket` of all dumps.
        settings: None for the defaults.
        on_step: called after each bucket and each shuffle of the null.
    """
    settings = settings or Exp1Settings()
    buckets = [whole.part(label == index) for index in range(n_buckets)]
    measured, directions = [], []
    for place, bucket in enumerate(buckets):
        measured.append(_measure_bucket(bucket, common_n, settings))
        directions.append(directions_of(bucket, settings.seed, EXACT))
        buckets[place] = whole.part(label == place)  # the same without its Gram matrix
        on_step()
    spectra, sums, numbers, ceilings = map(list, zip(*measured, strict=True))
    cross = measures_of(compare(buckets, directions))
    labellings = shuffled_labels(label, whole.rollout, settings.null, settings.seed)
    null = shuffled_null(whole, labellings, n_buckets, on_step)
    return Exp1(whole.dim, spectra, sums, numbers, cross, ceilings, null, settings)


def _measure_bucket(
    bucket: Bucket, common_n: int, settings: Exp1Settings
) -> tuple[Spectrum, Sums, BucketNumbers, dict[str, np.ndarray]]:
    """All that hangs on one bucket's Gram matrix: its spectrum, sums, numbers and ceilings."""
    spectrum, sums = Spectrum(bucket.n, bucket.energies()), sums_of(bucket)
    n_ranks = settings.ranks_of(common_n, bucket.dim)
    matched = matched_n(bucket, sums, spectrum, common_n, settings.matched, n_ranks, settings.seed)
    numbers = _bucket_numbers(spectrum, sums, matched, settings)
    return spectrum, sums, numbers, split_half_ceiling(bucket, settings.ceiling, settings.seed)


def replication_of(dumps: list[Dump], first: Mapping[str, Mapping[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """How a tag's numbers vary over its targets. `first`: the first target's `per_bucket`."""
    numbers = [first]
    with progress_bar("further targets", len(dumps) - 1, "targets") as bar:
        for dump in dumps[1:]:
            numbers.append(replicated_numbers(dump, device))
            bar.update()
    return {
        "targets": [dump.path.name for dump in dumps],
        **{
            measure: {bucket: spread_of([target[bucket][measure] for target in numbers]) for bucket in first}
            for measure in REPLICATED
        },
    }


def replicated_numbers(dump: Dump, device: str = "cpu") -> dict[str, dict[str, float | int | None]]:
    """Of each bucket what `REPLICATED` names: no draws, and one Gram matrix each."""
    found = {}
    for index in range(dump.bins):
        bucket = bucket_of(dump, index, device)
        spectrum, sums = Spectrum(bucket.n, bucket.energies()), sums_of(bucket)
        unit_norm = _number(sums.unit_norm_participation_ratios(np.ones((1, len(sums.n))))[0])
        values = (spectrum.participation_ratio, unit_norm, spectrum.rank(0.95))
        found[str(index)] = dict(zip(REPLICATED, values, strict=True))
    return found


def _bucket_numbers(spectrum: Spectrum, sums: Sums, matched: MatchedN, settings: Exp1Settings) -> BucketNumbers:
    everything = np.ones((1, len(sums.n)))

    def interval(measure: Callable[[Sums, np.ndarray], np.ndarray]) -> Interval | None:
        return half_sample_interval(sums, measure, settings.halves, settings.seed)

    return BucketNumbers(
        n=spectrum.n,
        participation_ratio=spectrum.participation_ratio,
        participation_ratio_ci95=interval(Sums.participation_ratios),
        top1_energy_frac=spectrum.top1_energy_frac,
        **{f"rank{percent}": spectrum.rank(percent / 100) for percent in RANK_PERCENTS},
        effective_rank=spectrum.effective_rank,
        ess=_number(sums.effective_sample_sizes(everything)[0]),
        ess_ci95=interval(Sums.effective_sample_sizes),
        participation_ratio_unit_norm=_number(sums.unit_norm_participation_ratios(everything)[0]),
        participation_ratio_unit_norm_ci95=interval(Sums.unit_norm_participation_ratios),
        participation_ratio_isotropic=_number(sums.isotropic_participation_ratios(everything)[0]),
        matched_n=matched,
    )


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
