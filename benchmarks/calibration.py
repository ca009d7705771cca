#!/usr/bin/env python3
"""Planted gradients of known truth, put through the toolkit's statistics: do the numbers hold what they promise?

Exp 2: prompts whose correct and incorrect rollouts have directions of a planted cosine, in noise. How often does the
interval hold the truth, which verdicts come out, how often is p below 0.05 where labels mean nothing?
Exp 1: buckets of k directions, and isotropic directions with heavy-tailed norms.
Exp 3: pooled dumps; intervals of shares of signal across and within prompts, of cosines and shares of the tokens kept,
of noise scales; where nothing is planted, nothing is seen.

The tables behind docs/calibration.md (minutes on two cores); with a tenth of the draws, too few for the bands; and one
experiment's alone:

    python benchmarks/calibration.py
    python benchmarks/calibration.py --draws 40 --null-draws 40
    python benchmarks/calibration.py --only exp3

Draw j of row i comes from the stream `default_rng([seed, i, j])`. An entry outside its band says NO; nothing is drawn
again.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # the matrices are small; processes share the cores

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

from gradprobe.analysis.bucket import Bucket, rollout_codes  # noqa: E402
from gradprobe.analysis.jackknife import Estimate  # noqa: E402
from gradprobe.analysis.opposition import Opposition, rho_over_sums  # noqa: E402
from gradprobe.analysis.pooled import Pooled, iter_prompts  # noqa: E402
from gradprobe.exp2.direction import ALIGNED, OPPOSED, ORTHOGONAL, UNDERPOWERED  # noqa: E402
from gradprobe.exp2.measure import BucketDirections, Exp2Settings, directions_of_bucket  # noqa: E402
from gradprobe.exp3.signal import SEEN, Exp3, signal_of_pooled  # noqa: E402
from gradprobe.exp3.tables import prompt_tables  # noqa: E402
from gradprobe.exp3.weights import update_weights  # noqa: E402
from gradprobe.library import participation_ratio  # noqa: E402

VERDICTS = (ALIGNED, ORTHOGONAL, OPPOSED, UNDERPOWERED)
COVERAGE_BAND = (0.90, 0.99)
LEVEL, LEVEL_BAND = 0.05, (0.02, 0.08)
PR_TOLERANCE, UNIT_NORM_TOLERANCE = 0.10, 0.05
N_SPECTRUM_DRAWS = 10
OUTSIDE = "**NO**"
Table = list[list[str]]
"""Cells of a header and of lines."""


@dataclass(frozen=True)
class Row:
    """A row of a table: what is planted, the stream of its truth (Exp 3), and all draws of it."""

    planted: Any
    stream: list[int]
    draws: list[Any]


# ---- tables ------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """For a table; a dash where there is none."""
    if value is None or np.isnan(value):
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def percent(share: float) -> str:
    """0.055 -> 5.5%."""
    return f"{100 * share:.1f}%"


def in_band(value: float, band: tuple[float, float]) -> str:
    """A word for the table."""
    return "yes" if band[0] <= value <= band[1] else OUTSIDE


def print_table(title: str, table: Table) -> None:
    """In Markdown."""
    print(f"\n## {title}\n")
    for line in (table[0], ["---:"] * len(table[0]), *table[1:]):
        print("| " + " | ".join(line) + " |", flush=True)


# ---- Exp 2 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """One bucket of planted gradients: token gradient = h (signal · u + rollout_effect · e + noise).

    The noise of a token and the effect e of its rollout are isotropic Gaussian vectors in `dim` dimensions with
    expected squared length 1. u is a unit vector per prompt and kind; the two kinds' have cosine `rho` in every prompt.

    Attributes:
        signal: length of the shared direction over that of one token's noise: the signal-to-noise ratio.
        rho: planted cosine.
        rollout_effect: length of what the tokens of one rollout share.
        n_prompts, n_rollouts, n_tokens: size; a prompt's number of correct rollouts is Binomial(n_rollouts, q),
            q uniform on 0.2 .. 0.8.
        signal_spread: standard deviation of the log of `signal` over prompts.
        norm_spread: standard deviation of log h over tokens.
        ragged: keep 1 .. n_tokens tokens of each rollout, at random, instead of all.
    """

    signal: float
    rho: float
    rollout_effect: float = 0.0
    dim: int = 8960
    n_prompts: int = 60
    n_rollouts: int = 8
    n_tokens: int = 4
    signal_spread: float = 0.0
    norm_spread: float = 0.0
    ragged: bool = False


@dataclass(frozen=True)
class Tokens:
    """A planted bucket as arrays, one row per token: what `directions_of_bucket` takes."""

    grads: np.ndarray
    prompt: np.ndarray
    sample_idx: np.ndarray
    correct: np.ndarray


def plant(planted: Planted, rng: np.random.Generator) -> Tokens:
    """Draw a bucket whose dot products within a prompt are distributed exactly as in `planted.dim` dimensions.

    Every statistic of Exp 2 is a function of the dot products between gradients of one prompt. Isotropic Gaussian
    noise is independent along the plane of the two planted directions and across it, and m such vectors have a
    Wishart Gram matrix across it, which Bartlett's (1933) triangular factor samples exactly. So m + 2 coordinates
    are enough, and no array of `dim` columns is needed.
    """
    p, r, t = planted.n_prompts, planted.n_rollouts, planted.n_tokens
    n_vectors = r * t + r
    factor = np.tril(rng.standard_normal((p, n_vectors, n_vectors)), -1)
    diagonal = np.arange(n_vectors)
    factor[:, diagonal, diagonal] = np.sqrt(rng.chisquare(planted.dim - 2 - diagonal, (p, n_vectors)))
    in_plane = rng.standard_normal((p, n_vectors, 2))
    gaussian = np.concatenate([in_plane, factor], axis=2) / np.sqrt(planted.dim)  # [p, m, 2 + m]
    noise, effect = gaussian[:, : r * t].reshape(p, r, t, -1), gaussian[:, r * t :, None]

    n_correct = rng.binomial(r, rng.uniform(0.2, 0.8, p))
    correct = rng.random((p, r)).argsort(axis=1) < n_correct[:, None]
    strength = planted.signal * np.exp(planted.signal_spread * rng.standard_normal(p))[:, None]
    shared = np.zeros((p, r, 1, 2 + n_vectors))
    shared[:, :, 0, 0] = strength * np.where(correct, 1.0, planted.rho)
    shared[:, :, 0, 1] = strength * np.where(correct, 0.0, np.sqrt(1 - planted.rho**2))
    norms = np.exp(planted.norm_spread * rng.standard_normal((p, r, t, 1)))
    grads = norms * (shared + planted.rollout_effect * effect + noise)
    kept = np.ones((p, r, t), dtype=bool)
    if planted.ragged:
        kept = np.arange(t) < rng.integers(1, t + 1, (p, r))[:, :, None]
    prompt, sample_idx, _ = np.nonzero(kept)
    return Tokens(grads[kept], prompt, sample_idx, correct[prompt, sample_idx])


def draw_row(task: tuple[int, int, Planted, int, int, int]) -> BucketDirections:
    """One draw of one row, from a stream of its own: the result doesn't hang on the number of processes."""
    row, draw, planted, seed, n_bootstrap, n_permutations = task
    tokens = plant(planted, np.random.default_rng([seed, row, draw]))
    rollout = rollout_codes(tokens.prompt, tokens.sample_idx)
    bucket = Bucket(tokens.grads, np.arange(len(tokens.grads)), tokens.prompt, rollout)
    settings = Exp2Settings(n_bootstrap, n_permutations, seed=draw)
    return directions_of_bucket(bucket, tokens.correct, settings)


