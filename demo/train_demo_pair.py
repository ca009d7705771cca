r"""Make the demo pair: a tiny base model and the RL-trained model that came from it.

Everything is made from nothing: arithmetic and one-variable equations, a byte-level BPE of Qwen2's kind, a
Qwen2 of about 1.6 million weights taught by supervised training on worked solutions (``base/``), and the same
model after GRPO with a verifiable reward (``trained/``). Held-out problems go to ``problems.jsonl``.

Needs torch, transformers, safetensors; the RL phase also needs ``pip install trl datasets``.

Commands, from the folder of this file::

    python train_demo_pair.py                               # remake everything here (under an hour, 2 cores)
    python train_demo_pair.py --quick --out quick_pair      # smoke test of all phases, about a minute
    python train_demo_pair.py --phases rl eval              # redo RL from base/ as saved, then measure
    python train_demo_pair.py --phases eval                 # only measure the pair and rewrite the numbers

Where other programs keep the cores busy, put ``OMP_WAIT_POLICY=PASSIVE`` before the command: threads that
spin while they wait for each other made training many times slower there.

Phases: ``data`` (problems, tokenizer), ``sft`` (-> base/), ``rl`` (-> trained/), ``eval``. Each one writes
its section of ``provenance.json``. Responses are drawn by the toolkit's own sampler, but for TRL's.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradprobe import __version__  # noqa: E402
from gradprobe.dump.on_policy import Tokens  # noqa: E402
from gradprobe.dump.records import Rollout  # noqa: E402
from gradprobe.problems.boxed import is_correct  # noqa: E402
from gradprobe.rollouts.early_word import early_word, n_of_rarer_kind  # noqa: E402
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses  # noqa: E402
from gradprobe.rollouts.score import TokenScores, score_responses  # noqa: E402

BATCH_TOKENS = 8192
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen2's own split pattern: transformers' Qwen2Tokenizer puts it in whatever tokenizer.json says, so that a
# tokenizer trained under another pattern would give other ids through AutoTokenizer.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# Qwen's layout of a chat, without its forced default system prompt.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# The sampling settings that Qwen2.5-Instruct checkpoints ship. Nothing in this script samples with them: they
# are here so that users of the pair can show that such settings do not leak into their own sampling.
SHIPPED_SAMPLING = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
}
FULL_SOFTMAX = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Settings:
    """Every number that decides how the pair comes out."""

    seed: int = 20260
    held_out: int = 2400
    validation: int = 256
    vocab_size: int = 512
    tokenizer_texts: int = 20000
    layers: int = 8
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    max_positions: int = 512
    sft_batch: int = 64
    sft_max_steps: int = 2000
    sft_warmup: int = 30
    sft_learning_rate: float = 2e-3
    sft_check_every: int = 50
    sft_stop_accuracy: float = 0.43
    rl_max_steps: int = 300
    rl_prompts_per_step: int = 16
    rl_generations: int = 8
    rl_learning_rate: float = 2e-4
    rl_warmup: int = 10
    rl_stop_reward: float = 0.80
    rl_stop_window: int = 25
    rl_max_new_tokens: int = 80
    max_new_tokens: int = 128
    eval_prompts: int = 256
    eval_rollouts: int = 8
    eval_batch: int = 512


# Walks through every phase; a model trained this briefly solves nothing, so its RL sees no reward yet.
QUICK = Settings(
    held_out=400,
    validation=32,
    tokenizer_texts=2000,
    sft_batch=32,
    sft_max_steps=40,
    sft_warmup=10,
    sft_check_every=20,
    rl_max_steps=4,
    rl_prompts_per_step=4,
    rl_max_new_tokens=64,
    max_new_tokens=64,
    eval_prompts=16,
    eval_rollouts=4,
)


# ---------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A problem with its numbers; the text, the answer and the ways to solve it follow from its kind."""

    kind: str
    numbers: tuple[int, int, int, int]

    @property
    def text(self) -> str:
        """What the user asks."""
        return KINDS[self.kind].text(*self.numbers)

    @property
    def answer(self) -> int:
        """What the box must hold."""
        return KINDS[self.kind].answer(*self.numbers)

    @property
    def key(self) -> tuple:
        """Identity up to swapping the two sides of a plus or times, so that no mirror image of a held-out
        problem can be trained on either."""
        return (self.kind, *KINDS[self.kind].key(*self.numbers))

    def ways(self) -> list[list[tuple[str, str]]]:
        """The honest orders of evaluation, each a list of (left side, right side) steps."""
        return KINDS[self.kind].ways(*self.numbers)


