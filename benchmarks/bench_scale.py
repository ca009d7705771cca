#!/usr/bin/env python3
"""Exp 1 and Exp 2 on a made-up dump of any size, each script in a process of its own: how long, and how much memory.

    python benchmarks/bench_scale.py 20480x8960 --device cuda
    python benchmarks/bench_scale.py 4000x256      # a laptop, in a minute

Rows x numbers, of 8 rollouts a prompt, 5 entropy buckets, 20 positions a rollout; removed afterwards.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gradprobe.dump.records import Position, write_records  # noqa: E402

SAMPLES, BUCKETS, POSITIONS = 8, 5, 20


def main(argv: list[str] | None = None) -> int:
    """Write the dump, analyse it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", metavar="ROWSxDIM")
    parser.add_argument("--device", default="cpu", help="for both analyses (default: %(default)s)")
    args = parser.parse_args(argv)
    rows, dim = map(int, args.size.split("x"))
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    print("| step | seconds | CPU seconds | peak GiB |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        dump = Path(directory) / "dump"
        write_dump(dump, max(2, round(rows / (SAMPLES * POSITIONS))), dim)
        for script in ("analyze_exp1_compression.py", "analyze_exp2_direction.py"):
            start = time.perf_counter()
            command = [sys.executable, ROOT / script, "--device", args.device, "--output-dir", directory, "--quiet"]
            process = subprocess.Popen([*command, f"made-up={dump}"], stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)  # taken by wait4, so it can't learn it by itself
            if process.returncode != 0:
                return 1
            seconds, peak = time.perf_counter() - start, used.ru_maxrss / 2**20
            print(f"| {script} | {seconds:.1f} | {used.ru_utime + used.ru_stime:.1f} | {peak:.2f} |", flush=True)
    return 0


def write_dump(path: Path, n_prompts: int, dim: int) -> None:
    """A finished dump: decaying columns, what the rollouts of a prompt and kind share, and uneven norms."""
    path.mkdir()
    rng = np.random.default_rng(0)
    shape = (n_prompts, SAMPLES, POSITIONS)
    entropy, correct = rng.exponential(size=shape), rng.random(shape[:2]) < 0.5
    # Not through a memory map: the peak of the processes to come would count its pages.
    header = {"descr": "<f4", "fortran_order": False, "shape": (entropy.size, dim)}
    with (path / "grads.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for kinds in correct.astype(int):
            shared = 0.3 * rng.standard_normal((2, 1, dim), np.float32)[kinds]
            noise = rng.standard_normal((SAMPLES, POSITIONS, dim), np.float32)
            norms = np.exp(rng.standard_normal((SAMPLES, POSITIONS, 1)))
            ((shared + noise) * norms / np.sqrt(1 + np.arange(dim) / 20)).astype(np.float32).tofile(file)
    places = enumerate(zip(np.ndindex(shape), entropy.ravel().tolist(), strict=True))
    meta = (
        Position(row, p, s, t, min(BUCKETS - 1, int(h)), h, bool(correct[p, s]), t, -h, 0.1)
        for row, ((p, s, t), h) in places
    )
    write_records(path / "meta.jsonl", meta)
    manifest = {
        **{"model_path": "made-up", "target": "model.layers.1.mlp.down_proj.weight", "row_idx": 0, "row_dim": dim},
        **{"num_prompts": n_prompts, "num_samples_per_prompt": SAMPLES, "num_rollouts": correct.size},
        **{"num_correct_rollouts": int(correct.sum()), "num_positions": entropy.size, "bins": BUCKETS},
        **{"entropy_edges": [*map(float, range(BUCKETS)), 1000.0], "pos_per_bin_per_rollout": POSITIONS // BUCKETS},
        **{"seed": 0, "max_new_tokens": POSITIONS, "temperature": 1.0, "prompt_idxs": list(range(n_prompts))},
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
