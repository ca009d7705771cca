#!/usr/bin/env python3
"""What a study costs: memory and FLOPs per gradient on paper, held against measurements, and hours of whole studies.

The tables of docs/scaling.md that need no measurement:

    python benchmarks/bench_scaling.py --paper

The formulae against saved tensors, peak memory and counted FLOPs of smaller models of the same proportions (about
six minutes on one core):

    python benchmarks/bench_scaling.py --check

This machine's rates, and the hours that the studies would take on it; Qwen2.5-1.5B's shape with random weights on a
GPU, a thinner one on a CPU:

    python benchmarks/bench_scaling.py

Markdown tables go to stdout.
"""

import argparse
import gc
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_probe import matmul_rate, peak_memory, reset_peak_memory  # noqa: E402

from gradprobe.dump.records import Position, Rollout, write_records  # noqa: E402
from gradprobe.gradients.blocks import OUTPUT, Block, Saved  # noqa: E402
from gradprobe.gradients.engine import GradientEngine  # noqa: E402
from gradprobe.gradients.targets import Projection, Target, expand_projected  # noqa: E402
from gradprobe.model.checkpoint import resolve_device, resolve_dtype  # noqa: E402
from gradprobe.model.decoder import LOGITS_PER_BLOCK  # noqa: E402
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses  # noqa: E402
from gradprobe.rollouts.score import score_responses  # noqa: E402

SUFFIX = "mlp.down_proj.weight"
POSITIONS_PER_ROLLOUT = 20
SAMPLE_ROWS = 512
BF16, FLOAT32 = 2, 4
LENGTHS = (1024, 4096, 16_384)
GB = 1e9


@dataclass(frozen=True)
class Attention:
    """FLOPs of attention, in multiples of length² · (heads · head size), of one layer forward and back."""

    forward: float
    backward: float


