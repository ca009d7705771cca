"""Rollouts from elsewhere: our own `rollouts.jsonl`, vLLM's and the OpenAI completions shape, TRL's and verl's dumps.

Whatever the shape, what comes out is token ids. Ids in the file are taken as they are. Text is tokenised again with
care: what does not come back from its ids is dropped and counted, for its tokens can't be known.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.console import SURROGATE
from ..common.errors import FaultyRecord, InputError
from ..common.fields import is_finite
from ..dump.records import PromptKey, Rollout
from ..problems.chat import ChatRefusal, ChatTemplate
from ..problems.data_set import Problem
from .formats import TRUTH_KEYS, Completion, RolloutReport, completions_of, is_list_of, raise_folded
from .places import in_words
from .server import are_token_ids

CACHED_TEXTS = 4096
LOST_BYTES = "\ufffd"
"""In a sampler's text it stands for bytes that made no character; its own ids are others."""

EMPTY = "completions without response tokens"
NOT_ROUND_TRIP = "completions whose text does not come back from its token ids"
TOO_LONG = "completions longer than the model's context"
END_APPENDED = "ended by themselves, which their text can't say: the end-of-sequence id was appended"
END_UNKNOWN = "may lack their end-of-sequence token: the file doesn't say how they ended"
PADDING_CUT = "ended in several end-of-sequence or padding ids, of which the first was kept"
BOUNDARY_DIFFERS = "have other ids where prompt and completion are tokenised as one text; kept as tokenised apart"
TEXT_DIFFERS = "have a text that this tokenizer does not make of their ids"
FROM_DATASET = "have the data set's prompt: the file's own lacks special tokens, or is missing"
OTHER_THAN_DATASET = "have a prompt other than the data set's rendering of their problem; probed as in the file"
RENDERED = "have a prompt of messages, rendered with the tokenizer's chat template"
SPECIALS_NOT_ADDED = "have a prompt as text, tokenised without the special tokens this tokenizer would add"

VERIFIER, ANEW = "the verifier", "`correct_from` verifier judges them anew"
VERDICTS = ("correct", "acc")
"""Fields that hold verdicts, by themselves or (verl's `acc`) as 1 and 0."""
NO_REWARDS = {"step", "prompt", "completion", "advantage", "prompt_ids", "completion_ids", *TRUTH_KEYS}
"""TRL's columns that are no reward; each reward function has a column of its name."""


