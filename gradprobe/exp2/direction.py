"""Exp 2's mathematics: do correct and incorrect rollouts of a prompt push the weights the same way?

+1 means that they would cancel under GRPO's advantages of ±1, 0 that they are orthogonal. All of it runs in
float64; gradients may be a memory map, of which one prompt is read at a time. Where there is no number (nothing to
average, a mean that is the zero vector), functions return None.

The original's cosine shrinks towards 0 with noise, whatever the truth is. What answers the question is `alignment`,
with the noise removed, an interval and a verdict; `cancellation` looks at the update itself. `measure` gives all of it.
The unit of chance is the rollout: tokens of one rollout are not independent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, stdtrit

from ..analysis.bucket import Bucket, to_device
from ..dump.mapped import read_rows
from ..dump.on_policy import MIN_RARE_TOKENS

MIN_TOKENS_OF_EACH_KIND = 2
MIN_TOKENS_TO_SPLIT = 4
MIN_ROLLOUTS_OF_EACH_KIND = 2
ALIGNED, OPPOSED, ORTHOGONAL, UNDERPOWERED = "aligned", "opposed", "orthogonal", "underpowered"
UNSAMPLED = "unsampled"
ORTHOGONAL_WITHIN = 0.25
POWER_FACTOR = 2.8
"""Standard errors that a two-sided test at 5% finds with 80% power: 1.96 + 0.84."""
DRAWS_AT_ONCE = 500
LABEL_BYTES = 64 << 20
ROUNDING = 1e-10


@dataclass(frozen=True)
class PromptDirection:
    """One usable prompt: at least 2 tokens of correct rollouts and 2 of incorrect ones.

    Attributes:
        prompt: the prompt's number.
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
        per_prompt: the usable ones, by ascending number.
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