FUSED_CAUSAL = Attention(2, 7)
"""Half of the two products forward; back, these anew, and again beside four of their size, by half each."""
NOT_COUNTED = Attention(0, 0)
"""The counter sees linear maps alone."""


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
        return replace(
            self,
            name=name,
            layers=self.layers // depth,
            hidden=self.hidden // width,
            ffn=self.ffn // width,
            head_dim=self.head_dim // width,
            vocab=self.vocab // width,
        )

    def model(self, device: str, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
        """A frozen random model; on the device `meta` its weights take no memory."""
        config_class = transformers.Qwen3Config if self.has_qk_norm else transformers.Qwen2Config
        model_class = transformers.Qwen3ForCausalLM if self.has_qk_norm else transformers.Qwen2ForCausalLM
        config = config_class(
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
            model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
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


def network_bytes(shape: Shape, size: int, tokens: int, n_chosen: int, projection: Projection) -> int:
    """What a projection of all linear weights keeps: of every layer, and of each linear map's inputs Q x, float32."""
    return saved_bytes(shape, size, tokens, shape.layers, n_chosen) + 7 * shape.layers * tokens * 4 * projection.cols


def head_bytes(shape: Shape, n_chosen: int) -> int:
    """Log-probs of a block of positions and two gradients of that size, float32."""
    return 3 * 4 * shape.vocab * min(n_chosen, LOGITS_PER_BLOCK // shape.vocab)


def backward_bytes(shape: Shape, size: int, rows: int) -> int:
    """What a backward pass needs for a moment: two gradients of the feed-forward block's width, two of the model's."""
    return rows * size * (2 * shape.ffn + 2 * shape.hidden)


def peak_bytes(shape: Shape, size: int, tokens: int, n_chosen: int) -> int:
    """Beside the weights, while differentiating on the middle layer: what is kept, and the larger of two moments."""
    n_above = shape.layers - 1 - shape.middle
    kept = saved_bytes(shape, size, tokens, n_above, n_chosen)
    kept += tokens * size * shape.ffn  # the target's inputs
    kept += tokens * size * shape.hidden  # hidden states
    return kept + max(head_bytes(shape, n_chosen), backward_bytes(shape, size, tokens))


# ---- FLOPs on paper ---------------------------------------------------------------------------------------------


def forward_flops(shape: Shape, length: int, attention: Attention = FUSED_CAUSAL) -> float:
    """One sequence through all layers, without the head."""
    return shape.layers * (2 * shape.layer_weights * length + attention.forward * length**2 * shape.q)


def item_flops(
    shape: Shape, length: int, reached: list[int], layer: int, n_rows: int, attention: Attention = FUSED_CAUSAL
) -> float:
    """One sequence, differentiated at some positions: forward once, the layers above the target back for each.

    Args:
        reached: how many tokens stand up to each position: so far it goes back.
        layer: the lowest target's.
        n_rows: targets.
    """
    n_above, n = shape.layers - 1 - layer, len(reached)
    behind_attention = shape.mlp_weights + shape.hidden * shape.q  # in the last layer, at the chosen positions only
    forward = forward_flops(shape, length, attention) - 2 * behind_attention * (length - n)
    linear_maps = 2 * (n_above * shape.layer_weights - behind_attention) * sum(reached) + 2 * behind_attention * n
    products = n_above * attention.backward * shape.q * sum(t * t for t in reached)
    head = 4 * shape.hidden * shape.vocab * n
    return forward + linear_maps + products + head + 2 * n_rows * shape.ffn * sum(reached)


def gradient_flops(shape: Shape, prompt: int, response: int, layer: int, n_rows: int) -> float:
    """All of one rollout's gradients, at positions spread evenly."""
    reached = [prompt + response * (k + 1) // POSITIONS_PER_ROLLOUT for k in range(POSITIONS_PER_ROLLOUT)]
    return item_flops(shape, reached[-1], reached, layer, n_rows)


def scoring_flops(shape: Shape, prompt: int, response: int) -> float:
    """One rollout forward, the head at its response tokens."""
    return forward_flops(shape, prompt + response) + 2 * shape.hidden * shape.vocab * response


# ---- seconds on paper -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What computes: its memory in bytes, FLOP/s and bytes/s at best, and the shares of these that are attained."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    share_passes: float
    share_decoding: float
    seconds_per_operation: float
    """That Python and torch take to start one, however small: what decoding a few rollouts waits for."""

    @property
    def usable(self) -> float:
        """A tenth is left to the allocator and the driver."""
        return 0.9 * self.memory


ASSUMED = {"share_passes": 0.4, "share_decoding": 0.5, "seconds_per_operation": 10e-6}
CARDS = (
    Card("80 GB (H100 SXM)", 80 * GB, 989e12, 3.35e12, **ASSUMED),
    Card("141 GB (H200)", 141 * GB, 989e12, 4.8e12, **ASSUMED),
)
"""Memory, dense bfloat16 FLOP/s and bandwidth by the maker's data sheets; what stands in `ASSUMED` is assumed."""


@dataclass(frozen=True)
class Study:
    """Everything is at full length: an upper bound where responses end of their own."""

    name: str
    shape: Shape
    checkpoints: int
    prompts: int
    samples: int
    response: int
    layers: tuple[int, ...]
    rows_per_layer: int
    prompt: int = 128

    @property
    def rollouts(self) -> int:
        """Of all checkpoints."""
        return self.checkpoints * self.prompts * self.samples

    @property
    def targets(self) -> int:
        """Rows of weights."""
        return len(self.layers) * self.rows_per_layer

    @property
    def rows(self) -> int:
        """Gradients of each target."""
        return self.rollouts * POSITIONS_PER_ROLLOUT


STUDIES = (
    Study("original", QWEN_1_5B, 2, 128, 8, 1024, (14,), 1),
    Study("16 checkpoints × 24 targets", QWEN_1_5B, 16, 128, 8, 1024, (7, 14, 21), 8),
    Study("8B", QWEN_8B, 2, 128, 8, 4096, (18,), 1),
    Study("32B", QWEN_32B, 2, 128, 8, 4096, (32,), 1),
)


def rows_at_once(study: Study, memory: float) -> int:
    """Rollouts whose keys and values fit beside the weights."""
    shape, length = study.shape, study.prompt + study.response
    per_rollout = cache_bytes_per_token(shape, BF16) * length
    return min(SAMPLE_ROWS, int((memory - BF16 * shape.n_weights()) // per_rollout))


def cards_needed(study: Study, card: Card) -> int:
    """The fewest cards that hold the weights and one sequence's gradients, and eight rollouts while sampling."""
    length = study.prompt + study.response
    alone = BF16 * study.shape.n_weights() + peak_bytes(study.shape, BF16, length, POSITIONS_PER_ROLLOUT)
    n_cards = math.ceil(alone / card.usable)
    while rows_at_once(study, n_cards * card.usable) < 8:
        n_cards += 1
    return n_cards


class OperationCount(TorchDispatchMode):
    """Counts what torch is asked to compute; views are free."""

    n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do as asked."""
        self.n += not function.is_view
        return function(*args, **(kwargs or {}))


class ProductCount(TorchDispatchMode):
    """Counts the FLOPs of matrix products, in place or not; attention's are none to torch."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do as asked."""
        name, found = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "addmm_", "bmm"):
            self.flops += 2 * found.numel() * args[-2].shape[-1]
        return found


@cache
def operations_per_step(shape: Shape) -> int:
    """Operations of one decoding step, counted in a thin model of as many layers."""
    model = shape.scaled(8, 1, shape.name).model("cpu", torch.float32)
    past = DynamicCache(config=model.config)
    ids, options = torch.zeros((2, 8), dtype=torch.long), {"past_key_values": past, "use_cache": True}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, **options)
        mask = torch.ones((2, 9), dtype=torch.long)
        mask[0, 0] = 0
        with OperationCount() as count:
            model(input_ids=ids[:, :1], attention_mask=mask, logits_to_keep=1, **options)
    return count.n


def decoding_seconds(shape: Shape, card: Card, n_rows: int, prompt: int, response: int, size: int = BF16) -> float:
    """One batch. A step takes as long as the slowest of three.

    All weights and the batch's keys and values are read; the arithmetic is done; the operations are started.
    """
    average = prompt + response / 2
    weights = shape.layers * shape.layer_weights + shape.hidden * shape.vocab
    n_bytes = size * weights + n_rows * average * cache_bytes_per_token(shape, size)
    flops = n_rows * (2 * weights + 4 * average * shape.q * shape.layers)
    return response * max(
        n_bytes / (card.share_decoding * card.bandwidth),
        flops / (card.share_passes * card.flops),
        operations_per_step(shape) * card.seconds_per_operation,
    )


def study_hours(study: Study, card: Card) -> dict[str, float]:
    """Wall-clock hours of each phase, one card at a time at work; `cards` hold the model."""
    n_cards, shape = cards_needed(study, card), study.shape
    n_rows = rows_at_once(study, n_cards * card.usable) // study.samples * study.samples
    passes = card.share_passes * card.flops
    batches = study.rollouts / n_rows
    prompts = study.rollouts / study.samples * forward_flops(shape, study.prompt) / passes
    sampling = batches * decoding_seconds(shape, card, n_rows, study.prompt, study.response) + prompts
    scoring = study.rollouts * scoring_flops(shape, study.prompt, study.response) / passes
    gradients = (
        study.rollouts * gradient_flops(shape, study.prompt, study.response, min(study.layers), study.targets) / passes
    )
    seconds = {"sampling": sampling, "scoring": scoring, "gradients": gradients}
    return {"cards": n_cards, **{phase: value / 3600 for phase, value in seconds.items()}}


def dump_bytes(study: Study) -> float:
    """`grads.npy` and `meta.jsonl` of every target, `rollouts.jsonl` of every checkpoint."""
    per_prompt_token, per_token, per_row = record_bytes()
    per_rollout = study.prompt * per_prompt_token + study.response * per_token
    return study.targets * study.rows * (4 * study.shape.ffn + per_row) + study.rollouts * per_rollout


def record_bytes() -> tuple[float, float, float]:
    """Bytes on disk of a prompt token, a response token and a row's description, as written for made-up numbers."""
    rng, n = np.random.default_rng(0), 4096
    ids = rng.integers(QWEN_1_5B.vocab, size=n).tolist()
    numbers = rng.random((2, n), dtype=np.float32).tolist()
    prompt = Rollout(0, 0, "", ids, [], [], [], "", "", True)
    texts = {"tail_mass": numbers[0], "token_texts": ["word"] * n}
    rollout = Rollout(0, 0, "", [], ids, *numbers, "word" * n, "", True, **texts)
    lines = [Position(i, 100, 4, 512, 3, numbers[0][i], False, ids[i], numbers[1][i], numbers[0][i]) for i in range(n)]
    sizes = []
    with tempfile.TemporaryDirectory() as directory:
        for records in ([prompt], [rollout], lines):
            write_records(Path(directory) / "records.jsonl", records)
            sizes.append((Path(directory) / "records.jsonl").stat().st_size / n)
    return sizes[0], sizes[1], sizes[2]


# ---- tables -----------------------------------------------------------------------------------------------------


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print it in Markdown."""
    header = list(header)
    print("\n| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
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
        [
            *("model", "weights", "bf16, GB", "KV cache, kB/token", "kept per layer, kB/token"),
            *("layers above the middle one", "their weights, GB", "operations a decoding step"),
        ],
        [
            [
                s.name,
                f"{s.n_weights():,}",
                figure(BF16 * s.n_weights() / GB),
                figure(cache_bytes_per_token(s, BF16) / 1e3),
                figure(saved_bytes_per_token(s, BF16) / 1e3),
                s.layers - 1 - s.middle,
                figure(BF16 * (s.layers - 1 - s.middle) * s.layer_weights / GB),
                f"{operations_per_step(s):,}",
            ]
            for s in SHAPES
        ],
    )
    print_memory()
    print_studies(CARDS)
    sizes = "{:.0f} a prompt token, {:.0f} a response token, {:.0f} a row's line in meta.jsonl".format(*record_bytes())
    print(f"Bytes on disk: {sizes}.")


def print_memory() -> None:
    """Memory and FLOPs of each model and length, and what fits beside the weights."""
    rows = []
    for shape in SHAPES:
        weights = BF16 * shape.n_weights()
        for length in LENGTHS:
            one = peak_bytes(shape, BF16, length, POSITIONS_PER_ROLLOUT)
            two = peak_bytes(shape, BF16, 2 * length, 2 * POSITIONS_PER_ROLLOUT)
            cache = cache_bytes_per_token(shape, BF16) * length
            prompt = 128
            flops = gradient_flops(shape, prompt, length - prompt, shape.middle, 1) / POSITIONS_PER_ROLLOUT
            fits = [(largest_batch(shape, length, card), int(max(0, card.usable - weights) // cache)) for card in CARDS]
            rows.append(
                [
                    shape.name,
                    f"{length:,}",
                    figure(weights / GB),
                    figure(cache / GB),
                    figure((two - one) / GB),
                    figure(head_bytes(shape, POSITIONS_PER_ROLLOUT) / GB),
                    figure((weights + one) / GB),
                    figure(flops / 1e12),
                    *[f"{n_sequences:,} / {n_rollouts:,}" for n_sequences, n_rollouts in fits],
                ]
            )
    table(
        [
            *("model", "tokens", "weights, GB", "KV cache a rollout, GB", "a further sequence, GB"),
            *("head's logits, GB", "peak of one sequence, GB", "TFLOP a row"),
            *(f"{card.name}: sequences / rollouts" for card in CARDS),
        ],
        rows,
    )


def largest_batch(shape: Shape, length: int, card: Card) -> int:
    """Sequences in one gradient pass."""
    n, room = 0, card.usable - BF16 * shape.n_weights()
    while peak_bytes(shape, BF16, (n + 1) * length, (n + 1) * POSITIONS_PER_ROLLOUT) <= room:
        n += 1
    return n


def print_studies(cards: Iterable[Card], studies: Iterable[Study] = STUDIES) -> None:
    """Hours and bytes of the studies."""
    rows = []
    for study in studies:
        for card in cards:
            hours = study_hours(study, card)
            phases = [hours[phase] for phase in ("sampling", "scoring", "gradients")]
            rows.append(
                [
                    study.name,
                    study.shape.name,
                    f"{study.rollouts:,} × {study.response:,}",
                    f"{study.targets} × {study.rows:,}",
                    card.name,
                    int(hours["cards"]),
                    *map(figure, phases),
                    figure(hours["cards"] * sum(phases)),
                    figure(dump_bytes(study) / GB),
                ]
            )
    table(
        [
            *("study", "model", "rollouts × tokens", "targets × rows", "card", "cards a model"),
            *("sampling, h", "scoring, h", "gradients, h", "card hours", "dumps, GB"),
        ],
        rows,
    )


# ---- the formulae against measurements --------------------------------------------------------------------------


def random_ids(shape: Shape, n: int, length: int, seed: int = 0) -> list[list[int]]:
    """Made-up sequences."""
    return np.random.default_rng(seed).integers(shape.vocab, size=(n, length)).tolist()


def differentiate(engine: GradientEngine, ids: list[list[int]], n_positions: int) -> Callable[[], None]:
    """One batch of whole sequences, positions spread evenly; the first token is the prompt."""
    length = len(ids[0])
    positions = np.linspace(0, length - 2, n_positions + 1).astype(int)[1:]
    prompts, responses = [row[:1] for row in ids], [row[1:] for row in ids]

    def work() -> None:
        for _ in engine.batches(prompts, responses, [positions] * len(ids), len(ids) * length):
            pass

    return work


def warm_engine(shape: Shape, model: nn.Module, targets: list[Target]) -> GradientEngine:
    """An engine that has tried its blocks out."""
    engine = GradientEngine(model, targets)
    differentiate(engine, random_ids(shape, 1, 16), 2)()
    return engine


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


def measure_peak(shape: Shape, n: int, length: int, device_name: str) -> dict[str, float]:
    """Measured : predicted of one batch; in a process of its own, since the peak is the process's."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    device, n_positions = torch.device(device_name), 2
    dtype, size = (torch.bfloat16, BF16) if device.type == "cuda" else (torch.float32, FLOAT32)
    model = shape.model(device_name, dtype)
    engine = warm_engine(shape, model, [Target(shape.middle, SUFFIX, 0)])
    work = differentiate(engine, random_ids(shape, n, length), n_positions)
    n_above, tokens = shape.layers - 1 - shape.middle, n * length
    shortest = (length - 1) * n  # the last token predicts nothing and is cut
    gc.collect()
    reset_peak_memory(device)
    before = peak_memory(device)
    work()
    peak = peak_memory(device) - before
    saved = measured_saved_bytes(work)
    predicted_saved = saved_bytes(shape, size, shortest, n_above, n * n_positions)
    predicted_peak = peak_bytes(shape, size, tokens, n * n_positions)
    return {"saved": saved, "predicted_saved": predicted_saved, "peak": peak, "predicted_peak": predicted_peak}


def measure_flops(shape: Shape, length: int) -> tuple[float, float]:
    """FLOPs of one sequence with two positions and three targets: counted, and on paper."""
    model = shape.model("cpu", torch.float32)
    engine = warm_engine(shape, model, [Target(shape.middle, SUFFIX, row) for row in range(3)])
    with ProductCount() as count:
        differentiate(engine, random_ids(shape, 1, length), 2)()
    reached = [(length - 2) // 2 + 1, length - 1]
    return count.flops, item_flops(shape, length - 1, reached, shape.middle, 3, NOT_COUNTED)


def measure_kept(shape: Shape, dtype: torch.dtype, length: int) -> tuple[int, int]:
    """Bytes kept of one sequence with two positions: measured, and on paper."""
    model = shape.model("cpu", dtype)
    engine = warm_engine(shape, model, [Target(shape.middle, SUFFIX, 0)])
    kept = measured_saved_bytes(differentiate(engine, random_ids(shape, 1, length), 2))
    n_above = shape.layers - 1 - shape.middle
    return kept, saved_bytes(shape, dtype.itemsize, length - 1, n_above, 2)


def measure_network(shape: Shape, dtype: torch.dtype, length: int) -> tuple[int, int]:
    """Bytes kept for a 16 × 16 projection of all linear weights, one sequence: measured, and on paper."""
    model, projection = shape.model("cpu", dtype), Projection(16, 16, 0)
    engine = warm_engine(shape, model, expand_projected(model, "all", "all-linear", projection))
    kept = measured_saved_bytes(differentiate(engine, random_ids(shape, 1, length), 2))
    n_tokens = length - 1
    inputs = 7 * shape.layers * n_tokens * 4 * projection.cols  # held by the engine, not by blocks
    return kept + inputs, network_bytes(shape, dtype.itemsize, n_tokens, 2, projection)


def print_check(device: torch.device, is_quick: bool = False) -> None:
    """Measured against paper; quickly, the first shape and one short batch alone."""
    shapes, batches = (CHECKED[:1], ((1, 256),)) if is_quick else (CHECKED, CHECKED_BATCHES)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors leave the resident set at once
    rows = []
    for shape in shapes:
        for n, length in batches:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure_peak, shape, n, length, device.type).result()
            rows.append(
                [
                    shape.name,
                    f"{n} × {length:,}",
                    figure(found["saved"] / 1e6),
                    f"{found['saved'] / found['predicted_saved']:.3f}",
                    figure(found["peak"] / 1e6),
                    f"{found['peak'] / found['predicted_peak']:.2f}",
                ]
            )
    table(["shape", "sequences × tokens", "kept, MB", "measured : paper", "peak, MB", "measured : paper"], rows)
    small = [
        (shape, length, *measure_kept(shape, torch.bfloat16, length), *measure_flops(shape, length))
        for shape in shapes
        for length in (256, 512)
    ]
    network = [
        (shape, length, *measure_network(shape, torch.float32, length)) for shape in shapes for length in (256, 512)
    ]
    table(
        ["shape", "tokens", "all-linear, kept, MB", "measured : paper"],
        [[s.name, n, figure(kept / 1e6), f"{kept / paper:.3f}"] for s, n, kept, paper in network],
    )
    table(
        ["shape", "tokens", "kept in bf16, MB", "measured : paper", "GFLOP counted", "counted : paper"],
        [
            [s.name, n, figure(kept / 1e6), f"{kept / p_kept:.3f}", figure(flops / 1e9), f"{flops / p_flops:.4f}"]
            for s, n, kept, p_kept, flops, p_flops in small
        ],
    )


# ---- this machine -----------------------------------------------------------------------------------------------


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written by a large copy, the best of several."""
    source = torch.zeros(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(8):
        best = min(best, seconds_of(lambda: target.copy_(source), device))
    return 2 * source.numel() / best


def operation_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Of one operation, Python's share included: from decoding one rollout with a model too thin to compute much."""
    thin = QWEN_1_5B.scaled(8, 1, "thin")
    model, n_steps = thin.model(device.type, dtype), 64
    ids = random_ids(thin, 1, 8)

    def work() -> None:
        list(sample_responses(model, ids, lambda p, s: rollout_uniforms(0, p, s, n_steps), Sampling(1, n_steps)))

    work()
    return min(seconds_of(work, device) for _ in range(3)) / n_steps / operations_per_step(QWEN_1_5B)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured_card(device: torch.device, prompts: int, response: int) -> Card:
    """This machine's rates, and what share of them the probe attains.

    The share of decoding is measured at one size: where starting operations is what takes long, as in a small model on
    a fast card, it is lower than a larger model's would be, and the hours predicted are too many.
    """
    dtype = resolve_dtype("auto", device)
    shape = QWEN_1_5B if device.type == "cuda" else QWEN_1_5B.scaled(4, 2, "1.5B / 4, 14 layers")
    prompt, samples, model = 128, 8, shape.model(device.type, dtype)
    flops, bandwidth = matmul_rate(device, dtype), copy_rate(device)
    memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else os.sysconf("SC_PHYS_PAGES") * 4096
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU (threads: {torch.get_num_threads()})"
    ideal = Card(name, memory, flops, bandwidth, 1.0, 1.0, operation_seconds(device, dtype))
    ids = random_ids(shape, prompts, prompt)

    def sample() -> None:
        uniforms = lambda p, s: rollout_uniforms(0, p, s, response)  # noqa: E731
        list(sample_responses(model, ids, uniforms, Sampling(samples, response), prompts * samples))

    whole = random_ids(shape, prompts * samples, prompt + response, seed=1)
    starts, ends = [row[:prompt] for row in whole], [row[prompt:] for row in whole]
    positions = np.linspace(0, response - 1, POSITIONS_PER_ROLLOUT).astype(int)
    engine = warm_engine(shape, model, [Target(shape.middle, SUFFIX, 0)])
    budget = 16_384 if device.type == "cuda" else 4096
    work = {
        "sampling": sample,
        "scoring": lambda: list(score_responses(model, starts, ends, budget)),
        "gradients": lambda: list(engine.batches(starts, ends, [positions] * len(whole), budget)),
    }
    n = prompts * samples
    on_paper = {
        "sampling": decoding_seconds(shape, ideal, n, prompt, response, dtype.itemsize),
        "scoring": n * scoring_flops(shape, prompt, response) / flops,
        "gradients": n * gradient_flops(shape, prompt, response, shape.middle, 1) / flops,
    }
    seconds = {}
    for phase, run in work.items():
        run()
        seconds[phase] = min(seconds_of(run, device) for _ in range(3))
    print(
        f"{name}, torch {torch.__version__}, {dtype}: {flops / 1e9:.4g} GFLOP/s in a large product, "
        f"{bandwidth / GB:.4g} GB/s in a large copy, {1e6 * ideal.seconds_per_operation:.3g} µs an operation"
    )
    table(
        ["phase", "model", "rollouts × tokens", "seconds, best of 3", "at the machine's rates", "share attained"],
        [
            [
                phase,
                shape.name,
                f"{n} × {prompt} + {response}",
                figure(s),
                figure(on_paper[phase]),
                f"{on_paper[phase] / s:.2f}",
            ]
            for phase, s in seconds.items()
        ],
    )
    return replace(
        ideal,
        share_passes=(on_paper["scoring"] + on_paper["gradients"]) / (seconds["scoring"] + seconds["gradients"]),
        share_decoding=on_paper["sampling"] / seconds["sampling"],
    )


def main(argv: list[str] | None = None) -> int:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="tables that need no measurement")
    parser.add_argument("--check", action="store_true", help="the formulae against measurements")
    parser.add_argument("--quick", action="store_true", help="of --check, one shape and one short batch alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, help="of the measured probe, 8 rollouts each (default: 32; 1 on a CPU)")
    parser.add_argument("--response", type=int, help="tokens of a rollout (default: 1024; 256 on a CPU)")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    device = resolve_device(args.device)
    if args.paper:
        print_paper()
    if args.check:
        print_check(device, args.quick)
    if not (args.paper or args.check):
        is_gpu = device.type == "cuda"
        prompts, response = args.prompts or (32 if is_gpu else 1), args.response or (1024 if is_gpu else 256)
        studies = STUDIES if is_gpu else STUDIES[:2]
        print_studies([measured_card(device, prompts, response)], studies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
