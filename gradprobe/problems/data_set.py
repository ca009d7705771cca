"""Problems in, sliced into shards."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import FaultyRecord, Unusable, first_of, raise_folded, raise_if_any
from ..common.record_files import JSONL, Record, RecordFile, lookup
from .boxed import last_boxed
from .data_files import open_data_set

ASSISTANT = "assistant"
PROBLEM_KEYS = ("prompt", "problem", "question", "messages", "conversations")
ANSWER_KEYS = ("ground_truth", "reward_model.ground_truth", "final_answer", "answer", "solution")
ID_KEYS = ("id", "unique_id", "extra_info.index")
ROLES = {"human": "user"} | dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "bot", "bing", "bard", "model"), ASSISTANT)
"""What ShareGPT, which has `from` and `value` in each message, and others call those whom chat templates know."""
NO_ID = "none"
COPIES = "copies of another row: the same prompt and answer"
ORIGINAL_SCHEMA = {"problem": "prompt", "answer": "ground_truth", "id": "id"}
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, as JSON can hold it; no tokenizer takes it, and no file."""
FINAL_LINE = re.compile(r"(?:^|\n)####[ \t]*([^\n]*)\Z")
IN_DOLLARS = re.compile(r"\$([^$]+)\$")
THOUSANDS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?")
MOST_KEYS_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One problem of a data set.

    `idx` is its row there. `prompt` is the text the model is to continue; where the data set gives a list of chat
    messages instead, `prompt` is empty and `messages` has them, as (role, content), until they are rendered.
    """

    idx: int
    id: str
    prompt: str
    ground_truth: str
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a data set, what they were read from, and what was left out.

    A problem is its prompt and its answer: rows that say both again, under whatever id, are copies and left out.

    `sha256` is that of the file's bytes or, of what is not one file, of the problems in canonical JSON.
    `columns` says which field gave the `problem`, the `answer` and the `id` (`none`: the row's number).
    `dropped` counts rows by the reason they were left out. `copies` are the ids of rows that say a problem again under
    another id than its own, which they name. `rendering` says how prompts were made of problems.
    """

    source: str
    sha256: str
    problems: list[Problem]
    kind: str
    n_rows: int
    columns: dict[str, str]
    dropped: dict[str, int] = field(default_factory=dict)
    rendering: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    copies: dict[str, str] = field(default_factory=dict)

    def only(self, indices: Sequence[int]) -> "ProblemSet":
        """With these problems alone; `description` and `summary` say what was read, which is all of them."""
        return replace(self, problems=[self.problems[i] for i in indices])

    @property
    def n_read(self) -> int:
        """How many problems were read."""
        return self.n_rows - sum(self.dropped.values())

    @property
    def description(self) -> dict[str, Any]:
        """What the manifest says of the data set; of the original's schema no more than it always did."""
        described = {"path": self.source, "sha256": self.sha256, "num_problems": self.n_read}
        if self.kind == JSONL and self.columns == ORIGINAL_SCHEMA:
            return described
        read = {"kind": self.kind, "num_rows": self.n_rows, "num_dropped": self.dropped, "columns": self.columns}
        return described | read

    @property
    def summary(self) -> str:
        """What was read, in a line."""
        ids = "ids are row numbers" if self.columns["id"] == NO_ID else f"id from '{self.columns['id']}'"
        line = (
            f"{self.source}: {self.kind}, {self.n_rows} rows, {self.n_read} problems "
            f"(problem from '{self.columns['problem']}', answer from '{self.columns['answer']}', {ids})"
        )
        return line + (f"; dropped {sum(self.dropped.values())}: {_listed(self.dropped)}" if self.dropped else "")


def load_problems(
    source: str | Path, problem_key: str | None = None, answer_key: str | None = None, id_key: str | None = None
) -> ProblemSet:
    """Read a data set; `open_data_set` says what can be one.

    Fields are found by the first of `PROBLEM_KEYS`, `ANSWER_KEYS` and `ID_KEYS` that any row has, upper and lower
    case alike, or are named, dotted for those inside of others (`reward_model.ground_truth`). Without an id, or with
    `id_key` "none", a row's number from 0 is its id.

    JSON lines in the original's schema are taken as they are. Of other data sets rows without a problem or an answer,
    with several answers, or without a `final_answer` where most rows have one, are dropped and counted. Everywhere a
    row of a wrong shape is an error, so is an id with two contents, and copies of a problem are left out and counted.
    """
    opened = open_data_set(str(source))
    columns = _choose_columns(opened, {"problem": problem_key, "answer": answer_key, "id": id_key})
    rows = opened.read([key for key in columns.values() if key != NO_ID])
    is_strict = opened.kind == JSONL and columns == ORIGINAL_SCHEMA
    found, faults = _read_rows(rows, columns, is_strict)
    faults = [*opened.faults, *faults]
    if not found.problems and not faults:
        why = f"; dropped: {_listed(found.dropped)}" if found.dropped else ""
        faults.append((f"`dataset` {source}", f"no problems in it{why}"))
    raise_folded(faults)
    sha256 = opened.sha256
    if not sha256:
        canonical = [[p.idx, p.id, p.prompt, p.messages, p.ground_truth] for p in found.problems]
        sha256 = hashlib.sha256(json.dumps(canonical, separators=(",", ":")).encode()).hexdigest()
    return replace(found, source=str(source), sha256=sha256, kind=opened.kind)


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items())


