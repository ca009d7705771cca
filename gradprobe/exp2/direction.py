"""Exp 2's mathematics: do correct and incorrect rollouts of a prompt push the weights the same way?

+1 means that they would cancel under GRPO's advantages of ±1, 0 that they are orthogonal. The original's cosine shrinks
towards 0 with noise, whatever the truth is. What answers the question is `cancellations`, which looks at the update
itself, and `alignment`, the cosine with the noise removed. The unit of chance is the rollout: tokens of one rollout are
not independent. All of it runs in float64, of one prompt's gradients at a time. Where there is no number (nothing to
average, a mean that is the zero vector), arrays hold NaN and everything else None.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from ..analysis.bucket import Bucket, to_device, to_host
from ..analysis.jackknife import (
    NO_ESTIMATE,
    POWER_FACTOR,
    Estimate,
    Interval,
    above_zero,
    cosine_of,
    interval_of,
    prompts_to_tell,
    quantile_of,
    stack_of_means,
    z_of,
)
from ..analysis.text import CANT_TELL, counted, number
from ..dump.mapped import read_rows
from ..dump.on_policy import MIN_RARE_TOKENS

MIN_TOKENS_OF_EACH_KIND = 2
MIN_TOKENS_TO_SPLIT = 4
MIN_ROLLOUTS_OF_EACH_KIND = 2
ALIGNED, OPPOSED, ORTHOGONAL, UNDERPOWERED = "aligned", "opposed", "orthogonal", "underpowered"
ADD_UP, CANCEL = "they add up", "they cancel"
UNSAMPLED = "unsampled"
ORTHOGONAL_WITHIN = 0.25
UNSAMPLED_REASON = f"fewer than {MIN_RARE_TOKENS} rare tokens to be expected, and what did not come up may decide"
LEVEL = 0.05
CENTRAL = (0.025, 0.975)
DRAWS_AT_ONCE = 500
LABEL_BYTES = 64 << 20
ROUNDING = 1e-10


@dataclass(frozen=True)
class Directions:
    """The original's cosines: k usable prompts, with 2 tokens of each kind, and m halved groups.

    Attributes:
        prompt: [k] the usable prompts' numbers, ascending.
        n_tokens: [k, 2] tokens of correct and of incorrect rollouts.
        cosines: [k] of the two kinds' mean gradients; NaN where a mean is the zero vector.
        control: [m] of halves, by prompt, correct before incorrect; NaN likewise.
    """

    prompt: np.ndarray
    n_tokens: np.ndarray
    cosines: np.ndarray
    control: np.ndarray


@dataclass(frozen=True)
class RolloutGrams:
    """What Exp 2 needs of the gradients beyond the token split: of P prompts with tokens, the rollouts' Gram matrices.

    A prompt with fewer rollouts than the longest is padded with rollouts of 0 tokens, whose Gram entries are 0.

    Attributes:
        prompts: [P] their numbers, ascending.
        gram: [P, R, R] float64, dot products of the rollouts' token-sum gradients Σ_t g_t.
        n_tokens: [P, R] int64, tokens of each rollout; 0 marks padding.
        correct: [P, R] bool; False at padding.
    """

    prompts: np.ndarray
    gram: np.ndarray
    n_tokens: np.ndarray
    correct: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """[P, R] bool, False at padding."""
        return self.n_tokens > 0

    @property
    def incorrect(self) -> np.ndarray:
        """[P, R] bool, False at padding."""
        return self.present & ~self.correct

    @property
    def mean_gram(self) -> np.ndarray:
        """[P, R, R] dot products of the rollouts' mean gradients."""
        counts = np.maximum(self.n_tokens, 1).astype(np.float64)
        return self.gram / (counts[:, :, None] * counts[:, None, :])

    def with_rollouts_of_each_kind(self, minimum: int) -> "RolloutGrams":
        """The prompts with at least `minimum` correct and as many incorrect rollouts, and a gradient that is not 0."""
        fewest = np.minimum(self.correct.sum(axis=1), self.incorrect.sum(axis=1))
        keep = (fewest >= minimum) & (np.trace(self.gram, axis1=1, axis2=2) > 0)
        return RolloutGrams(self.prompts[keep], self.gram[keep], self.n_tokens[keep], self.correct[keep])