def coverage_sections() -> dict[str, list[Planted]]:
    """Title -> rows in which there is a rho to be found."""
    rhos, signals = (1.0, 0.5, 0.0, -1.0), (0.05, 0.1, 0.2, 0.4)
    grid = [Planted(s, rho, effect) for s in signals for effect in (0.0, 0.3) for rho in rhos]
    base = [Planted(s, rho, 0.3) for s in signals for rho in rhos]
    hard = [planted for planted in base if planted.signal in (0.05, 0.2)]
    return {
        "60 prompts × 8 rollouts × 4 tokens in 8,960 dimensions": grid,
        "Harder: noise in 256 dimensions only": [replace(planted, dim=256) for planted in base],
        "Harder: a few prompts and tokens outweigh the rest (log-normal signals and norms, log-sd 0.7 each)": [
            replace(planted, signal_spread=0.7, norm_spread=0.7) for planted in hard
        ],
        "Harder: 12 prompts": [replace(planted, n_prompts=12) for planted in hard],
    }


def null_rows() -> list[Planted]:
    """Rows in which a prompt's rollouts are exchangeable: correctness means nothing."""
    return [
        Planted(0.0, 0.0),
        Planted(0.0, 0.0, 0.3),
        Planted(0.0, 0.0, 0.3, dim=256),
        Planted(0.05, 1.0),
        Planted(0.05, 1.0, 0.3),
        Planted(0.2, 1.0, 0.3, ragged=True),
        Planted(0.2, 1.0, 0.3, signal_spread=0.7, norm_spread=0.7),
    ]


