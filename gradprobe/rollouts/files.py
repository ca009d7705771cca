"""Rollouts from elsewhere: our own `rollouts.jsonl`, vLLM's and the OpenAI completions shape, TRL's and verl's dumps.

Whatever the shape, what comes out is token ids. Ids in the file are taken as they are. Text is tokenised again with
care: what does not come back from its ids is dropped and counted, for its tokens can't be known.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..common.errors import FaultyRecord, InputError, Unusable
from ..common.fields import is_finite
from ..dump.records import PromptKey, Rollout
from ..problems.data_set import ASSISTANT, SURROGATE, Problem, answer_of
from ..problems.templates import chat_template_of, in_chat
from .formats import TRUTH_KEYS, Completion, RolloutReport, completions_of, is_list_of, raise_folded
from .places import in_words
from .verdicts import Verdicts

CACHED_TEXTS = 4096
LOST_BYTES = "\ufffd"
"""In a sampler's text it stands for bytes that made no character; its own ids are others."""

BY_IDS = "hand over prompt ids"
EMPTY = "completions without response tokens"
NOT_ROUND_TRIP = "completions whose text does not come back from its token ids"
TOO_LONG = "completions longer than the model's context"
END_APPENDED = "ended by themselves, which their text can't say: the end-of-sequence id was appended"
END_UNKNOWN = "may lack their end-of-sequence token: the file doesn't say how they ended"
PADDING_CUT = "ended in several end-of-sequence or padding ids, of which the first was kept"
TEXT_DIFFERS = "have a text that this tokenizer does not make of their ids"
FROM_DATASET = "have the data set's prompt: the file's own lacks special tokens, or is missing"
OTHER_THAN_DATASET = "have a prompt other than the data set's rendering of their problem; probed as in the file"
RENDERED = "have a prompt of messages, rendered with the tokenizer's chat template"
SPECIALS_NOT_ADDED = "have a prompt as text, tokenised without the special tokens this tokenizer would add"


@dataclass(frozen=True)
class ForeignRollouts:
    """Rollouts to be scored, a file's of ours with the scores that they had; `correct` is None where to be verified."""

    rollouts: list[Rollout]
    report: RolloutReport


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean to the model to be probed, and the most of prompt and response together (None: no bound)."""

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
    copies: Mapping[str, str] = MappingProxyType({}),
    correct_from: str = "auto",
    correct_above: float | None = None,
    score_key: str | None = None,
) -> ForeignRollouts:
    """Read rollouts of any of `FORMATS` from JSONL, JSON or parquet, one file or several of one shape.

    Args:
        vocabulary: of the model to be probed; what is longer than its context is dropped.
        file_format: one of `FORMATS`, or "auto" to recognise it by its keys.
        problems: the data set the prompts come from; gives ground truths and prompt_idx.
        copies: other ids by which a completion may name a problem, with the problem's own.
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
    verdicts = Verdicts(report.format, correct_from, correct_above)
    resolve = _Resolver(vocabulary, report, problems, copies)
    rollouts: list[Rollout] = []
    faults: list[tuple[str, str]] = []
    for completion in completions:
        try:
            correct, source = verdicts.of(completion.fields)
            rollout = resolve.rollout(completion, correct)
            verdicts.keep(source, completion.where)
            scores = [] if score_key is None else _scores_of(completion, score_key, rollout)
            rollouts.append(replace(rollout, reward=verdicts.reward(completion.fields), bucket_scores=scores))
        except Unusable as error:
            report.count(report.dropped, str(error), completion.where)
        except FaultyRecord as error:
            faults.append((completion.where, str(error)))
    raise_folded(faults)
    source = verdicts.source
    if correct_above is not None and rollouts and " > " not in source:
        took = "" if source == "verifier" else f"; its verdicts are taken from '{source}', which needs none"
        raise InputError(f"`correct_above` {correct_above:g}: {file} has no reward to hold against it{took}")
    if not rollouts:
        raise InputError("; ".join((f"`rollouts` {file}: no rollouts left", *report.lines()[1:])))
    report.n_rollouts = len(rollouts)
    report.n_prompts = len({rollout.prompt_idx for rollout in rollouts})
    report.verdict_from = source
    report.n_to_verify = sum(rollout.correct is None for rollout in rollouts)
    return ForeignRollouts(rollouts, report)


def _scores_of(completion: Completion, key: str, rollout: Rollout) -> list[float]:
    found, ids = completion.fields.get(key), completion.response_ids or rollout.response_ids
    if not isinstance(found, list) or len(found) != len(ids) or not all(map(is_finite, found)):
        raise FaultyRecord(f"`bucket_by`: '{key}' is not a list of finite numbers, one for each of {len(ids)} tokens")
    return found[: len(rollout.response_ids)]


class _Codec:
    """Text to token ids and back, with nothing added, skipped or tidied up unless it says so."""

    def __init__(self, tokenizer: Any):
        self.encode = lru_cache(CACHED_TEXTS)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self.decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        self.readable = partial(self.decode, skip_special_tokens=True)

    def comes_back(self, text: str) -> bool:
        """Whether `text` is the text of its own ids; with a lone surrogate, which no tokenizer takes, it is not."""
        return SURROGATE.search(text) is None and self.decode(self.encode(text)) == text


