"""The shapes in which others write rollouts: every record in, its completions out, as the file has them.

Field names are those of vLLM 0.1x's RequestOutput, the OpenAI completions and batch API (with vLLM's `token_ids`
and llama.cpp's `logprobs.content[].id`), TRL 1.x's completion logs and verl 0.x's rollout and validation dumps.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..common.errors import FaultyRecord, InputError, Unusable, one_line, raise_folded, raise_if_any
from ..common.record_files import open_record_file
from ..dump.records import Rollout, rollout_from_json
from .server import logprob_entries, object_at, token_ids_of

N_EXAMPLES = 3

FAILED_REQUEST = "requests that failed"
INCOMPLETE_IDS = "completions whose token ids are incomplete (llama.cpp's log-probs leave out parts of characters)"
OTHER_STEPS = "come from other training steps than the first: rollouts of several policies"

APART = ("reasoning", "reasoning_content", "tool_calls", "function_call")
"""Where servers that parse a response put what they took out of its text."""
TRUTH_KEYS = ("ground_truth", "gts", "solution", "answer")


@dataclass(frozen=True)
class Completion:
    """One completion as its file has it; None is what the file does not say.

    Attributes:
        where: file and line (of parquet: row), for messages.
        prompt: text, or a chat's messages.
        end: what ended it: "eos", the id of another end token, or "cut" (its length, or a stop string).
        fields: what else stands in its record: problem_id, ground truth, verdicts, rewards.
        unusable: why it has to be dropped.
        sample: its request's id and its number among that request's samples.
        own: the rollout that it is, in a file of ours.
    """

    where: str
    prompt: str | list[dict[str, Any]] | None
    prompt_ids: list[int] | None
    text: str | None
    response_ids: list[int] | None
    end: str | int | None
    fields: dict[str, Any]
    unusable: str | None = None
    sample: tuple[str, Any] | None = None
    own: Rollout | None = None


@dataclass
class RolloutReport:
    """What was read, and what became of it.

    `sha256` is that of the file's bytes as they were read; of several files, that of their SHA-256 one after another.
    `verdict_from` is the field that verdicts are from, with its threshold if there is one, or "verifier".
    `dropped` and `notes` count completions (failed requests: lines) by reason; `examples` has the first places of each.
    """

    format: str
    sha256: str = ""
    n_completions: int = 0
    n_rollouts: int = 0
    n_prompts: int = 0
    n_to_verify: int = 0
    verdict_from: str = ""
    dropped: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def count(self, counter: Counter, reason: str, where: str) -> None:
        """Count in `dropped` a completion that is left out, in `notes` one of which something must be said."""
        counter[reason] += 1
        place = Path(where).name
        if len(self.examples[reason]) < N_EXAMPLES and place not in self.examples[reason]:
            self.examples[reason].append(place)

    def lines(self) -> list[str]:
        """The report for a person, one line each."""
        verdict = f", verdict from '{self.verdict_from}'" if self.n_rollouts else ""
        verdict = f", {self.n_to_verify} to be verified" if self.n_to_verify else verdict
        counts = [("dropped", self.dropped), ("note:", self.notes)]
        return [
            f"{self.format} rollouts: {self.n_rollouts} of {self.n_prompts} prompts{verdict}",
            *(f"{word} {n} {why} ({', '.join(self.examples[why])})" for word, of in counts for why, n in of.items()),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The report for the manifest; no paths in it."""
        shown = {name: value for name, value in vars(self).items() if name not in ("sha256", "examples")}
        return shown | {"dropped": dict(self.dropped), "notes": dict(self.notes)}


def completions_of(files: Sequence[Path], file_format: str) -> tuple[list[Completion], RolloutReport]:
    """The files' completions in order, and a report that names their format and has counted them."""
    opened = [open_record_file(file, "rollouts") for file in files]
    raise_folded(fault for file in opened for fault in file.faults)
    records = [(record.place, record.fields) for file in opened for record in file.read(file.keys)]
    raise_if_any(f"`rollouts` {file.source}: no rollouts in it" for file in opened if not file.keys)
    hashes = [file.sha256 for file in opened]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    report = RolloutReport(_recognise(*records[0]) if file_format == "auto" else file_format, sha256)
    is_shape, parse = SHAPES[report.format]
    completions: list[Completion] = []
    faults: list[tuple[str, str]] = []
    for where, record in records:
        try:
            if not is_shape(record):
                raise FaultyRecord(f"not of the shape {report.format}: {_keys_of(record)}")
            completions += parse(where, record)
        except Unusable as error:
            report.count(report.dropped, str(error), where)
        except FaultyRecord as error:
            faults.append((where, str(error)))
        else:
            if report.format in ("trl", "verl") and record.get("step") != records[0][1].get("step"):
                report.count(report.notes, OTHER_STEPS, where)
    raise_folded([*faults, *_repeated_requests(completions)])
    report.n_completions = len(completions)
    return completions, report