def share_of(row: Row, verdict: str) -> float:
    """Of all draws."""
    return float(np.mean([draw.alignment.verdict == verdict for draw in row.draws]))


def verdicts_of(row: Row) -> list[str]:
    """The share of each, of all draws."""
    return [percent(share_of(row, verdict)) for verdict in VERDICTS]


def coverage_table(rows: list[Row]) -> Table:
    """Header and lines of one Exp 2 section."""
    header = ["signal / noise", "rollout effect", "planted ρ", "ρ: mean ± sd", "interval given", "holds ρ, of those"]
    header += ["in 90–99%", "misses ρ, of all", "detectable, median", *VERDICTS]
    table = [header]
    for row in rows:
        alignments = [draw.alignment for draw in row.draws]
        estimates = [a.rho for a in alignments if a.ci95 is not None]
        detectable = [a.min_detectable for a in alignments if a.min_detectable is not None]
        intervals = [a.ci95 for a in alignments if a.ci95 is not None]
        holds = np.array([low <= row.planted.rho <= high for low, high in intervals], dtype=bool)
        spread = f"{number(np.mean(estimates), 3, signed=True)} ± {number(np.std(estimates), 3)}" if estimates else "–"
        covered = [percent(holds.mean()), in_band(holds.mean(), COVERAGE_BAND)] if len(holds) else ["–", "–"]
        planted = row.planted
        cells = [number(planted.signal), number(planted.rollout_effect, 1), number(planted.rho, 1, signed=True), spread]
        cells += [percent(len(holds) / len(row.draws)), *covered, percent(np.sum(~holds) / len(row.draws))]
        cells += [number(float(np.median(detectable)) if detectable else None, 3)]
        table.append([*cells, *verdicts_of(row)])
    return table


def null_table(rows: list[Row]) -> Table:
    """Header and lines of the section in which labels mean nothing."""
    tests = ["labels", "cancellation, ±1", "cancellation, group-normalised"]
    header = ["signal / noise", "rollout effect", "dimensions", "norms and sizes", *(f"p < 0.05: {t}" for t in tests)]
    header += ["all in 2–8%", "no signal: orthogonal never", *VERDICTS]
    table = [header]
    for row in rows:
        planted = row.planted
        tested = ("alignment", "cancellation", "cancellation_group_normalised")
        levels = [float(np.mean([getattr(draw, test).p_value < LEVEL for draw in row.draws])) for test in tested]
        kind = "heavy-tailed" if planted.norm_spread else "1 to 4 tokens per rollout" if planted.ragged else "equal"
        never = "–" if planted.signal else in_band(share_of(row, ORTHOGONAL), (0.0, 0.0))
        table.append(
            [number(planted.signal), number(planted.rollout_effect, 1), f"{planted.dim:,}", kind]
            + [percent(level) for level in levels]
            + ["yes" if all(in_band(level, LEVEL_BAND) == "yes" for level in levels) else OUTSIDE, never]
            + [*verdicts_of(row)]
        )
    return table


# ---- Exp 1 -------------------------------------------------------------------------------------------------------


def unit_norm(rows: np.ndarray) -> np.ndarray:
    """[n, d] rows at norm 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ratio_of(rows: np.ndarray) -> float:
    """The toolkit's participation ratio of [n, d] rows."""
    return participation_ratio(rows.astype(np.float32))


