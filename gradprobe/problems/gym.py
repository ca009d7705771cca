"""Problems that reasoning-gym makes up, and its own scorers as the verifier (Stojanovski et al. 2025)."""

import ast
import importlib.metadata
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..common.errors import InputError, reason_of
from ..common.extras import library
from ..common.record_files import RecordFile, numbered
from .boxed import last_boxed

GYM = "gym:"
GYM_DATASET = "reasoning-gym data set"
GYM_VERIFIER = "gym"
ENTRY = "entry"
"""The field that this verifier judges by: which problem of which data set, as JSON. Its answer alone is in `answer`."""
DEFAULTS = {"size": 500, "seed": 0}


def open_gym(source: str) -> RecordFile:
    """Make up a data set of `gym:NAME[:key=value,...]`; values are as in Python, and `size` and `seed` 500 and 0."""
    name, _, settings = source.removeprefix(GYM).partition(":")
    config = DEFAULTS | _settings_of(source, settings)
    made = _made(name, json.dumps(config), f"`dataset` {source}")
    rows = []
    for index in range(len(made)):
        problem = made[index]  # which makes it up
        shown = {key: problem[key] for key in ("question", "answer")}
        entry = {"name": name, "config": config, "index": index, "answer": problem["answer"]}
        rows.append({"id": f"{name}-{config['seed']}-{index}", **shown, ENTRY: json.dumps(entry)})
    return RecordFile(source, GYM_DATASET, "", list(rows[0]) if rows else [], lambda keys: numbered(source, rows))


def load_gym_verifier() -> tuple[Callable[[str, str], bool], dict[str, Any]]:
    """(judge, description); right is what the data set's own scorer gives full marks.

    The scorer sees the last `\\boxed{}` or, without one, what stands last in `<answer>` tags, the library's own way.
    """
    extract = library("reasoning_gym", "gym", "it").utils.extract_answer

    def judge(response: str, ground_truth: str) -> bool:
        entry = json.loads(ground_truth) if ground_truth.startswith("{") else {}
        if not entry.keys() >= {"name", "config", "index"}:
            raise ValueError("the ground truth is no entry of reasoning-gym: was it probed with another verifier?")
        made = _made(entry["name"], json.dumps(entry["config"]), ENTRY)
        boxed = last_boxed(response)
        answer = extract(response) if boxed is None else boxed
        return made.score_answer(answer, entry=made[entry["index"]]) >= 1

    return judge, {"name": GYM_VERIFIER, "version": importlib.metadata.version("reasoning-gym")}


def _settings_of(source: str, settings: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({settings})", mode="eval").body
        if call.args:
            raise ValueError("a value without its key")
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        form = f"{GYM}NAME[:key=value,...]"
        raise InputError(f"`dataset` {source}: not of the form {form} ({reason_of(error)})") from error


@lru_cache(maxsize=8)
def _made(name: str, config: str, named: str) -> Any:
    gym = library("reasoning_gym", "gym", named)
    try:
        return gym.create_dataset(name, **json.loads(config))
    # What its configurations are known to raise: no such data set or setting, a value out of bounds, of another type.
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        raise InputError(f"{named}: {reason_of(error)}") from error