@dataclass(frozen=True)
class Kind:
    """One kind of problem; every function takes the problem's four numbers."""

    draw: Callable[[random.Random], tuple[int, int, int, int]]
    fits: Callable[..., bool]
    text: Callable[..., str]
    answer: Callable[..., int]
    key: Callable[..., tuple]
    ways: Callable[..., list[list[tuple[str, str]]]]


def _ways_products(a: int, b: int, c: int, d: int) -> list[list[tuple[str, str]]]:
    left, right = (f"{a}*{b}", f"{a * b}"), (f"{c}*{d}", f"{c * d}")
    total = (f"{a * b}+{c * d}", f"{a * b + c * d}")
    return [[left, right, total], [right, left, total]]


def _ways_bracket(a: int, b: int, c: int, d: int) -> list[list[tuple[str, str]]]:
    product = a * (b + c)
    last = (f"{product}-{d}", f"{product - d}")
    inside_first = [(f"{b}+{c}", f"{b + c}"), (f"{a}*{b + c}", f"{product}"), last]
    expanded = [(f"{a}*{b}", f"{a * b}"), (f"{a}*{c}", f"{a * c}"), (f"{a * b}+{a * c}", f"{product}"), last]
    return [inside_first, expanded]


def _ways_chain(a: int, b: int, c: int, d: int) -> list[list[tuple[str, str]]]:
    product, total = b * c, a + b * c - d
    multiply = (f"{b}*{c}", f"{product}")
    left_to_right = [multiply, (f"{a}+{product}", f"{a + product}"), (f"{a + product}-{d}", f"{total}")]
    minus_first = [multiply, (f"{product}-{d}", f"{product - d}"), (f"{a}+{product - d}", f"{total}")]
    return [left_to_right, minus_first]


def _ways_equation(a: int, b: int, d: int, x: int) -> list[list[tuple[str, str]]]:
    right = a * (x + b) - d
    undo = [
        (f"{right}+{d}", f"{right + d}"),
        (f"{right + d}/{a}", f"{x + b}"),
        (f"{x + b}-{b}", f"{x}"),
    ]
    constant = a * b - d
    expand = [
        (f"{a}*{b}", f"{a * b}"),
        (f"{a * b}-{d}", f"{constant}"),
        (f"{right}-{constant}", f"{a * x}"),
        (f"{a * x}/{a}", f"{x}"),
    ]
    return [undo, expand]


KINDS: dict[str, Kind] = {
    "sum_of_products": Kind(
        draw=lambda r: (r.randint(2, 15), r.randint(2, 9), r.randint(2, 15), r.randint(2, 9)),
        fits=lambda a, b, c, d: True,
        text=lambda a, b, c, d: rf"Compute {a}*{b}+{c}*{d}. Use \boxed{{}}.",
        answer=lambda a, b, c, d: a * b + c * d,
        key=lambda a, b, c, d: tuple(sorted([tuple(sorted((a, b))), tuple(sorted((c, d)))])),
        ways=_ways_products,
    ),
    "bracket": Kind(
        draw=lambda r: (r.randint(2, 9), r.randint(2, 9), r.randint(2, 9), r.randint(1, 20)),
        fits=lambda a, b, c, d: a * (b + c) >= d,
        text=lambda a, b, c, d: rf"Compute {a}*({b}+{c})-{d}. Use \boxed{{}}.",
        answer=lambda a, b, c, d: a * (b + c) - d,
        key=lambda a, b, c, d: (a, *sorted((b, c)), d),
        ways=_ways_bracket,
    ),
    "chain": Kind(
        draw=lambda r: (r.randint(1, 30), r.randint(2, 12), r.randint(2, 9), r.randint(1, 20)),
        fits=lambda a, b, c, d: b * c >= d,
        text=lambda a, b, c, d: rf"Compute {a}+{b}*{c}-{d}. Use \boxed{{}}.",
        answer=lambda a, b, c, d: a + b * c - d,
        key=lambda a, b, c, d: (a, *sorted((b, c)), d),
        ways=_ways_chain,
    ),
    "equation": Kind(
        draw=lambda r: (r.randint(2, 9), r.randint(2, 9), r.randint(1, 9), r.randint(2, 12)),
        fits=lambda a, b, d, x: a * b > d,
        text=lambda a, b, d, x: rf"Solve {a}*(x+{b})-{d}={a * (x + b) - d}. Use \boxed{{}}.",
        answer=lambda a, b, d, x: x,
        key=lambda a, b, d, x: (a, b, d, x),
        ways=_ways_equation,
    ),
}

