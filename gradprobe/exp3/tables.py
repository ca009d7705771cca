"""From gradients to small tables per prompt, in two passes over the rows, and from these to moments with a jackknife.

Memory holds one prompt's rollouts, [R, B, d], the sum of all updates, [B, d], and tables of [B, B] per prompt.
"""

from dataclasses import dataclass

import numpy as np

from ..analysis.jackknife import MIN_PROMPTS, stack_of_means
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
        weights_with_all: [P, W] ⟨û_w, S_w⟩ of the columns of each weight, all tokens; W is 0 of a single weight.
        weights_with_own: [P, W] ‖û_w‖².
    """

    with_all: np.ndarray
    with_own: np.ndarray
    own_energy: np.ndarray
    within: np.ndarray
    score_product: np.ndarray
    score_energy: np.ndarray
    weights_with_all: np.ndarray
    weights_with_own: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Stacks, see `analysis.jackknife`, that all numbers across prompts are made of.

    Attributes:
        signal: [1 + P, B, B] ⟨U_b, U_b'⟩ without bias, from pairs of different prompts.
        noise: [1 + P, B, B] the trace of the covariance of û_b and û_b' over prompts, without bias.
        own_energy: [1 + P, B] E Σ_r w_r² ‖G_rb‖².
        weight_signal: [1 + P, W] ‖U_w‖² of each weight's columns without bias, all tokens.
        weight_noise: [1 + P, W] tr Cov(û_w).
    """

    signal: np.ndarray
    noise: np.ndarray
    own_energy: np.ndarray
    weight_signal: np.ndarray
    weight_noise: np.ndarray


def prompt_tables(pooled: Pooled, objective: str) -> PromptTables:
    """Read the rows twice, a prompt at a time.

    Raises:
        ValueError: as of `pooled.iter_prompts` and `update_weights`.
    """
    total = np.zeros((pooled.n_buckets, pooled.grads.shape[1]))
    for rollouts in iter_prompts(pooled):
        total += _update(rollouts, objective)[1]
    n, starts, of_all = pooled.n_buckets, list(pooled.weights.values()), total.sum(axis=0)
    columns: tuple[list[np.ndarray], ...] = ([], [], [], [], [], [], [], [])
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
        full = update.sum(axis=0)
        for column, product in zip(columns[6:], (full * of_all, full * full), strict=True):
            column.append(np.add.reduceat(product, starts) if starts else np.zeros(0))
    shapes = ((0, n, n), (0, n, n), (0, n), (0, n), (0, n), (0, n), (0, len(starts)), (0, len(starts)))
    return PromptTables(
        *(np.stack(column) if column else np.zeros(shape) for column, shape in zip(columns, shapes, strict=True))
    )


def moments_of(tables: PromptTables) -> Moments | None:
    """All stacks across prompts; None with fewer than 3 prompts."""
    if len(tables.with_own) < MIN_PROMPTS:
        return None
    of_buckets = _of_pairs(tables.with_all, tables.with_all.transpose(0, 2, 1), tables.with_own)
    of_weights = _of_pairs(tables.weights_with_all, tables.weights_with_all, tables.weights_with_own)
    return Moments(*of_buckets, stack_of_means(tables.own_energy), *of_weights)


def _of_pairs(with_all: np.ndarray, all_with: np.ndarray, with_own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stacks of ⟨U_a, U_b⟩ and of the covariance, of [P, ...] ⟨û_a, S_b⟩, ⟨S_a, û_b⟩ and ⟨û_a, û_b⟩."""
    n, own, sums = len(with_own), with_own.sum(axis=0), with_all.sum(axis=0)  # the last is ⟨S_a, S_b⟩
    products = np.concatenate([sums[None], sums - with_all - all_with + with_own])
    squares = np.concatenate([own[None], own - with_own])
    counts = np.concatenate([[n], np.full(n, n - 1)]).reshape(-1, *[1] * own.ndim)
    signal = (products - squares) / (counts * (counts - 1))
    return signal, squares / counts - signal


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
