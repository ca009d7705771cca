"""Rollouts and positions: the lines of rollouts.jsonl and meta.jsonl."""

import hashlib
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import FaultyRecord, InputError
from ..common.fields import INDEX, NUMBER, TEXT, TRUE_OR_FALSE, Kind, faults_of, is_finite, is_index, list_of
from ..common.files import iter_jsonl, write_jsonl

PromptKey = int | tuple[int, int]
"""A prompt's index in its data set, or (shard, index) where shards of unknown origin were merged."""
HASH_DIGITS = 16


class Line:
    """One line of a file."""

    def to_record(self) -> dict[str, Any]:
        """As it stands there: what is not known, and so has its field's default, is left out."""
        values = {of.name: getattr(self, of.name) for of in fields(self)}
        always = {of.name for of in fields(self) if of.default is MISSING and of.default_factory is MISSING}
        return {name: value for name, value in values.items() if name in always or value not in ([], None)}


@dataclass(frozen=True)
class Rollout(Line):
    """One sampled response and all that is needed to probe it again; one line of `rollouts.jsonl`.

    Attributes:
        entropies, logprobs: of the full softmax at temperature 1, nats, one per response token.
        correct: the verdict; None while it is still to be judged.
        tail_mass: 1 - max π, one per response token; empty in older files.
        bucket_scores: what tokens were put into buckets by where that is not their entropy, one each; else empty.
        reward: a number where one is known.
        token_texts: what each response token by itself decodes to, for people; empty in older files.
        sum_p2: Σ π², one per response token; empty in older files.
        step: ⟨∇ log π_t, Δ⟩ along the manifest's step, nats, one per response token; empty without one.
        step_logprobs: log-probs of the response tokens under the step's other end, nats; empty without one.
        step_by_weight: Σ_t ⟨∇_w log π_t, Δ_w⟩, nats, one per weight of the manifest's step; empty where not asked for.
    """

    prompt_idx: PromptKey
    sample_idx: int
    problem_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    entropies: list[float]
    logprobs: list[float]
    response: str
    ground_truth: str
    correct: bool
    tail_mass: list[float] = field(default_factory=list)
    bucket_scores: list[float] = field(default_factory=list)
    reward: float | None = None
    token_texts: list[str] = field(default_factory=list)
    sum_p2: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    step_logprobs: list[float] = field(default_factory=list)
    step_by_weight: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Position(Line):
    """One token's gradient described; one line of `meta.jsonl`. `pos` counts response tokens from 0."""

    row: int
    prompt_idx: PromptKey
    sample_idx: int
    pos: int
    bin: int
    entropy: float
    correct: bool
    token_id: int
    logprob: float
    tail_mass: float


@dataclass(frozen=True)
class PooledTokens(Line):
    """One pooled gradient described, the sum over all of a rollout's tokens in one bucket; one line of `meta.jsonl`.

    Attributes:
        n_tokens: in the sum.
        n_response_tokens: of the whole response.
        entropy, logprob: means over the tokens summed, nats.
        rare: their Σ tail mass, the rare tokens to be expected among them.
        reward: of the rollout, where one is known.
    """

    row: int
    prompt_idx: PromptKey
    sample_idx: int
    bin: int
    n_tokens: int
    n_response_tokens: int
    correct: bool
    entropy: float
    logprob: float
    rare: float
    reward: float | None = None


def prompt_hash(ids: Sequence[int]) -> str:
    """What a prompt is, in whatever data set: 16 hex digits of SHA-256 of its ids as little-endian int32."""
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()[:HASH_DIGITS]


def is_prompt_key(value: Any) -> bool:
    """Whether JSON holds a `PromptKey`."""
    return is_index(value) or (isinstance(value, list) and len(value) == 2 and all(map(is_index, value)))


def prompt_key_from_json(value: Any) -> PromptKey:
    """`7` -> 7, `[1, 7]` -> (1, 7).

    Raises:
        FaultyRecord: neither of both.
    """
    if not is_prompt_key(value):
        raise FaultyRecord(f"prompt_idx is not {PROMPT_KEY.words}: {reprlib.repr(value)}")
    return value if isinstance(value, int) else (value[0], value[1])


PROMPT_KEY = Kind(is_prompt_key, "an integer from 0 or [shard, integer]")
TOKEN_IDS, PER_TOKEN = list_of(is_index, "token ids"), list_of(is_finite, "finite numbers")
TEXTS = list_of(lambda value: isinstance(value, str), "texts")
ROLLOUT_KINDS = {
    "prompt_idx": PROMPT_KEY,
    "sample_idx": INDEX,
    "problem_id": TEXT,
    "prompt_ids": TOKEN_IDS,
    "response_ids": TOKEN_IDS,
    "entropies": PER_TOKEN,
    "logprobs": PER_TOKEN,
    "response": TEXT,
    "ground_truth": TEXT,
    "correct": TRUE_OR_FALSE,
    "tail_mass": PER_TOKEN.optional(),
    "token_texts": TEXTS.optional(),
    "bucket_scores": PER_TOKEN.optional(),
    "reward": NUMBER.or_null(),
    "sum_p2": PER_TOKEN.optional(),
    "step": PER_TOKEN.optional(),
    "step_logprobs": PER_TOKEN.optional(),
    "step_by_weight": PER_TOKEN.optional(),
}


def iter_rollouts(file: Path) -> Iterator[Rollout]:
    """Yield the rollouts of a `rollouts.jsonl`."""
    for number, record in iter_jsonl(file):
        try:
            yield rollout_from_json(record)
        except FaultyRecord as error:
            raise InputError(f"{file}:{number}: {error}") from error


def rollout_from_json(record: dict[str, Any]) -> Rollout:
    """What a line of a `rollouts.jsonl` holds.

    Raises:
        FaultyRecord: it is malformed, or the numbers per token don't match the tokens.
    """
    for fault in _rollout_faults(record):
        raise FaultyRecord(fault)
    values = {name: record[name] for name in ROLLOUT_KINDS if name in record}
    return Rollout(**values | {"prompt_idx": prompt_key_from_json(record["prompt_idx"])})


def _rollout_faults(record: dict[str, Any]) -> Iterator[str]:
    yield from faults_of(record, ROLLOUT_KINDS)
    n_tokens = len(record["response_ids"])
    if not n_tokens == len(record["entropies"]) == len(record["logprobs"]):
        yield "response_ids, entropies and logprobs differ in length"
    for name in ("tail_mass", "token_texts", "bucket_scores", "sum_p2", "step", "step_logprobs"):
        if len(record.get(name) or [0] * n_tokens) != n_tokens:
            yield f"response_ids and {name} differ in length"
    if not record["prompt_ids"]:
        yield "'prompt_ids' is empty"


def write_records(file: Path, records: Iterable[Line]) -> None:
    """Write `rollouts.jsonl` or `meta.jsonl`, one record a line, whole or not at all."""
    write_jsonl(file, (record.to_record() for record in records))