def rank_table(rng: np.random.Generator) -> Table:
    """Header and lines: buckets of k equally strong orthonormal directions with Gaussian coefficients.

    Of n rows, the coefficients' own scatter lowers PR from k to about k n / (n + k + 1): the ratio of the
    expectations of (tr G)² and ‖G‖_F² of an n × k Gaussian matrix.
    """
    header = ["k", "rows n", "dimensions", "PR: mean", "range", "expected at this n", f"within {PR_TOLERANCE:.0%} of k"]
    table = [header]
    for k, n, dim in ((1, 200, 512), (2, 500, 512), (5, 500, 8960), (10, 1000, 512), (20, 1000, 1024), (50, 1000, 512)):
        found = []
        for _ in range(N_SPECTRUM_DRAWS):
            directions = np.linalg.qr(rng.standard_normal((dim, k)))[0]
            found.append(ratio_of(rng.standard_normal((n, k)) @ directions.T))
        near = in_band(float(np.mean(found)), ((1 - PR_TOLERANCE) * k, (1 + PR_TOLERANCE) * k))
        spread = f"{number(min(found))} – {number(max(found))}"
        sizes = [f"{size:,}" for size in (k, n, dim)]
        table.append([*sizes, number(np.mean(found)), spread, number(k * n / (n + k + 1)), near])
    return table


def norm_table(rng: np.random.Generator) -> Table:
    """Header and lines: isotropic directions, their norms drawn from ever heavier tails, fresh rows in every draw."""
    n, dim, reference = 1000, 512, None
    laws = {f"log-normal, log-sd {s:g}": lambda s=s: np.exp(s * rng.standard_normal(n)) for s in (0.5, 1, 2)}
    laws = {"all equal": lambda: np.ones(n)} | laws
    laws["Student's t, 2 degrees of freedom"] = lambda: np.abs(rng.standard_t(2, n))
    header = ["norms", "ESS: mean", "PR: mean", "PR, of that at equal norms", "unit-norm PR: mean"]
    table = [[*header, "of that at equal norms", f"within {UNIT_NORM_TOLERANCE:.0%}"]]
    for name, law in laws.items():
        drawn = [unit_norm(rng.standard_normal((n, dim))) * law()[:, None] for _ in range(N_SPECTRUM_DRAWS)]
        raw = float(np.mean([ratio_of(rows) for rows in drawn]))
        unit = float(np.mean([ratio_of(unit_norm(rows)) for rows in drawn]))
        energies = [np.sum(rows**2, axis=1) for rows in drawn]
        size = float(np.mean([e.sum() ** 2 / np.sum(e**2) for e in energies]))
        reference = unit if reference is None else reference  # the first law's rows are of equal norm
        near = in_band(unit / reference, (1 - UNIT_NORM_TOLERANCE, 1 + UNIT_NORM_TOLERANCE))
        cells = [number(size, 1), number(raw, 1), percent(raw / reference), number(unit, 1), percent(unit / reference)]
        table.append([name, *cells, near])
    return table


# ---- Exp 3 -------------------------------------------------------------------------------------------------------


STREAM = 3000
SHARES = np.array([0.0, 0.0, 0.0, 0.66, 0.34])
SIDEWAYS = np.array([0.0, 0.1, -0.1, 0.3, -0.3])
"""Of each bucket's signal, in units of all buckets' together and across its direction; these cancel."""
NOISE = np.array([0.02, 0.05, 0.13, 0.38, 0.42])
N_BUCKETS = len(SHARES)
N_GROUPS = 40_000
NULL_BAND = (0.95, 1.0)
LEAST_GIVEN = 0.1
ROUNDING = 1e-9


@dataclass(frozen=True)
class PlantedPooled:
    """A pooled dump: G_rb = mean_b + (c_r - p) s (v_b + own_b) + h noise_rb, in `dim` dimensions, five buckets.

    v_b has planted shares of v = Σ_b v_b and a part across it; own_b is the prompt's own direction. Noise is isotropic
    and Gaussian; its expected squared length over all buckets is 1.

    Attributes:
        signal: ‖v‖: how far correct and incorrect rollouts' expected sums lie apart, over a rollout's noise.
        own: length of Σ_b own_b, over ‖v‖.
        mean: length of the score's mean, which is 0 on-policy.
        chances: of success, p uniform between these over prompts.
        strength_spread: log-sd of s over prompts (E s = 1).
        norm_spread: log-sd of h over rows (E h² = 1).
        n_rollouts: in each prompt.
        ragged: 4 .. n_rollouts rollouts in a prompt instead, at random.
    """

    signal: float
    objective: str = "dapo"
    own: float = 1.0
    mean: float = 0.0
    chances: tuple[float, float] = (0.05, 0.95)
    strength_spread: float = 0.0
    norm_spread: float = 0.0
    dim: int = 64
    n_prompts: int = 256
    n_rollouts: int = 16
    ragged: bool = False