@dataclass(frozen=True)
class RolloutGrams:
    """What Exp 2 needs of the gradients beyond the token split: P small Gram matrices, read in one pass.

    Prompts without a token are left out; a prompt with fewer rollouts than
    the longest is padded with rollouts of 0 tokens, whose Gram entries are 0.

    Attributes:
        prompts: [P] numbers of the prompts that have tokens, ascending.
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
        return self.only((fewest >= minimum) & (np.trace(self.gram, axis1=1, axis2=2) > 0))

    def only(self, keep: np.ndarray) -> "RolloutGrams":
        """Some of the prompts. `keep`: [P] bool, or their places."""
        return RolloutGrams(self.prompts[keep], self.gram[keep], self.n_tokens[keep], self.correct[keep])


@dataclass(frozen=True)
class Signal:
    """Is there a direction that the rollouts of one kind share?

    Attributes:
        total: Σ_p S_p, S_p the mean dot product of the mean gradients of two different rollouts. Its expectation is
            the squared length of what the rollouts share: noise adds nothing. Units of a squared gradient.
        ci95: Student's t interval over prompts; None with fewer than 2 prompts.
        above_zero: whether ci95 lies above 0.
    """

    total: float
    ci95: tuple[float, float] | None
    above_zero: bool

    def z(self, n_prompts: int) -> float | None:
        """`total` in standard errors over that many prompts; None without an interval, or of one without width."""
        margin = 0.0 if self.ci95 is None else self.ci95[1] - self.total
        return self.total / margin * float(stdtrit(n_prompts - 1, 0.975)) if margin > 0 else None


@dataclass(frozen=True)
class Alignment:
    """Do correct and incorrect rollouts share a direction, noise removed? See `alignment`.

    Attributes:
        n_prompts: usable prompts, with at least 2 rollouts of each kind; all numbers are about these.
        rho: noise-corrected cosine. Sampling error can carry it beyond ±1; it is not clipped, nor is ci95. None
            where Σ S is not positive.
        ci95: 95% interval of rho; None where one of the signals is not above 0 (no finite interval exists then).
        p_value: of the null that a prompt's rollouts are exchangeable, correct or not. This is not the null rho = 0:
            rollouts that all share one direction (rho = 1) obey it. None without usable prompts.
        min_detectable: the |rho| found with 80% power at the 5% level; None where ci95 is.
        signal_correct, signal_incorrect: see `Signal`; None without usable prompts.
        verdict: "aligned", "opposed", "orthogonal" or "underpowered"; "unsampled" see `judged_by_tails`.
    """

    n_prompts: int
    rho: float | None
    ci95: tuple[float, float] | None
    p_value: float | None
    min_detectable: float | None
    signal_correct: Signal | None
    signal_incorrect: Signal | None
    verdict: str


@dataclass(frozen=True)
class Cancellation:
    """Do the advantage-weighted gradients of a prompt's rollouts cancel? See `cancellation`; None without prompts.

    Attributes:
        n_prompts: prompts with at least 1 rollout of each kind.
        ratio: the mean over prompts of C. 1 is the value of mutually orthogonal rollouts, below 1 they cancel. Against
            the null: below it, correctness makes them cancel more than the same advantages dealt out at random.
        null_mean, null_ci95: mean and central 95% of the ratio with advantages permuted within each prompt.
        p_value: two-sided, of that null.
    """

    n_prompts: int
    ratio: float | None
    null_mean: float | None
    null_ci95: tuple[float, float] | None
    p_value: float | None


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


def compare_groups(bucket: Bucket, correct: np.ndarray, n_prompts: int, seed: int = 0) -> Directions:
    """Cosine of the mean gradients of correct and incorrect tokens per prompt, with the half-split control.

    Means weigh every token alike, whatever rollout it is of. The control is the noise floor: a random split of the
    tokens of one prompt and one kind, at least 4 of them, in two halves, and the cosine of the halves' means. It is
    taken on every prompt, also where only one kind occurs.

    Args:
        bucket: the tokens looked at.
        correct: [n] bool, whether each one's rollout was correct.
        n_prompts: prompts in the dump.
        seed: of the control's splits.
    """
    rng = np.random.default_rng(seed)
    per_prompt: list[PromptDirection] = []
    control: list[float | None] = []
    for code, members in _places_by_prompt(bucket.prompt):
        gradients = read_rows(bucket.grads, bucket.rows[members])
        kinds = (gradients[correct[members]], gradients[~correct[members]])
        if min(len(kind) for kind in kinds) >= MIN_TOKENS_OF_EACH_KIND:
            across = cosine(kinds[0].mean(axis=0), kinds[1].mean(axis=0))
            per_prompt.append(PromptDirection(code, len(kinds[0]), len(kinds[1]), across))
        control.extend(half_split_cosine(kind, rng) for kind in kinds if len(kind) >= MIN_TOKENS_TO_SPLIT)
    return Directions(n_prompts, tuple(per_prompt), tuple(control))


def _places_by_prompt(prompt: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each prompt's number, ascending, with the places in `prompt`, [n], at which it stands."""
    order = np.argsort(prompt, kind="stable")
    codes, starts = np.unique(prompt[order], return_index=True)
    return zip(codes.tolist(), np.split(order, starts[1:]), strict=False)  # split gives a part where there is none


def half_split_cosine(gradients: np.ndarray, rng: np.random.Generator) -> float | None:
    """Cosine between the means of two random halves of [n, d] gradients; of an odd n, the second has one more."""
    order = rng.permutation(len(gradients))
    half = len(gradients) // 2
    return cosine(gradients[order[:half]].mean(axis=0), gradients[order[half:]].mean(axis=0))