OPENERS = ("First ", "Start: ", "Note ", "Here ", "We see ", "Well, ")
CONNECTORS = ("Then ", "Next ", "So ", "Now ", "And ", "Thus ")
EQUALS = ("=", " is ", " makes ")
CLOSERS = (
    r"Answer: \boxed{%s}.",
    r"So \boxed{%s}.",
    r"Hence \boxed{%s}.",
    r"It is \boxed{%s}.",
    r"We get \boxed{%s}.",
)


def draw_problem(rng: random.Random) -> Problem:
    """A random problem, all kinds equally likely."""
    kind = rng.choice(sorted(KINDS))
    while True:
        numbers = KINDS[kind].draw(rng)
        if KINDS[kind].fits(*numbers):
            return Problem(kind, numbers)


def worked_solution(problem: Problem, rng: random.Random) -> str:
    """One honest solution. Order and every phrase are drawn anew: these free choices are the forks that give
    a model trained on the solutions its high-entropy tokens."""
    steps = rng.choice(problem.ways())
    sentences = []
    for place, (left, right) in enumerate(steps):
        lead = rng.choice(OPENERS if place == 0 else CONNECTORS)
        sentences.append(f"{lead}{left}{rng.choice(EQUALS)}{right}.")
    return " ".join([*sentences, rng.choice(CLOSERS) % problem.answer])


class FreshProblems:
    """Problems for training: never one that was reserved, not even mirrored."""

    def __init__(self, reserved: Sequence[Problem], rng: random.Random) -> None:
        self._reserved_keys = {problem.key for problem in reserved}
        self._reserved_texts = {problem.text for problem in reserved}
        self._rng = rng

    def __iter__(self) -> Iterator[Problem]:
        while True:
            problem = draw_problem(self._rng)
            if problem.key in self._reserved_keys:
                continue
            assert problem.text not in self._reserved_texts, "a reserved problem reached a training"
            yield problem

    def take(self, count: int, distinct: bool = False) -> list[Problem]:
        """The next `count` problems, without repeats among them if `distinct`."""
        taken: list[Problem] = []
        seen: set[Problem] = set()
        for problem in self:
            if len(taken) == count:
                break
            if distinct and problem in seen:
                continue
            seen.add(problem)
            taken.append(problem)
        return taken


