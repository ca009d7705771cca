"""Exp 2's mathematics: do correct and incorrect rollouts of a prompt push the weights the same way?

+1 means that they would cancel under GRPO's advantages of ±1, 0 that they are orthogonal. All of it runs in
float64; X is given as an array and row numbers, so it may be a memory map of which one prompt is read at a time.
Where there is no number (nothing to average, a mean that is the zero vector), functions return None.
"""

from dataclasses import dataclass

import numpy as np

MIN_TOKENS_OF_EACH_KIND = 2
MIN_TOKENS_TO_SPLIT = 4


@dataclass(frozen=True)
class PromptDirection:
    """One usable prompt: at least 2 tokens of correct rollouts and 2 of incorrect ones.

    Attributes:
        prompt: the prompt's code, as in the argument of `compare_groups`.
        n_correct_tokens: tokens of correct rollouts.
        n_incorrect_tokens: tokens of incorrect rollouts.
        cosine: of the two kinds' mean gradients; None where a mean is the zero vector.
    """

    prompt: int
    n_correct_tokens: int
    n_incorrect_tokens: int
    cosine: float | None


@dataclass(frozen=True)
class Directions:
    """Exp 2 on one set of tokens.

    Attributes:
        n_prompts: prompts in the dump, usable or not.
        per_prompt: the usable ones, by ascending code.
        control: the half-split cosines, by prompt, correct before incorrect; None where a mean is the zero vector.
    """

    n_prompts: int
    per_prompt: tuple[PromptDirection, ...]
    control: tuple[float | None, ...]

    @property
    def cosines(self) -> np.ndarray:
        """[k] float64, the cosine of every usable prompt that has one."""
        return known([prompt.cosine for prompt in self.per_prompt])

    @property
    def control_cosines(self) -> np.ndarray:
        """[k] float64, every half-split cosine there is."""
        return known(self.control)


@dataclass(frozen=True)
class CosineSummary:
    """Numbers on n cosines; None where n is 0. `std` is that of the population (divides by n)."""

    n: int
    mean: float | None
    median: float | None
    std: float | None
    frac_positive: float | None
    frac_gt_0p5: float | None


def cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """⟨a, b⟩ / (‖a‖ ‖b‖) of two [d] vectors; None where one is the zero vector."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else None


def known(values: list[float | None] | tuple[float | None, ...]) -> np.ndarray:
    """[k] float64: the values that are not None."""
    return np.array([value for value in values if value is not None], dtype=np.float64)


def summarise(cosines: np.ndarray) -> CosineSummary:
    """Mean, median, spread and shares of [n] cosines."""
    if len(cosines) == 0:
        return CosineSummary(0, None, None, None, None, None)
    return CosineSummary(
        n=len(cosines),
        mean=float(np.mean(cosines)),
        median=float(np.median(cosines)),
        std=float(np.std(cosines)),
        frac_positive=float(np.mean(cosines > 0)),
        frac_gt_0p5=float(np.mean(cosines > 0.5)),
    )


def compare_groups(
    grads: np.ndarray, rows: np.ndarray, prompt: np.ndarray, correct: np.ndarray, n_prompts: int, seed: int = 0
) -> Directions:
    """Cosine of the mean gradients of correct and incorrect tokens per prompt, with the half-split control.

    Means weigh every token alike, whatever rollout it is of. The control is the noise floor: a random split of the
    tokens of one prompt and one kind, at least 4 of them, in two halves, and the cosine of the halves' means. It is
    taken on every prompt, also where only one kind occurs.

    Args:
        grads: [n, d] gradients, may be a memory map.
        rows: [m] the tokens looked at (those of one entropy bucket).
        prompt: [n] code 0 .. n_prompts - 1 of each row's prompt.
        correct: [n] bool, whether each row's rollout was correct.
        n_prompts: prompts in the dump.
        seed: of the control's splits.
    """
    rng = np.random.default_rng(seed)
    per_prompt: list[PromptDirection] = []
    control: list[float | None] = []
    for code in range(n_prompts):
        members = rows[prompt[rows] == code]
        gradients = np.asarray(grads[members]).astype(np.float64)
        kinds = (gradients[correct[members]], gradients[~correct[members]])
        if min(len(kind) for kind in kinds) >= MIN_TOKENS_OF_EACH_KIND:
            across = cosine(kinds[0].mean(axis=0), kinds[1].mean(axis=0))
            per_prompt.append(PromptDirection(code, len(kinds[0]), len(kinds[1]), across))
        control.extend(half_split_cosine(kind, rng) for kind in kinds if len(kind) >= MIN_TOKENS_TO_SPLIT)
    return Directions(n_prompts, tuple(per_prompt), tuple(control))


def half_split_cosine(gradients: np.ndarray, rng: np.random.Generator) -> float | None:
    """Cosine between the means of two random halves of [n, d] gradients; of an odd n, the second has one more."""
    order = rng.permutation(len(gradients))
    half = len(gradients) // 2
    return cosine(gradients[order[:half]].mean(axis=0), gradients[order[half:]].mean(axis=0))
