#!/usr/bin/env python3
"""What a study costs: memory and FLOPs on paper, the formulae held against measurements, and the analyses by the clock.

What fits on a card, on paper; the formulae against saved tensors, peak memory and counted FLOPs of smaller models of
the same proportions (about six minutes on one core); Exp 1 and Exp 2 on a made-up dump of rows x numbers, each in a
process of its own (a laptop: 4000x256, a minute):

    python benchmarks/bench_scaling.py --paper
    python benchmarks/bench_scaling.py --check
    python benchmarks/bench_scaling.py --analyses 20480x8960 --device cuda

Markdown tables go to stdout.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gradprobe.dump.records import Position, write_records  # noqa: E402
from gradprobe.gradients.blocks import OUTPUT, Block, Saved  # noqa: E402
from gradprobe.gradients.engine import GradientEngine  # noqa: E402
from gradprobe.gradients.targets import AnyTarget, Projection, Target, expand_projected  # noqa: E402
from gradprobe.model.checkpoint import resolve_device, resolve_dtype  # noqa: E402
from gradprobe.model.decoder import LOGITS_PER_BLOCK  # noqa: E402

SUFFIX = "mlp.down_proj.weight"
POSITIONS_PER_ROLLOUT, PROMPT, SAMPLES, BUCKETS = 20, 128, 8, 5
BF16 = 2
LENGTHS = (1024, 4096, 16_384)
GB = 1e9
FORWARD, BACKWARD = 2, 7
"""FLOPs of a layer's fused causal attention over length² · (heads · head size): half of 2 products; back, of 7."""
CARDS = {"80 GB (H100 SXM)": 0.9 * 80 * GB, "141 GB (H200)": 0.9 * 141 * GB}
"""Usable bytes: a tenth is left to the allocator and the driver."""


