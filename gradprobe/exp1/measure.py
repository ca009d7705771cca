"""The whole of Exp 1 for one dump, on arrays: every number with its interval, its null and its ceiling.

    common_n = smallest_bucket([dump.bin for dump in dumps])
    result = measure_dump(dump.grads, dump.bin, dump.bins, dump.prompt, rollout_codes(...), common_n)
    summary[tag] |= result.as_json()

One pass over the buckets makes each one's Gram matrix, takes from it all that a bucket has to say, and keeps only
what comparisons across buckets need (`subspaces`).
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv

from ..analysis.gram import HOST, Arithmetic
from .compression import (
    HALF_DRAWS,
    LARGE_GRAM,
    MATCHED_DRAWS,
    RANK_DRAWS_OF_LARGE,
    DrawnNumber,
    Interval,
    MatchedN,
    Sums,
    drawn_number,
    half_sample_interval,
    matched_n,
    sums_of_rows,
)
from .spectrum import Spectrum, smaller_gram, spectrum_of_gram
from .subspaces import (
    CEILING_DRAWS,
    MAX_COSINE_BYTES,
    NULL_DRAWS,
    SUBSPACE_SIZES,
    ColumnGeometry,
    CosineGeometry,
    Space,
    measures_of,
    nested,
    shuffled_null,
    split_half_ceiling,
)

RANK_PERCENTS = (50, 90, 95, 99)
ROUNDING_OF_MEASURES = 1e-5
Table = list[list[float | None]]


@dataclass(frozen=True)
class Draws:
    """How many random draws stand behind each kind of number.

    Attributes:
        halves: halves of prompts, for intervals.
        matched: subsamples at equal n, for participation ratios.
        matched_rank: of these, those that are decomposed for the rank.
        matched_rank_of_large: the same where n and d both exceed 1,024: each takes seconds there.
        ceiling: halves of prompts, for the ceilings of measures across buckets.
        null: shuffles of bucket labels.
    """

    halves: int = HALF_DRAWS
    matched: int = MATCHED_DRAWS
    matched_rank: int = MATCHED_DRAWS
    matched_rank_of_large: int = RANK_DRAWS_OF_LARGE
    ceiling: int = CEILING_DRAWS
    null: int = NULL_DRAWS

    def ranks_of(self, n: int, dim: int) -> int:
        """How many subsamples of n rows of length `dim` are decomposed."""
        return self.matched_rank_of_large if min(n, dim) > LARGE_GRAM else self.matched_rank


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
        draws: how many were drawn of what.
        seed: of all draws.
    """

    dim: int
    spectra: list[Spectrum]
    sums: list[Sums]
    buckets: list[BucketNumbers]
    cross: dict[str, np.ndarray]
    ceilings: list[dict[str, np.ndarray]]
    null: dict[str, np.ndarray]
    draws: Draws
    seed: int

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

    def as_json(self) -> dict[str, Any]:
        """The keys of `exp1_summary.json` that come from here; no NaN in it."""
        tree = nested({path: _table(values) for path, values in self.cross.items()})
        ceilings = [{path: _drawn(values) for path, values in ceiling.items()} for ceiling in self.ceilings]
        null = {path: _drawn_table(values) for path, values in self.null.items()}
        return {
            "per_bucket": {str(index): asdict(numbers) for index, numbers in enumerate(self.buckets)},
            "cross_bucket_top1_cosine": tree["top1_cosine"],
            "cross_bucket_ceiling": [
                None if ceiling["top1_cosine"] is None else ceiling["top1_cosine"]["mean"] for ceiling in ceilings
            ],
            "cross_bucket_top1_repeats": self.top1_repeats(),
            "cross_bucket_overlap": tree["overlap"],
            "cross_bucket_captured_energy": tree["captured"],
            "cross_bucket_ceiling_detail": [nested(ceiling) for ceiling in ceilings],
            "cross_bucket_null": nested(null),
            "draws": asdict(self.draws) | {"seed": self.seed},
        }


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
    """The fewest rows of any bucket that has rows, over all dumps. `buckets`: the labels, [n], of each dump."""
    counts = [count for labels in buckets for count in np.unique(labels, return_counts=True)[1]]
    return int(min(counts, default=0))


