"""What each rollout's summed gradient weighs in the update of its prompt."""

from collections.abc import Callable

import numpy as np

MIN_ROLLOUTS_FOR_HSIC = 4


def update_weights(outcome: np.ndarray, n_response_tokens: np.ndarray, objective: str) -> np.ndarray:
    """[R] weights w_r, so that the update of a prompt is û = Σ_r w_r G_r.

    `dapo`: A_r / R with GRPO's advantage A_r = (c_r - mean) / std, every token alike (Yu et al. 2025). `grpo`: A_r / R
    over the response's length (Shao et al. 2024). `dr-grpo`: (c_r - mean) / (R - 1), the unbiased estimate of Cov(c, G)
    (Liu et al. 2025, up to scale). `reinforce`: c_r / R.

    The std is the sample's, with R - 1, as in TRL and verl. Their epsilon is left out: where all outcomes are equal,
    advantages are 0. A single rollout has no advantage either.

    Args:
        outcome: [R] reward, or 1 for correct and 0 for incorrect.
        n_response_tokens: [R] length of each response.
        objective: one of `OBJECTIVES`.

    Raises:
        ValueError: no such objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"no objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective](outcome.astype(np.float64), n_response_tokens)


def _centred(outcome: np.ndarray) -> np.ndarray:
    """Outcomes less their mean; exactly 0 where all are equal, which rounding of the mean would spoil."""
    return np.zeros(len(outcome)) if np.ptp(outcome) == 0 else outcome - outcome.mean()


def _dapo(outcome: np.ndarray, n_response_tokens: np.ndarray) -> np.ndarray:
    centred = _centred(outcome)
    return centred / (centred.std(ddof=1) * len(outcome)) if centred.any() else centred


def _grpo(outcome: np.ndarray, n_response_tokens: np.ndarray) -> np.ndarray:
    return _dapo(outcome, n_response_tokens) / np.maximum(n_response_tokens, 1)  # an empty response has no gradient


def _dr_grpo(outcome: np.ndarray, n_response_tokens: np.ndarray) -> np.ndarray:
    return _centred(outcome) / max(1, len(outcome) - 1)


def _reinforce(outcome: np.ndarray, n_response_tokens: np.ndarray) -> np.ndarray:
    return outcome / len(outcome)


OBJECTIVES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "dapo": _dapo,
    "grpo": _grpo,
    "dr-grpo": _dr_grpo,
    "reinforce": _reinforce,
}


def hsic_weights(outcome: np.ndarray) -> np.ndarray:
    """[R, R] symmetric weights H, diagonal 0, for which Σ_rs H_rs ⟨x_r, y_s⟩ is unbiased for ⟨Cov(c, x), Cov(c, y)⟩.

    The unbiased HSIC of Song et al. (2012, their eq. 5) with the linear kernel K = c cᵀ, diagonal 0, written as a
    linear form in the other kernel's Gram matrix; symmetric weights symmetrise a cross-Gram of x and y. Means of x and
    y need not be 0.

    Args:
        outcome: [R] with R at least 4.
    """
    n = len(outcome)
    centred = _centred(outcome)
    kernel = np.outer(centred, centred)
    np.fill_diagonal(kernel, 0.0)
    by_rollout = kernel.sum(axis=1)
    weights = kernel + by_rollout.sum() / ((n - 1) * (n - 2)) - np.add.outer(by_rollout, by_rollout) / (n - 2)
    np.fill_diagonal(weights, 0.0)
    return weights / (n * (n - 3))
