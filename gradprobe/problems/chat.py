"""Messages into a prompt by a tokenizer's own chat template, which is a program that nobody vouches for.

A template is rendered in a process of its own with a limit on time, memory and the length of what it prints. The
process imports neither torch nor a model class; it starts with the first prompt, which takes a second, and renders all
that follow, of any template, until the program ends.
"""

import atexit
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.console import SURROGATE
from ..common.errors import InputError, one_line
from .child import Answer, Answering, Child, clipped, described, limit_memory

SECONDS_PER_PROMPT = 10.0
MOST_CHARACTERS = 1 << 24
MOST_MEMORY = 1 << 30
BYTES_PER_CHARACTER = 12
"""In JSON at most: a character beyond the first 65,536 is two escapes of six."""


class ChatRefusal(Exception):  # noqa: N818 it is about one prompt, which whoever asks for it names
    """The template does not take these messages; the message says why."""


class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        text: of the template.

    Raises:
        InputError: the tokenizer has no chat template, or something else in its place.
    """

    def __init__(self, tokenizer: Any):
        try:
            self.text = tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:
            raise InputError(
                "`chat_template`: this checkpoint's tokenizer has none; give the whole prompt with `prompt_template`"
            ) from error
        if not isinstance(self.text, str):
            raise InputError(f"`chat_template`: the tokenizer's is of type {type(self.text).__name__}, not a text")
        if SURROGATE.search(self.text):
            raise InputError("`chat_template`: the tokenizer's holds half a surrogate pair, which is no character")
        tokens = {name: _as_text(value) for name, value in tokenizer.special_tokens_map.items()}
        self._given = {"chat_template": self.text, **tokens}

    def render(self, messages: Sequence[Mapping[str, Any]], is_begun: bool = False) -> str:
        """The prompt that ends where the model's answer begins, as `apply_chat_template` makes it.

        Args:
            is_begun: the last message is the beginning of the answer, which is to go on.

        Raises:
            ChatRefusal: the template raises on these messages, or makes nothing, or no text, of them.
            InputError: it takes too long, or too much memory, or makes too much text: so it would with others.
        """
        child = _renderer()
        answer = child.greeting
        if "error" not in answer:
            try:
                where = {"add_generation_prompt": not is_begun, "continue_final_message": is_begun}
                conversations = {"conversations": [list(map(dict, messages))]}
                answer = child.ask(self._given | where | conversations, SECONDS_PER_PROMPT)
            except (TypeError, ValueError, RecursionError) as error:
                raise ChatRefusal(f"the messages make no JSON: {one_line(str(error))}") from error
        if "error" in answer:
            raise InputError(f"`chat_template`: the tokenizer's can't be used: {one_line(answer['error'])}")
        if "refusal" in answer:
            raise ChatRefusal(one_line(answer["refusal"]))
        prompt = answer["prompt"]
        if not prompt:
            raise ChatRefusal("it makes nothing of it")
        if SURROGATE.search(prompt):
            raise ChatRefusal("it prints half a surrogate pair, which is no character")
        return prompt


_renderers: dict[int, Child] = {}
"""This process's, by its id: one that was forked must not share its parent's."""


def _renderer() -> Child:
    """The process that renders, started where there is none (any more)."""
    child = _renderers.get(os.getpid())
    if child is None or not child.is_running:
        child = Child(f"{__name__}:serve_prompts", {}, SECONDS_PER_PROMPT, BYTES_PER_CHARACTER * MOST_CHARACTERS + 1024)
        _renderers[os.getpid()] = child
        atexit.register(child.end)
    return child


def _as_text(value: Any) -> Any:
    return [str(token) for token in value] if isinstance(value, list | tuple) else str(value)


# The child's side


def serve_prompts(opening: Answer) -> tuple[Answer, Answering]:
    """What `child.serve` asks for: nothing to say at first, and the prompt that messages make."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(MOST_MEMORY)

    def answer(question: Answer) -> Answer:
        try:
            prompts, _ = render_jinja_template(**question)
        except MemoryError:
            return {"error": f"it takes more than {MOST_MEMORY >> 20} MiB of memory"}
        except TemplateError as error:
            return {"refusal": clipped(str(error))}
        # A template can make jinja, and what jinja calls, raise almost anything.
        except Exception as error:
            return {"refusal": described(error)}
        if len(prompts[0]) > MOST_CHARACTERS:
            return {"error": f"it makes {len(prompts[0])} characters of one prompt, more than {MOST_CHARACTERS}"}
        return {"prompt": prompts[0]}

    return {}, answer