def _choose_columns(opened: RecordFile, given: dict[str, str | None]) -> dict[str, str]:
    """The field of each of `problem`, `answer` and `id`, given or found by name."""
    if not opened.keys:
        raise_folded(opened.faults or [(f"`dataset` {opened.source}", "no problems in it")])
    there = f"(there: {first_of(opened.keys, MOST_KEYS_SHOWN)})"
    spelt = {key.lower(): key for key in reversed(opened.keys)} | {key: key for key in opened.keys}
    columns: dict[str, str] = {}
    faults: list[tuple[str, str]] = []
    for what, common in (("problem", PROBLEM_KEYS), ("answer", ANSWER_KEYS), ("id", ID_KEYS)):
        key = given[what]
        found = [spelt.get(name, spelt.get(name.lower())) for name in ((key,) if key else common)]
        if any(found):
            columns[what] = next(filter(None, found))
        elif what == "id" and key in (None, NO_ID):
            columns[what] = NO_ID
        elif key:
            faults.append((f"`{what}_key` {key}", f"not in {opened.source} {there}"))
        else:
            place = next(iter(opened.read([]))).place if opened.kind == JSONL else opened.source
            others = ", ".join(f"'{name}'" for name in common[1:])
            why = f"key '{common[0]}' is missing, and so are {others} {there}; name another with --{what}-key"
            faults.append((place, why))
    if faults:
        raise_folded([*opened.faults, *faults])
    return columns