def rollout_grams(bucket: Bucket, correct: np.ndarray) -> RolloutGrams:
    """Read the gradients once, a prompt at a time, and keep the Gram matrices of its rollouts' token sums.

    Args:
        bucket: the tokens looked at. A prompt's rollouts stand in ascending order of their numbers.
        correct: [n] bool, whether each one's rollout was correct.

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
        grams.gram[index, here, here] = (sums @ sums.T).cpu().numpy()  # sums: [rollouts, d]
        grams.n_tokens[index, here] = n_tokens
        grams.correct[index, here] = n_correct > 0
    return grams


def half_split_cosines_by_rollout(grams: RolloutGrams, rng: np.random.Generator) -> tuple[float | None, ...]:
    """The control with rollouts kept whole: the tokens of a rollout share a direction that is not the prompt's.

    One random split per prompt and kind with at least 2 rollouts, and the cosine of the halves' mean gradients, every
    token weighed alike, as in the original's split of tokens; of an odd number, the second half has one more.

    Returns:
        By prompt, correct before incorrect; None where a half's mean is the zero vector.
    """
    kinds = np.stack([grams.correct, grams.incorrect], axis=1)  # [P, 2, R]
    sizes = kinds.sum(axis=2)
    order = np.where(kinds, rng.random(kinds.shape), 2.0).argsort(axis=2).argsort(axis=2)  # others come last
    first = order < (sizes // 2)[:, :, None]
    cosines, defined = _cosines(_group_forms(grams.gram, first, kinds & ~first))
    split = sizes >= MIN_ROLLOUTS_OF_EACH_KIND
    return tuple(
        float(value) if known_value else None for value, known_value in zip(cosines[split], defined[split], strict=True)
    )


def alignment(
    grams: RolloutGrams, rng: np.random.Generator, *, n_bootstrap: int = 4000, n_permutations: int = 9999
) -> Alignment:
    """The cosine between what correct and what incorrect rollouts share, with the attenuation by noise removed.

    With m_c, m_i a prompt's means over rollout means, and S_c, S_i the mean dot products over pairs of different
    rollouts of a kind, over prompts with at least 2 rollouts of each kind:

        rho = Σ_p ⟨m_c, m_i⟩ / sqrt(Σ_p S_c · Σ_p S_i)

    (Spearman's 1904 correction for attenuation). No product holds a rollout's noise twice, so each sum is unbiased.

    The interval is Fieller's (1954) for the ratio, over prompts, with Student's t quantile and the denominator
    linearised in its two sums. Where a few prompts outweigh the rest, or where there are few, it covered 93 to 98% in
    trials in which percentile, BCa and studentised bootstrap and the delta method fell to between 80 and 90%; elsewhere
    all were alike (its coverage: docs/calibration.md). It is finite whenever both signals are above 0 at the 95%
    level; elsewhere no finite interval exists and none is given. Neither rho nor the interval is clipped to ±1, as is
    usual for corrected correlations: an interval cut at 1 would look narrower than it is.

    `min_detectable` is 2.8 bootstrap standard errors, the error taken as half the width of the central 68.3% of rho
    over prompts drawn with replacement, so that a few draws with a denominator near 0 don't decide it.

    The p-value permutes correctness over the rollouts of a prompt; statistic: the mean over prompts of the
    token-weighted cosine, 0 where a mean is the zero vector. It is twice the smaller tail, with the +1 correction
    (Phipson & Smyth 2010).
    """
    grams = grams.with_rollouts_of_each_kind(MIN_ROLLOUTS_OF_EACH_KIND)
    n_prompts = len(grams.prompts)
    if n_prompts == 0:
        return Alignment(0, None, None, None, None, None, None, UNDERPOWERED)
    bootstrap_rng, permutation_rng = rng.spawn(2)
    products = prompt_products(grams)
    signals = [_signal(products[:, column]) for column in (1, 2)]
    rho = _rho(products.sum(axis=0))
    interval = min_detectable = None
    if all(signal.above_zero for signal in signals):
        interval = _fieller_interval(products)
        min_detectable = POWER_FACTOR * _bootstrap_error(products, bootstrap_rng, n_bootstrap)
    null = permutation_null(grams, permutation_rng, n_permutations, _label_cosines)
    observed = _label_cosines(grams, grams.correct[:, None]).mean()
    return Alignment(
        n_prompts=n_prompts,
        rho=None if np.isnan(rho) else float(rho),
        ci95=interval,
        p_value=_two_sided_p(observed, null),
        min_detectable=min_detectable,
        signal_correct=signals[0],
        signal_incorrect=signals[1],
        verdict=_verdict(interval),
    )


def cancellation(
    grams: RolloutGrams, rng: np.random.Generator, *, n_permutations: int = 9999, group_normalised: bool = False
) -> Cancellation:
    """How much of the update a prompt's rollouts leave, once each is weighed by its advantage.

        C = ‖Σ_r A_r g_r‖² / Σ_r ‖A_r g_r‖²

    g_r is a rollout's mean gradient over its tokens in the bucket (GRPO divides a rollout's loss by its length). A_r is
    ±1, or (reward - mean) / std over the prompt's rollouts in the bucket (GRPO, Shao et al. 2024); scale cancels, so
    neither the kind of std nor its epsilon matters, and for ±1 the denominator is Σ ‖g_r‖².

    The ratio reported is the mean of C over the prompts with a rollout of each kind (elsewhere GRPO has no advantage,
    and there is nothing to permute). Means of ratios, not a ratio of sums: a prompt whose gradients are huge would
    decide the latter alone. The null permutes the advantages within each prompt; p is two-sided, with +1 correction.
    """
    grams = grams.with_rollouts_of_each_kind(1)
    if len(grams.prompts) == 0:
        return Cancellation(0, None, None, None, None)

    def statistic(some: RolloutGrams, labels: np.ndarray) -> np.ndarray:
        return _cancellation_ratios(some, labels, group_normalised)

    ratio = float(statistic(grams, grams.correct[:, None]).mean())
    null = permutation_null(grams, rng, n_permutations, statistic)
    if len(null) == 0:
        return Cancellation(len(grams.prompts), ratio, None, None, None)
    low, high = np.quantile(null, [0.025, 0.975])
    return Cancellation(
        len(grams.prompts), ratio, float(null.mean()), (float(low), float(high)), _two_sided_p(ratio, null)
    )


def prompt_products(grams: RolloutGrams) -> np.ndarray:
    """[P, 3] ⟨m_c, m_i⟩, S_c and S_i of every prompt, all of which need 2 rollouts of each kind. See `alignment`."""
    gram = grams.mean_gram
    indices = np.arange(gram.shape[1])
    gram[:, indices, indices] = 0.0  # a rollout with itself: signal and noise
    forms = _group_forms(gram, grams.correct[:, None], grams.incorrect[:, None])[:, :, 0]  # [3, P]
    n_correct, n_incorrect = grams.correct.sum(axis=1), grams.incorrect.sum(axis=1)
    pairs = (n_correct * n_incorrect, n_correct * (n_correct - 1), n_incorrect * (n_incorrect - 1))
    return np.stack([forms[1] / pairs[0], forms[0] / pairs[1], forms[2] / pairs[2]], axis=1)


LabelStatistic = Callable[[RolloutGrams, np.ndarray], np.ndarray]
"""Takes the Grams and labels, [P, draws, R] bool, and gives every prompt's value, [P, draws]."""


