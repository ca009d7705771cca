"""Which tokens carry what RL's own step gains: mathematics on arrays, no dump inside.

Δ = θ_to − θ_from is what training did. With d_t = ⟨∇ log π_t, Δ⟩ of every response token, a rollout's D_b is the sum
of d_t over its tokens of bucket b, a prompt's û_b = Σ_r w_r D_{r,b} with the objective's weights, U_b the mean over
prompts and U = Σ_b U_b: the first-order gain of the objective along Δ (with `dr-grpo`, of the expected reward). All is
linear in d_t, so that each rule of which tokens count is read off the same numbers. Prompts are the unit of chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..analysis.jackknife import NO_ESTIMATE, Estimate, Interval, interval_of, ratio_of, stack_of_means, z_of
from ..dump.on_policy import MIN_RARE_TOKENS
from .by_weight import ByWeight, by_weight
from .tables import MIN_PROMPTS
from .weights import update_weights

LEAST_T = 2.0
"""Below, the step's gain is not told from 0, and no share of it is a number."""
PERMUTATIONS = 10_000
GRID = np.arange(1, 21) / 20
TOKENS_SHOWN = 12


@dataclass(frozen=True)
class Along:
    """Tokens and rollouts along a step; T tokens of m rollouts, in order, those of a rollout side by side.

    Attributes:
        d: [T] ⟨∇ log π_t, Δ⟩, nats.
        n_tokens: [m] of each rollout.
        prompt: [m] int codes.
        outcome: [m] the reward, or 1 for correct and 0 for incorrect.
        shift: [T] log π under Δ's end less that under its start, nats.
        bucket: [T] int, 0 .. n_buckets - 1.
        tail_mass: [T] 1 − max π; None where it is not known.
        rules: by name, [T] scores each: the higher, the earlier a token is kept.
        token: [T] int codes of what the tokens read.
        weights: full names of those whose parts are known, maybe none.
        by_weight: [m, weights] ⟨∇_w Σ_t log π_t, Δ_w⟩ of every rollout.
    """

    d: np.ndarray
    n_tokens: np.ndarray
    prompt: np.ndarray
    outcome: np.ndarray
    shift: np.ndarray
    bucket: np.ndarray
    n_buckets: int
    tail_mass: np.ndarray | None
    rules: Mapping[str, np.ndarray]
    token: np.ndarray
    weights: tuple[str, ...] = ()
    by_weight: np.ndarray | None = None

    @cached_property
    def rollout(self) -> np.ndarray:
        """[T] each token's rollout."""
        return np.repeat(np.arange(len(self.n_tokens)), self.n_tokens)

    def sums(self, kept: np.ndarray) -> np.ndarray:
        """[m] Σ d_t over each rollout's tokens. `kept`: [T] bool."""
        return np.bincount(self.rollout[kept], self.d[kept], len(self.n_tokens))


@dataclass(frozen=True)
class Gain:
    """U with its interval over prompts, t = U over its standard error, and p of outcomes permuted within prompts."""

    value: float | None
    ci95: Interval | None
    t: float | None
    p_value: float | None


@dataclass(frozen=True)
class Part:
    """Some of the tokens: their share of all tokens, of the gain (none where |t| < 2) and of its variance."""

    share_of_tokens: float
    share: Estimate
    noise_share: float | None


@dataclass(frozen=True)
class Noise:
    """Var over prompts of û = between + within / R: what more prompts, or more rollouts of each, would do.

    Attributes:
        between, within: both without bias; between can come out below 0.
        rollouts: R, the mean number of a prompt's rollouts.
        half_width: of the gain's 95% interval.
        prompts_for_half_width: how many prompts halve it, with R rollouts each.
        prompts_of_twice_the_rollouts: how many do with 2 R.
    """

    between: float
    within: float
    rollouts: float
    half_width: float
    prompts_for_half_width: int
    prompts_of_twice_the_rollouts: int


