"""The whole of Exp 1: every number with its interval, its null and its ceiling, as `exp1_summary.json` has them.

    found = measure_dumps({tag: [sample_rollouts(target) for target in targets] for tag, targets in dumps.items()})
    found.numbers[tag]["per_bucket"]["4"]["participation_ratio_unit_norm"]

A dump's buckets are taken one after the other. Each makes its Gram matrix, takes from it all that a bucket has to say,
its halves included, and leaves behind its leading directions, which is all that comparisons across buckets need.
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import betaincinv

from ..analysis.bucket import Array, Bucket, bucket_of, rollout_codes
from ..analysis.prompts import Pairs, number_prompts
from ..analysis.replication import spread_of
from ..analysis.tokens import sum_p2_of
from ..common.console import progress_bar
from ..dump.format import Dump
from .compression import (
    CANT_TELL,
    HALF_DRAWS,
    MATCHED_DRAWS,
    Measure,
    Sums,
    compare_buckets,
    half_sample_interval,
    sums_of,
)
from .plane import project_to_plane
from .proxies import ALL, audit
from .spectrum import effective_rank, participation_ratio, rank_of_share, top1_energy_frac
from .subspaces import (
    CEILING_DRAWS,
    NULL_DRAWS,
    OVERLAP_SIZE,
    compare,
    compare_parts,
    directions_of,
    shuffled_labels,
    split_half_ceiling,
)

log = logging.getLogger(__name__)
RANK_PERCENTS = (50, 90, 95, 99)
SURPRISAL_GROUPS = 10
MAX_ROLLOUTS = 2048
"""Sums over pairs of more rollouts would outgrow all else."""
REPLICATED = ("participation_ratio", "participation_ratio_unit_norm", "rank95")
EXACT = 1e-10
"""Tolerance of a bucket's own directions: they are compared with those of the original scripts."""

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Exp1Settings:
    """How many random draws stand behind each kind of number.

    Attributes:
        halves: halves of prompts, for intervals of buckets and of ratios between dumps.
        matched: subsamples of the larger of two buckets, whole rollouts at a time, for ratios at equal n.
        ceiling: halves of prompts, for the ceilings of measures across buckets.
        null: shuffles of bucket labels.
        seed: of all draws.
    """

    halves: int = HALF_DRAWS
    matched: int = MATCHED_DRAWS
    ceiling: int = CEILING_DRAWS
    null: int = NULL_DRAWS
    seed: int = 0


@dataclass(frozen=True)
class Exp1:
    """Exp 1 of one dump.

    Attributes:
        numbers: the keys of `exp1_summary.json` that come from gradients and labels; no NaN in it.
        energies: of each bucket, squared singular values, descending.
        sums: of each bucket, for comparisons with other dumps.
    """

    numbers: Numbers
    energies: list[np.ndarray]
    sums: list[Sums]


@dataclass(frozen=True)
class Findings:
    """Exp 1 of several dumps.

    Attributes:
        numbers: each tag's.
        arrays: what figures show beside them: `<tag>.energies<bucket>`, `<tag>.points` [m, 2] on the first two
            principal components, `<tag>.point_buckets` [m], and `<tag>.explained` [2], their shares of the variance.
        warnings: of each tag, what the reader of its comparison must be told.
    """

    numbers: dict[str, Numbers]
    arrays: dict[str, np.ndarray]
    warnings: dict[str, list[str]]


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
    dumps: Mapping[str, Sequence[Dump]], settings: Exp1Settings | None = None, device: str = "cpu"
) -> Findings:
    """Exp 1 of every tag's first target, further tags against the first, with progress on stderr.

    What only comparisons need is kept of the first tag alone: of many checkpoints it would outgrow all else. Of a
    tag's further targets only what `replication` needs is taken.
    """
    settings = settings or Exp1Settings()
    prompts, pairs = number_prompts({tag: targets[0] for tag, targets in dumps.items()})
    first_tag = next(iter(dumps))
    warnings = {tag: _warnings_of(first_tag, tag, pairs[tag]) if tag in pairs else [] for tag in dumps}
    for warning in itertools.chain.from_iterable(warnings.values()):
        log.warning(warning)
    found = Findings({}, {}, warnings)
    first: Exp1 | None = None
    for tag, (dump, *others) in dumps.items():
        whole = bucket_of(dump, device=device)
        whole.prompt = prompts[tag][dump.prompt]
        with progress_bar(f"{tag}: Exp 1", dump.bins + settings.null + len(others), "steps") as bar:
            result = measure_dump(whole, dump.bin, dump.bins, settings, bar.update)
            numbers = {"n_positions": len(dump.grads), "row_dim": dump.row_dim} | result.numbers
            numbers["norm_by_surprisal"] = None if dump.logprob is None else norm_by(-dump.logprob, whole.squared_norms)
            sum_p2 = sum_p2_of((dump, *others))
            numbers["proxies"] = audit(dump, whole.squared_norms, sum_p2[0])
            if others:
                numbers["replication"] = _replication(numbers, (dump, *others), sum_p2, device, bar.update)
        if first is None:
            first = result
        else:
            numbers |= _compared(first_tag, first, result, pairs[tag], settings)
        found.numbers[tag] = numbers
        points, shown, explained = project_to_plane(whole, settings.seed)
        found.arrays.update({f"{tag}.energies{bucket}": one for bucket, one in enumerate(result.energies)})
        found.arrays.update({f"{tag}.points": points, f"{tag}.point_buckets": dump.bin[shown]})
        found.arrays[f"{tag}.explained"] = explained
    return found


