"""Where updates of two rollouts of a prompt meet: their coupling, Σ |⟨g, g'⟩| over pairs of tokens, by kinds of pairs.

A pair is of different rollouts of one prompt. Kinds are told apart by whether it is twice the same token, whether the
model was uncertain of both (π < 1/2), and whether both rollouts had the same outcome. Prompts are the unit of chance;
the gradients of one prompt are read at a time, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..analysis.bucket import Bucket, to_device
from ..analysis.jackknife import NO_ESTIMATE, Estimate, Interval, interval_of, ratio_of, stack_of_means
from ..dump.mapped import block_slices, read_rows
from .direction import CENTRAL, ROUNDING, places_by_prompt, two_sided_p

KINDS = (
    ("same_token_both_uncertain", "same_token_not_both_uncertain"),
    ("other_token_both_uncertain", "other_token_not_both_uncertain"),
)
ANY, SAME, DIFFERENT = "any_outcome", "same_outcome", "different_outcome"
OUTCOMES = {ANY: (0, 1), SAME: (0,), DIFFERENT: (1,)}
UNCERTAIN_BELOW = 0.5
TOKENS_SHOWN = 10
NUMBER, COUPLING, COSINE, PART_OF_C = range(4)


@dataclass(frozen=True)
class Tokens:
    """What each of n gradients is of; arrays are [n].

    Attributes:
        rollout: int codes.
        bucket: int, 0 .. n_buckets - 1.
        token: its id.
        is_uncertain: whether π of the token was below 1/2.
        correct: whether its rollout was.
    """

    rollout: np.ndarray
    bucket: np.ndarray
    token: np.ndarray
    is_uncertain: np.ndarray
    correct: np.ndarray

    def only(self, kept: np.ndarray) -> "Tokens":
        """Some of them. `kept`: an index."""
        return Tokens(*(column[kept] for column in vars(self).values()))


@dataclass(frozen=True)
class Null:
    """A share of coupling where ids are dealt out anew: mean, central 95%, and two-sided p of the share observed."""

    mean: float
    ci95: Interval
    p_value: float


@dataclass(frozen=True)
class PairsOfKind:
    """Pairs of one kind; without any, shares are 0 and the rest None, and all is None where a bucket has no pair.

    Attributes:
        share_of_coupling: of Σ |⟨g, g'⟩|, a ratio of means over prompts.
        mean_cosine: of g and g', over pairs.
        part_of_c: what these pairs add to C, see `pairs_of_prompt`: a mean over prompts with rollouts of each kind.
        null: of pairs of the same uncertain token; None of others, and where no id can move.
    """

    n_pairs: int
    share_of_pairs: float | None
    share_of_coupling: Estimate
    mean_cosine: float | None
    mean_cosine_ci95: Interval | None
    part_of_c: Estimate
    null: Null | None


Coupling = dict[str, dict[str, PairsOfKind]]
"""By one of `KINDS` and one of `OUTCOMES`."""


@dataclass(frozen=True)
class SharedToken:
    """A token on which correct and incorrect rollouts of a prompt meet.

    Attributes:
        n_pairs, n_prompts: how often that happens, and in how many prompts.
        share_of_coupling: of Σ |⟨g, g'⟩| over all pairs of different outcomes.
        mean_cosine, mean_cosine_ci95: as of `PairsOfKind`.
    """

    token_id: int
    n_pairs: int
    n_prompts: int
    share_of_coupling: Estimate
    mean_cosine: float
    mean_cosine_ci95: Interval | None


@dataclass(frozen=True)
class Meetings:
    """Coupling of a dump: in each bucket, of all its tokens, and the tokens behind most of it in the highest bucket."""

    by_bucket: list[Coupling]
    all_tokens: Coupling
    shared_tokens: list[SharedToken]


def meetings_of(bucket: Bucket, tokens: Tokens, n_buckets: int, rng: np.random.Generator, n_draws: int) -> Meetings:
    """Coupling within each bucket, and of all tokens, also across buckets.

    Args:
        bucket: all gradients.
        tokens: what they are of.
        n_buckets: by entropy.
        rng: of the null.
        n_draws: behind it; 0 for none.
    """
    scopes: list[list[np.ndarray]] = [[] for _ in range(n_buckets + 1)]
    nulls = np.zeros((n_buckets + 1, n_draws, 2))
    shared: list[np.ndarray] = []
    for _, places in places_by_prompt(bucket.prompt):
        gradients = to_device(read_rows(bucket.grads, bucket.rows[places]), bucket.device)
        gram, of_prompt = (gradients @ gradients.T).cpu().numpy(), tokens.only(places)
        nulls += dealt_anew(gram, of_prompt, n_buckets, rng, n_draws)
        for scope, own in enumerate(scopes):
            kept = np.flatnonzero((of_prompt.bucket == scope) | (scope == n_buckets))
            part, gram_of_part = of_prompt.only(kept), gram[np.ix_(kept, kept)]
            own.append(pairs_of_prompt(gram_of_part, part))
            if scope == n_buckets - 1:
                shared.append(shared_of_prompt(len(shared), gram_of_part, part))
    *by_bucket, everything = (_coupling(own, null) for own, null in zip(scopes, nulls, strict=True))
    between = np.array([one[COUPLING, :, :, 1].sum() for one in scopes[n_buckets - 1]])
    return Meetings(by_bucket, everything, _shared_tokens(shared, between))


@dataclass(frozen=True)
class _Pairs:
    """Pairs of different rollouts: [m] places of both, and by three marks of which kind they are."""

    first: np.ndarray
    second: np.ndarray
    marks: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, tokens: Tokens) -> "_Pairs":
        first, second = np.nonzero(np.triu(tokens.rollout[:, None] != tokens.rollout))
        marks = (
            tokens.token[first] != tokens.token[second],
            ~(tokens.is_uncertain[first] & tokens.is_uncertain[second]),
            tokens.correct[first] != tokens.correct[second],
        )
        return cls(first, second, marks)


def pairs_of_prompt(gram: np.ndarray, tokens: Tokens) -> np.ndarray:
    """[4, 2, 2, 2] of one prompt: the number of pairs, Σ |⟨g, g'⟩|, Σ cosines and the part of C, by kind.

    The axes after the first: another token, not both uncertain, different outcomes; index 0 is that it isn't so. With
    m_r a rollout's mean over its n_r tokens here, and A_r = ±1 (`direction.cancellations`),

        C = ‖Σ_r A_r m_r‖² / Σ_r ‖m_r‖² = 1 + Σ_{pairs} 2 A_r A_s ⟨g, g'⟩ / (n_r n_s Σ_r ‖m_r‖²)

    which the parts add up to; NaN without rollouts of each kind. `gram`: [n, n] dot products.
    """
    pairs = _Pairs.of(tokens)
    products, kind = gram[pairs.first, pairs.second], np.ravel_multi_index(pairs.marks, (2, 2, 2))
    lengths = np.sqrt(gram.diagonal())
    lengths = lengths[pairs.first] * lengths[pairs.second]
    cosines = products / np.where(lengths > 0, lengths, np.inf)
    _, rollout, counts = np.unique(tokens.rollout, return_inverse=True, return_counts=True)
    weight = 1 / counts[rollout]
    weight_of_pair, is_same = weight[pairs.first] * weight[pairs.second], rollout[:, None] == rollout
    energy = weight @ (gram * is_same) @ weight
    is_mixed = tokens.correct.any() and not tokens.correct.all() and energy > 0
    signs = np.where(pairs.marks[2], -2.0, 2.0)
    of_c = signs * weight_of_pair * products / energy if is_mixed else np.full(len(kind), np.nan)
    measures = (np.ones(len(kind)), np.abs(products), cosines, of_c)
    found = np.array([np.bincount(kind, values, 8) for values in measures], np.float64).reshape(4, 2, 2, 2)
    found[PART_OF_C] += 0.0 if is_mixed else np.nan
    return found


def dealt_anew(gram: np.ndarray, tokens: Tokens, n_buckets: int, rng: np.random.Generator, n_draws: int) -> np.ndarray:
    """Σ |⟨g, g'⟩| over one prompt's pairs of the same uncertain token where ids are dealt out anew.

    Ids change places among the uncertain tokens of one rollout and bucket alone. So every draw has as many such pairs,
    between the same rollouts and buckets, as there are: only which gradients meet in them is left to chance.

    Returns:
        [n_buckets + 1, n_draws, 2] within each bucket, and of all tokens; of the same outcome, and of different ones.
    """
    order = np.lexsort((tokens.bucket, tokens.rollout, ~tokens.is_uncertain))[: int(tokens.is_uncertain.sum())]
    own = tokens.only(order)
    pairs, stratum = _Pairs.of(own), own.rollout * n_buckets + own.bucket
    differs, first, second = (one[~pairs.marks[0]] for one in (pairs.marks[2], pairs.first, pairs.second))
    is_within = (own.bucket[first] == own.bucket[second]) & (own.bucket[first] == np.arange(n_buckets)[:, None])
    scopes = np.concatenate([is_within, np.ones((1, len(first)), bool)])
    columns = np.stack([scopes & ~differs, scopes & differs], axis=1).reshape(2 * len(scopes), len(first)).T
    coupling, found = np.abs(gram[np.ix_(order, order)]), np.zeros((n_draws, 2 * len(scopes)))
    for part in block_slices(n_draws if len(first) else 0, 24 * max(len(first), len(order))):
        dealt = (stratum + rng.random((part.stop - part.start, len(order)))).argsort(axis=1)
        found[part] = coupling[dealt[:, first], dealt[:, second]] @ columns.astype(np.float64)
    return found.reshape(n_draws, len(scopes), 2).swapaxes(0, 1)


def shared_of_prompt(place: int, gram: np.ndarray, tokens: Tokens) -> np.ndarray:
    """[k, 5] of the k tokens on which outcomes of a prompt meet: its place, the id, pairs, Σ |⟨g, g'⟩|, Σ cosines."""
    pairs = _Pairs.of(tokens)
    is_shared = ~pairs.marks[0] & pairs.marks[2]
    first, second = pairs.first[is_shared], pairs.second[is_shared]
    products, lengths = gram[first, second], np.sqrt(gram[first, first] * gram[second, second])
    ids, of_id = np.unique(tokens.token[first], return_inverse=True)
    cosines = products / np.where(lengths > 0, lengths, np.inf)
    sums = [np.bincount(of_id, values, len(ids)) for values in (np.ones(len(first)), np.abs(products), cosines)]
    return np.stack([np.full(len(ids), place), ids, *sums], axis=1)