@dataclass(frozen=True)
class StepSignal:
    """Exp 3 along a step.

    Attributes:
        gain: of all tokens, of the objective.
        reward_gain: of the expected reward, to first order.
        linearity: correlation of d_t with the real shift, and slope of the shift over d_t.
        score_mean_z: per bucket, z over prompts of Σ_r D_{r,b}, 0 in expectation on-policy; None where fewer than 30
            rare tokens were to be expected.
        noise: None with fewer than 3 prompts, or one rollout each.
        buckets: each one's part.
        n_rare: per bucket Σ tail mass, the rare tokens to be expected; None where it is not known.
        keep_top: by rule, what the highest 5%, 10%, ..., 100% of the tokens carry.
        tokens: of the words that carry most, for or against: the code, how often it came up, its part.
        by_weight: each weight's part of the gain and of its variance; None where that is not known.
    """

    n_prompts: int
    n_rollouts: int
    objective: str
    gain: Gain
    reward_gain: Estimate
    linearity: tuple[float | None, float | None]
    score_mean_z: tuple[float | None, ...]
    n_rare: tuple[float | None, ...]
    noise: Noise | None
    buckets: tuple[Part, ...]
    keep_top: dict[str, tuple[Part, ...]]
    tokens: tuple[tuple[int, int, Part], ...]
    by_weight: ByWeight | None


def step_signal(along: Along, objective: str = "dapo", seed: int = 0) -> StepSignal:
    """All of Exp 3 along a step. `seed`: of the permutations."""
    members = [np.flatnonzero(along.prompt == code) for code in np.unique(along.prompt)]
    weights, of_reward = (_weights(along, members, name) for name in (objective, "dr-grpo"))
    everything = np.ones(len(along.d), bool)

    def updates(kept: np.ndarray, weights: np.ndarray = weights) -> np.ndarray:
        """[P] û of some tokens. `kept`: [T] bool."""
        weighted = weights * along.sums(kept)
        return np.array([weighted[of_prompt].sum() for of_prompt in members])

    whole = updates(everything)
    gain = _gain(whole, _permuted(along, members, objective, seed))
    is_told = gain.t is not None and abs(gain.t) >= LEAST_T
    sign = np.sign(gain.t) if is_told else 0.0  # Fieller's interval wants a denominator above 0

    def part(kept: np.ndarray) -> Part:
        own, estimate = updates(kept), NO_ESTIMATE
        if is_told:
            estimate = ratio_of(stack_of_means(sign * own), stack_of_means(sign * whole))
        noise = float(np.cov(own, whole, bias=True)[0, 1] / whole.var()) if whole.var() > 0 else None
        return Part(float(kept.mean()), estimate, noise)

    rewards = _gain(updates(everything, of_reward), np.zeros(0))
    by_bucket = [along.bucket == index for index in range(along.n_buckets)]
    n_rare = [None if along.tail_mass is None else float(along.tail_mass[kept].sum()) for kept in by_bucket]
    heaviest = np.argsort(-np.abs(np.bincount(along.token, weights[along.rollout] * along.d)), kind="stable")
    return StepSignal(
        n_prompts=len(members),
        n_rollouts=len(along.prompt),
        objective=objective,
        gain=gain,
        reward_gain=Estimate(rewards.value, rewards.ci95),
        linearity=_linearity(along.d, along.shift),
        score_mean_z=tuple(
            None if rare is not None and rare < MIN_RARE_TOKENS else _score_z(along.sums(kept), members)
            for kept, rare in zip(by_bucket, n_rare, strict=True)
        ),
        n_rare=tuple(n_rare),
        noise=_noise(weights * along.sums(everything), members, gain),
        buckets=tuple(map(part, by_bucket)),
        keep_top={name: tuple(part(highest(score, share)) for share in GRID) for name, score in along.rules.items()},
        tokens=tuple(
            (code, int(np.sum(along.token == code)), part(along.token == code))
            for code in heaviest[: TOKENS_SHOWN if is_told else 0].tolist()
        ),
        by_weight=_by_weight(along, weights, members, sign) if along.weights and gain.value is not None else None,
    )


def _by_weight(along: Along, weights: np.ndarray, members: list[np.ndarray], sign: float) -> ByWeight | None:
    """`sign`: of the gain, 0 where it is not told from 0."""
    updates = np.array([weights[of_prompt] @ along.by_weight[of_prompt] for of_prompt in members])  # [P, W]
    whole, means = updates.sum(axis=1, keepdims=True), stack_of_means(updates)
    noise = stack_of_means(updates * whole) - means * stack_of_means(whole)
    return by_weight(along.weights, sign * means, noise)