def _warnings_of(first: str, tag: str, pairs: Pairs) -> list[str]:
    """A pairing that is a guess, or leaves nothing."""
    if not pairs.is_certain:
        return [
            f"{first} and {tag} are paired by prompt_idx alone, as they don't tell their prompts' token ids or data "
            "set: what is said over the prompts of both is wrong if these are other problems, or in another order"
        ]
    if pairs.n_prompts == 0:
        return [f"{first} and {tag} have no prompt in common, by {pairs.by}: they are not compared"]
    return []


def _compared(first_tag: str, first: Exp1, result: Exp1, pairs: Pairs, settings: Exp1Settings) -> Numbers:
    """One tag's buckets against the first's; no ratios where their number differs or no prompt is common."""
    ratios = reason = None
    if len(first.sums) != len(result.sums):
        reason = "the number of buckets differs"
    elif pairs.n_prompts == 0:
        reason = f"no prompt is common to both, by {pairs.by}"
    else:
        draws = {"half_draws": settings.halves, "draws": settings.matched, "seed": settings.seed}
        found = [compare_buckets(one, other, **draws) for one, other in zip(first.sums, result.sums, strict=True)]
        ratios = {str(bucket): ratio and asdict(ratio) for bucket, ratio in enumerate(found)}
    return {"compared_with": {first_tag: ratios}, "paired_with": {first_tag: asdict(pairs) | {"reason": reason}}}


def measure_dump(
    whole: Bucket,
    label: np.ndarray,
    n_buckets: int,
    settings: Exp1Settings | None = None,
    on_step: Callable[[], Any] = lambda: None,
) -> Exp1:
    """All that Exp 1 says of one dump's gradients.

    Args:
        whole: all gradients. For comparisons across dumps, equal `prompt` numbers must mean equal prompts.
        label: [n] entropy bucket, 0 .. n_buckets - 1.
        n_buckets: how many there are, empty ones included.
        settings: None for the defaults.
        on_step: called after each bucket and each shuffle of the null.
    """
    settings = settings or Exp1Settings()
    measured = []
    for index in range(n_buckets):
        measured.append(_measure_bucket(whole.part(label == index), settings))
        on_step()
    buckets, energies, sums, ceilings, directions = map(list, zip(*measured, strict=True))
    null = []
    for draw, labels in enumerate(shuffled_labels(label, whole.rollout, settings.null, settings.seed)):
        null.append(compare_parts(whole, labels, n_buckets, draw))
        on_step()
    numbers = {
        "per_bucket": {str(index): numbers for index, numbers in enumerate(buckets)},
        **_cross_numbers(compare(directions), ceilings, null, whole.dim),
        "draws": asdict(settings),
    }
    return Exp1(numbers, energies, sums)


def _measure_bucket(bucket: Bucket, settings: Exp1Settings) -> tuple[Numbers, np.ndarray, Sums, np.ndarray, Array]:
    """All that hangs on one bucket's Gram matrix: its numbers, energies, sums, ceilings and directions."""
    energies, sums = bucket.energies(), sums_of(bucket)
    ceiling = split_half_ceiling(bucket, settings.ceiling, settings.seed)
    directions = directions_of(bucket, settings.seed, EXACT)
    return _bucket_numbers(bucket, energies, sums, settings), energies, sums, ceiling, directions


def _bucket_numbers(bucket: Bucket, energies: np.ndarray, sums: Sums, settings: Exp1Settings) -> Numbers:
    """What one bucket has to say; docs/methods.md explains each. None: no number."""

    by_prompt = sums.by_prompt()

    def interval(measure: Measure) -> tuple[float, float] | None:
        return half_sample_interval(by_prompt, measure, settings.halves, settings.seed)

    return {
        "n": bucket.n,
        "participation_ratio": participation_ratio(energies),
        "participation_ratio_ci95": interval(Sums.participation_ratios),
        "top1_energy_frac": top1_energy_frac(energies),
        **{f"rank{percent}": rank_of_share(energies, percent / 100) for percent in RANK_PERCENTS},
        "effective_rank": effective_rank(energies),
        "ess": _of_all(sums, Sums.effective_sample_sizes),
        "ess_ci95": interval(Sums.effective_sample_sizes),
        "participation_ratio_unit_norm": _of_all(sums, Sums.unit_norm_participation_ratios),
        "participation_ratio_unit_norm_ci95": interval(Sums.unit_norm_participation_ratios),
        "participation_ratio_isotropic": _of_all(sums, Sums.isotropic_participation_ratios),
    }