def _read_rows(
    rows: Iterable[Record], columns: dict[str, str], is_strict: bool
) -> tuple[ProblemSet, list[tuple[str, str]]]:
    """What the rows say, still without its source, and faults at their places.

    Rows are looked at one by one and copies are let go: a data set of 1.8 million rows may have 18 thousand problems.
    """
    problems: list[Problem] = []
    are_worked: list[bool] = []  # of each problem whose answer is a text, whether it has a final answer
    unfinished: list[Problem] = []
    n_rows = 0
    dropped: Counter[str] = Counter()
    faults: list[tuple[str, str]] = []
    torn_ids: list[tuple[str, str]] = []
    copies: dict[str, str] = {}
    first_of_id: dict[str, tuple[Problem, str]] = {}  # with its place
    answers_of: dict[Any, dict[str, Problem]] = {}  # by prompt and answer: the first problem
    seen: set[bytes] = set()
    for row in rows:
        n_rows += 1
        # The same in all that is read, its id too: most copies are, and are known three times as fast.
        digest = hashlib.blake2b(repr(row.fields).encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in seen:
            dropped[COPIES] += 1
            continue
        try:
            problem = _problem_of(row, columns, is_strict)
        except Unusable as error:
            dropped[str(error)] += 1
            continue
        except FaultyRecord as error:
            faults.append((row.place, str(error)))
            continue
        answers = answers_of.setdefault(problem.prompt or problem.messages, {})
        first = answers.setdefault(problem.ground_truth, problem)
        if columns["id"] != NO_ID:
            where = row.place.rpartition(":")[2].strip()
            before, place = first_of_id.setdefault(problem.id, (first, where))
            if before is not first:
                place = f"line {place}" if place.isdecimal() else place
                torn_ids.append((row.place, f"id '{problem.id}' was used in {place}, for another problem or answer"))
                continue
        if first is not problem:
            dropped[COPIES] += 1
            copies[problem.id] = first.id
            continue
        problems.append(problem)
        seen.add(digest)
        text = lookup(row.fields, columns["answer"])
        if not is_strict and isinstance(text, str):
            are_worked.append(bool(final_answer(text)))
            unfinished += [] if are_worked[-1] else [problem]
    if unfinished and 2 * sum(are_worked) > len(are_worked):  # then one that has no final answer is cut off
        dropped[f"without a final answer (#### or \\boxed{{}}) in '{columns['answer']}'"] += len(unfinished)
        left_out = {problem.idx for problem in unfinished}
        problems = [problem for problem in problems if problem.idx not in left_out]
    for place, fault in torn_ids[:1]:
        faults.append((place, fault + (f" (and {len(torn_ids) - 1} more like it)" if torn_ids[1:] else "")))
    torn = [next(iter(answers.values())).id for answers in answers_of.values() if len(answers) > 1]
    said = f"{len(torn)} prompts stand with several answers (such as that of problem '{first_of(torn, 1)}')"
    notes = [f"{said}; analyses take each of them for one"] if torn else []
    return ProblemSet("", "", problems, "", n_rows, columns, dict(dropped), notes=tuple(notes), copies=copies), faults


def _problem_of(row: Record, columns: dict[str, str], is_strict: bool) -> Problem:
    values = {}
    for what, key in columns.items():
        try:
            values[what] = row.idx if (what, key) == ("id", NO_ID) else lookup(row.fields, key)
        except KeyError as error:
            raise FaultyRecord(f"key '{key}' is missing") from error
    _refuse_other_types(values["id"], columns["id"], str | int)
    prompt, messages = _prompt_of(values["problem"], columns["problem"], is_strict)
    if is_strict:
        answer = decoded(values["answer"])
        if isinstance(answer, list):
            raise FaultyRecord(f"'{columns['answer']}' has several answers")
        _refuse_other_types(answer, columns["answer"])
        answer = str(answer)
    else:
        answer = answer_of(values["answer"], columns["answer"])
    for text in (str(values["id"]), prompt, answer, *(content for _, content in messages)):
        if half := SURROGATE.search(text):
            raise FaultyRecord(f"half a surrogate pair ({half[0]!a}) in its text")
    return Problem(row.idx, str(values["id"]), prompt, answer, messages)


def _prompt_of(value: Any, key: str, is_strict: bool) -> tuple[str, tuple[tuple[str, str], ...]]:
    if not is_strict and (_is_blank(value) or value == []):
        raise Unusable(f"without '{key}'")
    _refuse_other_types(value, key, str | list)
    if isinstance(value, str):
        return value, ()
    if not all(isinstance(message, dict) for message in value):
        raise FaultyRecord(f"'{key}' is a list, but not one of chat messages (role and content)")
    messages = tuple((m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in value)
    if not all(isinstance(text, str) for message in messages for text in message):
        raise FaultyRecord(f"'{key}' has a chat message whose role or content is not text")
    return "", tuple((ROLES.get(role.lower(), role), content) for role, content in messages)


def _is_blank(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and not value.strip())


def _refuse_other_types(value: Any, key: str, types: Any = str | int | float) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        raise FaultyRecord(f"'{key}' is of type {type(value).__name__}")


def decoded(value: Any) -> Any:
    """What a text holds that is a JSON list of texts; anything else as it stands, for `[0, 1]` is an interval.

    A list of one is its entry.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            found = json.loads(value)
            if found and isinstance(found, list) and all(isinstance(entry, str) for entry in found):
                value = found
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def answer_of(value: Any, key: str) -> str:
    """The answer that a field holds: of worked text, what it ends in (`final_answer`).

    Raises:
        Unusable: there is none, or several.
        FaultyRecord: neither text nor a number.
    """
    value = decoded(value)
    if isinstance(value, list) and len(value) > 1:
        raise Unusable(f"with several answers in '{key}'")
    if value == [] or _is_blank(value):
        raise Unusable(f"without '{key}'")
    _refuse_other_types(value, key)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # tables hold whole numbers as floats where the column has gaps
    text = str(value).strip()
    if in_dollars := IN_DOLLARS.fullmatch(text):
        text = in_dollars[1].strip()
    return final_answer(text) or text


def final_answer(text: str) -> str:
    """What a worked solution ends in: its last line after `####`, else its last `\\boxed{}`; "" if it has neither.

    Thousands separators go from a number after `####`, as in GSM8K's own evaluation.
    """
    final_line = FINAL_LINE.search(text.strip())
    if final_line and final_line[1].strip():
        answer = final_line[1].strip()
        return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer
    return (last_boxed(text) or "").strip()


def shard_of_study(
    n_problems: int, num_prompts: int, seed: int, shard_index: int = 0, num_shards: int = 1, skip: int = 0
) -> np.ndarray:
    """The problem indices of shard `shard_index`, [n] int64: its own slice of one seeded permutation.

    The study is the first `num_prompts` of the permutation, so its shards are disjoint and together hold the
    same problems whatever `num_shards` is. A study that grows has the old one as its first problems: its further shards
    `skip` these.
    """
    faults = []
    if num_prompts > n_problems:
        faults.append(f"`num_prompts` {num_prompts}: the data set has {n_problems} problems")
    if num_shards > num_prompts - skip:
        faults.append(f"`num_shards` {num_shards}: more shards than the study's {num_prompts - skip} prompts")
    raise_if_any(faults)
    study = np.random.default_rng(seed).permutation(n_problems)[skip:num_prompts]
    return np.array_split(study, num_shards)[shard_index]
