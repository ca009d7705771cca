"""Messages into a prompt by a tokenizer's own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..common.errors import InputError, reason_of


class ChatRefusal(Exception):  # noqa: N818 it is about one prompt, which whoever asks for it names
    """The template does not take these messages; the message says why."""


class ChatTemplate:
    """A tokenizer's chat template; `text` is its own. `InputError` where there is none."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        try:
            self.text: str = tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:
            raise InputError(
                "`chat_template`: this checkpoint's tokenizer has none; give the whole prompt with `prompt_template`"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], is_begun: bool = False) -> str:
        """The prompt that ends where the model's answer begins, or with its beginning, the last message (`is_begun`).

        Raises:
            ChatRefusal: the template raises on these messages, or makes nothing of them.
        """
        end = {"add_generation_prompt": not is_begun, "continue_final_message": is_begun}
        try:
            prompt = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **end)
        except Exception as error:  # a template is a program, which can raise anything
            raise ChatRefusal(reason_of(error)) from error
        if not prompt:
            raise ChatRefusal("it makes nothing of it")
        return prompt
