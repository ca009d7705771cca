"""Exp 3's mathematics: which tokens does the learning signal sit in, and what does keeping only some of them do?

A prompt's update is û = Σ_b û_b, û_b = Σ_r w_r G_rb, with G_rb the sum of ∇ log π_t over rollout r's tokens in bucket b
and w_r what the objective makes of the outcomes. Over prompts û_b has the mean U_b, the signal, and a noise around it.
Both split over buckets: ‖U‖² = Σ_b ⟨U_b, U⟩, and the noise N = tr Cov(û) = Σ_b tr Cov(û_b, û). A **share** is always
such a part of the whole: shares of signal and of noise add up to 1, and one of them can be negative. A **noise scale**
is always that of a part on its own, tr Cov(û_b) / ‖U_b‖² (McCandlish et al. 2018): the prompts at which its signal
equals its noise.

‖U_b‖² and ⟨U_b, U⟩ come from pairs of different prompts, so that no noise is in them. Prompts are the unit of chance;
where no number can be had, it is None.
"""

from dataclasses import dataclass

import numpy as np

from ..analysis.jackknife import (
    NO_ESTIMATE,
    Estimate,
    Interval,
    above_zero,
    cosine_of,
    interval_of,
    prompts_to_tell,
    ratio_of,
    stack_of_means,
    z_of,
)
from ..analysis.pooled import Pooled
from ..analysis.text import number
from ..dump.on_policy import MIN_RARE_TOKENS
from .by_weight import ByWeight, by_weight
from .tables import MIN_PROMPTS, Moments, PromptTables, moments_of, prompt_tables

SEEN, UNDERPOWERED = "seen", "underpowered"
CLAIMED_SHARE = 0.2
"""Of tokens: what the 80/20 paper keeps."""


@dataclass(frozen=True)
class Signal:
    """Is there an update that prompts share?

    Attributes:
        value: ‖U‖² without bias, in units of a squared update; below 0 by chance. None with fewer than 3 prompts.
        ci95: value ± t standard errors, over prompts.
        z: value in standard errors.
        verdict: "seen" where ci95 lies above 0, else "underpowered".
    """

    value: float | None
    ci95: Interval | None
    z: float | None
    verdict: str


@dataclass(frozen=True)
class ScoreMean:
    """Does a bucket's score have mean zero, as it must where rollouts are the model's own?

    Attributes:
        share_of_energy: Σ_p ‖E G_b‖², from pairs of different rollouts of a prompt, over Σ_p E ‖G_b‖².
        z: the numerator in standard errors, over prompts; None where fewer than 30 rare tokens were to be expected, as
            what did not come up would have made the mean 0.
    """

    share_of_energy: float | None
    z: float | None


@dataclass(frozen=True)
class BucketSignal:
    """One bucket; what shares and scales are stands at the top of this module.

    Attributes:
        share_of_tokens: of all response tokens.
        n_rare: Σ tail mass, the rare tokens to be expected; None where it is not known.
        signal_share: ⟨U_b, U⟩ / ‖U‖².
        signal_share_within_prompts: Σ_p ⟨u_b, u⟩ / Σ_p ‖u‖², u_b = Cov(c, G_b) of one prompt, whatever the objective.
        noise_share: tr Cov(û_b, û) / tr Cov(û).
        noise_scale_prompts: tr Cov(û_b) / ‖U_b‖².
        cosine_with_update: of U_b and U.
        score_mean: see `ScoreMean`.
    """

    share_of_tokens: float | None
    n_rare: float | None
    signal_share: Estimate
    signal_share_within_prompts: Estimate
    noise_share: float | None
    noise_scale_prompts: float | None
    cosine_with_update: Estimate
    score_mean: ScoreMean


@dataclass(frozen=True)
class Kept:
    """The update that only some of the tokens make, against that of all.

    Attributes:
        share_of_tokens: kept.
        cosine: of the two expected updates.
        signal_share: ⟨U_kept, U⟩ / ‖U‖².
        noise_share: tr Cov(û_kept, û) / tr Cov(û).
        noise_scale_ratio: the kept update's own noise scale over that of the full one.
    """

    share_of_tokens: float | None
    cosine: Estimate
    signal_share: Estimate
    noise_share: float | None
    noise_scale_ratio: Estimate