def measure_dump(
    grads: np.ndarray,
    bucket: np.ndarray,
    n_buckets: int,
    prompt: np.ndarray,
    rollout: np.ndarray,
    common_n: int,
    *,
    draws: Draws | None = None,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
    arithmetic: Arithmetic = HOST,
) -> Exp1:
    """All of Exp 1 for one dump.

    Args:
        grads: [n, d] float32, may be a memory map: blocks are read.
        bucket: [n] entropy bucket, 0 .. n_buckets - 1.
        n_buckets: how many there are, empty ones included.
        prompt: [n] number of each row's prompt. For comparisons across dumps, equal numbers must mean equal prompts.
        rollout: [n] number of each row's rollout (`compression.rollout_codes`).
        common_n: the n at which buckets are compared, `smallest_bucket` of all dumps.
        draws: how many random draws of each kind; None for the defaults.
        seed: of all draws.
        on_step: called `n_steps` times.
        arithmetic: where Gram products and eigenvalues are computed.
    """
    draws = draws or Draws()
    rows = [np.flatnonzero(bucket == index) for index in range(n_buckets)]
    geometry = geometry_for(grads, rows, arithmetic)
    measured = []
    for own in rows:
        measured.append(
            _measure_bucket(grads, own, prompt[own], rollout[own], geometry, common_n, draws, seed, arithmetic)
        )
        on_step()
    spectra, sums, numbers, spaces = map(list, zip(*measured, strict=True))
    if isinstance(geometry, CosineGeometry):
        for i, j in zip(*np.triu_indices(n_buckets, 1), strict=True):
            geometry.set_cross(rows[i], rows[j])
    on_step()
    ceilings = []
    for own in rows:
        ceilings.append(split_half_ceiling(geometry, own, prompt[own], draws.ceiling, seed))
        on_step()
    null = shuffled_null(geometry, bucket, rollout, n_buckets, draws.null, seed, on_step)
    cross = measures_of(geometry.compare(spaces))
    return Exp1(grads.shape[1], spectra, sums, numbers, cross, ceilings, null, draws, seed)


def n_steps(n_buckets: int, draws: Draws | None = None) -> int:
    """How often `measure_dump` calls `on_step`."""
    return 2 * n_buckets + 1 + (draws or Draws()).null


def geometry_for(
    grads: np.ndarray, rows: list[np.ndarray], arithmetic: Arithmetic = HOST
) -> CosineGeometry | ColumnGeometry:
    """Cosines of all rows where each bucket has fewer rows than d and they fit 2 GiB; else matrices of the draws."""
    small = max(map(len, rows), default=0) < grads.shape[1] and 4 * len(grads) ** 2 <= MAX_COSINE_BYTES
    return CosineGeometry(grads, arithmetic) if small else ColumnGeometry(grads, arithmetic)


def _measure_bucket(
    grads: np.ndarray,
    rows: np.ndarray,
    prompt: np.ndarray,
    rollout: np.ndarray,
    geometry: CosineGeometry | ColumnGeometry,
    common_n: int,
    draws: Draws,
    seed: int,
    arithmetic: Arithmetic,
) -> tuple[Spectrum, Sums, BucketNumbers, Space]:
    """All that hangs on one bucket's Gram matrix, which lives no longer than this call."""
    gram = smaller_gram(grads, rows, arithmetic) if len(rows) else np.zeros((0, 0))
    row_gram, columns = (gram, None) if len(rows) < grads.shape[1] else (None, gram)
    if isinstance(geometry, CosineGeometry):
        geometry.set_gram(rows, gram)
    spectrum, vectors = spectrum_of_gram(grads, rows, gram, max(SUBSPACE_SIZES), arithmetic)
    space = geometry.space_of_eigenvectors(rows, spectrum.energies[: vectors.shape[1]], vectors)
    sums = sums_of_rows(grads, rows, rollout, prompt, row_gram, columns=columns, arithmetic=arithmetic)
    matched = matched_n(
        grads, rows, rollout, sums, spectrum, common_n,
        gram=row_gram, columns=columns, draws=draws.matched, rank_draws=draws.ranks_of(common_n, grads.shape[1]),
        seed=seed, arithmetic=arithmetic,
    )  # fmt: skip
    return spectrum, sums, _bucket_numbers(spectrum, sums, matched, draws.halves, seed), space


def _bucket_numbers(spectrum: Spectrum, sums: Sums, matched: MatchedN, half_draws: int, seed: int) -> BucketNumbers:
    everything = np.ones((1, len(sums.n)))

    def interval(measure: Callable[[Sums, np.ndarray], np.ndarray]) -> Interval | None:
        return half_sample_interval(sums, measure, half_draws, seed)

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


def _table(values: np.ndarray) -> Table:
    return [[_number(value) for value in row] for row in values]


def _drawn(values: np.ndarray) -> dict[str, Any] | None:
    found: DrawnNumber | None = drawn_number(values)
    return None if found is None else asdict(found)


def _drawn_table(values: np.ndarray) -> list[list[dict[str, Any] | None]]:
    return [[_drawn(values[:, i, j]) for j in range(values.shape[2])] for i in range(values.shape[1])]
