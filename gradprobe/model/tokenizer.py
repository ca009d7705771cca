"""The tokenizer of a checkpoint: its own, the one that its adapter was trained with, or one that is named."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..common.errors import InputError, first_of
from .source import CheckpointSource, faults_as_input, has_tokenizer, named


def load_tokenizer(source: CheckpointSource) -> Any:
    """The tokenizer that goes with a checkpoint: named, or its adapter's own, or its own.

    One whose ids mean something else than the checkpoint's is refused.
    """
    parameter, path = source.tokenizer_place
    tokenizer = _read(source, parameter, path)
    if parameter != "model_path":
        _refuse_other_ids(source, tokenizer, f"`{parameter}` {path}: its tokenizer")
    return tokenizer


def _read(source: CheckpointSource, parameter: str, path: str) -> Any:
    if Path(path).exists() and not has_tokenizer(path, parameter):
        raise InputError(f"`{parameter}` {path}: no tokenizer in it; name one by `tokenizer`")
    with faults_as_input(f"{named(parameter, path)}: its tokenizer can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, **source.options_of(path))
    if len(tokenizer) <= len(tokenizer.added_tokens_encoder):
        raise InputError(f"`{parameter}` {path}: its tokenizer has no vocabulary (tokenizer.json is missing?)")
    return tokenizer


def _refuse_other_ids(source: CheckpointSource, tokenizer: Any, whose: str) -> None:
    """Raise `InputError` where the model would read another token than the tokenizer means.

    Added tokens may be more or fewer, as trainers name spare ids; no token may have another id.
    """
    has_own = has_tokenizer(source.path, "model_path", source.revision)
    own = _read(source, "model_path", source.path) if has_own else None
    ids, own_ids = tokenizer.get_vocab(), own.get_vocab() if has_own else {}
    with faults_as_input(f"{named('model_path', source.path)}: can't be loaded"):
        config = AutoConfig.from_pretrained(source.path, **source.options_of(source.path))
    size, highest = config.get_text_config().vocab_size, max((i for t, i in ids.items() if t not in own_ids), default=0)
    if highest >= size:
        raise InputError(f"{whose} has ids up to {highest}, the model's vocabulary {size}; name another by `tokenizer`")
    if not has_own:
        return
    added = own.added_tokens_encoder.keys() | tokenizer.added_tokens_encoder.keys()
    both = {token: (ids.get(token), own_ids.get(token)) for token in ids.keys() | own_ids.keys()}
    others = sorted(token for token, (a, b) in both.items() if a != b and not (token in added and None in (a, b)))
    if others:
        raise InputError(f"{whose} gives {len(others)} tokens other ids than {source.path}'s: {first_of(others, 5)}")