@dataclass(frozen=True)
class Exp3:
    """Exp 3 of one dump.

    Attributes:
        n_prompts, n_rollouts: all, with or without rows.
        n_prompts_mixed: prompts whose rollouts' outcomes differ.
        bins: buckets.
        objective: what made the weights.
        outcome: of what: "reward" or "verdict".
        signal: of the full update.
        noise_scale_prompts: of the full update.
        buckets: one each.
        keep_top: the highest buckets kept, one more in every entry; the last one keeps all.
        keep_bottom: the lowest ones likewise.
        keep_random: as many tokens as in `keep_top`, kept at random: see `kept_tokens`.
        at_20_percent: "top", "bottom" and "random" at exactly 20% of the tokens, a bucket that this share cuts
            being kept in part, at random.
        by_weight: ‖U_w‖² / ‖U‖² and tr Cov(û_w) / tr Cov(û), all tokens; None of a single weight.
    """

    n_prompts: int
    n_prompts_mixed: int
    n_rollouts: int
    bins: int
    objective: str
    outcome: str
    signal: Signal
    noise_scale_prompts: Estimate
    buckets: tuple[BucketSignal, ...]
    keep_top: tuple[Kept, ...]
    keep_bottom: tuple[Kept, ...]
    keep_random: tuple[Kept, ...]
    at_20_percent: dict[str, Kept]
    by_weight: ByWeight | None


def signal_of_pooled(pooled: Pooled, objective: str = "dapo") -> Exp3:
    """All of Exp 3 on one pooled dump. Gradients are read twice, a prompt at a time.

    Prompts whose outcomes are all equal have an update of 0 where the objective gives them no advantage, and count
    as such in every mean over prompts. Prompts with fewer than 4 rollouts have no part in what is within prompts.

    Args:
        pooled: rows and rollouts.
        objective: one of `weights.OBJECTIVES`.

    Raises:
        ValueError: as of `pooled.iter_prompts` and `weights.update_weights`.
    """
    tables = prompt_tables(pooled, objective)
    moments = moments_of(tables)
    tokens = np.bincount(pooled.bucket, pooled.n_tokens, pooled.n_buckets)  # [B]
    everything = np.ones(pooled.n_buckets)
    top = [np.arange(pooled.n_buckets) >= lowest for lowest in reversed(range(pooled.n_buckets))]
    shares = [_share(tokens, chance) for chance in top]
    return Exp3(
        n_prompts=len(tables.with_own),
        n_prompts_mixed=_n_mixed(pooled),
        n_rollouts=len(pooled.rollout_prompt),
        bins=pooled.n_buckets,
        objective=objective,
        outcome=pooled.outcome_is,
        signal=_signal(moments),
        noise_scale_prompts=_noise_scale(moments, everything),
        buckets=tuple(_bucket(pooled, tables, moments, tokens, index) for index in range(pooled.n_buckets)),
        keep_top=tuple(kept_tokens(moments, tokens, chance) for chance in top),
        keep_bottom=tuple(kept_tokens(moments, tokens, chance[::-1]) for chance in top),
        keep_random=tuple(kept_tokens(moments, tokens, (share or 0.0) * everything) for share in shares),
        at_20_percent={
            "top": kept_tokens(moments, tokens, highest_share(tokens, CLAIMED_SHARE)),
            "bottom": kept_tokens(moments, tokens, highest_share(tokens[::-1], CLAIMED_SHARE)[::-1]),
            "random": kept_tokens(moments, tokens, CLAIMED_SHARE * everything),
        },
        by_weight=by_weight(tuple(pooled.weights), moments.weight_signal, moments.weight_noise)
        if pooled.weights and moments
        else None,
    )


def reason_of(result: Exp3) -> str | None:
    """Why no signal is seen, in words; None where one is."""
    if result.signal.verdict == SEEN:
        return None
    counted = f"{result.n_prompts} prompts, {result.n_prompts_mixed or 'none'} with both outcomes"
    if result.signal.value is None:
        return f"{counted}; at least {MIN_PROMPTS} prompts are needed"
    z = "" if result.signal.z is None else f" (z {number(result.signal.z, 1)})"
    return f"signal not above 0{z}; {counted}; {prompts_to_tell(result.n_prompts, result.signal.z, rate=1)}"


def kept_tokens(moments: Moments | None, tokens: np.ndarray, chance: np.ndarray) -> Kept:
    """The update of tokens that are each kept with the chance of their bucket, independently.

    Chances of 0 and 1 keep whole buckets. With chances a between these, the expected update is Σ_b a_b U_b, and chance
    itself adds noise: the kept update's own is Σ_bb' a_b a_b' N_bb' + Σ_b a_b (1 - a_b) E Σ_t w² ‖g_t‖², t over the
    bucket's tokens. Pooled rows don't hold single tokens; in their place stands E Σ_r w_r² ‖G_rb‖². The two are equal
    where the gradients of a rollout's tokens in one bucket are uncorrelated, as those of rollouts from the model itself
    are (each has mean zero given what went before), but for how the weights hang on the outcome. So for one chance for
    all, a control, cosine 1 and shares of a are no measurement but what they must be, and only the noise scale is an
    estimate. Rows of a dump with `bucket_by` random measure all of it: there `keep_top` keeps tokens at random.

    Args:
        moments: None where there are too few prompts.
        tokens: [B] of each bucket.
        chance: [B] from 0 to 1.
    """
    chance = np.asarray(chance, dtype=np.float64)
    if moments is None:
        return Kept(_share(tokens, chance), NO_ESTIMATE, NO_ESTIMATE, None, NO_ESTIMATE)
    full, noise = _sum(moments.signal), _sum(moments.noise)
    product, own = _product_with_full(moments.signal, chance), chance @ moments.signal @ chance
    seen = above_zero(full)
    ratio = NO_ESTIMATE
    if seen and noise.min() > 0:
        ratio = ratio_of(_own_noise(moments, chance) / noise * full, own)
    return Kept(
        share_of_tokens=_share(tokens, chance),
        cosine=cosine_of(product, own, full),
        signal_share=ratio_of(product, full),
        noise_share=_noise_share(moments, chance),
        noise_scale_ratio=ratio,
    )