class _Resolver:
    """Makes rollouts of completions: ids of prompt and response, the problem, the place among its samples."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        report: RolloutReport,
        problems: Sequence[Problem] | None,
        copies: Mapping[str, str],
    ):
        tokenizer, end_ids = vocabulary.tokenizer, vocabulary.end_ids
        self.tokenizer, self.vocabulary, self.report = tokenizer, vocabulary, report
        self.chat_template = chat_template_of(tokenizer) if getattr(tokenizer, "chat_template", None) else ""
        self.own_samples: set[tuple[PromptKey, int]] = set()
        self.n_samples_of: Counter = Counter()
        self.codec = _Codec(tokenizer)
        self.problems = None if problems is None else _ProblemIndex(problems, copies, self.codec)
        self.prompt_idx_of: dict[tuple[int, ...], int] = {}
        self.remarks: list[str] = []
        self.padding = end_ids | ({tokenizer.pad_token_id} - {None})
        self.adds_specials = tokenizer("")["input_ids"] != []
        specials = (*tokenizer.all_special_tokens, "bos_token", "eos_token") if report.format == "verl" else ()
        self.strips_specials = any(token in self.chat_template for token in specials)

    def rollout(self, completion: Completion, correct: bool | None) -> Rollout:
        """The completion's rollout; what must be said of it is counted.

        Raises:
            Unusable: there is nothing in it to probe.
            FaultyRecord: it can't be used; says why.
        """
        self.remarks = []
        own = completion.own
        found = self._foreign(completion, correct) if own is None else self._own(own, correct)
        if not found.response_ids:
            raise Unusable(EMPTY)
        context = self.vocabulary.context
        if context is not None and len(found.prompt_ids) + len(found.response_ids) > context:
            raise Unusable(TOO_LONG)
        for remark in self.remarks:
            self.report.count(self.report.notes, remark, completion.where)
        return found

    def _foreign(self, completion: Completion, correct: bool | None) -> Rollout:
        prompt = self._prompt_text(completion)
        problem = None if self.problems is None else self.problems.of(completion, prompt)
        ground_truth = _ground_truth(completion.fields, problem, correct)
        prompt_ids = self._prompt_ids(completion, prompt, problem)
        number = self.prompt_idx_of.setdefault(tuple(prompt_ids), len(self.prompt_idx_of))
        prompt_idx = number if problem is None else problem.idx
        sample_idx = self.n_samples_of[prompt_idx]
        self.n_samples_of[prompt_idx] += 1  # dropped ones keep their number, so that a sample can be found in its file
        ids = self._response_ids(completion)
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

    def _own(self, own: Rollout, correct: bool | None) -> Rollout:
        sample = own.prompt_idx, own.sample_idx
        if sample in self.own_samples:
            raise FaultyRecord(f"prompt {own.prompt_idx} sample {own.sample_idx} stands twice")
        self.own_samples.add(sample)
        self._checked(own.prompt_ids, "prompt ids")
        self._remark_on_text(self._checked(own.response_ids, "response ids"), own.response)
        return replace(own, correct=correct)

    def _prompt_ids(self, completion: Completion, text: str | None, problem: Problem | None) -> list[int]:
        has_ids = completion.prompt_ids is not None
        ids = self._checked(completion.prompt_ids, "prompt ids") if has_ids else self._encoded(text, problem)
        if problem is not None and ids != self.codec.encode(problem.prompt):
            self.remarks.append(OTHER_THAN_DATASET)
        elif problem is not None and not has_ids and text != problem.prompt:
            self.remarks.append(FROM_DATASET)
        if not has_ids:
            self.remarks += [RENDERED] if isinstance(completion.prompt, list) else []
            self.remarks += [SPECIALS_NOT_ADDED] if self.adds_specials else []
        return ids

    def _encoded(self, text: str | None, problem: Problem | None) -> list[int]:
        if problem is not None and text in (None, self.problems.readable_prompts[problem.idx]):
            return self.codec.encode(problem.prompt)
        if text is None:
            raise FaultyRecord("neither text nor token ids of the prompt; `dataset` brings them where ids match")
        if self.strips_specials and not any(token in text for token in self.tokenizer.all_special_tokens):
            raise FaultyRecord(
                "verl writes prompts without their special tokens, so this is not what the model saw; "
                "`dataset` FILE with the rendered prompts brings them back"
            )
        if not self.codec.comes_back(text):
            raise FaultyRecord(f"its prompt does not come back from its token ids; {BY_IDS}")
        return self.codec.encode(text)

    def _prompt_text(self, completion: Completion) -> str | None:
        prompt = completion.prompt
        if prompt is None or isinstance(prompt, str):
            return prompt
        if completion.prompt_ids is not None:
            return None
        if not is_list_of(dict, prompt):
            raise FaultyRecord("its prompt is neither a text nor a list of messages")
        if not self.chat_template:
            raise FaultyRecord("its prompt is a list of messages, and the tokenizer has no chat template")
        if prompt[-1].get("role") == ASSISTANT:
            raise FaultyRecord(f"its prompt ends in a message of the role {ASSISTANT}, solution or beginning: {BY_IDS}")
        messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
        return in_chat(messages, self.tokenizer)

    def _response_ids(self, completion: Completion) -> list[int]:
        has_ids = completion.response_ids is not None
        if has_ids:
            given = self._checked(completion.response_ids, "response ids")
            if completion.unusable is not None:
                raise Unusable(completion.unusable)
        elif not isinstance(completion.text, str):
            raise FaultyRecord("neither text nor token ids of the completion")
        elif LOST_BYTES in completion.text or not self.codec.comes_back(completion.text):
            raise Unusable(NOT_ROUND_TRIP)
        else:
            given = self.codec.encode(completion.text)
        # An end id further ahead stays: it may be one of this checkpoint and not of the one that sampled.
        n_kept = len(given)
        while n_kept > 1 and given[n_kept - 1] in self.padding and given[n_kept - 2] in self.padding:
            n_kept -= 1
        ids, is_cut = given[:n_kept], n_kept < len(given)
        self.remarks += [PADDING_CUT] if is_cut else []
        if has_ids and completion.text is not None:
            self._remark_on_text(ids, completion.text)
        if has_ids or is_cut or completion.end == "cut" or (ids and ids[-1] in self.vocabulary.end_ids):
            return ids
        end_id = completion.end if type(completion.end) is int else self.tokenizer.eos_token_id
        if completion.end is None or end_id is None:
            self.remarks.append(END_UNKNOWN)
            return ids
        self.remarks.append(END_APPENDED)
        return self._checked([*ids, end_id], "response ids")

    def _checked(self, ids: Any, what: str) -> list[int]:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise FaultyRecord(f"its {what} are not a list of integers")
        size = self.vocabulary.size
        for odd in (i for i in ids if not 0 <= i < size):
            raise FaultyRecord(f"its {what} have {odd}, the model's are 0 to {size - 1}: another model's?")
        if what == "prompt ids" and not ids:
            raise FaultyRecord("its prompt has no tokens, at least 1 is needed")
        return ids

    def _remark_on_text(self, ids: list[int], text: str) -> None:
        # The last is how our own sampler decodes; a tokenizer that tidies up makes another text of it.
        plain = self.tokenizer.decode(ids, skip_special_tokens=True)
        if text not in (self.codec.decode(ids), self.codec.readable(ids), plain):
            self.remarks.append(TEXT_DIFFERS)


def _ground_truth(fields: dict[str, Any], problem: Problem | None, correct: bool | None) -> str:
    key = next((key for key in TRUTH_KEYS if fields.get(key) not in (None, "")), None)
    try:
        given = None if key is None else answer_of(fields[key], key)  # as a data set's
    except Unusable:
        if correct is None:
            raise
        given = str(fields[key])
    if problem is None:
        if given is None and correct is None:
            raise FaultyRecord("neither a verdict ('correct') nor a 'ground_truth'; `dataset` FILE brings them")
        return given or ""
    if given is not None and problem.ground_truth.split() not in (given.split(), str(fields[key]).split()):
        raise FaultyRecord(f"its ground truth is '{given}', that of problem '{problem.id}' '{problem.ground_truth}'")
    return problem.ground_truth


class _ProblemIndex:
    """Finds a completion's problem: by id, by the prompt's ids, by its text, by its text without special tokens.

    Attributes:
        readable_prompts: without their special tokens, as verl writes them, by the problems' idx.
    """

    def __init__(self, problems: Sequence[Problem], copies: Mapping[str, str], codec: _Codec):
        self.by_id = {problem.id: problem for problem in problems}
        self.by_id |= {copy: self.by_id[own] for copy, own in copies.items() if own in self.by_id}
        self.readable_prompts: dict[int, str] = {}
        self.by_prompt: dict[str | tuple[int, ...] | None, list[Problem]] = defaultdict(list)
        for problem in problems:
            ids = codec.encode(problem.prompt)
            self.readable_prompts[problem.idx] = codec.readable(ids)
            for key in {tuple(ids), problem.prompt, self.readable_prompts[problem.idx]}:
                self.by_prompt[key].append(problem)

    def of(self, completion: Completion, prompt: str | None) -> Problem:
        """The problem that a completion answers; `prompt` is its prompt's text."""
        given_id, ids = completion.fields.get("problem_id"), completion.prompt_ids
        if given_id is not None and str(given_id) in self.by_id:
            return self.by_id[str(given_id)]
        found = self.by_prompt.get(tuple(ids)) if is_list_of(int, ids) else None
        found = found or self.by_prompt.get(prompt)
        if not found:
            named = "" if given_id is None else f" and no problem has the id '{given_id}'"
            raise FaultyRecord(f"its prompt is none of the data set's{named}")
        if len({problem.ground_truth for problem in found}) > 1:
            raise FaultyRecord(f"its prompt is that of problems {found[0].id} and {found[1].id}; give 'problem_id'")
        return found[0]