@dataclass(frozen=True)
class ForeignRollouts:
    """Rollouts to be scored, a file's of ours with the scores that they had; `correct` is None where to be verified."""

    rollouts: list[Rollout]
    report: RolloutReport


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean to the model to be probed.

    Attributes:
        size: ids are below it.
        end_ids: its end-of-sequence ids.
        context: the most tokens of prompt and response together; None for no bound.
    """

    tokenizer: Any
    size: int
    end_ids: frozenset[int]
    context: int | None = None


def read_rollouts(
    files: Path | Sequence[Path],
    vocabulary: Vocabulary,
    *,
    file_format: str = "auto",
    problems: Sequence[Problem] | None = None,
    correct_from: str = "auto",
    correct_above: float | None = None,
    score_key: str | None = None,
) -> ForeignRollouts:
    """Read rollouts of any of `FORMATS` from JSONL, JSON or parquet, one file or several of one shape.

    All faults are named with their lines.

    Args:
        vocabulary: of the model to be probed; what is longer than its context is dropped.
        file_format: one of `FORMATS`, or "auto" to recognise it by its keys.
        problems: the data set the prompts come from; gives ground truths and prompt_idx. Without it prompts are
            numbered as they appear.
        correct_from: "auto" (a bool `correct`, verl's `acc` as a bool or as 1 and 0, else the reward), the name of a
            bool or a reward in the file, or "verifier" to ignore what the file says.
        correct_above: a reward above it counts as correct.
        score_key: a field that holds a number for each response token, to bucket them by.
    """
    files = [files] if isinstance(files, Path) else files
    file = in_words(files)
    completions, report = completions_of(files, file_format)
    if report.format == "gradprobe" and problems is not None:
        raise InputError(f"`rollouts` {file}: rollouts of our own bring their problems; leave `dataset` out")
    judge = _Judge(report.format, correct_from, correct_above)
    resolve = _Resolver(vocabulary, report, problems)
    rollouts: list[Rollout] = []
    faults: list[tuple[str, str]] = []
    for completion in completions:
        try:
            correct, source = judge.verdict(completion.fields)
            rollout = resolve.rollout(completion, correct)
            if rollout is not None:
                judge.keep(source, completion.where)
                scores = [] if score_key is None else _scores_of(completion, score_key, rollout)
                rollouts.append(replace(rollout, reward=judge.reward(completion.fields), bucket_scores=scores))
        except FaultyRecord as error:
            faults.append((completion.where, str(error)))
    raise_folded(faults)
    if correct_above is not None and rollouts and " > " not in judge.source:
        took = "" if judge.source == "verifier" else f"; its verdicts are taken from '{judge.source}', which needs none"
        raise InputError(f"`correct_above` {correct_above:g}: {file} has no reward to hold against it{took}")
    if not rollouts:
        raise InputError("; ".join((f"`rollouts` {file}: no rollouts left", *report.lines()[1:])))
    report.n_rollouts = len(rollouts)
    report.n_prompts = len({rollout.prompt_idx for rollout in rollouts})
    report.verdict_from = judge.source
    report.n_to_verify = sum(rollout.correct is None for rollout in rollouts)
    return ForeignRollouts(rollouts, report)


def _scores_of(completion: Completion, key: str, rollout: Rollout) -> list[float]:
    found, ids = completion.fields.get(key), completion.response_ids or rollout.response_ids
    if not isinstance(found, list) or len(found) != len(ids) or not all(map(is_finite, found)):
        raise FaultyRecord(f"`bucket_by`: '{key}' is not a list of finite numbers, one for each of {len(ids)} tokens")
    return found[: len(rollout.response_ids)]


@dataclass
class _Judge:
    """Takes the verdict from a completion's fields; None leaves it to the verifier.

    Attributes:
        places: where each kind of verdict that was kept is first: a field, a field and its threshold, or the verifier.
    """

    format: str
    correct_from: str
    correct_above: float | None
    places: dict[str, str] = field(default_factory=dict)

    def verdict(self, fields: dict[str, Any]) -> tuple[bool | None, str]:
        """The verdict, and what it is from."""
        key = self._key(fields)
        if key is None:
            return None, VERIFIER
        value = fields[key]
        if isinstance(value, bool):
            return value, key
        if value is None or value != value:
            raise FaultyRecord(f"'{key}' is {'null' if value is None else 'NaN'}, no verdict: {ANEW}")
        if not isinstance(value, int | float):
            raise FaultyRecord(f"'{key}' is neither true or false nor a number")
        if not is_finite(value):
            raise FaultyRecord(f"'{key}' is not a finite number")
        if self._is_verdict(key, value):
            return value == 1, key
        if self.correct_above is None:
            raise FaultyRecord(
                f"'{key}' is a number: `correct_above` THRESHOLD says which rewards are correct answers, {ANEW}"
            )
        return value > self.correct_above, f"{key} > {self.correct_above:g}"

    def keep(self, source: str, where: str) -> None:
        """Count a rollout whose verdict is from `source`.

        Raises:
            FaultyRecord: others' are from elsewhere.
        """
        first, place = next(iter(self.places.items()), (source, where))
        if source != first:
            said, before = (name if name == VERIFIER else f"'{name}'" for name in (source, first))
            raise FaultyRecord(
                f"would take its verdict from {said}, {place} from {before}: one file needs one kind; "
                "`correct_from` names a field that all have, or verifier"
            )
        self.places[source] = place

    @property
    def source(self) -> str:
        """What all verdicts are from."""
        return next(iter(self.places), VERIFIER).removeprefix("the ")

    def _is_verdict(self, key: str, value: Any) -> bool:
        """Whether a value is a verdict as it stands: true or false, or `acc` (or `correct`) as 1 or 0."""
        if isinstance(value, bool):
            return key in VERDICTS
        # With a threshold for it, a number in `correct` is a reward; verl's `acc` is one only where it is asked for.
        is_reward = self.correct_above is not None and (key != "acc" or self.correct_from == key)
        return key in VERDICTS and not is_reward and _is_number(value) and value in (0, 1)

    def _key(self, fields: dict[str, Any]) -> str | None:
        if self.correct_from == "verifier":
            return None
        if self.correct_from != "auto":
            if self.correct_from not in fields:
                raise FaultyRecord(f"`correct_from` {self.correct_from}: key '{self.correct_from}' is missing")
            return self.correct_from
        for key in VERDICTS:
            if self._is_verdict(key, fields.get(key)):
                return key
        rewards = [key for key in self._reward_keys(fields) if _is_number(fields.get(key))]
        if len(rewards) > 1:
            raise FaultyRecord(f"several rewards; `correct_from` names one of {', '.join(rewards)}, or verifier")
        return rewards[0] if rewards else None

    def _reward_keys(self, fields: dict[str, Any]) -> Sequence[str]:
        if self.format == "trl":
            return [key for key in fields if key not in NO_REWARDS]
        return ("score",) if self.format == "verl" else ("correct", "score", "reward")

    def reward(self, fields: dict[str, Any]) -> float | None:
        """The number that a completion was rewarded with, where one and only one is known and its verdict counts."""
        if self.correct_from == "verifier":
            return None
        named = self._reward_keys(fields) if self.correct_from == "auto" else [self.correct_from]
        found = [fields[key] for key in named if is_finite(fields.get(key))]
        return float(found[0]) if len(found) == 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Codec:
    """Text to token ids and back, with nothing added, skipped or tidied up unless it says so."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._ids_of = lru_cache(CACHED_TEXTS)(self._tokenise)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands."""
        return list(self._ids_of(text))

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def comes_back(self, text: str) -> bool:
        """Whether `text` is the text of its own ids; with a lone surrogate, which no tokenizer takes, it is not."""
        return SURROGATE.search(text) is None and self.decode(self.encode(text)) == text

    def readable(self, ids: list[int]) -> str:
        """The text of token ids without special tokens, as verifiers are given it."""
        return self.decode(ids, skip_special_tokens=True)


class _Resolver:
    """Makes rollouts of completions: ids of prompt and response, the problem, the place among its samples."""

    def __init__(self, vocabulary: Vocabulary, report: RolloutReport, problems: Sequence[Problem] | None):
        tokenizer, end_ids = vocabulary.tokenizer, vocabulary.end_ids
        self.tokenizer, self.end_ids, self.vocabulary, self.report = tokenizer, end_ids, vocabulary, report
        self.chat_template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        self.own_samples: set[tuple[PromptKey, int]] = set()
        self.n_samples_of: Counter = Counter()
        self.codec = _Codec(tokenizer)
        self.problems = None if problems is None else _ProblemIndex(problems, self.codec)
        self.prompt_idx_of: dict[tuple[int, ...], int] = {}
        self.padding = end_ids | ({tokenizer.pad_token_id} - {None})
        self.adds_specials = tokenizer("")["input_ids"] != []
        self.strips_specials = report.format == "verl" and _template_has_specials(tokenizer, self.chat_template)

    def rollout(self, completion: Completion, correct: bool | None) -> Rollout | None:
        """The completion's rollout, or None where it was dropped (and counted).

        Raises:
            FaultyRecord: the completion can't be used; says why.
        """
        if completion.own is not None:
            return self._own(completion, completion.own, correct)
        prompt = self._prompt_text(completion)
        problem = None if self.problems is None else self.problems.of(completion, prompt)
        ground_truth = _ground_truth(completion.fields, problem, correct)
        prompt_ids = self._prompt_ids(completion, prompt, problem)
        number = self.prompt_idx_of.setdefault(tuple(prompt_ids), len(self.prompt_idx_of))
        prompt_idx = number if problem is None else problem.idx
        sample_idx = self.n_samples_of[prompt_idx]
        self.n_samples_of[prompt_idx] += 1  # dropped ones keep their number, so that a sample can be found in its file
        reason = completion.unusable or self._fault_of_text(completion)
        ids = [] if reason else self._response_ids(completion)
        reason = reason or self._fault_of_length(prompt_ids, ids)
        if reason is not None:
            self.report.drop(reason, completion.where)
            return None
        for remark in (*self._prompt_remarks(completion, prompt, problem, prompt_ids), *self._remarks(completion, ids)):
            self.report.note(remark, completion.where)
        given_id = completion.fields.get("problem_id")
        return Rollout(
            prompt_idx=prompt_idx,
            sample_idx=sample_idx,
            problem_id=problem.id if problem else str(prompt_idx if given_id is None else given_id),
            prompt_ids=prompt_ids,
            response_ids=ids,
            entropies=[],
            logprobs=[],
            response=self.codec.readable(ids),
            ground_truth=ground_truth,
            correct=correct,
        )

    def _own(self, completion: Completion, own: Rollout, correct: bool | None) -> Rollout | None:
        for ids, what in ((own.prompt_ids, "prompt ids"), (own.response_ids, "response ids")):
            self._checked(ids, what)
        sample = own.prompt_idx, own.sample_idx
        if sample in self.own_samples:
            raise FaultyRecord(f"prompt {own.prompt_idx} sample {own.sample_idx} stands twice")
        self.own_samples.add(sample)
        reason = self._fault_of_length(own.prompt_ids, own.response_ids)
        if reason is not None:
            self.report.drop(reason, completion.where)
            return None
        for remark in self._remarks(completion, own.response_ids):
            self.report.note(remark, completion.where)
        return replace(own, correct=correct)

    def _prompt_ids(self, completion: Completion, text: str | None, problem: Problem | None) -> list[int]:
        if completion.prompt_ids is not None:
            return self._checked(completion.prompt_ids, "prompt ids")
        if problem is not None and (text is None or text == self.problems.readable_prompt_of(problem)):
            return self.codec.encode(problem.prompt)
        if text is None:
            raise FaultyRecord("neither text nor token ids of the prompt; `dataset` brings them where ids match")
        if self.strips_specials and not any(token in text for token in self.tokenizer.all_special_tokens):
            raise FaultyRecord(
                "verl writes prompts without their special tokens, so this is not what the model saw; "
                "`dataset` FILE with the rendered prompts brings them back"
            )
        if not self.codec.comes_back(text):
            raise FaultyRecord("its prompt does not come back from its token ids; hand over prompt ids")
        return self.codec.encode(text)

    def _prompt_text(self, completion: Completion) -> str | None:
        prompt = completion.prompt
        if prompt is None or isinstance(prompt, str) or completion.prompt_ids is not None:
            return prompt if isinstance(prompt, str) else None
        if not is_list_of(dict, prompt):
            raise FaultyRecord("its prompt is neither a text nor a list of messages")
        if self.chat_template is None:
            raise FaultyRecord("its prompt is a list of messages, and the tokenizer has no chat template")
        messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
        try:
            return self.chat_template.render(messages)
        except ChatRefusal as error:
            raise FaultyRecord(f"the tokenizer's chat template does not take its prompt ({error})") from error

    def _response_ids(self, completion: Completion) -> list[int]:
        if completion.response_ids is not None:
            return self._without_padding(self._checked(completion.response_ids, "response ids"))
        ids = self._without_padding(self.codec.encode(completion.text))
        end_id = completion.end if type(completion.end) is int else self.tokenizer.eos_token_id
        has_end = bool(ids) and ids[-1] in self.end_ids
        if completion.end in ("cut", None) or end_id is None or has_end:
            return ids
        return self._checked([*ids, end_id], "response ids")

    def _without_padding(self, ids: list[int]) -> list[int]:
        # An end id further ahead stays: it may be one of this checkpoint and not of the one that sampled.
        n_kept = len(ids)
        while n_kept > 1 and ids[n_kept - 1] in self.padding and ids[n_kept - 2] in self.padding:
            n_kept -= 1
        return ids[:n_kept]

    def _checked(self, ids: Any, what: str) -> list[int]:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise FaultyRecord(f"its {what} are not a list of integers")
        size = self.vocabulary.size
        if not are_token_ids(ids, size):
            odd = next(i for i in ids if not 0 <= i < size)
            raise FaultyRecord(f"its {what} have {odd}, the model's are 0 to {size - 1}: another model's?")
        if what == "prompt ids" and not ids:
            raise FaultyRecord("its prompt has no tokens, at least 1 is needed")
        return ids

    def _fault_of_text(self, completion: Completion) -> str | None:
        if completion.response_ids is not None:
            return None
        if not isinstance(completion.text, str):
            raise FaultyRecord("neither text nor token ids of the completion")
        is_whole = LOST_BYTES not in completion.text and self.codec.comes_back(completion.text)
        return None if is_whole else NOT_ROUND_TRIP

    def _fault_of_length(self, prompt_ids: list[int], ids: list[int]) -> str | None:
        if not ids:
            return EMPTY
        context = self.vocabulary.context
        return TOO_LONG if context is not None and len(prompt_ids) + len(ids) > context else None

    def _prompt_remarks(
        self, completion: Completion, text: str | None, problem: Problem | None, prompt_ids: list[int]
    ) -> Iterator[str]:
        has_ids = completion.prompt_ids is not None
        if problem is not None and prompt_ids != self.codec.encode(problem.prompt):
            yield OTHER_THAN_DATASET
        elif problem is not None and not has_ids and text != problem.prompt:
            yield FROM_DATASET
        if has_ids:
            return
        if isinstance(completion.prompt, list):
            yield RENDERED
        if self.adds_specials:
            yield SPECIALS_NOT_ADDED
        if completion.response_ids is None:
            joint = self.codec.encode(self.codec.decode(prompt_ids) + completion.text)
            if joint != prompt_ids + self.codec.encode(completion.text):
                yield BOUNDARY_DIFFERS

    def _remarks(self, completion: Completion, ids: list[int]) -> Iterator[str]:
        if completion.response_ids is None:
            yield from self._text_remarks(completion, ids)
            return
        if len(ids) < len(completion.response_ids):
            yield PADDING_CUT
        # The last is how our own sampler decodes; a tokenizer that tidies up makes another text of it.
        plain = self.tokenizer.decode(ids, skip_special_tokens=True)
        texts_of_ids = (self.codec.decode(ids), self.codec.readable(ids), plain)
        if isinstance(completion.text, str) and completion.text not in texts_of_ids:
            yield TEXT_DIFFERS

    def _text_remarks(self, completion: Completion, ids: list[int]) -> Iterator[str]:
        from_text = self.codec.encode(completion.text)
        if len(ids) < len(from_text):
            yield PADDING_CUT
        elif len(ids) > len(from_text):
            yield END_APPENDED
        elif completion.end != "cut" and ids[-1] not in self.end_ids:
            yield END_UNKNOWN


def _ground_truth(fields: dict[str, Any], problem: Problem | None, correct: bool | None) -> str:
    given = next((fields[key] for key in TRUTH_KEYS if fields.get(key) is not None), None)
    if given is not None and (not isinstance(given, str | int | float) or isinstance(given, bool)):
        raise FaultyRecord(f"its ground truth is of type {type(given).__name__}, a text or number is needed")
    if problem is None:
        if given is None and correct is None:
            raise FaultyRecord("neither a verdict ('correct') nor a 'ground_truth'; `dataset` FILE brings them")
        return "" if given is None else str(given)
    if given is not None and str(given).split() != problem.ground_truth.split():
        raise FaultyRecord(f"its ground truth is '{given}', that of problem '{problem.id}' '{problem.ground_truth}'")
    return problem.ground_truth


def _template_has_specials(tokenizer: Any, chat_template: ChatTemplate | None) -> bool:
    if chat_template is None:
        return False
    try:
        rendered = chat_template.render([{"role": "user", "content": "x"}])
    except ChatRefusal:
        return True  # as far as anybody knows
    return any(token in rendered for token in tokenizer.all_special_tokens)


class _ProblemIndex:
    """Finds a completion's problem: by id, by the prompt's ids, by its text, by its text without special tokens."""

    def __init__(self, problems: Sequence[Problem], codec: _Codec):
        self.by_id = {problem.id: problem for problem in problems}
        self.readable_prompts: dict[int, str] = {}
        self.by_prompt: dict[str | tuple[int, ...] | None, list[Problem]] = defaultdict(list)
        for problem in problems:
            ids = codec.encode(problem.prompt)
            self.readable_prompts[problem.idx] = codec.readable(ids)
            for key in {tuple(ids), problem.prompt, self.readable_prompts[problem.idx]}:
                self.by_prompt[key].append(problem)

    def readable_prompt_of(self, problem: Problem) -> str:
        """The prompt without its special tokens, as verl writes it."""
        return self.readable_prompts[problem.idx]

    def of(self, completion: Completion, prompt: str | None) -> Problem:
        """The problem that a completion answers; `prompt` is its prompt's text.

        Raises:
            FaultyRecord: none does, or several with different ground truths.
        """
        given_id = completion.fields.get("problem_id")
        if given_id is not None and str(given_id) in self.by_id:
            return self.by_id[str(given_id)]
        ids = completion.prompt_ids
        found = self.by_prompt.get(tuple(ids), []) if is_list_of(int, ids) else []
        found = found or self.by_prompt.get(prompt, [])
        if not found:
            named = "" if given_id is None else f" and no problem has the id '{given_id}'"
            raise FaultyRecord(f"its prompt is none of the data set's{named}")
        if len({problem.ground_truth for problem in found}) > 1:
            raise FaultyRecord(f"its prompt is that of problems {found[0].id} and {found[1].id}; give 'problem_id'")
        return found[0]