def highest_share(tokens: np.ndarray, share: float) -> np.ndarray:
    """[B] chances that keep the share of tokens with the highest buckets; at most one of them is neither 0 nor 1.

    `tokens`: [B] of each bucket.
    """
    above = np.cumsum(tokens[::-1])[::-1] - tokens
    left = share * tokens.sum() - above
    return np.clip(np.divide(left, tokens, out=np.zeros(len(tokens)), where=tokens > 0), 0.0, 1.0)


def _bucket(
    pooled: Pooled, tables: PromptTables, moments: Moments | None, tokens: np.ndarray, index: int
) -> BucketSignal:
    only = np.eye(pooled.n_buckets)[index]
    kept = kept_tokens(moments, tokens, only)
    n_rare = None if pooled.rare is None else float(pooled.rare[pooled.bucket == index].sum())
    return BucketSignal(
        share_of_tokens=kept.share_of_tokens,
        n_rare=n_rare,
        signal_share=kept.signal_share,
        signal_share_within_prompts=_share_within(tables.within, index),
        noise_share=kept.noise_share,
        noise_scale_prompts=_noise_scale(moments, only).value,
        cosine_with_update=kept.cosine,
        score_mean=_score_mean(tables.score_product[:, index], tables.score_energy[:, index], n_rare),
    )


def _signal(moments: Moments | None) -> Signal:
    if moments is None:
        return Signal(None, None, None, UNDERPOWERED)
    full = _sum(moments.signal)
    return Signal(float(full[0]), interval_of(full), z_of(full), SEEN if above_zero(full) else UNDERPOWERED)


def _noise_scale(moments: Moments | None, chance: np.ndarray) -> Estimate:
    if moments is None:
        return NO_ESTIMATE
    return ratio_of(_own_noise(moments, chance), chance @ moments.signal @ chance)


def _own_noise(moments: Moments, chance: np.ndarray) -> np.ndarray:
    """[1 + P] tr Cov of the update of tokens kept with chances [B]."""
    return chance @ moments.noise @ chance + moments.own_energy @ (chance * (1 - chance))


def _noise_share(moments: Moments, chance: np.ndarray) -> float | None:
    noise = _sum(moments.noise)[0]
    return float(_product_with_full(moments.noise, chance)[0] / noise) if noise > 0 else None


def _share_within(within: np.ndarray, index: int) -> Estimate:
    """`within`: [P', B] of `PromptTables`."""
    if len(within) < 2:
        return NO_ESTIMATE
    return ratio_of(stack_of_means(within[:, index]), stack_of_means(within.sum(axis=1)))


def _score_mean(product: np.ndarray, energy: np.ndarray, n_rare: float | None) -> ScoreMean:
    """`product`, `energy`: [P''] of one bucket."""
    if not energy.sum() > 0:
        return ScoreMean(None, None)
    is_unsampled = n_rare is not None and n_rare < MIN_RARE_TOKENS
    z = z_of(stack_of_means(product)) if len(product) >= 2 and not is_unsampled else None
    return ScoreMean(float(product.sum() / energy.sum()), z)


def _sum(tables: np.ndarray) -> np.ndarray:
    """[1 + P] the sum of each of [1 + P, B, B]."""
    return tables.sum(axis=(1, 2))


def _product_with_full(tables: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """[1 + P] Σ_bb' chance_b tables_bb'."""
    return tables.sum(axis=2) @ chance


def _share(tokens: np.ndarray, chance: np.ndarray) -> float | None:
    return float(chance @ tokens / tokens.sum()) if tokens.sum() > 0 else None


def _n_mixed(pooled: Pooled) -> int:
    """Prompts with more than one outcome."""
    pairs = np.unique(np.stack([pooled.rollout_prompt.astype(np.float64), pooled.outcome], axis=1), axis=0)
    return int(np.sum(np.unique(pairs[:, 0], return_counts=True)[1] > 1))