def permutation_null(
    grams: RolloutGrams, rng: np.random.Generator, n_permutations: int, statistic: LabelStatistic
) -> np.ndarray:
    """[n_permutations] the mean over prompts of `statistic`, correctness permuted over the rollouts of each prompt."""
    at_once = int(np.clip(LABEL_BYTES // (8 * max(1, grams.correct.size)), 1, DRAWS_AT_ONCE))
    draws = [
        statistic(grams, _permuted_labels(grams, min(at_once, n_permutations - start), rng)).mean(axis=0)
        for start in range(0, n_permutations, at_once)
    ]
    return np.concatenate([np.zeros(0), *draws])


def _permuted_labels(grams: RolloutGrams, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """[P, n_draws, R] bool, each prompt with as many correct rollouts as it has; padding stays False."""
    n_prompts, n_rollouts = grams.correct.shape
    keys = rng.random((n_prompts, n_draws, n_rollouts))
    keys += ~grams.present[:, None]  # padding last
    last = grams.correct.sum(axis=1)[:, None, None] - 1  # of the sorted keys that still are correct ones
    threshold = np.take_along_axis(np.sort(keys, axis=2), np.broadcast_to(last, (n_prompts, n_draws, 1)), axis=2)
    return keys <= threshold


def _group_forms(gram: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[3, P, draws] ⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩, a and b being the sums of the rollouts in two groups.

    Args:
        gram: [P, R, R] dot products of rollouts.
        first, second: [P, draws, R] bool.
    """
    of_first, of_second = first @ gram, second @ gram
    products = ((of_first, first), (of_first, second), (of_second, second))
    return np.stack([np.einsum("pdr,pdr->pd", left, right) for left, right in products])


def _cosines(forms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of [3, ...] `_group_forms`, 0 where one of the vectors is 0, and whether it is defined."""
    norms = np.sqrt(np.maximum(forms[0], 0.0)) * np.sqrt(np.maximum(forms[2], 0.0))
    defined = norms > 0
    return np.clip(forms[1] / np.where(defined, norms, 1.0), -1.0, 1.0) * defined, defined


def _label_cosines(grams: RolloutGrams, labels: np.ndarray) -> np.ndarray:
    """[P, draws] the token-weighted cosine of every prompt, 0 without one. `labels`: [P, draws, R] bool."""
    return _cosines(_group_forms(grams.gram, labels, grams.present[:, None] & ~labels))[0]


def _cancellation_ratios(grams: RolloutGrams, labels: np.ndarray, group_normalised: bool) -> np.ndarray:
    """[P, draws] C of every prompt. `labels`: [P, draws, R] bool."""
    others = grams.present[:, None] & ~labels
    gram = grams.mean_gram
    share = grams.correct.sum(axis=1) / grams.present.sum(axis=1) if group_normalised else np.full(len(gram), 0.5)
    gain, loss = (1 - share)[:, None], share[:, None]  # advantages, up to scale: +gain and -loss
    same, across, other = _group_forms(gram, labels, others)
    energy = np.einsum("prr->pr", gram)[:, :, None]
    own_energy = gain**2 * (labels @ energy)[:, :, 0] + loss**2 * (others @ energy)[:, :, 0]
    return (gain**2 * same - 2 * gain * loss * across + loss**2 * other) / own_energy


def _signal(products: np.ndarray) -> Signal:
    """`products`: [P] S of every prompt."""
    total, n = float(products.sum()), len(products)
    if n < 2:
        return Signal(total, None, False)
    margin = float(stdtrit(n - 1, 0.975) * products.std(ddof=1) * np.sqrt(n))
    return Signal(total, (total - margin, total + margin), total - margin > 0)


def _rho(sums: np.ndarray) -> np.ndarray:
    """[...] rho of [..., 3] sums of `prompt_products`; NaN where a signal is not positive."""
    defined = (sums[..., 1] > 0) & (sums[..., 2] > 0)
    scale = np.where(defined, np.sqrt(np.abs(sums[..., 1])) * np.sqrt(np.abs(sums[..., 2])), 1.0)
    return np.where(defined, sums[..., 0] / scale, np.nan)


def _fieller_interval(products: np.ndarray) -> tuple[float, float]:
    """All values r for which Σ_p (y_p - r x_p) is within t standard errors of 0, y_p and x_p being a prompt's shares.

    `products`: [P, 3] with sums of S_c and S_i that are above 0 at the 95% level each; then so is their mean, and the
    set is a finite interval.
    """
    _, correct, incorrect = products.sum(axis=0)
    numerator = products[:, 0] / (np.sqrt(correct) * np.sqrt(incorrect))  # sums to rho
    denominator = (products[:, 1] / correct + products[:, 2] / incorrect) / 2  # sums to 1
    n = len(products)
    (a, b), (_, c) = np.cov(numerator, denominator) * n * stdtrit(n - 1, 0.975) ** 2
    rho = numerator.sum()
    centre, half_width = rho - b, np.sqrt(max(0.0, (rho - b) ** 2 - (1 - c) * (rho**2 - a)))
    return float((centre - half_width) / (1 - c)), float((centre + half_width) / (1 - c))


def _bootstrap_error(products: np.ndarray, rng: np.random.Generator, n_bootstrap: int) -> float:
    """Standard error of rho over prompts drawn with replacement. `products`: [P, 3]."""
    n = len(products)
    sums = [
        rng.multinomial(n, np.full(n, 1 / n), min(DRAWS_AT_ONCE, n_bootstrap - start)) @ products
        for start in range(0, n_bootstrap, DRAWS_AT_ONCE)
    ]
    draws = _rho(np.concatenate(sums))
    low, high = np.nanquantile(draws, ndtr([-1.0, 1.0]))
    return float(high - low) / 2


def _two_sided_p(observed: float, null: np.ndarray) -> float | None:
    """Twice the smaller tail of [draws] `null`, with the +1 correction; None without draws."""
    if len(null) == 0:
        return None
    slack = ROUNDING * max(1.0, abs(observed))  # the same labels, summed in another order
    tails = np.sum(null <= observed + slack), np.sum(null >= observed - slack)
    return float(min(1.0, 2 * (1 + min(tails)) / (1 + len(null))))


def _verdict(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return UNDERPOWERED
    low, high = interval
    if low > 0:
        return ALIGNED
    if high < 0:
        return OPPOSED
    return ORTHOGONAL if low > -ORTHOGONAL_WITHIN and high < ORTHOGONAL_WITHIN else UNDERPOWERED


def rare_tokens(grams: RolloutGrams, tail_mass: np.ndarray | None, bucket: Bucket, correct: np.ndarray) -> float | None:
    """The rare tokens to be expected behind the less sampled of the two mean gradients that ρ compares.

    A token drawn where the likeliest word has 1 - ε is rare with chance ε, and has a gradient some 1/ε times as long as
    the others': Σ ε counts those to be expected.

    Args:
        grams: of the bucket; only prompts with 2 rollouts of each kind have a part in ρ.
        tail_mass: [n] ε of each of the bucket's gradients, a sum where several tokens are pooled; None: not known.
        bucket: whose gradients.
        correct: [n] bool.

    Returns:
        None where tail masses are not known, or no prompt has a part.
    """
    usable = grams.with_rollouts_of_each_kind(MIN_ROLLOUTS_OF_EACH_KIND).prompts
    if tail_mass is None or len(usable) == 0:
        return None
    has_part = np.isin(bucket.prompt, usable)
    return float(min(tail_mass[has_part & kind].sum() for kind in (correct, ~correct)))


def judged_by_tails(found: Alignment, n_rare: float | None) -> Alignment:
    """The same with the verdict "unsampled" where fewer than 30 rare tokens were to be expected behind a mean."""
    is_unsampled = n_rare is not None and n_rare < MIN_RARE_TOKENS
    return replace(found, verdict=UNSAMPLED) if is_unsampled else found


def reason_of(found: Alignment, n_rare: float | None) -> str | None:
    """Why a verdict tells nothing, in words; None where it does. `n_rare`: see `rare_tokens`."""
    if found.verdict == UNSAMPLED:
        return f"{n_rare:.1f} rare tokens to be expected behind a mean, {MIN_RARE_TOKENS} are needed"
    if found.verdict != UNDERPOWERED:
        return None
    counted = f"{found.n_prompts or 'no'} prompt{'s' * (found.n_prompts > 1)} with 2 rollouts of each kind"
    if found.n_prompts < 2:
        return counted
    signals = {"correct": found.signal_correct, "incorrect": found.signal_incorrect}
    unseen = [
        f"{kind}{_in_errors(signal.z(found.n_prompts))}" for kind, signal in signals.items() if not signal.above_zero
    ]
    if unseen:
        return f"signal of {' and '.join(unseen)} rollouts not above 0; {counted}"
    return f"the interval reaches beyond ±{ORTHOGONAL_WITHIN} and holds 0; {counted}"


def _in_errors(z: float | None) -> str:
    return "" if z is None else f" (z {z:.1f})"