@dataclass(frozen=True)
class Truth:
    """What a planted dump's numbers estimate; moments of the update are [B, B]."""

    signal: np.ndarray
    noise: np.ndarray
    within: np.ndarray

    def kept(self, chance: np.ndarray) -> tuple[float, float, float]:
        """Cosine with the full update, signal share and noise scale ratio of the buckets kept."""
        full, own = self.signal.sum(), chance @ self.signal @ chance
        product, noise = (chance @ self.signal).sum(), chance @ self.noise @ chance
        return product / np.sqrt(own * full), product / full, noise / own / (self.noise.sum() / full)


@dataclass(frozen=True)
class PooledDraw:
    """One draw's results; `within` and `leave_one_out` are two estimates of the mean ‖Cov(c, G)‖² over prompts.

    A draw whose score has a mean holds these two, any other `exp3` and, where there is a signal, `opposition`.
    """

    exp3: Exp3 | None = None
    opposition: Opposition | None = None
    within: float | None = None
    leave_one_out: float | None = None


def group_sizes(planted: PlantedPooled, n: int, rng: np.random.Generator) -> np.ndarray:
    """[n] rollouts of each prompt."""
    return rng.integers(4, planted.n_rollouts + 1, n) if planted.ragged else np.full(n, planted.n_rollouts)


def plant_pooled(planted: PlantedPooled, rng: np.random.Generator) -> Pooled:
    """Draw a dump; a rollout has a row in every bucket."""
    p, r, b, d = planted.n_prompts, planted.n_rollouts, N_BUCKETS, planted.dim
    chance = rng.uniform(*planted.chances, p)[:, None]
    outcome = (rng.random((p, r)) < chance).astype(float)
    effect = np.zeros((p, 1, b, d))
    effect[..., 0], effect[..., 1] = planted.signal * SHARES, planted.signal * SIDEWAYS
    effect += planted.own * planted.signal * rng.standard_normal((p, 1, b, d)) / np.sqrt(b * d)
    effect *= log_normal(planted.strength_spread, (p, 1, 1, 1), 1, rng)
    sums = np.sqrt(NOISE / d)[:, None] * rng.standard_normal((p, r, b, d))
    sums *= log_normal(planted.norm_spread, (p, r, b, 1), 2, rng)
    sums += (outcome - chance)[:, :, None, None] * effect
    sums += planted.mean * rng.standard_normal((p, 1, b, d)) / np.sqrt(b * d)
    prompt, sample = np.nonzero(np.arange(r) < group_sizes(planted, p, rng)[:, None])
    return Pooled(
        grads=sums[prompt, sample].reshape(-1, d).astype(np.float32),
        prompt=np.repeat(prompt, b),
        sample=np.repeat(sample, b),
        bucket=np.tile(np.arange(b), len(prompt)),
        n_tokens=np.full(b * len(prompt), 10),
        rare=None,
        rollout_prompt=prompt,
        rollout_sample=sample,
        outcome=outcome[prompt, sample],
        correct=outcome[prompt, sample] > 0,
        n_response_tokens=response_lengths(len(prompt), rng),
        n_buckets=b,
    )


def response_lengths(n: int, rng: np.random.Generator) -> np.ndarray:
    """[n] tokens, log-normal with log-sd 0.5 around 100."""
    return np.maximum(1, np.round(100 * np.exp(0.5 * rng.standard_normal(n)))).astype(int)


def log_normal(spread: float, shape: tuple[int, ...], moment: int, rng: np.random.Generator) -> np.ndarray:
    """Factors of log-sd `spread` whose first or second moment is 1."""
    return np.exp(spread * rng.standard_normal(shape) - moment * spread**2 / 2)


