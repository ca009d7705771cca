#!/usr/bin/env python3
"""Exp 1 at the size of the full study: how long, how much memory, and against numpy's SVD.

`study`: all of Exp 1, every interval, ceiling and null, for two dumps of 128 prompts × 8 rollouts × 5 buckets × 4
positions of 8,960 numbers (20,480 rows each). One bucket of the second dump is smaller, so that every other bucket is
cut down to its size in the comparison at equal n: the slowest case. Some two minutes on two cores.
On cores that are shared with other jobs set OPENBLAS_NUM_THREADS=1: threads that wait for each other cost more.

    python benchmarks/bench_spectrum.py study

`svd`: the spectra and first right singular vectors of 10,240 × 8,960 in five buckets, by `Bucket` and by
`numpy.linalg.svd` of each bucket in float64, bucket by bucket in turn; both read the float32 memory map themselves.
Two minutes. One product of n² d multiplications in float64 is the floor of the first and about a tenth of the second.

    python benchmarks/bench_spectrum.py svd

`whole`: all of Exp 1 on that dump, against the SVDs that the same numbers would take: one per bucket, and with the
same number of draws two per ceiling (halves of buckets) and one per bucket and null. Those SVDs are counted and two
are timed, one of each size. What intervals by halves of prompts would add is left out, which favours the SVD.

    python benchmarks/bench_spectrum.py whole

The same on a laptop in seconds: add `--prompts 8 --dim 1000`. The dumps are made up, written to --work-dir and removed
afterwards. A table goes to stdout, and one line of JSON for programs behind it.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gradprobe.analysis.bucket import Bucket, rollout_codes  # noqa: E402
from gradprobe.exp1.compression import compare_buckets  # noqa: E402
from gradprobe.exp1.measure import EXACT, Exp1Settings, measure_dump, smallest_bucket  # noqa: E402
from gradprobe.exp1.spectrum import Spectrum  # noqa: E402
from gradprobe.exp1.summary import numbers_of  # noqa: E402

BUCKETS, SAMPLES, POSITIONS = 5, 8, 4
SHARES = (0.5, 0.9, 0.95, 0.99)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["study", "svd", "whole"])
    add("--prompts", type=int, help="prompts per dump (default: 128 for study, else 64)")
    add("--dim", type=int, default=8960, help="length of a gradient row (default: %(default)s)")
    add("--repeats", type=int, default=1, help="of the SVD comparison; means are shown (default: %(default)s)")
    add("--work-dir", type=Path, help="where the made-up dumps go, 1.5 GB (default: the system's temporary directory)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the dumps, measure, print."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as directory:
        if args.what == "study":
            result = time_study(Path(directory), args.prompts or 128, args.dim)
        elif args.what == "whole":
            result = time_whole(Path(directory), args.prompts or 64, args.dim)
        else:
            result = time_svd(Path(directory), args.prompts or 64, args.dim, args.repeats)
    result |= {"numpy": np.__version__, "cpus": os.cpu_count(), "load_average": os.getloadavg()}
    for name, value in result.items():
        print(f"{name:>32}: {value:.4g}" if isinstance(value, float) else f"{name:>32}: {value}")
    print(json.dumps(result))
    return 0


def make_labels(n_prompts: int) -> dict[str, np.ndarray]:
    """[n] each: prompt, sample and bucket of every row, in the order in which a probe writes them."""
    shape = (n_prompts, SAMPLES, BUCKETS, POSITIONS)
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices(shape))
    return {"prompt": prompt, "sample": sample, "bucket": bucket}


def whole_of(grads: np.ndarray, labels: dict[str, np.ndarray]) -> Bucket:
    """All of a dump's gradients."""
    return Bucket(grads, np.arange(len(grads)), labels["prompt"], rollout_codes(labels["prompt"], labels["sample"]))


