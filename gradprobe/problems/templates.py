"""Problems into prompts, by a text template, the tokenizer's own chat template, or both; and prompts into tokens."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.errors import FaultyRecord, InputError, first_few, raise_if_any, reason_of
from .data_set import ASSISTANT, Problem, ProblemSet

PLACEHOLDER = "{problem}"
PREVIEW_CHARACTERS = 600


def read_template(given: str) -> str:
    """The text of `prompt_template`: `given` itself if it holds `{problem}`, else all of the file that it names."""
    if PLACEHOLDER in given:
        return given
    try:
        text = Path(given).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"`prompt_template` {given}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(
            f"`prompt_template` {given}: no {PLACEHOLDER} in it, so a file's name; {error.strerror}"
        ) from error
    if PLACEHOLDER not in text:
        raise InputError(f"`prompt_template` {given}: the file has no {PLACEHOLDER} in it")
    return text


def render_prompts(
    problem_set: ProblemSet,
    template: str | None = None,
    chat: bool = False,
    system_prompt: str | None = None,
    tokenizer: Any = None,
    continue_final_message: bool = False,
) -> ProblemSet:
    """The problems with their prompts rendered, and how, in `rendering`; without any of it they are left as they are.

    `template` is text with `{problem}`, every one of which becomes the problem's text; other braces stay. With
    `chat` the outcome is the user's message in `tokenizer`'s own chat template, after `system_prompt` if there is
    one, and ends where the model's answer begins. Lists of messages are rendered by the chat template alone. Where
    they end in one of the assistant, that is the answer's beginning if `continue_final_message` says so; else it is
    taken for a solution, which leaves nothing to sample.

    `rendering` holds all that goes into the prompts, and a hash of them: a chat template may well print today's date.
    """
    source, problems = problem_set.source, problem_set.problems
    in_messages = next((problem.id for problem in problems if problem.messages), None)
    begun = next((problem.id for problem in problems if _is_begun(problem)), None)
    if in_messages is not None and (template is not None or not chat):
        raise InputError(
            f"`dataset` {source}: prompts are lists of chat messages (problem '{in_messages}'); `chat_template` alone, "
            "without `prompt_template`, renders them; or name another field with `problem_key`"
        )
    if begun is not None and not continue_final_message:
        raise InputError(
            f"`dataset` {source}: messages end in one of the role {ASSISTANT} (problem '{begun}'); "
            "if it is a solution, write the messages without it, or name a field that has the question alone with "
            "`problem_key`; if it is an answer's beginning, add `continue_final_message`"
        )
    if continue_final_message and begun is None:
        raise InputError(f"`continue_final_message`: no prompt of {source} ends in an {ASSISTANT}'s message")
    rendering: dict[str, Any] = {"prompt_template": template}
    if template is not None:
        problems = [replace(problem, prompt=fill(template, problem.prompt)) for problem in problems]
    if chat:
        chat_template = chat_template_of(tokenizer)
        notes = _notes(problems, tokenizer, chat_template)
        rendering |= {"chat_template_sha256": _sha256(chat_template), "system_prompt": system_prompt}
        rendering |= {"continue_final_message": True} if continue_final_message else {}
        problems = [_rendered(problem, system_prompt, tokenizer) for problem in problems]
    else:
        notes = [] if tokenizer is None else _without_specials([problem.prompt for problem in problems], tokenizer)
    if template is None and not chat:
        return replace(problem_set, notes=(*problem_set.notes, *notes))
    rendering["prompts_sha256"] = _sha256(json.dumps([problem.prompt for problem in problems]))
    return replace(problem_set, problems=problems, rendering=rendering, notes=(*problem_set.notes, *notes))


def encode_prompts(
    problems: Sequence[Problem], tokenizer: Any, vocab_size: int, context: int | None
) -> list[list[int]]:
    """Token ids of each prompt, with nothing added; it has to leave room for an answer in the model's context."""
    prompts = tokenizer([problem.prompt for problem in problems], add_special_tokens=False)["input_ids"]

    def faults() -> Iterator[str]:
        for problem, ids in zip(problems, prompts, strict=True):
            its_prompt = f"problem '{problem.id}': its prompt has"
            if not ids:
                yield f"{its_prompt} 0 tokens, at least 1 is needed"
            elif context is not None and len(ids) >= context:
                yield f"{its_prompt} {len(ids)} tokens, the model's context {context}"
            elif max(ids) >= vocab_size:
                yield f"{its_prompt} token id {max(ids)}, the model's vocabulary {vocab_size}: another tokenizer?"

    raise_if_any(first_few(faults(), "prompts"))
    return prompts


