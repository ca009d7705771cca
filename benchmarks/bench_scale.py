#!/usr/bin/env python3
"""Merge, Exp 1, Exp 2 and plots on dumps of any size: how long each takes, and how much memory.

Writes made-up shards block by block (8 rollouts a prompt, 5 entropy buckets, 20 positions a rollout), then runs the
scripts as a person would, each in a process of its own, and prints a table. `rows x dim` asks for one dump merged from
two shards; a factor in front of it for as many dumps, compared with the first.

How cost grows with the number of positions, up to a million (4 GB on disk, twice):
    python benchmarks/bench_scale.py 125000x1024 250000x1024 500000x1024 1000000x1024

The full study, base and trained (1.5 GB, twice):
    python benchmarks/bench_scale.py 2x20480x8960

A laptop, in a minute:
    python benchmarks/bench_scale.py 4000x256 2x4000x256

Memory is the largest resident set (VmHWM), and the largest share of it that is not a file's pages (RssAnon, looked at
every 20 ms). Libraries use --threads threads. What is written to --work-dir is removed afterwards.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SAMPLES, BUCKETS, POSITIONS = 8, 5, 20
PROMPTS_AT_ONCE = 64
SECONDS_BETWEEN_LOOKS = 0.02
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Size:
    """How much is analysed at once: `dumps` of `rows` gradients each, `dim` numbers long."""

    dumps: int
    rows: int
    dim: int

    def __str__(self) -> str:
        return (f"{self.dumps} × " if self.dumps > 1 else "") + f"{self.rows:,} × {self.dim:,}"


@dataclass(frozen=True)
class Cost:
    """What one process took: seconds, of a processor too, and GiB at its peak, all of it and without files' pages."""

    seconds: float
    cpu_seconds: float
    resident: float
    anonymous: float

    def cells(self) -> list[str]:
        """For the table."""
        return [f"{self.seconds:.1f}", f"{self.cpu_seconds:.1f}", f"{self.resident:.2f}", f"{self.anonymous:.2f}"]


def together(costs: Iterable[Cost]) -> Cost:
    """One after the other."""
    seconds, cpu_seconds, resident, anonymous = zip(
        *((cost.seconds, cost.cpu_seconds, cost.resident, cost.anonymous) for cost in costs), strict=True
    )
    return Cost(sum(seconds), sum(cpu_seconds), max(resident), max(anonymous))


def size_of(text: str) -> Size:
    """`2x20480x8960` or `20480x8960`."""
    numbers = [int(part) for part in text.split("x")]
    if len(numbers) not in (2, 3) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxDIM or DUMPSxROWSxDIM")
    return Size(*numbers) if len(numbers) == 3 else Size(1, *numbers)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", type=size_of, metavar="[DUMPSx]ROWSxDIM")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="for both analyses (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, help="where dumps go (default: the system's temporary directory)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the dumps of each size, run the chain on them, print the table."""
    args = parse_args(argv)
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.work_dir) as directory:
            costs = measure(Path(directory), size, args.threads, args.device)
        for step, cost in (costs | {"**all**": together(costs.values())}).items():
            rows.append([str(size), step, *cost.cells()])
            print(rows[-1], file=sys.stderr, flush=True)
    header = ["positions × numbers", "step", "seconds", "CPU seconds", "peak GiB", "of which no file's"]
    for line in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(line)} |")
    print(
        f"\n{args.threads} threads, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, device {args.device}"
    )
    return 0