@dataclass(frozen=True)
class Signal:
    """Is there a direction that the rollouts of one kind share?

    `value` is the mean over prompts of S, the mean dot product of the mean gradients of two different rollouts: the
    squared length of what they share, to which noise adds nothing. `ci95` and `z` are over prompts, None of one alone.
    """

    value: float
    ci95: Interval | None
    z: float | None
    above_zero: bool


@dataclass(frozen=True)
class Alignment:
    """Do correct and incorrect rollouts share a direction, noise removed? See `alignment`.

    Attributes:
        n_prompts: usable prompts, with at least 2 rollouts of each kind; all numbers are about these.
        rho, ci95: the cosine and its 95% interval, not clipped to ±1; None unless both signals are above 0.
        p_value: of rollouts exchangeable, correct or not. This is not the null rho = 0: rollouts that all share one
            direction (rho = 1) obey it.
        min_detectable: the |rho| found with 80% power at the 5% level; None where ci95 is.
        signal_correct, signal_incorrect: see `Signal`; None without usable prompts.
        verdict: "aligned", "opposed", "orthogonal", "underpowered", or "unsampled", whatever the interval.
        reason: why a verdict tells nothing, and what would; None where it does.
    """

    n_prompts: int
    rho: float | None
    ci95: Interval | None
    p_value: float | None
    min_detectable: float | None
    signal_correct: Signal | None
    signal_incorrect: Signal | None
    verdict: str
    reason: str | None


@dataclass(frozen=True)
class Cancellation:
    """Do the advantage-weighted gradients of a prompt's rollouts cancel? See `cancellations`; None without prompts.

    Attributes:
        n_prompts: prompts with at least 1 rollout of each kind.
        ratio: the mean over prompts of C. 1 is the value of mutually orthogonal rollouts.
        null_mean, null_ci95, p_value: of advantages permuted within each prompt; central 95%, two-sided.
        verdict: "they add up" (above the null, p < 0.05), "they cancel" (below it), "can't tell" or "unsampled".
        reason: as of `Alignment`.
    """

    n_prompts: int
    ratio: float | None
    null_mean: float | None
    null_ci95: Interval | None
    p_value: float | None
    verdict: str
    reason: str | None


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """⟨a, b⟩ / (‖a‖ ‖b‖) of two [d] vectors; NaN where one is the zero vector."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else np.nan


def compare_groups(bucket: Bucket, correct: np.ndarray, seed: int = 0) -> Directions:
    """Cosine of the mean gradients of correct and incorrect tokens per prompt, with the half-split control.

    Means weigh every token alike, whatever rollout it is of. The control is the noise floor: the tokens of one prompt
    and one kind, at least 4 of them, also where only one kind occurs, split in two halves by `seed`, and the cosine of
    the halves' means. `correct`: [n] bool, whether each token's rollout was.
    """
    rng = np.random.default_rng(seed)
    usable: list[tuple[int, int, int, float]] = []
    control: list[float] = []
    for code, members in places_by_prompt(bucket.prompt):
        gradients = read_rows(bucket.grads, bucket.rows[members])
        kinds = (gradients[correct[members]], gradients[~correct[members]])
        sizes = len(kinds[0]), len(kinds[1])
        if min(sizes) >= MIN_TOKENS_OF_EACH_KIND:
            usable.append((code, *sizes, cosine(kinds[0].mean(axis=0), kinds[1].mean(axis=0))))
        control.extend(half_split_cosine(kind, rng) for kind in kinds if len(kind) >= MIN_TOKENS_TO_SPLIT)
    found = np.array(usable, np.float64).reshape(-1, 4)
    return Directions(found[:, 0].astype(int), found[:, 1:3].astype(int), found[:, 3], np.array(control, np.float64))


def places_by_prompt(prompt: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each prompt's number, ascending, with the places in `prompt`, [n], at which it stands."""
    order = np.argsort(prompt, kind="stable")
    codes, starts = np.unique(prompt[order], return_index=True)
    return zip(codes.tolist(), np.split(order, starts[1:]), strict=False)  # split gives a part where there is none


