"""The tokenizer of a checkpoint: its own, the one that its adapter was trained with, or one that is named."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..common.errors import InputError, first_of
from .source import (
    HUB_NAME,
    READING_ERRORS,
    CheckpointSource,
    blaming,
    faults_as_input,
    has_tokenizer,
    refuse_unsound,
)

SHOWN_TOKENS = 5


def load_tokenizer(source: CheckpointSource) -> Any:
    """The tokenizer that goes with a checkpoint: named, or its adapter's own, or its own.

    Raises:
        InputError: there is none, or it has no vocabulary, or its ids mean something else than the checkpoint's.
    """
    refuse_unsound(source)
    parameter, path = source.tokenizer_place
    if parameter == "model_path":
        return _own(source)
    tokenizer = _read(source, parameter, path)
    _refuse_other_ids(source, tokenizer, f"`{parameter}` {path}: its tokenizer")
    return tokenizer


def _own(source: CheckpointSource) -> Any:
    if Path(source.path).exists() and not has_tokenizer(source.path, "model_path"):
        raise InputError(f"`model_path` {source.path}: no tokenizer in it; name one by `tokenizer`")
    with blaming(source, READING_ERRORS):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.options)
    return _with_vocabulary(tokenizer, f"`model_path` {source.path}")


def _read(source: CheckpointSource, parameter: str, path: str) -> Any:
    if not Path(path).exists() and not HUB_NAME.fullmatch(path):
        raise InputError(f"`{parameter}` {path}: no such directory")
    if Path(path).exists() and not has_tokenizer(path, parameter):
        raise InputError(f"`{parameter}` {path}: no tokenizer in it")
    with faults_as_input(f"`{parameter}` {path}: its tokenizer can't be loaded", READING_ERRORS):
        tokenizer = AutoTokenizer.from_pretrained(path, **source.options_of(path))
    return _with_vocabulary(tokenizer, f"`{parameter}` {path}")


def _with_vocabulary(tokenizer: Any, whose: str) -> Any:
    if len(tokenizer) <= len(tokenizer.added_tokens_encoder):
        raise InputError(f"{whose}: its tokenizer has no vocabulary (tokenizer.json is missing?)")
    return tokenizer


def _refuse_other_ids(source: CheckpointSource, tokenizer: Any, whose: str) -> None:
    """Raise `InputError` where the model would read another token than the tokenizer means.

    Added tokens may be more or fewer, as trainers name spare ids; no token may have another id.
    """
    ids, own, own_ids = tokenizer.get_vocab(), None, {}
    if has_tokenizer(source.path, "model_path", source.revision):
        own = _own(source)
        own_ids = own.get_vocab()
    with blaming(source, READING_ERRORS):
        config = AutoConfig.from_pretrained(source.path, **source.options)
    size, highest = config.get_text_config().vocab_size, max((i for t, i in ids.items() if t not in own_ids), default=0)
    if highest >= size:
        raise InputError(f"{whose} has ids up to {highest}, the model's vocabulary {size}; name another by `tokenizer`")
    if own is None:
        return
    added = own.added_tokens_encoder.keys() | tokenizer.added_tokens_encoder.keys()
    both = {token: (ids.get(token), own_ids.get(token)) for token in ids.keys() | own_ids.keys()}
    others = sorted(token for token, (a, b) in both.items() if a != b and not (token in added and None in (a, b)))
    if others:
        shown = first_of(others, SHOWN_TOKENS)
        raise InputError(f"{whose} gives {len(others)} tokens other ids than that of {source.path}: {shown}")