def truth_of(planted: PlantedPooled, rng: np.random.Generator) -> Truth:
    """In closed form but for the moments of weights, which are averages over 40,000 groups.

    With a = Σ_r w_r (c_r - p): U_b = E[a] E[s] v_b, E⟨û_b, û_b'⟩ = E[a²] E[s²] E⟨v_b + own_b, v_b' + own_b'⟩ and, in
    one bucket, E[Σ w²] E[h²] noise_b more. Weights that don't add up to 0 are planted with a mean of 0 only.
    """
    moments = np.zeros(3)
    for size, chance in zip(group_sizes(planted, N_GROUPS, rng), rng.uniform(*planted.chances, N_GROUPS), strict=True):
        outcome = (rng.random(size) < chance).astype(float)
        weights = update_weights(outcome, response_lengths(size, rng), planted.objective)
        pull = weights @ (outcome - chance)
        moments += np.array([pull, pull**2, weights @ weights]) / N_GROUPS
    shared = planted.signal**2 * (np.outer(SHARES, SHARES) + np.outer(SIDEWAYS, SIDEWAYS))
    effect = shared + np.eye(N_BUCKETS) * (planted.own * planted.signal) ** 2 / N_BUCKETS
    signal = moments[0] ** 2 * shared
    own = moments[1] * np.exp(planted.strength_spread**2) * effect + moments[2] * np.diag(NOISE)
    p = np.linspace(*planted.chances, 10_001)
    within = np.mean((p * (1 - p)) ** 2) * np.exp(planted.strength_spread**2) * effect.sum(axis=1)
    return Truth(signal, own - signal, within)


def leave_one_out_products(pooled: Pooled) -> float:
    """Mean ⟨A_r G_r, A_s G_s⟩ over r ≠ s, A_r against the other rollouts: unbiased only if the score's mean is 0."""
    found = []
    for rollouts in iter_prompts(pooled):
        n = len(rollouts.outcome)
        advantage = (rollouts.outcome - rollouts.outcome.mean()) * n / (n - 1)
        vectors = advantage[:, None] * rollouts.sums.sum(axis=1)
        total = vectors.sum(axis=0)
        found.append((total @ total - np.sum(vectors**2)) / (n * (n - 1)))
    return float(np.mean(found))


def draw_pooled(task: tuple[int, int, PlantedPooled, int]) -> PooledDraw:
    """One draw of one row, from a stream of its own: the result doesn't hang on the number of processes."""
    row, draw, planted, seed = task
    pooled = plant_pooled(planted, np.random.default_rng([seed, row, draw]))
    if planted.mean:
        within = float(prompt_tables(pooled, planted.objective).within.sum(axis=1).mean())
        return PooledDraw(within=within, leave_one_out=leave_one_out_products(pooled))
    opposition = rho_over_sums(pooled) if planted.signal else None
    return PooledDraw(signal_of_pooled(pooled, planted.objective), opposition)


def pooled_rows() -> list[PlantedPooled]:
    """Rows in which there is a signal."""
    return [
        *(PlantedPooled(signal) for signal in (0.05, 0.08, 0.2)),
        *(PlantedPooled(0.08, objective) for objective in ("grpo", "dr-grpo", "reinforce")),
        PlantedPooled(0.08, "dr-grpo", own=0.0),
        PlantedPooled(0.08, chances=(0.0, 0.3)),
        PlantedPooled(0.08, ragged=True),
        PlantedPooled(0.08, dim=16),
        *(PlantedPooled(0.08, strength_spread=0.7, norm_spread=spread) for spread in (0.7, 1.2)),
        PlantedPooled(0.2, n_prompts=24),
    ]


def pooled_null_rows() -> list[PlantedPooled]:
    """Rows in which outcomes mean nothing."""
    return [
        *(PlantedPooled(0.0, dim=dim) for dim in (64, 4)),
        PlantedPooled(0.0, norm_spread=1.2, dim=4),
        PlantedPooled(0.0, n_prompts=24),
        PlantedPooled(0.0, n_prompts=24, norm_spread=1.2, dim=4),
    ]


def name_of(planted: PlantedPooled) -> str:
    """What is special about a row."""
    parts = [planted.objective, f"{planted.n_prompts} × {'4 to ' if planted.ragged else ''}{planted.n_rollouts}"]
    parts += [f"{planted.dim} dimensions"] if planted.dim != PlantedPooled.dim else []
    parts += ["no prompt's own direction"] if planted.own == 0 else []
    parts += [f"score mean {planted.mean}"] if planted.mean else []
    parts += [f"p {planted.chances[0]}–{planted.chances[1]}"] if planted.chances != PlantedPooled.chances else []
    spreads = (planted.strength_spread, planted.norm_spread)
    parts += [f"log-sd {spreads[0]} of prompts, {spreads[1]} of rows"] if any(spreads) else []
    return ", ".join(parts)