@dataclass(frozen=True)
class Shape:
    """A Qwen model's dimensions."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 151_936
    tied: bool = False
    has_qk_norm: bool = True

    @property
    def q(self) -> int:
        """Numbers in a token's queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Numbers in a token's keys, and in its values."""
        return self.kv_heads * self.head_dim

    @property
    def mlp_weights(self) -> int:
        """Of one layer: gate, up and down."""
        return 3 * self.hidden * self.ffn

    @property
    def layer_weights(self) -> int:
        """That one layer multiplies with."""
        return 2 * self.hidden * (self.q + self.kv) + self.mlp_weights

    @property
    def middle(self) -> int:
        """The layer that the probe takes by default."""
        return self.layers // 2

    def scaled(self, width: int, depth: int, name: str) -> "Shape":
        """The same proportions, 1/`width` as wide and 1/`depth` as deep."""
        thinner = {key: getattr(self, key) // width for key in ("hidden", "ffn", "head_dim", "vocab")}
        return replace(self, name=name, layers=self.layers // depth, **thinner)

    def model(self, device: str, dtype: torch.dtype) -> nn.Module:
        """A frozen random model; on the device `meta` its weights take no memory."""
        family = "Qwen3" if self.has_qk_norm else "Qwen2"
        config = getattr(transformers, f"{family}Config")(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=max(LENGTHS),
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, dtype=dtype)
        return model.eval().requires_grad_(False)

    def n_weights(self) -> int:
        """All parameters, counted in the module tree."""
        return sum(parameter.numel() for parameter in self.model("meta", torch.bfloat16).parameters())


QWEN_1_5B = Shape("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 128, tied=True, has_qk_norm=False)
QWEN_8B = Shape("Qwen3-8B", 36, 4096, 12_288, 32, 8, 128)
QWEN_32B = Shape("Qwen3-32B", 64, 5120, 25_600, 64, 8, 128)
SHAPES = (QWEN_1_5B, QWEN_8B, QWEN_32B)
CHECKED = (
    QWEN_1_5B.scaled(4, 4, "1.5B / 4, 7 layers"),
    QWEN_8B.scaled(8, 4, "8B / 8, 9 layers"),
    QWEN_32B.scaled(8, 8, "32B / 8, 8 layers"),
)
CHECKED_BATCHES = ((4, 1024), (1, 2048), (1, 4096))
"""(sequences, tokens of each)."""


# ---- memory on paper --------------------------------------------------------------------------------------------


def cache_bytes_per_token(shape: Shape, size: int) -> int:
    """Keys and values of every layer."""
    return 2 * shape.layers * shape.kv * size


def saved_bytes_per_token(shape: Shape, size: int) -> int:
    """What is kept of one layer for one token; `size` is the bytes of a number in the model's dtype.

    Two norms keep their unit vector and one float32 factor; Qwen3's norms of queries and keys likewise; attention keeps
    queries, keys and values; the feed-forward block two vectors of its width.
    """
    norms = 2 * (size * shape.hidden + 4)
    qk_norms = size * (shape.q + shape.kv) + 4 * (shape.heads + shape.kv_heads) if shape.has_qk_norm else 0
    attention = size * (shape.q + 2 * shape.kv)
    return norms + qk_norms + attention + 2 * size * shape.ffn


def saved_bytes(shape: Shape, size: int, tokens: int, n_above: int, n_chosen: int) -> int:
    """What is kept of the layers above the target.

    Args:
        tokens: of the batch.
        n_above: layers above the target's.
        n_chosen: positions of all sequences: behind its attention the last layer runs there only.
    """
    whole_layers = n_above * tokens * saved_bytes_per_token(shape, size)
    left_out = (2 * size * shape.ffn + size * shape.hidden + 4) * (tokens - n_chosen)
    rotary = 2 * size * tokens * shape.head_dim
    return whole_layers - left_out + rotary


def head_bytes(shape: Shape, n_chosen: int) -> int:
    """Log-probs of a block of positions and two gradients of that size, float32."""
    return 3 * 4 * shape.vocab * min(n_chosen, LOGITS_PER_BLOCK // shape.vocab)


def peak_bytes(shape: Shape, size: int, tokens: int, n_chosen: int) -> int:
    """Beside the weights, while differentiating on the middle layer: what is kept, and the larger of two moments.

    One is the head's; in the other a backward pass has two gradients of the feed-forward block's width and two of the
    model's.
    """
    n_above = shape.layers - 1 - shape.middle
    kept = saved_bytes(shape, size, tokens, n_above, n_chosen)
    two = tokens * size * (shape.ffn + shape.hidden)  # the target's inputs and the hidden states
    return kept + two + max(head_bytes(shape, n_chosen), 2 * two)


# ---- FLOPs on paper ---------------------------------------------------------------------------------------------


def forward_flops(shape: Shape, length: int, attention: int = FORWARD) -> float:
    """One sequence through all layers, without the head."""
    return shape.layers * (2 * shape.layer_weights * length + attention * length**2 * shape.q)


def item_flops(shape: Shape, reached: list[int], layer: int, n_rows: int, with_attention: bool = True) -> float:
    """One sequence, differentiated at some positions: forward once, the layers above the target back for each.

    Args:
        reached: how many tokens stand up to each position, ascending: so far it goes back.
        layer: the lowest target's.
        n_rows: targets.
    """
    n_above, n, length = shape.layers - 1 - layer, len(reached), reached[-1]
    behind_attention = shape.mlp_weights + shape.hidden * shape.q  # in the last layer, at the chosen positions only
    forward = forward_flops(shape, length, FORWARD * with_attention) - 2 * behind_attention * (length - n)
    linear_maps = 2 * (n_above * shape.layer_weights - behind_attention) * sum(reached) + 2 * behind_attention * n
    products = with_attention * n_above * BACKWARD * shape.q * sum(t * t for t in reached)
    head = 4 * shape.hidden * shape.vocab * n
    return forward + linear_maps + products + head + 2 * n_rows * shape.ffn * sum(reached)


def gradient_flops(shape: Shape, response: int, layer: int, n_rows: int) -> float:
    """All of one rollout's gradients, at positions spread evenly."""
    reached = [PROMPT + response * (k + 1) // POSITIONS_PER_ROLLOUT for k in range(POSITIONS_PER_ROLLOUT)]
    return item_flops(shape, reached, layer, n_rows)


# ---- tables -----------------------------------------------------------------------------------------------------


def table(header: str, rows: Iterable[Iterable[Any]]) -> None:
    """Print it in Markdown; `header`: names of columns, " | " between them."""
    print(f"\n| {header} |\n|" + " --- |" * len(header.split(" | ")))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print()


def figure(value: float) -> str:
    """Three digits, with commas."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def print_paper() -> None:
    """All that needs no measurement."""
    table(
        "model | weights | bf16, GB | KV cache, kB/token | kept per layer, kB/token | layers above the middle one | "
        "their weights, GB",
        [shape_cells(shape) for shape in SHAPES],
    )
    table(
        "model | tokens | weights, GB | KV cache a rollout, GB | a further sequence, GB | head's logits, GB | "
        "peak of one sequence, GB | TFLOP a row | " + " | ".join(f"{card}: sequences / rollouts" for card in CARDS),
        [memory_cells(shape, length) for shape in SHAPES for length in LENGTHS],
    )


def shape_cells(shape: Shape) -> list[Any]:
    """What one model takes, whatever the length."""
    n_weights, n_above = shape.n_weights(), shape.layers - 1 - shape.middle
    per_token = [figure(of_token(shape, BF16) / 1e3) for of_token in (cache_bytes_per_token, saved_bytes_per_token)]
    above = [n_above, figure(BF16 * n_above * shape.layer_weights / GB)]
    return [shape.name, f"{n_weights:,}", figure(BF16 * n_weights / GB), *per_token, *above]


def memory_cells(shape: Shape, length: int) -> list[str]:
    """Memory and FLOPs of one model and length, and what fits beside the weights."""
    weights, cache = BF16 * shape.n_weights(), cache_bytes_per_token(shape, BF16) * length
    one, two = (peak_bytes(shape, BF16, n * length, n * POSITIONS_PER_ROLLOUT) for n in (1, 2))
    flops = gradient_flops(shape, length - PROMPT, shape.middle, 1) / POSITIONS_PER_ROLLOUT
    head = head_bytes(shape, POSITIONS_PER_ROLLOUT)
    sizes = [figure(n_bytes / GB) for n_bytes in (weights, cache, two - one, head, weights + one)]
    fits = []
    for usable in CARDS.values():
        n, room = 0, usable - weights
        while peak_bytes(shape, BF16, (n + 1) * length, (n + 1) * POSITIONS_PER_ROLLOUT) <= room:
            n += 1
        fits.append(f"{n:,} / {int(max(0, room) // cache):,}")
    return [shape.name, f"{length:,}", *sizes, figure(flops / 1e12), *fits]


# ---- the formulae against measurements --------------------------------------------------------------------------


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak anew: the allocator's on a GPU, the process's resident set on a CPU (where Linux allows it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was asked; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gradients_of(shape: Shape, model: nn.Module, targets: list[AnyTarget], n: int, length: int) -> Callable[[], None]:
    """What differentiates n made-up sequences at two positions each; the first token is the prompt."""
    engine = GradientEngine(model, targets)

    def work(n: int = n, length: int = length) -> None:
        ids = np.random.default_rng(0).integers(shape.vocab, size=(n, length)).tolist()
        positions = [np.linspace(0, length - 2, 3).astype(int)[1:]] * n
        for _ in engine.batches([row[:1] for row in ids], [row[1:] for row in ids], positions, n * length):
            pass

    work(1, 16)  # the engine tries its blocks out
    return work


class ProductCount(TorchDispatchMode):
    """Counts the FLOPs of matrix products, in place or not; attention's are none to torch."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do as asked."""
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            self.flops += 2 * found.numel() * args[-2].shape[-1]
        return found


def measured_saved_bytes(work: Callable[[], None]) -> int:
    """Bytes that blocks keep while `work` runs, weights left out."""
    kept: dict[int, torch.Tensor] = {}
    forward = Block.forward

    def kept_of(x: Any) -> Iterable[torch.Tensor]:
        if isinstance(x, torch.Tensor):
            return [x]
        parts = x if isinstance(x, list | tuple) else vars(x).values()
        return [tensor for part in parts for tensor in kept_of(part)]

    def noting(self: Block, *args: Any) -> tuple[torch.Tensor, Saved]:
        x, saved = forward(self, *args)
        if set(self.taps) != {OUTPUT}:
            kept.update((t.untyped_storage().data_ptr(), t) for t in kept_of(saved) if not isinstance(t, nn.Parameter))
        return x, saved

    with mock.patch.object(Block, "forward", noting):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure_peak(shape: Shape, n: int, length: int, device_name: str) -> list[str]:
    """Cells of one batch: bytes kept and at the peak; in a process of its own, since the peak is the process's."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    device = torch.device(device_name)
    dtype = resolve_dtype("auto", device)
    work = gradients_of(shape, shape.model(device_name, dtype), [Target(shape.middle, SUFFIX, 0)], n, length)
    gc.collect()
    reset_peak_memory(device)
    before = peak_memory(device)
    work()
    peak, kept = peak_memory(device) - before, measured_saved_bytes(work)
    n_cut = n * (length - 1)  # the last token predicts nothing and is cut
    kept_on_paper = saved_bytes(shape, dtype.itemsize, n_cut, shape.layers - 1 - shape.middle, 2 * n)
    peak_on_paper = peak_bytes(shape, dtype.itemsize, n * length, 2 * n)
    sizes = [figure(kept / 1e6), f"{kept / kept_on_paper:.3f}", figure(peak / 1e6), f"{peak / peak_on_paper:.2f}"]
    return [shape.name, f"{n} × {length:,}", *sizes]


def print_check(device: torch.device, is_quick: bool = False) -> None:
    """Measured against paper; quickly, the first shape and one short batch alone."""
    shapes, batches = (CHECKED[:1], ((1, 256),)) if is_quick else (CHECKED, CHECKED_BATCHES)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors leave the resident set at once
    rows = []
    for shape in shapes:
        for n, length in batches:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(measure_peak, shape, n, length, device.type).result())
    table("shape | sequences × tokens | kept, MB | measured : paper | peak, MB | measured : paper", rows)
    for header, cells_of in (
        ("shape | tokens | all-linear, kept, MB | measured : paper", network_cells),
        ("shape | tokens | kept in bf16, MB | measured : paper | GFLOP counted | counted : paper", narrow_cells),
    ):
        table(header, [cells_of(shape, length) for shape in shapes for length in (256, 512)])


def network_cells(shape: Shape, length: int) -> list[Any]:
    """Bytes kept for a 16 × 16 projection of all linear weights, float32, one sequence."""
    model, projection = shape.model("cpu", torch.float32), Projection(16, 16, 0)
    targets = expand_projected(model, "all", "all-linear", projection)
    inputs = 7 * shape.layers * (length - 1) * 4 * projection.cols  # Q x of each map, held by the engine, not by blocks
    kept = inputs + measured_saved_bytes(gradients_of(shape, model, targets, 1, length))
    paper = inputs + saved_bytes(shape, 4, length - 1, shape.layers, 2)
    return [shape.name, length, figure(kept / 1e6), f"{kept / paper:.3f}"]


def narrow_cells(shape: Shape, length: int) -> list[Any]:
    """Of one sequence, the bytes kept in bfloat16 and the FLOPs of three targets."""
    model = shape.model("cpu", torch.bfloat16)
    kept = measured_saved_bytes(gradients_of(shape, model, [Target(shape.middle, SUFFIX, 0)], 1, length))
    kept_on_paper = saved_bytes(shape, BF16, length - 1, shape.layers - 1 - shape.middle, 2)
    targets = [Target(shape.middle, SUFFIX, row) for row in range(3)]
    work = gradients_of(shape, shape.model("cpu", torch.float32), targets, 1, length)
    with ProductCount() as count:
        work()
    reached = [(length - 2) // 2 + 1, length - 1]
    flops_on_paper = item_flops(shape, reached, shape.middle, 3, with_attention=False)
    measured = [figure(kept / 1e6), f"{kept / kept_on_paper:.3f}", figure(count.flops / 1e9)]
    return [shape.name, length, *measured, f"{count.flops / flops_on_paper:.4f}"]


# ---- the analyses --------------------------------------------------------------------------------------------------


def print_analyses(size: str, device: torch.device) -> None:
    """Seconds and peak memory of Exp 1 and Exp 2; `size`: ROWSxDIM of the made-up dump, removed afterwards."""
    rows, dim = map(int, size.split("x"))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    cells = []
    with tempfile.TemporaryDirectory() as directory:
        dump = Path(directory) / "dump"
        write_dump(dump, max(2, round(rows / (SAMPLES * POSITIONS_PER_ROLLOUT))), dim)
        for script in ("analyze_exp1_compression.py", "analyze_exp2_direction.py"):
            start = time.perf_counter()
            command = [sys.executable, ROOT / script, "--device", device.type, "--output-dir", directory, "--quiet"]
            process = subprocess.Popen(
                [*command, f"made-up={dump}"], stdout=subprocess.DEVNULL, env=os.environ | threads
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)  # taken by wait4, so it can't learn it by itself
            if process.returncode != 0:
                raise SystemExit(1)
            seconds, cpu = time.perf_counter() - start, used.ru_utime + used.ru_stime
            cells.append([script, f"{seconds:.1f}", f"{cpu:.1f}", f"{used.ru_maxrss / 2**20:.2f}"])
    table("step | seconds | CPU seconds | peak GiB", cells)


def write_dump(path: Path, n_prompts: int, dim: int) -> None:
    """A finished dump: decaying columns, what the rollouts of a prompt and kind share, and uneven norms."""
    path.mkdir()
    rng = np.random.default_rng(0)
    shape = (n_prompts, SAMPLES, POSITIONS_PER_ROLLOUT)
    entropy, correct = rng.exponential(size=shape), rng.random(shape[:2]) < 0.5
    # Not through a memory map: the peak of the processes to come would count its pages.
    header = {"descr": "<f4", "fortran_order": False, "shape": (entropy.size, dim)}
    with (path / "grads.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for kinds in correct.astype(int):
            shared = 0.3 * rng.standard_normal((2, 1, dim), np.float32)[kinds]
            noise = rng.standard_normal((SAMPLES, POSITIONS_PER_ROLLOUT, dim), np.float32)
            norms = np.exp(rng.standard_normal((SAMPLES, POSITIONS_PER_ROLLOUT, 1)))
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
        **{
            "entropy_edges": [*map(float, range(BUCKETS)), 1000.0],
            "pos_per_bin_per_rollout": POSITIONS_PER_ROLLOUT // BUCKETS,
        },
        **{
            "seed": 0,
            "max_new_tokens": POSITIONS_PER_ROLLOUT,
            "temperature": 1.0,
            "prompt_idxs": list(range(n_prompts)),
        },
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--paper", action="store_true", help="tables that need no measurement")
    what.add_argument("--check", action="store_true", help="the formulae against measurements")
    what.add_argument("--analyses", metavar="ROWSxDIM", help="Exp 1 and Exp 2 on a made-up dump")
    parser.add_argument("--quick", action="store_true", help="of --check, one shape and one short batch alone")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    if args.paper:
        print_paper()
    elif args.analyses:
        print_analyses(args.analyses, resolve_device(args.device))
    else:
        print_check(resolve_device(args.device), args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