def _repeated_requests(completions: list[Completion]) -> list[tuple[str, str]]:
    """(place, fault) of samples of one request that stand twice, word for word.

    vLLM numbers its requests from 0 in every process, so that two runs in one file share ids; where any of the samples
    of one name differ, names say nothing.
    """
    first: dict[tuple[str, Any], Completion] = {}
    faults, words = [], attrgetter("prompt", "prompt_ids", "text", "response_ids")
    for again in completions:
        before = again if again.sample is None else first.setdefault(again.sample, again)
        if before is again:
            continue
        if words(before) != words(again):
            return []
        named = f"request '{one_line(again.sample[0], 60)}' stands at {Path(before.where).name} already"
        faults.append((again.where, f"{named}, word for word: was the file written twice? leave the copies out"))
    return faults


def _recognise(where: str, record: dict[str, Any]) -> str:
    found = [name for name, (is_shape, _) in SHAPES.items() if is_shape(record)]
    if len(found) != 1:
        what = f"of several shapes ({', '.join(found)})" if found else f"of no known shape: {_keys_of(record)}"
        raise InputError(f"{where}: {what}; `rollouts_format` names one of {', '.join(FORMATS)}")
    return found[0]


def _keys_of(record: dict[str, Any]) -> str:
    return f"its keys are {', '.join(sorted(record))}"


def _own(where: str, record: dict[str, Any]) -> list[Completion]:
    own = rollout_from_json(record)
    return [Completion(where, None, own.prompt_ids, own.response, own.response_ids, "cut", record, own=own)]


def _vllm(where: str, record: dict[str, Any]) -> list[Completion]:
    outputs = [{"text": output} if isinstance(output, str) else output for output in record["outputs"]]
    if not all(isinstance(output, dict) for output in outputs):
        raise FaultyRecord("an entry of 'outputs' is neither an object nor a text")
    return [
        Completion(
            where,
            record.get("prompt"),
            record.get("prompt_token_ids"),
            output.get("text"),
            output.get("token_ids"),
            _end_of(output),
            _fields(record, output, len(outputs)),
            sample=_sample_of(record.get("request_id"), output, number),
        )
        for number, output in enumerate(outputs)
    ]


def _openai(where: str, record: dict[str, Any]) -> list[Completion]:
    request, response = _request_and_response(record)
    prompt = request.get("prompt", request.get("messages"))
    prompt_is_ids = is_list_of(int, prompt)
    if is_list_of((str, list), prompt):
        raise FaultyRecord("several prompts in one line; write one request a line")
    choices = response.get("choices")
    if not is_list_of(dict, choices):
        raise FaultyRecord("'choices' is not a list of objects")
    return [
        Completion(
            where,
            None if prompt_is_ids else prompt,
            choice.get("prompt_token_ids") or (prompt if prompt_is_ids else response.get("prompt_token_ids")),
            choice["text"] if "text" in choice else object_at(choice, "message").get("content"),
            _whole(token_ids_of(response, choice), choice, object_at(choice, "message")),
            _end_of(choice, may_be_stop_string=bool(request.get("stop")) and "stop_reason" not in choice),
            _fields({"problem_id": record.get("custom_id"), **record}, choice, len(choices)),
            None if _has_all_ids(response, choice) else INCOMPLETE_IDS,
            _sample_of(response.get("id"), choice, number),
        )
        for number, choice in enumerate(choices)
    ]