def fill(template: str, problem: str) -> str:
    """`template` with each `{problem}` replaced; LaTeX is full of braces, so no other one means anything."""
    return template.replace(PLACEHOLDER, problem)


def preview(problem: Problem) -> str:
    """One problem as it is handed to the model, for a person to look at; a long prompt without its middle."""
    prompt, half = problem.prompt, PREVIEW_CHARACTERS // 2
    if len(prompt) > PREVIEW_CHARACTERS:
        prompt = f"{prompt[:half]} [... {len(prompt) - 2 * half} characters ...] {prompt[-half:]}"
    return f"problem '{problem.id}', answer '{problem.ground_truth}', prompt: {prompt}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def chat_template_of(tokenizer: Any) -> str:
    """The text of a tokenizer's own chat template."""
    try:
        return tokenizer.get_chat_template()
    except (ValueError, AttributeError) as error:
        raise InputError(
            "`chat_template`: this checkpoint's tokenizer has none; give the whole prompt with `prompt_template`"
        ) from error


def in_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any, is_begun: bool = False) -> str:
    """The prompt that ends where the model's answer begins, or with its beginning, the last message (`is_begun`).

    Raises:
        FaultyRecord: the tokenizer's chat template raises on these messages, or makes nothing of them.
    """
    end = {"add_generation_prompt": not is_begun, "continue_final_message": is_begun}
    try:
        prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, **end)
    except Exception as error:  # a template is a program, which can raise anything
        raise FaultyRecord(f"the tokenizer's chat template does not take its prompt ({reason_of(error)})") from error
    if not prompt:
        raise FaultyRecord("the tokenizer's chat template makes nothing of its prompt")
    return prompt


def _rendered(problem: Problem, system_prompt: str | None, tokenizer: Any) -> Problem:
    given = problem.messages or (("user", problem.prompt),)
    if system_prompt is not None:
        if any(role == "system" for role, _ in given):
            raise InputError(f"`system_prompt`: problem '{problem.id}' brings a system message of its own; omit it")
        given = (("system", system_prompt), *given)
    messages = [{"role": role, "content": content} for role, content in given]
    try:
        prompt = in_chat(messages, tokenizer, _is_begun(problem))
    except FaultyRecord as error:
        raise InputError(f"`chat_template`: problem '{problem.id}': {error}") from error
    return replace(problem, prompt=prompt, messages=())


def _is_begun(problem: Problem) -> bool:
    return bool(problem.messages) and problem.messages[-1][0] == ASSISTANT


def _without_specials(prompts: list[str], tokenizer: Any) -> list[str]:
    """What is to be said where a tokenizer would put special tokens around a text, as that of Gemma or Llama does."""
    special = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    n_without = sum(not prompt.startswith(special[0]) for prompt in prompts) if special else 0
    if not n_without:
        return []
    return [
        f"{n_without} prompts are text, tokenised without the special tokens that this tokenizer would add "
        f"({' '.join(special)}); where the model is to see them, say so: `prompt_template` '{special[0]}{PLACEHOLDER}'"
    ]


def _notes(problems: Sequence[Problem], tokenizer: Any, chat_template: str) -> list[str]:
    """What may well be a mistake, in plain words."""
    notes = []
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = [(problem.id, problem.prompt + "".join(text for _, text in problem.messages)) for problem in problems]
    suspects = [(problem_id, found[0]) for problem_id, text in texts if (found := [t for t in special if t in text])]
    if suspects:
        notes.append(
            f"`chat_template`: {len(suspects)} problems hold special tokens before it is applied "
            f"(problem '{suspects[0][0]}': {suspects[0][1]}); are they rendered already?"
        )
    if "strftime_now" in chat_template:
        notes.append("`chat_template`: the tokenizer's prints today's date, so prompts change from day to day")
    return notes