def half_split_cosine(gradients: np.ndarray, rng: np.random.Generator) -> float:
    """Cosine between the means of two random halves of [n, d] gradients; of an odd n, the second has one more."""
    order = rng.permutation(len(gradients))
    half = len(gradients) // 2
    return cosine(gradients[order[:half]].mean(axis=0), gradients[order[half:]].mean(axis=0))


def rollout_grams(bucket: Bucket, correct: np.ndarray) -> RolloutGrams:
    """Read the gradients once, a prompt at a time, and keep the Gram matrices of its rollouts' token sums.

    A prompt's rollouts stand in the order of their numbers. `correct`: [n] bool, whether each token's rollout was.

    Raises:
        ValueError: a rollout has both correct and incorrect tokens.
    """
    order = np.lexsort((bucket.rows, bucket.rollout, bucket.prompt))
    codes, starts = np.unique(bucket.prompt[order], return_index=True)
    members = np.split(order, starts[1:]) if len(codes) else []
    firsts = [np.unique(bucket.rollout[part], return_index=True)[1] for part in members]
    shape = (len(codes), max(map(len, firsts), default=0))
    grams = RolloutGrams(codes, np.zeros((*shape, shape[1])), np.zeros(shape, np.int64), np.zeros(shape, bool))
    for index, (part, first) in enumerate(zip(members, firsts, strict=True)):
        n_correct = np.add.reduceat(correct[part].astype(np.int64), first)
        n_tokens = np.diff(first, append=len(part))
        if np.any((n_correct > 0) & (n_correct < n_tokens)):
            raise ValueError(f"prompt {codes[index]}: a rollout has both correct and incorrect tokens")
        sums = to_device(np.add.reduceat(read_rows(bucket.grads, bucket.rows[part]), first, axis=0), bucket.device)
        here = slice(len(first))
        grams.gram[index, here, here] = to_host(sums @ sums.T)  # sums: [rollouts, d]
        grams.n_tokens[index, here] = n_tokens
        grams.correct[index, here] = n_correct > 0
    return grams