def _request_and_response(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Request and response of a line that has both, of a batch's output line, or of a response with a prompt in it."""
    response = record.get("response", record)
    response = response.get("body", response) if isinstance(response, dict) else response
    if record.get("error") or not isinstance(response, dict) or response.get("error"):
        raise Unusable(FAILED_REQUEST)
    request = record.get("request", record)
    if not isinstance(request, dict):
        raise FaultyRecord("'request' is not an object")
    if request.get("echo"):
        raise FaultyRecord("asked for with 'echo': prompt and completion can't be told apart")
    return request, response


def _whole(ids: list[int] | None, *spoken: dict[str, Any]) -> list[int] | None:
    """The token ids as they are; `FaultyRecord` where there are none and the text is only a part of the response."""
    apart = [key for of in spoken for key in APART if of.get(key)]
    if ids is None and apart:
        raise FaultyRecord(
            f"a part of its response stands beside 'content', in '{apart[0]}', and not as it was sampled: have the "
            "server write token ids, or turn its parsers off (vLLM: no --reasoning-parser, no --tool-call-parser)"
        )
    return ids


def _has_all_ids(response: dict[str, Any], choice: dict[str, Any]) -> bool:
    """False where ids stand beside llama.cpp's log-probs and their bytes don't make the text."""
    if choice.get("token_ids") is not None or "__verbose" in response or token_ids_of(response, choice) is None:
        return True
    spoken = b"".join(bytes(entry.get("bytes") or []) for entry in logprob_entries(choice))
    return isinstance(choice.get("text"), str) and spoken.startswith(choice["text"].encode("utf-8", "surrogatepass"))


def _trl(where: str, record: dict[str, Any]) -> list[Completion]:
    completion = record.get("completion")
    if isinstance(completion, list):
        if len(completion) != 1 or not isinstance(completion[0], dict) or not completion[0].get("content"):
            raise FaultyRecord("its completion is of several turns or without text; only one answer can be probed")
        completion = completion[0]["content"]
        _whole(record.get("completion_ids"), *record["completion"])
    prompt_ids, ids = record.get("prompt_ids"), record.get("completion_ids")
    return [Completion(where, record.get("prompt"), prompt_ids, completion, ids, None, record)]


def _verl(where: str, record: dict[str, Any]) -> list[Completion]:
    prompt_ids, ids = record.get("prompt_ids"), record.get("response_ids")
    return [Completion(where, record["input"], prompt_ids, record["output"], ids, None, record)]


SHAPES: dict[str, tuple[Callable[[dict[str, Any]], bool], Callable[[str, dict[str, Any]], list[Completion]]]] = {
    "gradprobe": (lambda r: {"prompt_idx", "sample_idx", "prompt_ids", "response_ids"} <= r.keys(), _own),
    "vllm": (lambda r: isinstance(r.get("outputs"), list), _vllm),
    "openai": (lambda r: "choices" in r or isinstance(r.get("response"), dict) or bool(r.get("error")), _openai),
    "trl": (lambda r: "completion" in r or "completion_ids" in r, _trl),
    "verl": (lambda r: {"input", "output"} <= r.keys(), _verl),
}
"""How a record's keys tell its shape, and what reads it."""
FORMATS = tuple(SHAPES)


def is_list_of(kind: Any, value: Any) -> bool:
    """Whether `value` is a list, not empty, of instances of `kind` (a type or a tuple of types)."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _fields(record: dict[str, Any], output: dict[str, Any], n_outputs: int) -> dict[str, Any]:
    """What an output says of itself, and what its record says of all of them: the problem, not the verdict."""
    shared = ("problem_id", *TRUTH_KEYS)
    return {**(record if n_outputs == 1 else {key: record[key] for key in shared if key in record}), **output}


def _sample_of(request: Any, output: dict[str, Any], number: int) -> tuple[str, Any] | None:
    """What names one sample in its file; None where the request has no id."""
    index = output.get("index")
    return (request, index if type(index) is int else number) if isinstance(request, str) else None


def _end_of(output: dict[str, Any], may_be_stop_string: bool = False) -> str | int | None:
    """How vLLM and OpenAI say a completion ended; `stop_reason` is vLLM's: a stop id, a stop string, or null."""
    stop_reason, finish_reason = output.get("stop_reason"), output.get("finish_reason")
    if type(stop_reason) is int:
        return stop_reason
    if isinstance(stop_reason, str) or finish_reason == "length":
        return "cut"
    return "eos" if finish_reason == "stop" and not may_be_stop_string else None