def covered(estimates: list[list[Estimate]], truths: list[float]) -> list[str]:
    """Lowest and highest coverage over several numbers, of the draws that give each, and whether all lie in the band.

    Numbers given in fewer than one draw in ten are left out; the cell then says how many are left.

    Args:
        estimates: of each number, all draws.
        truths: of each number.
    """
    coverage = []
    for draws, truth in zip(estimates, truths, strict=True):
        intervals = [estimate.ci95 for estimate in draws if estimate.ci95 is not None]
        if len(intervals) >= LEAST_GIVEN * len(draws):
            coverage.append(float(np.mean([low <= truth <= high for low, high in intervals])))
    if not coverage:
        return ["–", "–"]
    low, high = min(coverage), max(coverage)
    missed = ["too rarely"] * (low < COVERAGE_BAND[0]) + ["too often"] * (high > COVERAGE_BAND[1])
    span = percent(low) if len(coverage) == 1 else f"{percent(low)} – {percent(high)}"
    some = "" if len(coverage) == len(estimates) else f" ({len(coverage)} of {len(estimates)})"
    return [span + some, f"{OUTSIDE}, {' and '.join(missed)}" if missed else "yes"]


def pooled_table(rows: list[Row]) -> Table:
    """Header and lines."""
    numbers = ["signal share", "keep_top: cosine", "keep_top: signal share", "keep_top: noise scale ratio"]
    numbers += ["cosine with update", "share within prompts", "noise scale", "ρ over sums = −1"]
    header = ["planted", "signal / noise", "noise scale, prompts", "seen", "share of bucket 3: mean ± sd"]
    header += [cell for name in numbers for cell in (f"{name} held", "in 90–99%")] + ["shares add up to 1"]
    table = [header]
    for row in rows:
        results = [draw.exp3 for draw in row.draws]
        seen = [result for result in results if result.signal.verdict == SEEN]
        shares = np.array([[bucket.signal_share.value for bucket in result.buckets] for result in seen])
        spread = f"{number(shares[:, 3].mean(), 3)} ± {number(shares[:, 3].std(), 3)}" if len(seen) else "–"
        adds_up = np.all(np.abs(shares.sum(axis=1) - 1) < ROUNDING) if len(seen) else True
        truth = truth_of(row.planted, np.random.default_rng(row.stream))
        scale = truth.noise.sum() / truth.signal.sum()
        cells = [name_of(row.planted), number(row.planted.signal), number(scale, 0), percent(len(seen) / len(results))]
        table.append([*cells, spread, *interval_columns(row, truth), "yes" if adds_up else OUTSIDE])
    return table


def interval_columns(row: Row, truth: Truth) -> list[str]:
    """The cells of `pooled_table` that tell how often intervals hold the truth."""
    results, scale = [draw.exp3 for draw in row.draws], truth.noise.sum() / truth.signal.sum()
    buckets = range(N_BUCKETS)
    kept = range(N_BUCKETS - 1)  # the last entry keeps all: exactly 1
    with_signal = [b for b in buckets if truth.signal[b, b] > 0]
    of_kept = zip(*(truth.kept((np.arange(N_BUCKETS) >= N_BUCKETS - 1 - i).astype(float)) for i in kept), strict=True)
    names = ("cosine", "signal_share", "noise_scale_ratio")
    shares = truth.signal.sum(axis=1) / truth.signal.sum()
    return [
        *covered([[r.buckets[b].signal_share for r in results] for b in buckets], list(shares)),
        *(
            cell
            for name, truths in zip(names, of_kept, strict=True)
            for cell in covered([[getattr(r.keep_top[i], name) for r in results] for i in kept], list(truths))
        ),
        *covered(
            [[r.buckets[b].cosine_with_update for r in results] for b in with_signal],
            [truth.kept(np.eye(N_BUCKETS)[b])[0] for b in with_signal],
        ),
        *covered(
            [[r.buckets[b].signal_share_within_prompts for r in results] for b in buckets],
            list(truth.within / truth.within.sum()),
        ),
        *covered([[r.noise_scale_prompts for r in results]], [scale]),
        *covered([[draw.opposition.all_tokens for draw in row.draws]], [-1.0]),
    ]