def _of_all(sums: Sums, measure: Measure) -> float | None:
    (value,) = measure(sums, np.ones((1, len(sums.n)))).tolist()
    return value if np.isfinite(value) else None


def norm_by(surprisal: np.ndarray, squared_norms: np.ndarray) -> list[Numbers] | None:
    """Quartiles of the norm by tenths of surprisal, each at its median; None where nothing is above 0. Takes [n]."""
    usable = (squared_norms > 0) & (surprisal > 0)
    norms, surprisal = np.sqrt(squared_norms[usable]), surprisal[usable]
    groups = [group for group in np.array_split(np.argsort(surprisal), SURPRISAL_GROUPS) if len(group)]
    found = []
    for group in groups:
        quartiles = np.quantile(norms[group], [0.25, 0.5, 0.75]).tolist()
        found.append({"surprisal": float(np.median(surprisal[group])), "quartiles": quartiles})
    return found or None


def _cross_numbers(cross: np.ndarray, ceilings: Sequence[np.ndarray], null: Sequence[np.ndarray], dim: int) -> Numbers:
    """Measures across buckets, [2, B, B], between halves of each, [draws, 2], and of shuffles, [2, B, B] each."""
    size, n_buckets = str(OVERLAP_SIZE), len(ceilings)
    cosines, overlaps = ([[_finite(value) for value in row] for row in values] for values in cross)
    halves = [[_drawn(of_measure) for of_measure in ceiling.T] for ceiling in ceilings]
    drawn = np.reshape(null, (-1, *cross.shape))
    shuffled = [
        [[None if i == j else _drawn(drawn[:, measure, i, j]) for j in range(n_buckets)] for i in range(n_buckets)]
        for measure in range(len(cross))
    ]
    return {
        "cross_bucket_top1_cosine": cosines,
        "cross_bucket_ceiling": [cosine and cosine["mean"] for cosine, _ in halves],
        "cross_bucket_top1_repeats": [_repeats(cosine, dim) for cosine, _ in halves],
        "cross_bucket_overlap": {size: overlaps},
        "cross_bucket_ceiling_detail": [{"top1_cosine": one, "overlap": {size: other}} for one, other in halves],
        "cross_bucket_null": {"top1_cosine": shuffled[0], "overlap": {size: shuffled[1]}},
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _drawn(values: np.ndarray) -> Numbers | None:
    """Mean and central 95% of the draws that have a number, and how many these are; None if none has.

    The range is the spread over draws from these gradients, not what other prompts would have given.
    """
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    return {"mean": float(values.mean()), "ci95": np.quantile(values, [0.025, 0.975]).tolist(), "draws": len(values)}


def _repeats(halves: Numbers | None, dim: int) -> str | None:
    """Does a bucket's leading direction come up in both halves of its prompts? None: no halves.

    "yes" where the range of |cos| between halves lies above, "no" where it lies below what that of two random
    directions stays under 95% of the time (cos² of those is Beta(1/2, (d-1)/2)), else "can't tell".
    """
    if halves is None:
        return None
    random = float(np.sqrt(betaincinv(0.5, (dim - 1) / 2, 0.95))) if dim > 1 else 1.0
    low, high = halves["ci95"]
    return "yes" if low > random else "no" if high < random else CANT_TELL


def _replication(
    first: Numbers, dumps: Sequence[Dump], sum_p2: Sequence[Any], device: str, on_target: Callable[[], Any]
) -> Numbers:
    """How a tag's numbers vary over its targets: of the others, one Gram matrix a bucket and no draws."""
    of_buckets, proxies = [first["per_bucket"]], [first["proxies"]]
    for dump, known in zip(dumps[1:], sum_p2[1:], strict=True):
        whole = bucket_of(dump, device=device)
        proxies.append(audit(dump, whole.squared_norms, known))  # norms that the parts then share
        of_buckets.append({bucket: _replicated(whole.part(dump.bin == int(bucket))) for bucket in of_buckets[0]})
        on_target()
    shown = (ALL, str(dumps[0].bins - 1))

    def rhos(name: str, group: str) -> list[float | None]:
        return [found[name] and found[name][group]["rank_correlation"]["value"] for found in proxies]

    return {
        "targets": [dump.path.name for dump in dumps],
        **{
            measure: {bucket: spread_of([target[bucket][measure] for target in of_buckets]) for bucket in of_buckets[0]}
            for measure in REPLICATED
        },
        "proxies": {name: {group: spread_of(rhos(name, group)) for group in shown} for name in proxies[0]},
    }


def _replicated(bucket: Bucket) -> Numbers:
    energies = bucket.energies()
    values = (
        participation_ratio(energies),
        _of_all(sums_of(bucket), Sums.unit_norm_participation_ratios),
        rank_of_share(energies, 0.95),
    )
    return dict(zip(REPLICATED, values, strict=True))
