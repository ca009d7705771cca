#!/usr/bin/env python3
"""Planted gradients of known truth, put through the toolkit's statistics: do the numbers hold what they promise?

Exp 2: prompts whose correct and incorrect rollouts have directions of a planted cosine, in noise. How often does the
interval hold the truth, which verdicts come out, how often is p below 0.05 where labels mean nothing, and what did
the original's measure say? Exp 1: buckets of k directions, and isotropic directions with heavy-tailed norms. Exp 3:
`calibration_exp3.py`.

The tables that docs/calibration.md sums up (minutes on two cores):

    python benchmarks/calibration.py --output out/calibration.md

The same rows from a tenth of the draws (too few for the bands), not written, and one experiment's tables alone:

    python benchmarks/calibration.py --draws 40 --null-draws 40
    python benchmarks/calibration.py --only exp3

The tables go to stdout; an entry outside its band says NO.
"""

import argparse
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # the matrices are small; processes share the cores

import numpy as np  # noqa: E402
import scipy  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import calibration_exp3  # noqa: E402
from calibration_tables import COVERAGE_BAND, OUTSIDE, in_band, markdown, mean_of, number, percent, tables_of  # noqa: E402

import gradprobe  # noqa: E402
from gradprobe.analysis.bucket import Bucket, rollout_codes  # noqa: E402
from gradprobe.exp1.spectrum import participation_ratio as ratio_of_energies  # noqa: E402
from gradprobe.exp2.direction import (  # noqa: E402
    ALIGNED,
    MIN_ROLLOUTS_OF_EACH_KIND,
    OPPOSED,
    ORTHOGONAL,
    UNDERPOWERED,
)
from gradprobe.exp2.measure import BucketDirections, Exp2Settings, directions_of_bucket  # noqa: E402
from gradprobe.exp2.summary import summarise  # noqa: E402
from gradprobe.library import participation_ratio  # noqa: E402

VERDICTS = (ALIGNED, ORTHOGONAL, OPPOSED, UNDERPOWERED)
LEVEL, LEVEL_BAND = 0.05, (0.02, 0.08)
PR_TOLERANCE, UNIT_NORM_TOLERANCE = 0.10, 0.05
N_SPECTRUM_DRAWS = 10
EXPERIMENTS = ("exp1", "exp2", "exp3")


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


@dataclass(frozen=True)
class Row:
    """A row of an Exp 2 table: what is planted and all its draws."""

    planted: Planted
    draws: list[BucketDirections]

    def verdicts(self) -> list[str]:
        """The share of each, of all draws."""
        return [percent(self.share(verdict)) for verdict in VERDICTS]

    def share(self, verdict: str) -> float:
        """Of all draws."""
        return float(np.mean([draw.alignment.verdict == verdict for draw in self.draws]))


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


def original_columns(row: Row) -> list[str]:
    """Mean over draws of the original's mean cosine and token-split control, and of the split by rollout."""
    draws = row.draws
    cosines = mean_of([summarise(draw.directions.cosines)["mean"] for draw in draws])
    tokens = mean_of([summarise(draw.directions.control)["mean"] for draw in draws])
    rollouts = mean_of([summarise(draw.control_by_rollout)["mean"] for draw in draws])
    return [number(value, 3, signed=True) for value in (cosines, tokens, rollouts)]


ORIGINAL_HEADER = ["original: mean cos", "original: token-split control", "rollout-split control"]


def coverage_table(rows: list[Row]) -> list[list[str]]:
    """Header and lines of one Exp 2 section."""
    header = ["signal / noise", "rollout effect", "planted ρ", "ρ: mean ± sd", "interval given", "holds ρ, of those"]
    header += ["in 90–99%", "misses ρ, of all", "detectable, median", *VERDICTS, *ORIGINAL_HEADER]
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
        table.append([*cells, *row.verdicts(), *original_columns(row)])
    return table