def pooled_null_table(rows: list[Row]) -> Table:
    """Header and lines of the section in which outcomes mean nothing."""
    table = [["planted", "underpowered", "in 95–100%", "z: mean ± sd"]]
    for row in rows:
        signals = [draw.exp3.signal for draw in row.draws]
        blind = float(np.mean([signal.verdict != SEEN for signal in signals]))
        z = [signal.z for signal in signals]
        spread = f"{number(np.mean(z), signed=True)} ± {number(np.std(z))}"
        table.append([name_of(row.planted), percent(blind), in_band(blind, NULL_BAND), spread])
    return table


def within_table(rows: list[Row]) -> Table:
    """Header and lines of the section in which the score's mean is not 0."""
    header = ["planted", "true ‖Cov(c, G)‖² × 1000", "estimate: mean ± standard error", "within 3 standard errors"]
    table = [[*header, "control, leave-one-out advantages", "off by more than 10"]]
    for row in rows:
        truth = truth_of(row.planted, np.random.default_rng(row.stream)).within.sum()
        cells = [name_of(row.planted), number(1000 * truth, 3)]
        for key in ("within", "leave_one_out"):
            values = np.array([getattr(draw, key) for draw in row.draws])
            error = values.std() / np.sqrt(len(values))
            off = abs(values.mean() - truth)
            cells.append(f"{number(1000 * values.mean(), 3)} ± {number(1000 * error, 3)}")
            cells.append("yes" if (off < 3 * error if key == "within" else off > 10 * error) else OUTSIDE)
        table.append(cells)
    return table


# ---- all of it ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Draw all rows, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--draws", type=int, default=400, help="per row in which there is a truth (default: %(default)s)")
    add("--null-draws", type=int, default=400, help="per row in which labels mean nothing (default: %(default)s)")
    add("--bootstrap", type=int, default=500, help="draws behind each detectable |ρ| (default: %(default)s)")
    add("--permutations", type=int, default=499, help="behind each p-value (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count(), help="processes; results don't hang on it (default: all cores)")
    add("--only", choices=("exp1", "exp2", "exp3"), help="the tables of one experiment (default: all)")
    args = parser.parse_args(argv)
    started = time.perf_counter()

    def print_rows(
        title: str, first: int, rows: list[Any], n: int, draw: Callable, of_draw: tuple, table: Callable
    ) -> None:
        """`first`: the number of the first row; `n`: draws of each; `of_draw`: settings of `draw`."""
        found = []
        for index, planted in enumerate(rows, first):
            tasks = [(index, j, planted, args.seed, *of_draw) for j in range(n)]
            found.append(Row(planted, [args.seed, index], list(pool.map(draw, tasks, chunksize=max(1, n // 16)))))
        print_table(title, table(found))

    with ProcessPoolExecutor(args.workers) as pool:
        if args.only in (None, "exp2"):
            first = 0
            for title, rows in coverage_sections().items():
                print_rows(f"Exp 2. {title}", first, rows, args.draws, draw_row, (args.bootstrap, 0), coverage_table)
                first += len(rows)
            nulls = (args.bootstrap, args.permutations)
            title = "Exp 2. Labels that mean nothing"
            print_rows(title, first, null_rows(), args.null_draws, draw_row, nulls, null_table)
        if args.only in (None, "exp1"):
            rng = np.random.default_rng([args.seed, 2000])
            print_table("Exp 1. A bucket of k directions", rank_table(rng))
            title = "Exp 1. Isotropic directions (1,000 rows in 512 dimensions), heavy-tailed norms"
            print_table(title, norm_table(rng))
        if args.only in (None, "exp3"):
            first = STREAM
            biased = [PlantedPooled(0.2, "dr-grpo", mean=mean) for mean in (0.2, 1.0)]
            for title, rows, n, table in (
                ("Exp 3. Pooled dumps with a planted signal", pooled_rows(), args.draws, pooled_table),
                ("Exp 3. Outcomes that mean nothing", pooled_null_rows(), args.null_draws, pooled_null_table),
                ("Exp 3. Within prompts, where the score's mean is not 0", biased, args.draws, within_table),
            ):
                print_rows(title, first, rows, n, draw_pooled, (), table)
                first += len(rows)
    print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