def measure(directory: Path, size: Size, threads: int, device: str) -> dict[str, Cost]:
    """The chain at one size, step by step."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    figures = str(directory / "figures")
    merges: list[Cost] = []
    tagged = []
    for index in range(size.dumps):
        shards = [directory / f"{index}_s{shard}" for shard in range(2)]
        n_prompts = max(2, round(size.rows / (SAMPLES * POSITIONS)))
        halves = np.array_split(np.arange(n_prompts), 2)
        for shard, (path, prompts) in enumerate(zip(shards, halves, strict=True)):
            write_shard(path, prompts, size.dim, seed=10 * index + shard)
        merged = directory / f"dump{index}"
        merges.append(run(environment, "merge_grad_vector_shards.py", str(merged), *map(str, shards)))
        for path in shards:
            shutil.rmtree(path)
        tagged.append(f"step{index}={merged}")
    costs = {"merge": together(merges)}
    for step, script in (("Exp 1", "analyze_exp1_compression.py"), ("Exp 2", "analyze_exp2_direction.py")):
        costs[step] = run(environment, script, "--device", device, "--output-dir", figures, *tagged)
    costs["plots"] = run(environment, "plot_exp12_intuitive.py", "--output-dir", figures, *tagged)
    return costs


def write_shard(path: Path, prompts: np.ndarray, dim: int, seed: int) -> None:
    """A finished dump with made-up gradients: decaying columns, what prompts and kinds share, and uneven norms."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    n_rows = len(prompts) * SAMPLES * POSITIONS
    scale = (1 / np.sqrt(1 + np.arange(dim) / 20)).astype(np.float32)
    n_correct = 0
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, dim), np.float32)) | {"shape": (n_rows, dim)}
    with (path / "grads.npy").open("wb") as grads, (path / "meta.jsonl").open("w", encoding="utf-8") as meta:
        np.lib.format.write_array_header_1_0(grads, header)
        row = 0
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[start : start + PROMPTS_AT_ONCE]
            shape = (len(some), SAMPLES, POSITIONS)
            entropy = rng.exponential(size=shape)
            correct = rng.random(shape[:2]) < 0.5
            n_correct += int(correct.sum())
            block = rng.standard_normal((*shape, dim), dtype=np.float32)
            block += 0.3 * rng.standard_normal((len(some), 1, 1, dim), dtype=np.float32)
            block += (
                0.3
                * rng.standard_normal((len(some), 2, 1, dim), dtype=np.float32)[
                    np.arange(len(some))[:, None], correct.astype(int)
                ]
            )
            block *= scale * np.exp(rng.standard_normal((*shape, 1))).astype(np.float32)
            block.tofile(grads)
            for place in np.ndindex(shape):
                prompt, sample, position = place
                meta.write(
                    json.dumps(
                        {
                            "row": row,
                            "prompt_idx": int(some[prompt]),
                            "sample_idx": sample,
                            "pos": position,
                            "bin": min(BUCKETS - 1, int(entropy[place])),
                            "entropy": float(entropy[place]),
                            "correct": bool(correct[prompt, sample]),
                            "token_id": position,
                            "logprob": -float(entropy[place]),
                        }
                    )
                    + "\n"
                )
                row += 1
    manifest = {
        "model_path": "models/made-up",
        "target": "model.layers.1.mlp.down_proj.weight",
        "row_idx": 0,
        "row_dim": dim,
        "num_prompts": len(prompts),
        "num_samples_per_prompt": SAMPLES,
        "num_rollouts": len(prompts) * SAMPLES,
        "num_correct_rollouts": n_correct,
        "num_positions": n_rows,
        "entropy_edges": [*map(float, range(BUCKETS)), 1000.0],
        "bins": BUCKETS,
        "pos_per_bin_per_rollout": POSITIONS // BUCKETS,
        "seed": 0,
        "max_new_tokens": POSITIONS,
        "temperature": 1.0,
        "prompt_idxs": prompts.tolist(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def run(environment: dict[str, str], script: str, *arguments: str) -> Cost:
    """Run one of the scripts to its end; its output goes to this process's only if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        anonymous = resident = 0.0
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            found = memory_of(process.pid)
            anonymous, resident = max(anonymous, found.get("RssAnon", 0)), max(resident, found.get("VmHWM", 0))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        seconds = time.perf_counter() - start
        _, status, used = ended
        process.returncode = os.waitstatus_to_exitcode(status)  # taken by wait4, so it can't learn it by itself
        if process.returncode != 0:
            output.seek(0)
            raise SystemExit(f"{script} failed with exit code {process.returncode}:\n{output.read()[-3000:]}")
    return Cost(seconds, used.ru_utime + used.ru_stime, resident, anonymous)


def memory_of(pid: int) -> dict[str, float]:
    """GiB of what the kernel says about a process's memory; nothing where it has just ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: int(kib) / 2**20 for name, kib in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB$", text, re.M)}


if __name__ == "__main__":
    sys.exit(main())
