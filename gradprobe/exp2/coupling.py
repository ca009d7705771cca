"""Where updates of two rollouts of a prompt meet: their coupling, Σ |⟨g, g'⟩| over pairs of tokens, by kinds of pairs.

A pair is of different rollouts of one prompt. Kinds are told apart by whether it is twice the same token, whether the
model was uncertain of both (π < 1/2), and whether both rollouts had the same outcome. Prompts are the unit of chance;
the gradients of one prompt are read at a time, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..analysis.bucket import Bucket, to_device, to_host
from ..analysis.jackknife import NO_ESTIMATE, Estimate, Interval, interval_of, ratio_of, stack_of_means
from ..dump.mapped import block_slices, read_rows
from .direction import CENTRAL, ROUNDING, places_by_prompt, two_sided_p

SAME_UNCERTAIN = "same_token_both_uncertain"
OTHERS = ("same_token_not_both_uncertain", "other_token_both_uncertain", "other_token_not_both_uncertain")
KINDS = (SAME_UNCERTAIN, *OTHERS)
ANY, SAME, DIFFERENT = "any_outcome", "same_outcome", "different_outcome"
OUTCOMES = {ANY: [0, 1], SAME: [0], DIFFERENT: [1]}
UNCERTAIN_BELOW = 0.5
TOKENS_SHOWN = 10


@dataclass(frozen=True)
class Tokens:
    """What n gradients are of, [n] each: int codes of rollouts, buckets from 0, ids, whether π < 1/2, outcomes."""

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
    """A share of coupling where ids are dealt anew: mean, central 95%, and the two-sided p of the share observed."""

    mean: float
    ci95: Interval
    p_value: float


@dataclass(frozen=True)
class Pairs:
    """Some of the pairs; what needs pairs and finds none is None.

    Attributes:
        share_of_coupling: of Σ |⟨g, g'⟩|, a ratio of means over prompts.
        part_of_c: what they add to C, see `_pairs_of_prompt`: a mean over prompts with rollouts of each kind.
        null: of pairs of the same uncertain token; None of others, and where no id can move.
    """

    n_pairs: int
    share_of_pairs: float | None
    share_of_coupling: Estimate
    mean_cosine: float | None
    mean_cosine_ci95: Interval | None
    part_of_c: Estimate
    null: Null | None


Coupling = dict[str, dict[str, Pairs]]
"""By one of `KINDS` and one of `OUTCOMES`."""


@dataclass(frozen=True)
class Meetings:
    """Coupling in each bucket and of all tokens; of the highest bucket, by id, where outcomes meet most in one token.

    Shares of `shared_tokens` are of all pairs of different outcomes.
    """

    by_bucket: list[Coupling]
    all_tokens: Coupling
    shared_tokens: dict[int, Pairs]


def meetings_of(bucket: Bucket, tokens: Tokens, n_buckets: int, rng: np.random.Generator, n_draws: int) -> Meetings:
    """All of it. `bucket`: all gradients; `tokens`: what they are of; `n_draws`: of the null, 0 for none."""
    scopes: list[list[np.ndarray]] = [[] for _ in range(n_buckets + 1)]
    nulls, shared = np.zeros((n_draws, n_buckets + 1, 2)), []
    for place, (_, rows) in enumerate(places_by_prompt(bucket.prompt)):
        gradients = to_device(read_rows(bucket.grads, bucket.rows[rows]), bucket.device)
        gram, of_prompt = to_host(gradients @ gradients.T), tokens.only(rows)
        nulls += _dealt_anew(gram, of_prompt, n_buckets, rng, n_draws)
        for scope, sums in enumerate(scopes):
            kept = np.flatnonzero((of_prompt.bucket == scope) | (scope == n_buckets))
            kind, differs, ids, values = _pairs_of_prompt(gram[np.ix_(kept, kept)], of_prompt.only(kept))
            sums.append(np.array([np.bincount(2 * kind + differs, one, 8) for one in values]).reshape(4, 4, 2))
            if scope == n_buckets - 1:
                meets = differs & (kind < 2)
                shared.append(np.stack([np.full(meets.sum(), place), ids[meets], *values[:, meets]]))
    found = [_coupling(np.array(sums), nulls[:, scope]) for scope, sums in enumerate(scopes)]
    return Meetings(found[:-1], found[-1], _shared_tokens(shared, scopes[-2]))


def _pairs_of_prompt(gram: np.ndarray, tokens: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a prompt's m pairs: [m] the kind, whether outcomes differ, the first's id, and [4, m] what is summed.

    That is 1, |⟨g, g'⟩|, the cosine, and the part of C. With m_r a rollout's mean over its n_r tokens here, A_r = ±1,

        C = ‖Σ_r A_r m_r‖² / Σ_r ‖m_r‖² = 1 + Σ_{pairs} 2 A_r A_s ⟨g, g'⟩ / (n_r n_s Σ_r ‖m_r‖²)

    (`direction.cancellations`); NaN without rollouts of each kind. `gram`: [n, n] dot products.
    """
    is_same_rollout = tokens.rollout[:, None] == tokens.rollout
    first, second = np.nonzero(np.triu(~is_same_rollout))
    products, lengths = gram[first, second], np.sqrt(gram.diagonal())
    lengths, weight = lengths[first] * lengths[second], 1 / is_same_rollout.sum(axis=1)
    energy = weight @ (gram * is_same_rollout) @ weight
    is_mixed = 0 < tokens.correct.sum() < len(tokens.correct) and energy > 0
    differs = tokens.correct[first] != tokens.correct[second]
    of_c = np.where(differs, -2, 2) * weight[first] * weight[second] * products / (energy if is_mixed else np.nan)
    is_other, is_certain = tokens.token[first] != tokens.token[second], ~tokens.is_uncertain
    kind = 2 * is_other + (is_certain[first] | is_certain[second])
    cosines = products / np.where(lengths > 0, lengths, np.inf)
    return kind, differs, tokens.token[first], np.stack([np.ones(len(kind)), np.abs(products), cosines, of_c])