def make_grads(file: Path, labels: dict[str, np.ndarray], dim: int, seed: int) -> np.ndarray:
    """Write gradients that look like real ones, block by block, and open them as a memory map.

    Decaying column scales, a direction per prompt, and norms that spread over magnitudes in low-entropy buckets.
    """
    rng = np.random.default_rng(seed)
    n_rows, n_prompts = len(labels["prompt"]), int(labels["prompt"].max()) + 1
    scale = 1 / np.sqrt(1 + np.arange(dim) / 20)
    shared = rng.standard_normal((n_prompts, dim), dtype=np.float32)
    grads = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(n_rows, dim))
    for start in range(0, n_rows, 1024):
        part = slice(start, min(start + 1024, n_rows))
        block = rng.standard_normal((part.stop - start, dim), dtype=np.float32)
        block += 0.5 * shared[labels["prompt"][part]]
        norms = np.exp(rng.standard_normal(len(block)) * (2.0 - 0.4 * labels["bucket"][part]))
        grads[part] = block * scale * norms[:, None]
    grads.flush()
    del grads
    return np.load(file, mmap_mode="r")


def time_study(directory: Path, n_prompts: int, dim: int) -> dict[str, Any]:
    """All of Exp 1 for two dumps, and the comparison between them."""
    labels = {tag: make_labels(n_prompts) for tag in ("base", "trained")}
    smaller = labels["trained"]["bucket"]
    smaller[np.flatnonzero(smaller == BUCKETS - 1)[:: 4 * POSITIONS]] = BUCKETS - 2
    grads = {tag: make_grads(directory / f"{tag}.npy", labels[tag], dim, i) for i, tag in enumerate(labels)}
    common_n = smallest_bucket(label["bucket"] for label in labels.values())
    before = _peak_bytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    results, seconds = {}, {}
    for tag, label in labels.items():
        dump_start = time.perf_counter()
        steps: list[float] = []
        results[tag] = measure_dump(
            whole_of(grads[tag], label),
            label["bucket"],
            BUCKETS,
            common_n,
            on_step=lambda steps=steps, since=dump_start: steps.append(time.perf_counter() - since),
        )
        seconds[tag] = stage_seconds(steps)
        print(f"{tag}: {seconds[tag]}", file=sys.stderr)
    ratios = [compare_buckets(*pair) for pair in zip(results["base"].sums, results["trained"].sums, strict=True)]
    elapsed, cpu_elapsed = time.perf_counter() - start, time.process_time() - cpu_start
    json.dumps({tag: numbers_of(result) for tag, result in results.items()}, allow_nan=False)
    return {
        "rows_per_dump": len(labels["base"]["prompt"]),
        "dim": dim,
        "common_n": common_n,
        "draws": str(Exp1Settings()),
        "seconds_both_dumps": elapsed,
        "cpu_seconds_both_dumps": cpu_elapsed,
        "seconds_by_stage": seconds,
        "peak_gib_with_mapped_pages": _peak_bytes() / 2**30,
        "peak_gib_before": before / 2**30,
        "ratios_known": sum(ratio is not None for ratio in ratios),
    }


def stage_seconds(steps: list[float]) -> dict[str, float]:
    """Seconds of each stage, from the times at which `measure_dump` called `on_step`."""
    ends = [steps[BUCKETS - 1], steps[-1]]
    names = ["buckets and their ceilings", "directions across buckets and null"]
    return {name: round(end - begin, 1) for name, begin, end in zip(names, [0.0, *ends], ends, strict=False)}