def _coupling(sums: Sequence[np.ndarray], null: np.ndarray) -> Coupling:
    """`sums`: of each prompt, see `pairs_of_prompt`; `null`: [draws, 2]."""
    kept = [one for one in sums if one[NUMBER].any()]
    by_kind = np.array(kept).reshape(-1, 4, 2, 2, 2)
    whole = by_kind.sum(axis=(2, 3, 4))
    return {
        name: {
            outcome: _pairs_of_kind(
                by_kind[:, :, i, j, marks].sum(axis=2), whole, null[:, marks].sum(axis=1) if i == j == 0 else None
            )
            for outcome, marks in OUTCOMES.items()
        }
        for i, of_token in enumerate(KINDS)
        for j, name in enumerate(of_token)
    }


def _pairs_of_kind(sums: np.ndarray, whole: np.ndarray, null: np.ndarray | None) -> PairsOfKind:
    """`sums`, `whole`: [P, 4] of one kind and of all; `null`: [draws] of its coupling."""
    n, of_all = sums[:, NUMBER].sum(), whole[:, NUMBER].sum()
    of_c = sums[~np.isnan(sums[:, PART_OF_C]), PART_OF_C]
    cosine = _ratio(sums[:, COSINE], sums[:, NUMBER])
    total = whole[:, COUPLING].sum()
    return PairsOfKind(
        n_pairs=int(n),
        share_of_pairs=float(n / of_all) if of_all else None,
        share_of_coupling=_ratio(sums[:, COUPLING], whole[:, COUPLING]),
        mean_cosine=cosine.value,
        mean_cosine_ci95=cosine.ci95,
        part_of_c=Estimate(
            float(of_c.mean()) if len(of_c) else None,
            interval_of(stack_of_means(of_c)) if len(of_c) > 1 else None,
        ),
        null=None if null is None or not total > 0 else _null(sums[:, COUPLING].sum() / total, null / total),
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Of sums over prompts, [P] each, with an interval where there is one; none where the denominator is 0."""
    if not denominator.sum() > 0:
        return NO_ESTIMATE
    value = float(numerator.sum() / denominator.sum())
    stacks = map(stack_of_means, (numerator, denominator))
    return Estimate(value, ratio_of(*stacks).ci95 if len(numerator) > 1 else None)


def _null(observed: float, null: np.ndarray) -> Null | None:
    """None where no draw differs from another."""
    p_value = two_sided_p(observed, null)
    if p_value is None or np.ptp(null) <= ROUNDING:
        return None
    low, high = np.quantile(null, CENTRAL)
    return Null(float(null.mean()), (float(low), float(high)), p_value)


def _shared_tokens(found: Sequence[np.ndarray], between: np.ndarray) -> list[SharedToken]:
    """`found`: of each prompt, see `shared_of_prompt`; `between`: [P] coupling over all pairs of different outcomes."""
    place, token, *sums = np.concatenate([np.zeros((0, 5)), *found]).T
    ids, of_id = np.unique(token, return_inverse=True)
    heaviest = np.argsort(-np.bincount(of_id, sums[1], len(ids)), kind="stable")[:TOKENS_SHOWN]
    shown = []
    for index in heaviest:
        own = of_id == index
        n, coupling, cosines = (np.bincount(place[own].astype(int), one[own], len(between)) for one in sums)
        cosine = _ratio(cosines, n)
        share = _ratio(coupling, between)
        shown.append(SharedToken(int(ids[index]), int(n.sum()), int(own.sum()), share, cosine.value, cosine.ci95))
    return shown
