"""On-policy, what correct rollouts push for is what incorrect ones push against: ρ over sums, whose expectation is -1.

With a_c = Σ_{correct r} G_r / n and a_i = Σ_{incorrect r} G_r / n, n the prompt's rollouts, the score's mean of zero
gives E a_i = -E a_c for prompts of any chance of success, easy and hard ones alike (docs/methods.md).
"""

from dataclasses import dataclass

import numpy as np

from .jackknife import NO_ESTIMATE, Estimate, cosine_of, stack_of_means
from .pooled import Pooled, PromptRollouts, iter_prompts


@dataclass(frozen=True)
class Opposition:
    """ρ over sums: `all_tokens` of the rollouts' whole sums, `by_bucket` one for each bucket."""

    all_tokens: Estimate
    by_bucket: tuple[Estimate, ...]


def rho_over_sums(pooled: Pooled) -> Opposition:
    """The noise-removed cosine of a_c and a_i over all prompts, mixed or not.

        ρ = Σ_p ⟨a_c, a_i⟩ / sqrt(Σ_p ‖a_c‖² · Σ_p ‖a_i‖²)

    Each product is taken over pairs of different rollouts and divided by n (n - 1), so that all three sums are
    unbiased; on-policy their expectations are -Q, Q and Q with one Q = Σ_p ‖P(correct) E[G | correct]‖². Prompts with a
    single rollout have no pair and are left out. None where a sum of squares is not above 0 at the 95% level. The
    interval is Fieller's over prompts.

    Raises:
        ValueError: as of `pooled.iter_prompts`.
    """
    products = [_products(rollouts) for rollouts in iter_prompts(pooled) if len(rollouts.correct) >= 2]
    if len(products) < 2:
        return Opposition(NO_ESTIMATE, (NO_ESTIMATE,) * pooled.n_buckets)
    stacks = stack_of_means(np.stack(products))  # [1 + P, B + 1, 3]
    *by_bucket, all_tokens = (cosine_of(*stacks[:, index].T) for index in range(pooled.n_buckets + 1))
    return Opposition(all_tokens, tuple(by_bucket))


def _products(rollouts: PromptRollouts) -> np.ndarray:
    """[B + 1, 3] ⟨a_c, a_i⟩, ‖a_c‖² and ‖a_i‖² of one prompt, without bias; last, those of all tokens."""
    vectors = np.concatenate([rollouts.sums, rollouts.sums.sum(axis=1, keepdims=True)], axis=1)  # [R, B + 1, d]
    kinds = [vectors[kind] for kind in (rollouts.correct, ~rollouts.correct)]
    sums = [kind.sum(axis=0) for kind in kinds]
    across = np.einsum("bd,bd->b", sums[0], sums[1])
    within = [
        np.einsum("bd,bd->b", total, total) - np.einsum("rbd,rbd->b", kind, kind)
        for total, kind in zip(sums, kinds, strict=True)
    ]
    n = len(vectors)
    return np.stack([across, *within], axis=1) / (n * (n - 1))