def time_svd(directory: Path, n_prompts: int, dim: int, repeats: int) -> dict[str, Any]:
    """The same numbers from Gram matrices and from numpy's SVD."""
    labels = make_labels(n_prompts)
    grads = make_grads(directory / "grads.npy", labels, dim, 0)
    laps = {name: Laps() for name in ("gram", "svd", "svd without vectors")}
    worst_energy = worst_number = worst_direction = 0.0
    for _ in range(repeats):
        for index in range(BUCKETS):
            in_bucket = labels["bucket"] == index
            with laps["gram"]:
                bucket = whole_of(grads, labels).part(in_bucket)
                found = Spectrum(bucket.n, bucket.energies())
                _, directions = bucket.leading_directions(1, tolerance=EXACT)
                numbers = numbers_to_compare(found)
            with laps["svd"]:
                rows = grads[np.flatnonzero(in_bucket)].astype(np.float64)
                _, sigma, right = np.linalg.svd(rows, full_matrices=False)
            with laps["svd without vectors"]:
                np.linalg.svd(rows, compute_uv=False)
            energies = sigma**2
            worst_energy = max(worst_energy, np.abs(found.energies - energies).max() / energies[0])
            worst_direction = max(worst_direction, 1 - abs(float(directions[:, 0].numpy() @ right[0])))
            worst_number = max(worst_number, *np.abs(numbers / numbers_by_hand(energies) - 1))
            print({name: [round(value, 1) for value in lap.cpu] for name, lap in laps.items()}, file=sys.stderr)
    seconds = {name: sum(lap.wall) / repeats for name, lap in laps.items()}
    cpu = {name: sum(lap.cpu) / repeats for name, lap in laps.items()}
    return {
        "rows": len(grads),
        "dim": dim,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "times_faster": {name: seconds[name] / seconds["gram"] for name in seconds},
        "times_faster_cpu": {name: cpu[name] / cpu["gram"] for name in cpu},
        "worst_error_of_an_energy_over_the_largest": float(worst_energy),
        "worst_relative_error_of_a_number": float(worst_number),
        "worst_1_minus_cos_of_direction": float(worst_direction),
    }


def time_whole(directory: Path, n_prompts: int, dim: int) -> dict[str, Any]:
    """All of Exp 1 for one dump of even buckets, and what numpy's SVD would take for its spectra, ceilings and null."""
    labels, draws = make_labels(n_prompts), Exp1Settings()
    grads = make_grads(directory / "grads.npy", labels, dim, 0)
    laps = {name: Laps() for name in ("exp1", "svd of a bucket", "svd of half a bucket")}
    rows = np.flatnonzero(labels["bucket"] == 0)
    for name, part in (("svd of a bucket", rows), ("svd of half a bucket", rows[: len(rows) // 2])):
        with laps[name]:
            np.linalg.svd(grads[part].astype(np.float64), full_matrices=False)
    with laps["exp1"]:
        measure_dump(whole_of(grads, labels), labels["bucket"], BUCKETS, len(rows), draws)
    counts = {"svd of a bucket": BUCKETS * (1 + draws.null), "svd of half a bucket": BUCKETS * 2 * draws.ceiling}
    result: dict[str, Any] = {"rows": len(grads), "dim": dim, "counts": counts}
    for clock in ("wall", "cpu"):
        seconds = {name: getattr(lap, clock)[0] for name, lap in laps.items()}
        svd_seconds = sum(count * seconds[name] for name, count in counts.items())
        result[f"{clock}_seconds"] = seconds
        result[f"{clock}_seconds_of_the_counted_svds"] = svd_seconds
        result[f"times_faster_{clock}"] = svd_seconds / seconds["exp1"]
    return result


class Laps:
    """Wall-clock and processor seconds of each `with` block."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


def numbers_to_compare(found: Spectrum) -> np.ndarray:
    """The study's numbers of one bucket."""
    ranks = [found.rank(q) for q in SHARES]
    return np.array([found.participation_ratio, found.top1_energy_frac, found.effective_rank, *ranks])


def numbers_by_hand(energies: np.ndarray) -> np.ndarray:
    """The same, written out."""
    p = np.sqrt(energies) / np.sqrt(energies).sum()
    cumulative = np.cumsum(energies) / energies.sum()
    ratio = energies.sum() ** 2 / (energies**2).sum()
    ranks = [np.flatnonzero(cumulative >= q)[0] + 1 for q in SHARES]
    return np.array([ratio, energies[0] / energies.sum(), np.exp(-(p * np.log(p)).sum()), *ranks])


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