def half_split_cosines_by_rollout(grams: RolloutGrams, rng: np.random.Generator) -> np.ndarray:
    """[m] the control with rollouts kept whole: tokens of a rollout share a direction that is not the prompt's.

    One random split per prompt and kind with at least 2 rollouts, by prompt, correct before incorrect; every token is
    weighed alike, as in the original's split of tokens. NaN where a half's mean is the zero vector.
    """
    kinds = np.stack([grams.correct, grams.incorrect], axis=1)  # [P, 2, R]
    sizes = kinds.sum(axis=2)
    order = np.where(kinds, rng.random(kinds.shape), 2.0).argsort(axis=2).argsort(axis=2)  # others come last
    first = order < (sizes // 2)[:, :, None]
    cosines = _cosines(_group_forms(grams.gram, first, kinds & ~first))
    return cosines[sizes >= MIN_ROLLOUTS_OF_EACH_KIND]


def alignment(
    grams: RolloutGrams,
    rng: np.random.Generator,
    is_unsampled: bool = False,
    *,
    n_bootstrap: int = 4000,
    n_permutations: int = 9999,
) -> Alignment:
    """The cosine between what correct and what incorrect rollouts share, with the attenuation by noise removed.

    With m_c, m_i a prompt's means over rollout means, and S_c, S_i the mean dot products over pairs of different
    rollouts of a kind, over prompts with at least 2 rollouts of each kind:

        rho = Σ_p ⟨m_c, m_i⟩ / sqrt(Σ_p S_c · Σ_p S_i)

    (Spearman's 1904 correction for attenuation). No product holds a rollout's noise twice, so each sum is unbiased.
    The interval is Fieller's over prompts (`jackknife.cosine_of`): with few prompts, or few that outweigh the rest, it
    covered 93 to 98% in trials in which bootstraps and the delta method fell to 80 to 90% (docs/calibration.md).

    `min_detectable` is 2.8 bootstrap standard errors, each half the central 68.3% of rho over prompts drawn with
    replacement, so that a few draws with a denominator near 0 don't decide it. The p-value permutes correctness over
    the rollouts of a prompt; statistic: the mean over prompts of the token-weighted cosine, 0 where a mean is the zero
    vector. It is twice the smaller tail, with the +1 correction (Phipson & Smyth 2010).
    """
    grams = grams.with_rollouts_of_each_kind(MIN_ROLLOUTS_OF_EACH_KIND)
    n_prompts = len(grams.prompts)
    if n_prompts == 0:
        return Alignment(0, None, None, None, None, None, None, *_judged(0, NO_ESTIMATE, {}, False))
    bootstrap_rng, permutation_rng = rng.spawn(2)
    products = prompt_products(grams)
    signals = {kind: _signal(products[:, column]) for column, kind in enumerate(("correct", "incorrect"), start=1)}
    rho = cosine_of(*stack_of_means(products).T) if n_prompts > 1 else NO_ESTIMATE
    null = permutation_null(grams, permutation_rng, n_permutations, _label_cosines)
    p_value = two_sided_p(_label_cosines(grams, grams.correct[:, None]).mean(), null)
    detectable = rho.ci95 and POWER_FACTOR * _bootstrap_error(products, bootstrap_rng, n_bootstrap)
    verdict, reason = _judged(n_prompts, rho, signals, is_unsampled)
    return Alignment(n_prompts, rho.value, rho.ci95, p_value, detectable, *signals.values(), verdict, reason)


def cancellations(
    grams: RolloutGrams, rng: np.random.Generator, is_unsampled: bool = False, *, n_permutations: int = 9999
) -> tuple[Cancellation, Cancellation]:
    """How much of the update a prompt's rollouts leave, each weighed by its advantage: ±1, and group-normalised.

        C = ‖Σ_r A_r g_r‖² / Σ_r ‖A_r g_r‖²

    g_r is a rollout's mean gradient over its tokens in the bucket (GRPO divides a rollout's loss by its length). A_r is
    ±1, or (reward - mean) / std over the prompt's rollouts in the bucket (GRPO, Shao et al. 2024); scale cancels. The
    ratio is the mean of C over the prompts with a rollout of each kind (elsewhere GRPO has no advantage), and not a
    ratio of sums, which a prompt whose gradients are huge would decide. p is that of `alignment`.
    """
    grams = grams.with_rollouts_of_each_kind(1)
    if len(grams.prompts) == 0:
        nothing = Cancellation(0, None, None, None, None, CANT_TELL, "no prompt with rollouts of each kind")
        return nothing, nothing
    ratios = _cancellation_ratios(grams, grams.correct[:, None]).mean(axis=0)[0]
    null = permutation_null(grams, rng, n_permutations, _cancellation_ratios)
    signs, normalised = (_cancellation(len(grams.prompts), float(ratios[i]), null[:, i], is_unsampled) for i in (0, 1))
    return signs, normalised


def _cancellation(n_prompts: int, ratio: float, null: np.ndarray, is_unsampled: bool) -> Cancellation:
    """`null`: [draws] of the ratio."""
    if len(null) == 0:
        return Cancellation(n_prompts, ratio, None, None, None, CANT_TELL, "no permutations")
    mean, p_value = float(null.mean()), two_sided_p(ratio, null)
    low, high = np.quantile(null, CENTRAL)
    verdict, reason = ADD_UP if ratio > mean else CANCEL, None
    if is_unsampled:
        verdict, reason = UNSAMPLED, UNSAMPLED_REASON
    elif p_value is None or p_value >= LEVEL:
        error = float(null.std())
        size = prompts_to_tell(n_prompts, abs(ratio - mean) / error if error > 0 else None)
        verdict, reason = CANT_TELL, f"C is as under shuffled labels (p {number(p_value, 2)}); {size}"
    return Cancellation(n_prompts, ratio, mean, (float(low), float(high)), p_value, verdict, reason)


def prompt_products(grams: RolloutGrams) -> np.ndarray:
    """[P, 3] ⟨m_c, m_i⟩, S_c and S_i of every prompt, all of which need 2 rollouts of each kind. See `alignment`."""
    gram = grams.mean_gram
    indices = np.arange(gram.shape[1])
    gram[:, indices, indices] = 0.0  # a rollout with itself: signal and noise
    forms = _group_forms(gram, grams.correct[:, None], grams.incorrect[:, None])[:, :, 0]  # [3, P]
    n_correct, n_incorrect = grams.correct.sum(axis=1), grams.incorrect.sum(axis=1)
    pairs = (n_correct * n_incorrect, n_correct * (n_correct - 1), n_incorrect * (n_incorrect - 1))
    return np.stack([forms[1] / pairs[0], forms[0] / pairs[1], forms[2] / pairs[2]], axis=1)


def permutation_null(
    grams: RolloutGrams,
    rng: np.random.Generator,
    n_permutations: int,
    statistic: Callable[[RolloutGrams, np.ndarray], np.ndarray],
) -> np.ndarray:
    """[n_permutations, ...] the prompts' mean `statistic`, correctness permuted over the rollouts of each prompt.

    `statistic` takes labels, [P, draws, R] bool, and gives every prompt's value or values, [P, draws, ...].
    """
    at_once = int(np.clip(LABEL_BYTES // (8 * max(1, grams.correct.size)), 1, DRAWS_AT_ONCE))
    draws = [
        statistic(grams, _permuted_labels(grams, min(at_once, n_permutations - start), rng)).mean(axis=0)
        for start in range(0, max(1, n_permutations), at_once)
    ]
    return np.concatenate(draws)


def _permuted_labels(grams: RolloutGrams, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """[P, n_draws, R] bool, each prompt with as many correct rollouts as it has; padding stays False."""
    n_prompts, n_rollouts = grams.correct.shape
    keys = rng.random((n_prompts, n_draws, n_rollouts))
    keys += ~grams.present[:, None]  # padding last
    last = grams.correct.sum(axis=1)[:, None, None] - 1  # of the sorted keys that still are correct ones
    threshold = np.take_along_axis(np.sort(keys, axis=2), np.broadcast_to(last, (n_prompts, n_draws, 1)), axis=2)
    return keys <= threshold


def _group_forms(gram: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[3, P, draws] ⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩, a and b the sums of rollouts in two groups, [P, draws, R] bool."""
    of_first, of_second = first @ gram, second @ gram
    products = ((of_first, first), (of_first, second), (of_second, second))
    return np.stack([np.einsum("pdr,pdr->pd", left, right) for left, right in products])


def _cosines(forms: np.ndarray) -> np.ndarray:
    """Cosines of [3, ...] `_group_forms`; NaN where one of the vectors is 0."""
    norms = np.sqrt(np.maximum(forms[0], 0.0)) * np.sqrt(np.maximum(forms[2], 0.0))
    return np.clip(forms[1] / np.where(norms > 0, norms, np.nan), -1.0, 1.0)


def _label_cosines(grams: RolloutGrams, labels: np.ndarray) -> np.ndarray:
    """[P, draws] the token-weighted cosine of every prompt, 0 without one. `labels`: [P, draws, R] bool."""
    return np.nan_to_num(_cosines(_group_forms(grams.gram, labels, grams.present[:, None] & ~labels)))


def _cancellation_ratios(grams: RolloutGrams, labels: np.ndarray) -> np.ndarray:
    """[P, draws, 2] C of every prompt, advantages ±1 and group-normalised. `labels`: [P, draws, R] bool."""
    others, gram = grams.present[:, None] & ~labels, grams.mean_gram
    same, across, other = _group_forms(gram, labels, others)
    energy = np.einsum("prr->pr", gram)[:, :, None]
    energy_of_labels, energy_of_others = ((group @ energy)[:, :, 0] for group in (labels, others))
    share = (grams.correct.sum(axis=1) / grams.present.sum(axis=1))[:, None]
    ratios = []
    for gain, loss in ((0.5, 0.5), (1 - share, share)):  # advantages, up to scale: +gain and -loss
        left = gain**2 * same - 2 * gain * loss * across + loss**2 * other
        ratios.append(left / (gain**2 * energy_of_labels + loss**2 * energy_of_others))
    return np.stack(ratios, axis=2)


def _signal(values: np.ndarray) -> Signal:
    """`values`: [P] S of every prompt."""
    if len(values) < 2:
        return Signal(float(values.mean()), None, None, False)
    stack = stack_of_means(values)
    return Signal(float(stack[0]), interval_of(stack), z_of(stack), above_zero(stack))


def _bootstrap_error(products: np.ndarray, rng: np.random.Generator, n_bootstrap: int) -> float:
    """Standard error of rho over prompts drawn with replacement. `products`: [P, 3]."""
    n = len(products)
    draws = [
        rng.multinomial(n, np.full(n, 1 / n), min(DRAWS_AT_ONCE, n_bootstrap - start)) @ products
        for start in range(0, n_bootstrap, DRAWS_AT_ONCE)
    ]
    product, correct, incorrect = np.concatenate(draws).T
    has_rho = (correct > 0) & (incorrect > 0)
    rho = product[has_rho] / (np.sqrt(correct[has_rho]) * np.sqrt(incorrect[has_rho]))
    low, high = np.quantile(rho, ndtr([-1.0, 1.0]))
    return float(high - low) / 2


def two_sided_p(observed: float, null: np.ndarray) -> float | None:
    """Twice the smaller tail of [draws] `null`, with the +1 correction; None without draws."""
    if len(null) == 0:
        return None
    slack = ROUNDING * max(1.0, abs(observed))  # the same labels, summed in another order
    tails = np.sum(null <= observed + slack), np.sum(null >= observed - slack)
    return float(min(1.0, 2 * (1 + min(tails)) / (1 + len(null))))


def _judged(n_prompts: int, rho: Estimate, signals: Mapping[str, Signal], is_unsampled: bool) -> tuple[str, str | None]:
    """The verdict on rho; and where that tells nothing, what is missing, and how many prompts would have it."""
    if is_unsampled:
        return UNSAMPLED, UNSAMPLED_REASON
    usable = f"{counted(n_prompts, 'prompt')} with {MIN_ROLLOUTS_OF_EACH_KIND} rollouts of each kind"
    if n_prompts < 2:
        return UNDERPOWERED, usable
    if rho.value is None or rho.ci95 is None:
        unseen = {kind: signal.z for kind, signal in signals.items() if not signal.above_zero}
        named = [kind if z is None else f"{kind} (z {number(z, 1)})" for kind, z in unseen.items()]
        weaker = min((-np.inf if z is None else z for z in unseen.values()), default=None)
        why = f"signal of {' and '.join(named)} rollouts not above 0"
        return UNDERPOWERED, f"{why}; {usable}; {prompts_to_tell(n_prompts, weaker)}"
    low, high = rho.ci95
    if low > 0 or high < 0:
        return ALIGNED if low > 0 else OPPOSED, None
    if low > -ORTHOGONAL_WITHIN and high < ORTHOGONAL_WITHIN:
        return ORTHOGONAL, None
    away = max(abs(rho.value), ORTHOGONAL_WITHIN - abs(rho.value))  # from 0, or else from the limits of orthogonal
    z = away * 2 * quantile_of(np.empty(1 + n_prompts)) / (high - low)
    why = f"the interval of rho reaches beyond ±{ORTHOGONAL_WITHIN} and holds 0"
    return UNDERPOWERED, f"{why}; {usable}; {prompts_to_tell(n_prompts, z)}"