def null_table(rows: list[Row]) -> list[list[str]]:
    """Header and lines of the section in which labels mean nothing."""
    tests = ["labels", "cancellation, ±1", "cancellation, group-normalised"]
    header = ["signal / noise", "rollout effect", "dimensions", "norms and sizes", *(f"p < 0.05: {t}" for t in tests)]
    header += ["all in 2–8%", "no signal: orthogonal never", *VERDICTS, *ORIGINAL_HEADER]
    table = [header]
    for row in rows:
        planted = row.planted
        tested = ("alignment", "cancellation", "cancellation_group_normalised")
        levels = [float(np.mean([getattr(draw, test).p_value < LEVEL for draw in row.draws])) for test in tested]
        kind = "heavy-tailed" if planted.norm_spread else "1 to 4 tokens per rollout" if planted.ragged else "equal"
        never = "–" if planted.signal else in_band(row.share(ORTHOGONAL), (0.0, 0.0))
        table.append(
            [number(planted.signal), number(planted.rollout_effect, 1), f"{planted.dim:,}", kind]
            + [percent(level) for level in levels]
            + ["yes" if all(in_band(level, LEVEL_BAND) == "yes" for level in levels) else OUTSIDE, never]
            + [*row.verdicts(), *original_columns(row)]
        )
    return table


def unit_norm(rows: np.ndarray) -> np.ndarray:
    """[n, d] rows at norm 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ratio_of(rows: np.ndarray) -> float:
    """The toolkit's participation ratio of [n, d] rows."""
    return participation_ratio(rows.astype(np.float32))


def rank_table(rng: np.random.Generator) -> list[list[str]]:
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


def norm_table(rng: np.random.Generator) -> list[list[str]]:
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
        size = mean_of([ratio_of_energies(np.sum(rows**2, axis=1)) for rows in drawn])
        reference = unit if reference is None else reference  # the first law's rows are of equal norm
        near = in_band(unit / reference, (1 - UNIT_NORM_TOLERANCE, 1 + UNIT_NORM_TOLERANCE))
        cells = [number(size, 1), number(raw, 1), percent(raw / reference), number(unit, 1), percent(unit / reference)]
        table.append([name, *cells, near])
    return table


WHAT_WAS_PLANTED = f"""
## What was planted (Exp 2)

token gradient = h · (signal · u + effect · e + noise). u: a unit vector per prompt and kind, those of correct and
incorrect rollouts at cosine ρ. e: shared by the tokens of one rollout. e and the noise: isotropic Gaussian, expected
squared length 1, so *signal / noise* is the shared direction's length over that of one token's noise. h = 1 but where
norms are called heavy-tailed. Correct rollouts: Binomial(8, q) a prompt, q uniform on 0.2–0.8; only prompts with at
least {MIN_ROLLOUTS_OF_EACH_KIND} of each kind have a part in ρ. Dot products within a prompt are all that any of the
statistics use; they are sampled exactly as in so many dimensions (Bartlett's factor of the Wishart distribution) and
go through the same code as a dump.

*interval given*: the share of draws in which both signals are above 0 at the 95% level; otherwise there is no finite
interval, `ci95` is null and the verdict is underpowered. Such draws count neither as hit nor as miss in *holds ρ, of
those*, nor in the mean of ρ; they are in the denominator of *misses ρ, of all*. Where intervals are given rarely, those
given are selected for signals that came out strong; the bias of that selection is not corrected. *detectable*:
`min_detectable`. Verdicts: share of all draws; at ρ = 0 a 95% interval leaves out 0 in 5% of draws by design. The
original's measures and the two controls: mean over draws.

## What was planted (Exp 1)

{N_SPECTRUM_DRAWS} draws a row. First table: rows with independent standard normal coefficients on k orthonormal
directions; the coefficients' own scatter lowers PR to about k n / (n + k + 1). Second: directions uniform on the
sphere, norms of the law named, fresh rows in every draw; PR of the rows as they are, and scaled to norm 1.
"""