def _weights(along: Along, members: list[np.ndarray], objective: str) -> np.ndarray:
    """[m] of every rollout in the update of its prompt."""
    weights = np.zeros(len(along.prompt))
    for of_prompt in members:
        weights[of_prompt] = update_weights(along.outcome[of_prompt], along.n_tokens[of_prompt], objective)
    return weights


def highest(score: np.ndarray, share: float) -> np.ndarray:
    """[T] bool, the share of the tokens with the highest score; of equal scores those that come first."""
    kept = np.zeros(len(score), bool)
    kept[np.argsort(-score, kind="stable")[: round(share * len(score))]] = True
    return kept


def _gain(whole: np.ndarray, null: np.ndarray) -> Gain:
    if len(whole) < MIN_PROMPTS:
        return Gain(None, None, None, None)
    stack = stack_of_means(whole)
    tails = np.sum(null <= whole.mean()), np.sum(null >= whole.mean())
    p_value = min(1.0, 2 * (1 + int(min(tails))) / (1 + len(null)))
    return Gain(float(whole.mean()), interval_of(stack), z_of(stack), p_value)


def _permuted(along: Along, members: list[np.ndarray], objective: str, seed: int) -> np.ndarray:
    """[PERMUTATIONS] U with outcomes permuted over the rollouts of each prompt; lengths stay with their rollouts."""
    rng = np.random.default_rng(seed)
    sums, total = along.sums(np.ones(len(along.d), bool)), np.zeros(PERMUTATIONS)
    for of_prompt in members:
        # What hangs on the outcomes alone is permuted; a length divides its own rollout's sum.
        ones = np.ones(len(of_prompt), np.int64)
        advantage = update_weights(along.outcome[of_prompt], ones, objective)
        length = along.n_tokens[of_prompt] if objective == "grpo" else ones
        order = rng.random((PERMUTATIONS, len(of_prompt))).argsort(axis=1)
        total += advantage[order] @ (sums[of_prompt] / np.maximum(length, 1))
    return total / max(1, len(members))


def _linearity(d: np.ndarray, shift: np.ndarray) -> tuple[float | None, float | None]:
    if len(d) < 2 or not (d.std() > 0 and shift.std() > 0):
        return None, None
    (of_d, of_both), (_, of_shift) = np.cov(d, shift)
    return float(of_both / np.sqrt(of_d * of_shift)), float(of_both / of_d)


def _score_z(sums: np.ndarray, members: list[np.ndarray]) -> float | None:
    """`sums`: [m] of one bucket."""
    of_prompts = np.array([sums[of_prompt].sum() for of_prompt in members])
    return z_of(stack_of_means(of_prompts)) if len(of_prompts) >= MIN_PROMPTS else None


def _noise(contribution: np.ndarray, members: list[np.ndarray], gain: Gain) -> Noise | None:
    """One-way analysis of variance of the rollouts' contributions. `contribution`: [m] w_r D_r, summing to û."""
    members = [of_prompt for of_prompt in members if len(of_prompt) >= 2]
    if len(members) < MIN_PROMPTS or gain.ci95 is None:
        return None
    counts = np.array([len(of_prompt) for of_prompt in members])
    means = np.array([contribution[of_prompt].sum() for of_prompt in members])
    spreads = np.array([(len(p) * contribution[p]).var(ddof=1) for p in members])  # of what a rollout alone says
    of_means, within = means.var(ddof=1), float(spreads.mean())
    between = float(of_means - (spreads / counts).mean())
    rollouts = float(counts.mean())
    twice = max(between, 0.0) + within / (2 * rollouts)
    return Noise(
        between=between,
        within=within,
        rollouts=rollouts,
        half_width=(gain.ci95[1] - gain.ci95[0]) / 2,
        prompts_for_half_width=4 * len(members),
        prompts_of_twice_the_rollouts=int(np.ceil(4 * len(members) * twice / of_means)) if of_means > 0 else 0,
    )