def reserve_problems(settings: Settings) -> tuple[list[Problem], list[Problem]]:
    """The held-out and the validation problems. They follow from the seed alone, so that every phase can
    reserve the same ones before it draws anything to train on."""
    rng = random.Random(settings.seed)
    chosen: dict[tuple, Problem] = {}
    while len(chosen) < settings.held_out + settings.validation:
        problem = draw_problem(rng)
        chosen.setdefault(problem.key, problem)
    problems = list(chosen.values())
    assert len({problem.text for problem in problems}) == len(problems)
    return problems[: settings.held_out], problems[settings.held_out :]


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    """The problem as the chat template renders it, up to where the assistant speaks."""
    messages = [{"role": "user", "content": problem.text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def write_problems(path: Path, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> None:
    """The held-out problems, one JSON object per line."""
    lines = []
    for index, problem in enumerate(problems):
        meta = {
            "kind": problem.kind,
            "problem": problem.text,
            "steps": [len(way) for way in problem.ways()],
            "numbers": list(problem.numbers),
        }
        record = {
            "id": f"demo-{index:05d}",
            "prompt": render_prompt(tokenizer, problem),
            "ground_truth": str(problem.answer),
            "meta": meta,
        }
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------- tokenizer


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of Qwen2's kind: its normalizer, its split pattern, all 256 bytes, specials last."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    specials = [END_OF_TEXT, IM_START, IM_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(specials)
    return bpe


def save_tokenizer(bpe: Tokenizer, folder: Path, max_positions: int) -> PreTrainedTokenizerBase:
    """Write the tokenizer as a Qwen2 checkpoint has it, and hand back what AutoTokenizer makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def check_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Assert that AutoTokenizer and the tokenizers library agree on every text and that decoding gives it back: the
    Auto class rebuilds the tokenizer and may drop what it does not know, which would show here and nowhere else."""
    auto, raw = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    unseen = ["Zürich — 東京 🙂\n\n  tabs\tand 1234567890", "I'll\r\nsay: x²≠{y}", f"Hi{IM_END}\n{IM_START}you"]
    for text in [*texts, *unseen]:
        ids = auto(text, add_special_tokens=False)["input_ids"]
        assert ids == raw.encode(text, add_special_tokens=False).ids, f"ids differ for {text!r}"
        assert auto.decode(ids, skip_special_tokens=False) == text, f"no round trip for {text!r}"


# ------------------------------------------------------------------------------------------- checkpoints


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A Qwen2 of the demo's size with random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    return Qwen2ForCausalLM(config)


def save_checkpoint(model: PreTrainedModel, tokenizer_folder: Path, folder: Path) -> None:
    """Write the weights rounded to bfloat16, with the tokenizer and the shipped sampling settings. The model
    at hand stays in float32.

    The tokenizer is read anew because one that has been used remembers how it last padded, and saving it
    would put that into tokenizer.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    copy = Qwen2ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.config.dtype = torch.bfloat16
    copy.config.use_cache = True  # training with TRL turns it off
    copy.generation_config = GenerationConfig(
        **SHIPPED_SAMPLING,
        eos_token_id=[tokenizer.convert_tokens_to_ids(IM_END), end_of_text],
        pad_token_id=end_of_text,
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """The saved bfloat16 weights, held and computed with in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------- sampling


def judged_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    n_samples: int,
    settings: Settings,
    seed: int,
) -> list[Rollout]:
    """`n_samples` responses to each problem from the full softmax at temperature 1, scored and judged."""
    prompts = tokenizer([render_prompt(tokenizer, problem) for problem in problems], add_special_tokens=False)[
        "input_ids"
    ]
    batches = sample_responses(
        model,
        prompts,
        lambda p, s: rollout_uniforms(seed, p, s, settings.max_new_tokens),
        Sampling(n_samples, settings.max_new_tokens, end_ids=end_ids_of(tokenizer)),
        settings.eval_batch,
    )
    sampled = [
        (p, s, response)
        for p, samples in enumerate(samples for batch in batches for samples in batch)
        for s, response in enumerate(samples)
    ]
    scores: dict[int, TokenScores] = {}
    for batch in score_responses(model, [prompts[p] for p, *_ in sampled], [ids for *_, ids in sampled], BATCH_TOKENS):
        scores |= batch
    texts = tokenizer.batch_decode([ids for *_, ids in sampled], skip_special_tokens=True)
    return [
        Rollout(
            prompt_idx=p,
            sample_idx=s,
            problem_id=problems[p].text,
            prompt_ids=prompts[p],
            response_ids=ids,
            entropies=scores[i].entropies.tolist(),
            logprobs=scores[i].logprobs.tolist(),
            response=texts[i],
            ground_truth=str(problems[p].answer),
            correct=is_correct(texts[i], str(problems[p].answer)),
        )
        for i, (p, s, ids) in enumerate(sampled)
    ]


def end_ids_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Any of them ends a response."""
    return frozenset(tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT]))


def accuracy_of(rollouts: Sequence[Rollout]) -> float:
    """Share of right answers."""
    return sum(rollout.correct for rollout in rollouts) / len(rollouts)


# ------------------------------------------------------------------------------------------ phase: data


def run_data(out: Path, settings: Settings) -> dict[str, Any]:
    """Train the tokenizer, write the held-out problems."""
    held_out, validation = reserve_problems(settings)
    rng = random.Random(settings.seed + 1)
    fresh = FreshProblems([*held_out, *validation], rng)
    texts = [
        f"{problem.text}\n{worked_solution(problem, rng)}\nsystem user assistant"
        for problem in fresh.take(settings.tokenizer_texts)
    ]
    tokenizer = save_tokenizer(train_bpe(texts, settings.vocab_size), out / "base", settings.max_positions)
    write_problems(out / "problems.jsonl", held_out, tokenizer)
    prompts = [render_prompt(tokenizer, problem) for problem in held_out]
    check_tokenizer(out / "base", [*prompts, *texts])
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    return {
        "problems": len(held_out),
        "problems_by_kind": {kind: sum(p.kind == kind for p in held_out) for kind in sorted(KINDS)},
        "vocabulary": len(tokenizer),
        "prompt_tokens_mean": round(sum(lengths) / len(lengths), 2),
        "prompt_tokens_max": max(lengths),
    }


# ------------------------------------------------------------------------------------------- phase: sft


def sft_batch(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> dict[str, torch.Tensor]:
    """Prompts with worked solutions, padded on the right; only the response's tokens are labelled.

    There is no attention mask: under a causal model nothing looks at padding on the right, and torch's causal
    kernel is much faster than one with a mask.
    """
    rendered = [render_prompt(tokenizer, problem) for problem in problems]
    prompts = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    solutions = [worked_solution(problem, rng) + IM_END for problem in problems]
    responses = tokenizer(solutions, add_special_tokens=False)["input_ids"]
    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids = torch.full((len(problems), width), tokenizer.pad_token_id)
    labels = torch.full((len(problems), width), -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return {"input_ids": ids, "labels": labels}


def run_sft(out: Path, settings: Settings) -> dict[str, Any]:
    """Train from random weights until the accuracy on validation problems reaches the level asked for: a base
    that already solves everything, or nothing, leaves RL nothing to do."""
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    held_out, validation = reserve_problems(settings)
    rng = random.Random(settings.seed + 2)
    fresh = FreshProblems([*held_out, *validation], rng)
    model = new_model(settings, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.sft_learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    history: list[dict[str, float]] = []
    model.train()
    for step in range(1, settings.sft_max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.sft_learning_rate * min(1.0, step / settings.sft_warmup)
        loss = model(**sft_batch(fresh.take(settings.sft_batch), tokenizer, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % settings.sft_check_every == 0:
            model.eval()
            accuracy = accuracy_of(judged_rollouts(model, tokenizer, validation, 1, settings, settings.seed + step))
            model.train()
            history.append({"step": step, "loss": round(loss.item(), 4), "accuracy": round(accuracy, 4)})
            log(f"sft step {step}: loss {loss.item():.3f}, validation accuracy {accuracy:.3f}")
            if accuracy >= settings.sft_stop_accuracy:
                break
    save_checkpoint(model, out / "base", out / "base")
    return {
        "steps": step,
        "solutions_seen": step * settings.sft_batch,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "history": history,
    }


# -------------------------------------------------------------------------------------------- phase: rl


RL_LOGGED = ("reward", "entropy", "completions/mean_length", "frac_reward_zero_std", "grad_norm")


def reward_correct(completions: list[str], ground_truth: list[str], **_: Any) -> list[float]:
    """TRL's reward function: 1 for a right box, 0 for anything else."""
    return [float(is_correct(text, truth)) for text, truth in zip(completions, ground_truth, strict=True)]


def _stop_callback(base_class: type, settings: Settings, history: list[dict[str, float]]) -> Any:
    """A callback that keeps the log and stops once the mean reward of the last steps is high enough: a model
    that no longer errs would leave no prompt with both right and wrong rollouts."""

    class StopAtReward(base_class):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "reward" not in logs:
                return
            entry = {name: round(float(logs[name]), 4) for name in RL_LOGGED if name in logs}
            history.append({"step": state.global_step, **entry})
            recent = [entry["reward"] for entry in history[-settings.rl_stop_window :]]
            if state.global_step % 10 == 0:
                log(f"rl mean reward of last {len(recent)} steps {statistics.fmean(recent):.3f}; {history[-1]}")
            if len(recent) == settings.rl_stop_window and statistics.fmean(recent) >= settings.rl_stop_reward:
                control.should_training_stop = True

    return StopAtReward()


def run_rl(out: Path, settings: Settings) -> dict[str, Any]:
    """GRPO with the DAPO loss, from the base checkpoint as it was saved."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise SystemExit(f"the rl phase needs TRL ({error}); install it with: pip install trl datasets") from error
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    model = load_checkpoint(out / "base")
    # TRL gives its own settings to `generate`, which fills any that are unset from here.
    model.generation_config = GenerationConfig(
        **FULL_SOFTMAX, eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    held_out, validation = reserve_problems(settings)
    fresh = FreshProblems([*held_out, *validation], random.Random(settings.seed + 3))
    problems = fresh.take(settings.rl_max_steps * settings.rl_prompts_per_step, distinct=True)
    rows = [{"prompt": render_prompt(tokenizer, p), "ground_truth": str(p.answer)} for p in problems]
    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),  # TRL asks for one, but writes nothing there without saves
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        seed=settings.seed,
        max_steps=settings.rl_max_steps,
        per_device_train_batch_size=settings.rl_prompts_per_step * settings.rl_generations,
        num_generations=settings.rl_generations,
        gradient_accumulation_steps=1,
        learning_rate=settings.rl_learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.rl_warmup,
        loss_type="dapo",
        beta=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        max_completion_length=settings.rl_max_new_tokens,
    )
    history: list[dict[str, float]] = []
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_correct,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_stop_callback(TrainerCallback, settings, history)],
    )
    trainer.remove_callback(PrinterCallback)  # our own callback logs, in fewer words
    trainer.train()
    save_checkpoint(trainer.model, out / "base", out / "trained")
    return {"steps": trainer.state.global_step, "history": history}


# ------------------------------------------------------------------------------------------ phase: eval


def measure(folder: Path, problems: Sequence[Problem], settings: Settings) -> dict[str, Any]:
    """What a saved checkpoint does on held-out problems."""
    tokenizer, n = AutoTokenizer.from_pretrained(folder), settings.eval_rollouts
    rollouts = judged_rollouts(load_checkpoint(folder).eval(), tokenizer, problems, n, settings, settings.seed + 5)
    kinds = sorted({problem.kind for problem in problems})
    of_kind = {kind: [r for r in rollouts if problems[r.prompt_idx].kind == kind] for kind in kinds}
    return {
        "prompts": len(problems),
        "rollouts": len(rollouts),
        "accuracy": round(accuracy_of(rollouts), 4),
        "accuracy_by_kind": {kind: round(accuracy_of(of), 4) for kind, of in of_kind.items()},
        "share_mixed": round(sum(k > 0 for k in n_of_rarer_kind(rollouts)) / len(problems), 4),
        # log π + H has mean 0 up to chance if and only if nothing narrowed or widened the softmax.
        "said": list(early_word(rollouts, end_ids_of(tokenizer), Tokens.of(rollouts).test(True))),
        "example_prompt": problems[0].text,
        "example_responses": [rollout.response for rollout in rollouts[: min(3, n)]],
    }


def run_eval(out: Path, settings: Settings) -> dict[str, Any]:
    """Measure both checkpoints on the first held-out problems, as read back from problems.jsonl."""
    lines = (out / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    metas = [json.loads(line)["meta"] for line in lines[: settings.eval_prompts]]
    problems = [Problem(meta["kind"], tuple(meta["numbers"])) for meta in metas]
    assert [problem.text for problem in problems] == [meta["problem"] for meta in metas]
    result: dict[str, Any] = {}
    for name in ("base", "trained"):
        check_tokenizer(out / name, [problem.text for problem in problems])
        result[name] = measure(out / name, problems, settings)
        log(f"{name}: {json.dumps(result[name])}")
    result["gain"] = round(result["trained"]["accuracy"] - result["base"]["accuracy"], 4)
    folders, names = ("base", "trained"), ("model.safetensors", "tokenizer.json")
    files = ["problems.jsonl", *(f"{folder}/{name}" for folder in folders for name in names)]
    result["sha256"] = {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in files}
    return result


# -------------------------------------------------------------------------------------------- provenance


def log(line: str) -> None:
    """A line for whoever watches the run."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {line}", flush=True)


def versions() -> dict[str, str]:
    """What the phase ran with."""
    found = {"gradprobe": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "trl", "accelerate", "datasets"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def settings_of(phase: str, settings: Settings) -> dict[str, Any]:
    """The settings less those that belong to another phase by their name."""
    others = tuple(f"{name}_" for name in PHASES if name != phase)
    return {name: value for name, value in dataclasses.asdict(settings).items() if not name.startswith(others)}


def record_phase(out: Path, phase: str, section: dict[str, Any]) -> None:
    """Put the phase's section into provenance.json."""
    path = out / "provenance.json"
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    whole.pop("made_by", None)  # of the pair as it was; the sections say by which version they were made
    whole[phase] = section
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


PHASES: dict[str, Callable[[Path, Settings], dict[str, Any]]] = {
    "data": run_data,
    "sft": run_sft,
    "rl": run_rl,
    "eval": run_eval,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the pair goes (default: the folder of this script)")
    parser.add_argument("--quick", action="store_true", help="all phases in about a minute; needs --out")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the phases asked for; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick needs --out: it must not overwrite the pair in this folder")
    out, settings = args.out or HERE, QUICK if args.quick else Settings()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(args.threads)
    out.mkdir(parents=True, exist_ok=True)
    for phase in [name for name in PHASES if name in args.phases]:
        started = time.monotonic()
        log(f"phase {phase}")
        section = PHASES[phase](out, settings)
        section["wall_seconds"] = round(time.monotonic() - started, 1)
        section["threads"] = args.threads
        section["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        section["versions"] = versions()
        section["settings"] = settings_of(phase, settings)
        record_phase(out, phase, section)
        log(f"phase {phase}: {section['wall_seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