def _dealt_anew(gram: np.ndarray, tokens: Tokens, n_buckets: int, rng: np.random.Generator, n_draws: int) -> np.ndarray:
    """Σ |⟨g, g'⟩| over one prompt's pairs of the same uncertain token where ids are dealt out anew.

    Ids change places among the uncertain tokens of one rollout and bucket alone. So every draw has as many such pairs,
    between the same rollouts and buckets, as there are: only which gradients meet in them is left to chance.

    Returns:
        [n_draws, n_buckets + 1, 2] within each bucket, and of all tokens; of the same outcome, and of different ones.
    """
    order = np.lexsort((tokens.bucket, tokens.rollout, ~tokens.is_uncertain))[: int(tokens.is_uncertain.sum())]
    own, coupling, found = tokens.only(order), np.abs(gram[np.ix_(order, order)]), np.zeros((n_draws, n_buckets + 1, 2))
    is_pair = (own.token[:, None] == own.token) & (own.rollout[:, None] != own.rollout)
    first, second = np.nonzero(np.triu(is_pair))
    differs, is_within = own.correct[first] != own.correct[second], own.bucket[first] == own.bucket[second]
    scopes = np.arange(n_buckets + 1)[:, None]
    counts = (is_within & (own.bucket[first] == scopes)) | (scopes == n_buckets)
    columns = np.stack([counts & ~differs, counts & differs], axis=1).astype(np.float64)  # [scopes, 2, pairs]
    for part in block_slices(n_draws if len(first) else 0, 24 * max(len(first), len(order))):
        keys = own.rollout * n_buckets + own.bucket + rng.random((part.stop - part.start, len(order)))
        dealt = keys.argsort(axis=1)
        found[part] = np.tensordot(coupling[dealt[:, first], dealt[:, second]], columns, (1, 2))
    return found


def _coupling(sums: np.ndarray, null: np.ndarray) -> Coupling:
    """`sums`: [P, 4, 4, 2] by what is summed, kind, and whether outcomes differ; `null`: [draws, 2]."""
    sums = sums.reshape(-1, 4, 4, 2)
    sums = sums[sums[:, 0].sum(axis=(1, 2)) > 0]
    whole = sums.sum(axis=(2, 3))
    return {
        kind: {
            outcome: _pairs(sums[:, :, k, marks].sum(axis=2), whole, null[:, marks].sum(axis=1) if k == 0 else None)
            for outcome, marks in OUTCOMES.items()
        }
        for k, kind in enumerate(KINDS)
    }


def _shared_tokens(found: Sequence[np.ndarray], sums: Sequence[np.ndarray]) -> dict[int, Pairs]:
    """`found`: [6, m] of each prompt's m pairs its place, the id, and what is summed; `sums`: as `_coupling`'s."""
    place, token, *values = np.concatenate([np.zeros((6, 0)), *found], axis=1)
    ids, of_id = np.unique(token, return_inverse=True)
    whole = np.array([one[:, :, 1].sum(axis=1) for one in sums])
    shown = {}
    for index in np.argsort(-np.bincount(of_id, values[1], len(ids)), kind="stable")[:TOKENS_SHOWN]:
        own = of_id == index
        of_token = [np.bincount(place[own].astype(int), one[own], len(whole)) for one in values]
        shown[int(ids[index])] = _pairs(np.stack(of_token, axis=1), whole, None)
    return shown


def _pairs(sums: np.ndarray, whole: np.ndarray, null: np.ndarray | None) -> Pairs:
    """`sums`, `whole`: [P, 4] of some pairs and of all, C's NaN where it has no part; `null`: [draws] of coupling."""
    n, total, cosine = sums[:, 0].sum(), whole[:, :2].sum(axis=0), _ratio(sums[:, 2], sums[:, 0])
    of_c = sums[(whole[:, 0] > 0) & ~np.isnan(whole[:, 3]), 3]
    interval = interval_of(stack_of_means(of_c)) if len(of_c) > 1 else None
    return Pairs(
        n_pairs=int(n),
        share_of_pairs=float(n / total[0]) if total[0] else None,
        share_of_coupling=_ratio(sums[:, 1], whole[:, 1]),
        mean_cosine=cosine.value,
        mean_cosine_ci95=cosine.ci95,
        part_of_c=Estimate(float(of_c.mean()) if len(of_c) else None, interval),
        null=None if null is None or not total[1] > 0 else _null(sums[:, 1].sum() / total[1], null / total[1]),
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Of sums over prompts, [P] each, with an interval where there is one; none where the denominator is 0."""
    if not denominator.sum() > 0:
        return NO_ESTIMATE
    interval = ratio_of(*map(stack_of_means, (numerator, denominator))).ci95 if len(numerator) > 1 else None
    return Estimate(float(numerator.sum() / denominator.sum()), interval)


def _null(observed: float, null: np.ndarray) -> Null | None:
    """None where no draw differs from another."""
    p_value = two_sided_p(observed, null)
    if p_value is None or np.ptp(null) <= ROUNDING:
        return None
    low, high = np.quantile(null, CENTRAL)
    return Null(float(null.mean()), (float(low), float(high)), p_value)
