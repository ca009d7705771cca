"""From gradients to small tables per prompt, in two passes over the rows, and from these to moments with a jackknife.

Memory holds one prompt's rollouts, [R, B, d], the sum of all updates, [B, d], and tables of [B, B] per prompt.
"""

from dataclasses import dataclass

import numpy as np

from ..analysis.jackknife import MIN_PROMPTS
from ..analysis.pooled import Pooled, PromptRollouts, iter_prompts
from .weights import MIN_ROLLOUTS_FOR_HSIC, hsic_weights, update_weights


@dataclass(frozen=True)
class PromptTables:
    """What Exp 3 keeps of each prompt: û_b is its update by the tokens of bucket b, S_b the sum of û_b over prompts.

    Attributes:
        with_all: [P, B, B] ⟨û_b, S_b'⟩.
        with_own: [P, B, B] ⟨û_b, û_b'⟩.
        own_energy: [P, B] Σ_r w_r² ‖G_rb‖².
        within: [P', B] unbiased ⟨Cov(c, G_b), Cov(c, G)⟩, of the prompts with at least 4 rollouts.
        score_product: [P'', B] mean ⟨G_rb, G_sb⟩ over pairs of different rollouts, of the prompts that have a pair.
        score_energy: [P'', B] mean ‖G_rb‖² of the same prompts.
    """

    with_all: np.ndarray
    with_own: np.ndarray
    own_energy: np.ndarray
    within: np.ndarray
    score_product: np.ndarray
    score_energy: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Stacks, see `analysis.jackknife`, that all numbers across prompts are made of.

    Attributes:
        signal: [1 + P, B, B] ⟨U_b, U_b'⟩ without bias, from pairs of different prompts.
        noise: [1 + P, B, B] the trace of the covariance of û_b and û_b' over prompts, without bias.
        own_energy: [1 + P, B] E Σ_r w_r² ‖G_rb‖².
    """

    signal: np.ndarray
    noise: np.ndarray
    own_energy: np.ndarray


def prompt_tables(pooled: Pooled, objective: str) -> PromptTables:
    """Read the rows twice, a prompt at a time.

    Raises:
        ValueError: as of `pooled.iter_prompts` and `update_weights`.
    """
    total = np.zeros((pooled.n_buckets, pooled.grads.shape[1]))
    for rollouts in iter_prompts(pooled):
        total += _update(rollouts, objective)[1]
    n = pooled.n_buckets
    columns: tuple[list[np.ndarray], ...] = ([], [], [], [], [], [])
    for rollouts in iter_prompts(pooled):
        weights, update = _update(rollouts, objective)
        energies = np.einsum("rbd,rbd->rb", rollouts.sums, rollouts.sums)
        columns[0].append(update @ total.T)
        columns[1].append(update @ update.T)
        columns[2].append(weights**2 @ energies)
        if len(weights) >= MIN_ROLLOUTS_FOR_HSIC:
            columns[3].append(_within(rollouts))
        if len(weights) >= 2:
            columns[4].append(_score_product(rollouts, energies))
            columns[5].append(energies.mean(axis=0))
    shapes = ((0, n, n), (0, n, n), (0, n), (0, n), (0, n), (0, n))
    return PromptTables(
        *(np.stack(column) if column else np.zeros(shape) for column, shape in zip(columns, shapes, strict=True))
    )


def moments_of(tables: PromptTables) -> Moments | None:
    """All stacks across prompts; None with fewer than 3 prompts."""
    n = len(tables.with_own)
    if n < MIN_PROMPTS:
        return None
    own, sums = tables.with_own.sum(axis=0), tables.with_all.sum(axis=0)  # the latter is S Sᵀ
    sums_without = sums - tables.with_all - tables.with_all.transpose(0, 2, 1) + tables.with_own
    products = np.concatenate([sums[None], sums_without])
    squares = np.concatenate([own[None], own - tables.with_own])
    counts = np.concatenate([[n], np.full(n, n - 1)])[:, None, None]
    signal = (products - squares) / (counts * (counts - 1))
    energy = tables.own_energy.sum(axis=0)
    energies = np.concatenate([energy[None], energy - tables.own_energy]) / counts[:, :, 0]
    return Moments(signal, squares / counts - signal, energies)


def _update(rollouts: PromptRollouts, objective: str) -> tuple[np.ndarray, np.ndarray]:
    """The rollouts' weights [R] and the prompt's update by bucket, [B, d]."""
    weights = update_weights(rollouts.outcome, rollouts.n_response_tokens, objective)
    return weights, np.tensordot(weights, rollouts.sums, axes=1)


def _within(rollouts: PromptRollouts) -> np.ndarray:
    """[B] ⟨Cov(c, G_b), Cov(c, G)⟩ of one prompt without bias."""
    weighted = hsic_weights(rollouts.outcome) @ rollouts.sums.sum(axis=1)  # [R, d]
    return np.einsum("rbd,rd->b", rollouts.sums, weighted)


def _score_product(rollouts: PromptRollouts, energies: np.ndarray) -> np.ndarray:
    """[B] the mean of ⟨G_rb, G_sb⟩ over r ≠ s. `energies`: [R, B] ‖G_rb‖²."""
    total, n = rollouts.sums.sum(axis=0), len(energies)
    return (np.einsum("bd,bd->b", total, total) - energies.sum(axis=0)) / (n * (n - 1))
