"""Rollouts and positions: the lines of rollouts.jsonl and meta.jsonl."""

import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.files import iter_jsonl, write_jsonl

MOST = 1 << 62
"""What integers and numbers in a file stay below: more would not fit an array."""
PromptKey = int | tuple[int, int]
"""A prompt's index in its data set, or (shard, index) where shards of unknown origin were merged."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response and all that is needed to probe it again; one line of `rollouts.jsonl`.

    `entropies` (nats) and `logprobs` are those of the full softmax at temperature 1, one per response token.
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


@dataclass(frozen=True)
class Position:
    """One gradient row's description; one line of `meta.jsonl`. `pos` counts response tokens from 0."""

    row: int
    prompt_idx: PromptKey
    sample_idx: int
    pos: int
    bin: int
    entropy: float
    correct: bool
    token_id: int
    logprob: float


def prompt_key_from_json(value: Any) -> PromptKey:
    """`7` -> 7, `[1, 7]` -> (1, 7).

    Raises:
        ValueError: neither of both.
    """
    if _is_of_kind(value, int):
        return value
    if isinstance(value, list) and len(value) == 2 and all(_is_of_kind(part, int) for part in value):
        return (value[0], value[1])
    raise ValueError(f"prompt_idx is neither an integer from 0 nor [shard, integer]: {reprlib.repr(value)}")


def _is_of_kind(value: Any, kind: type) -> bool:
    return _is_int(value) and 0 <= value < MOST if kind is int else isinstance(value, kind)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return _is_of_kind(value, int)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST


def iter_rollouts(file: Path) -> Iterator[Rollout]:
    """Yield the rollouts of a `rollouts.jsonl`.

    Raises:
        InputError: a line is malformed, or the numbers per token don't match the tokens.
    """
    for number, record in iter_jsonl(file):
        fault = _rollout_fault(record)
        if fault is not None:
            raise InputError(f"{file}:{number}: {fault}")
        values = {name: record[name] for name in Rollout.__dataclass_fields__}
        yield Rollout(**values | {"prompt_idx": prompt_key_from_json(record["prompt_idx"])})


def _rollout_fault(record: dict[str, Any]) -> str | None:
    for name in Rollout.__dataclass_fields__:
        if name not in record:
            return f"key '{name}' is missing"
    for name, kind in (("problem_id", str), ("response", str), ("ground_truth", str), ("correct", bool)):
        if not isinstance(record[name], kind):
            return f"'{name}' is not of type {kind.__name__}"
    for name, is_right in (
        ("prompt_ids", _is_token_id),
        ("response_ids", _is_token_id),
        ("entropies", _is_finite),
        ("logprobs", _is_finite),
    ):
        if not isinstance(record[name], list) or not all(map(is_right, record[name])):
            return f"'{name}' is not a list of " + ("token ids" if is_right is _is_token_id else "finite numbers")
    if not len(record["response_ids"]) == len(record["entropies"]) == len(record["logprobs"]):
        return "response_ids, entropies and logprobs differ in length"
    if not record["prompt_ids"]:
        return "'prompt_ids' is empty"
    return _rollout_key_fault(record)


def _rollout_key_fault(record: dict[str, Any]) -> str | None:
    if not _is_of_kind(record.get("sample_idx"), int):
        return "'sample_idx' is missing or not an integer from 0"
    try:
        prompt_key_from_json(record.get("prompt_idx"))
    except ValueError as error:
        return str(error)
    return None


def write_records(file: Path, records: Iterable[Rollout | Position]) -> None:
    """Write `rollouts.jsonl` or `meta.jsonl`, one record a line, whole or not at all."""
    write_jsonl(file, map(asdict, records))
