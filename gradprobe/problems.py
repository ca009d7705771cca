"""Problems in, sliced into shards."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError, raise_if_any

REQUIRED_KEYS = {"id": (str, int), "prompt": (str,), "ground_truth": (str, int, float)}


@dataclass(frozen=True)
class Problem:
    """One problem of a data set; `idx` is its index there, `prompt` is fully rendered."""

    idx: int
    id: str
    prompt: str
    ground_truth: str


@dataclass(frozen=True)
class ProblemSet:
    """All problems of a data set, and the hash of its bytes."""

    path: Path
    sha256: str
    problems: list[Problem]


def load_problems(path: Path) -> ProblemSet:
    """Read a JSONL data set with `id`, `prompt` (fully rendered), `ground_truth` and optionally `meta`.

    Raises:
        InputError: the file can't be read, is empty, or has bad lines; all of them are named.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").split("\n")
    except OSError as error:
        raise InputError(f"--dataset {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--dataset {path}: not UTF-8 at byte {error.start}") from error

    problems: list[Problem] = []
    faults: list[str] = []
    first_line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record, fault = _parse_record(line)
        if record is None:
            faults.append(f"{path}:{number}: {fault}")
            continue
        problem_id = str(record["id"])
        if problem_id in first_line_of:
            faults.append(f"{path}:{number}: id '{problem_id}' was used in line {first_line_of[problem_id]}")
        first_line_of.setdefault(problem_id, number)
        problems.append(Problem(len(problems), problem_id, record["prompt"], str(record["ground_truth"])))
    if not problems and not faults:
        faults.append(f"--dataset {path}: no problems in it")
    raise_if_any(faults)
    return ProblemSet(path, hashlib.sha256(content).hexdigest(), problems)


def _parse_record(line: str) -> tuple[dict | None, str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        return None, f"not JSON ({error})"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    for key, types in REQUIRED_KEYS.items():
        if key not in record:
            return None, f"key '{key}' is missing"
        if not isinstance(record[key], types) or isinstance(record[key], bool):
            return None, f"'{key}' is of type {type(record[key]).__name__}"
    return record, ""


def shard_of_study(
    n_problems: int, num_prompts: int, seed: int, shard_index: int = 0, num_shards: int = 1
) -> np.ndarray:
    """The problem indices of shard `shard_index`: its own slice of one seeded permutation.

    The study is the first `num_prompts` of the permutation, so its shards are disjoint and together hold the
    same problems whatever `num_shards` is.

    Returns:
        [n] int64 problem indices, in the permutation's order.

    Raises:
        InputError: more prompts than problems, more shards than prompts, or an index outside the shards.
    """
    faults = []
    if num_prompts > n_problems:
        faults.append(f"--num-prompts {num_prompts}: the data set has {n_problems} problems")
    if num_shards > num_prompts:
        faults.append(f"--num-shards {num_shards}: more shards than the study's {num_prompts} prompts")
    if not 0 <= shard_index < num_shards:
        faults.append(f"--shard-index {shard_index}: must be 0 to {num_shards - 1} (--num-shards {num_shards})")
    raise_if_any(faults)
    study = np.random.default_rng(seed).permutation(n_problems)[:num_prompts]
    return np.array_split(study, num_shards)[shard_index]
