"""Planted pooled dumps of known truth, put through Exp 3 and ρ over sums. `calibration.py` runs and prints it.

A draw's intervals are held against the truth that was planted: shares of signal across and within prompts, cosine and
share of the tokens kept, noise scales. Where nothing is planted, nothing may be seen.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from calibration_tables import COVERAGE_BAND, OUTSIDE, in_band, number, percent, tables_of

from gradprobe.analysis.jackknife import Estimate
from gradprobe.analysis.opposition import Opposition, rho_over_sums
from gradprobe.analysis.pooled import Pooled, iter_prompts
from gradprobe.exp3.signal import SEEN, Exp3, signal_of_pooled
from gradprobe.exp3.tables import prompt_tables
from gradprobe.exp3.weights import update_weights

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
class Draw:
    """One draw's results; `within` and `leave_one_out` are two estimates of the mean ‖Cov(c, G)‖² over prompts.

    A draw whose score has a mean holds these two, any other `exp3` and, where there is a signal, `opposition`.
    """

    exp3: Exp3 | None = None
    opposition: Opposition | None = None
    within: float | None = None
    leave_one_out: float | None = None


@dataclass(frozen=True)
class Row:
    """A planted dump, its truth and all its draws."""

    planted: PlantedPooled
    truth: Truth
    draws: list[Draw]


def group_sizes(planted: PlantedPooled, n: int, rng: np.random.Generator) -> np.ndarray:
    """[n] rollouts of each prompt."""
    return rng.integers(4, planted.n_rollouts + 1, n) if planted.ragged else np.full(n, planted.n_rollouts)


def plant(planted: PlantedPooled, rng: np.random.Generator) -> Pooled:
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


def draw_row(task: tuple[int, int, PlantedPooled, int]) -> Draw:
    """One draw of one row, from a stream of its own: the result doesn't hang on the number of processes."""
    row, draw, planted, seed = task
    pooled = plant(planted, np.random.default_rng([seed, STREAM + row, draw]))
    if planted.mean:
        within = float(prompt_tables(pooled, planted.objective).within.sum(axis=1).mean())
        return Draw(within=within, leave_one_out=leave_one_out_products(pooled))
    opposition = rho_over_sums(pooled) if planted.signal else None
    return Draw(signal_of_pooled(pooled, planted.objective), opposition)


def coverage_rows() -> list[PlantedPooled]:
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


def null_rows() -> list[PlantedPooled]:
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


def coverage_table(rows: list[Row]) -> list[list[str]]:
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
        scale = row.truth.noise.sum() / row.truth.signal.sum()
        cells = [name_of(row.planted), number(row.planted.signal), number(scale, 0), percent(len(seen) / len(results))]
        table.append([*cells, spread, *interval_columns(row, scale), "yes" if adds_up else OUTSIDE])
    return table


def interval_columns(row: Row, scale: float) -> list[str]:
    """The cells of `coverage_table` that tell how often intervals hold the truth."""
    results, truth = [draw.exp3 for draw in row.draws], row.truth
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


def null_table(rows: list[Row]) -> list[list[str]]:
    """Header and lines of the section in which outcomes mean nothing."""
    table = [["planted", "underpowered", "in 95–100%", "z: mean ± sd"]]
    for row in rows:
        signals = [draw.exp3.signal for draw in row.draws]
        blind = float(np.mean([signal.verdict != SEEN for signal in signals]))
        z = [signal.z for signal in signals]
        spread = f"{number(np.mean(z), signed=True)} ± {number(np.std(z))}"
        table.append([name_of(row.planted), percent(blind), in_band(blind, NULL_BAND), spread])
    return table


def within_table(rows: list[Row]) -> list[list[str]]:
    """Header and lines of the section in which the score's mean is not 0."""
    header = ["planted", "true ‖Cov(c, G)‖² × 1000", "estimate: mean ± standard error", "within 3 standard errors"]
    table = [[*header, "control, leave-one-out advantages", "off by more than 10"]]
    for row in rows:
        truth = row.truth.within.sum()
        cells = [name_of(row.planted), number(1000 * truth, 3)]
        for key in ("within", "leave_one_out"):
            values = np.array([getattr(draw, key) for draw in row.draws])
            error = values.std() / np.sqrt(len(values))
            off = abs(values.mean() - truth)
            cells.append(f"{number(1000 * values.mean(), 3)} ± {number(1000 * error, 3)}")
            cells.append("yes" if (off < 3 * error if key == "within" else off > 10 * error) else OUTSIDE)
        table.append(cells)
    return table


WHAT_WAS_PLANTED = f"""
## What was planted (Exp 3)

A rollout's sum in bucket b = mean + (c − p) · s · (v_b + own_b) + h · noise, in 64 dimensions where not said otherwise;
five buckets. v = Σ v_b, the same for all prompts, of length *signal / noise*, in units of the noise of a rollout's
whole sum; the shares of v are {", ".join(f"{share:g}" for share in SHARES)}, and each v_b has a part across v
({", ".join(f"{part:g}" for part in SIDEWAYS)} of its length), which cancel in the sum. own_b: directions of the
prompt's own, together as long as v. Noise: isotropic, {", ".join(f"{share:g}" for share in NOISE)} of its energy in the
buckets. c: correct with chance p, uniform on 0.05–0.95 over prompts; s and h are 1 but where log-normal spreads are
named (E s = E h² = 1). On-policy the mean is 0. Response lengths (`grpo`): log-normal, log-sd 0.5.

*seen*: the share of draws whose ‖U‖² is above 0 at the 95% level; elsewhere shares and cosines are null and count
neither as hit nor as miss. A cosine or noise scale of kept tokens needs a signal of theirs above 0 besides, a share
within prompts and ρ a signal within prompts. *held*: of the draws with an interval; the lowest and the highest of the
five buckets, or of the entries of `keep_top` but for the last, which keeps all. Numbers that are given in fewer than
{LEAST_GIVEN:.0%} of the draws are left out, as these draws are few and selected (a rule made after a first run of 100
draws a row had shown such cells, with 0 to 100% held of a handful); a bracket says how many are left, a dash that none
is. *too often*, *too rarely*: on which side of the band. *cosine with update*: of the buckets that have a signal. True
shares, cosines and noise scales: closed form, with the moments of the weights from {N_GROUPS:,} groups.

The jackknife's variance of an average over pairs of prompts is up to twice the truth where the prompts have little in
common (Efron & Stein 1981: never too small), so intervals may hold the truth more often than 95%.
"""


def sections(pool: ProcessPoolExecutor, n_draws: int, n_null_draws: int, seed: int) -> dict[str, list[list[str]]]:
    """Title -> table."""
    biased = [PlantedPooled(0.2, "dr-grpo", mean=mean) for mean in (0.2, 1.0)]
    parts = [
        ("Exp 3. Pooled dumps with a planted signal", coverage_rows(), n_draws, (), coverage_table),
        ("Exp 3. Outcomes that mean nothing", null_rows(), n_null_draws, (), null_table),
        ("Exp 3. Within prompts, where the score's mean is not 0", biased, n_draws, (), within_table),
    ]

    def row_of(index: int, planted: PlantedPooled, draws: list[Draw]) -> Row:
        return Row(planted, truth_of(planted, np.random.default_rng([seed, STREAM + index])), draws)

    return tables_of(pool, parts, seed, draw_row, row_of)