def document(sections: dict[str, list[list[str]]], args: argparse.Namespace, command: str) -> str:
    """The tables as one Markdown text."""
    outside = {title: sum(OUTSIDE in cell for line in table for cell in line) for title, table in sections.items()}
    lines = [
        "# Calibration: planted truths through the toolkit's statistics",
        "",
        f"Written on {datetime.now(timezone.utc):%Y-%m-%d} by `{command}`: gradprobe {gradprobe.__version__}, "
        f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}. {args.draws} draws a "
        f"row where there is a truth to hold, {args.null_draws} where labels mean nothing; draw j of row i comes from "
        f"the stream `default_rng([{args.seed}, i, j])`, rows counted from 0 through all tables of Exp 2, from "
        f"{calibration_exp3.STREAM} through those of Exp 3. Exp 2: {args.bootstrap} bootstrap draws behind each "
        f"detectable |ρ|, {args.permutations} permutations behind each p.",
        "",
        f"Entries outside their band are marked {OUTSIDE}; nothing was drawn again, and nothing left out but what is "
        "said of Exp 3. There are:",
        "",
        *(f"- {count or 'none'} in “{title}”" for title, count in outside.items()),
        *((WHAT_WAS_PLANTED.rstrip("\n"),) if args.only != "exp3" else ()),
        *((calibration_exp3.WHAT_WAS_PLANTED.rstrip("\n"),) if args.only in (None, "exp3") else ()),
    ]
    for title, table in sections.items():
        lines += ["", f"## {title}", "", *markdown(table)]
    return "\n".join(lines) + "\n"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--draws", type=int, default=400, help="per row in which there is a ρ (default: %(default)s)")
    add("--null-draws", type=int, default=400, help="per row in which labels mean nothing (default: %(default)s)")
    add("--bootstrap", type=int, default=500, help="draws behind each detectable |ρ| (default: %(default)s)")
    add("--permutations", type=int, default=499, help="behind each p-value (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count(), help="processes; results don't hang on it (default: all cores)")
    add("--only", choices=EXPERIMENTS, help="the tables of one experiment (default: all)")
    add("--output", type=Path, metavar="FILE", help="write the tables there as Markdown (default: only to stdout)")
    args = parser.parse_args(argv)
    if min(args.draws, args.null_draws, args.bootstrap, args.permutations, args.workers) < 1:
        parser.error("--draws, --null-draws, --bootstrap, --permutations and --workers take 1 or more")
    return args


def exp2_sections(pool: ProcessPoolExecutor, args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Title -> table."""
    parts = [
        (f"Exp 2. {title}", rows, args.draws, (args.bootstrap, 0), coverage_table)
        for title, rows in coverage_sections().items()
    ]
    nulls = (args.bootstrap, args.permutations)
    parts.append(("Exp 2. Labels that mean nothing", null_rows(), args.null_draws, nulls, null_table))
    return tables_of(pool, parts, args.seed, draw_row, lambda _, planted, draws: Row(planted, draws))


def main(argv: list[str] | None = None) -> int:
    """Draw all rows, print the tables, write them."""
    args = parse_args(argv)
    started = time.perf_counter()
    wanted = EXPERIMENTS if args.only is None else (args.only,)
    sections: dict[str, list[list[str]]] = {}
    with ProcessPoolExecutor(args.workers) as pool:
        if "exp2" in wanted:
            sections |= exp2_sections(pool, args)
        if "exp1" in wanted:
            rng = np.random.default_rng([args.seed, 2000])
            sections["Exp 1. A bucket of k directions"] = rank_table(rng)
            title = "Exp 1. Isotropic directions (1,000 rows in 512 dimensions), heavy-tailed norms"
            sections[title] = norm_table(rng)
        if "exp3" in wanted:
            sections |= calibration_exp3.sections(pool, args.draws, args.null_draws, args.seed)
    command = " ".join(["python", "benchmarks/calibration.py", *(sys.argv[1:] if argv is None else argv)])
    text = document(sections, args, command)
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
