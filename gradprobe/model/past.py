"""What a decoder keeps of the tokens before, and up to what length of a sequence that stays as it is."""

import inspect

from torch import nn
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..common.errors import InputError
from .decoder import decoder_of

OF_TOKENS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Layers of a cache that hold keys and values of each token, or nothing of their own."""
CACHES = ("past_key_values", "cache_params")
"""What models call their cache; behind any other name (RWKV's `state`) lies one that can't be handed on as it is."""


def cache_name(model: nn.Module) -> str | None:
    """Under which name the model takes its cache; None where it has none."""
    return next((name for name in CACHES if name in inspect.signature(type(model).forward).parameters), None)


def keeps_tokens_apart(model: nn.Module) -> bool:
    """Whether all that is kept of earlier tokens is each one's keys and values, at positions that are told.

    Then rollouts of any age can lie side by side, padded on the left, and a prompt can be shared. Recurrent and
    convolved states (Mamba, hybrid decoders) have no place for padding, nor have chunks counted from the first column.
    """
    config = model.config.get_text_config()
    if not {"past_key_values", "position_ids"} <= inspect.signature(type(decoder_of(model)).forward).parameters.keys():
        return False
    if getattr(config, "attention_chunk_size", None) and "chunked_attention" in (config.layer_types or ()):
        return False
    return all(type(layer) in OF_TOKENS for layer in DynamicCache(config=model.config).layers)


def refuse_without_cache(model: nn.Module) -> None:
    """Raise `InputError` where our own sampler could only run every prefix anew."""
    if cache_name(model) is None:
        raise InputError(no_cache(model))


def no_cache(model: nn.Module) -> str:
    """Why our own sampler can't serve it, and what does."""
    return (
        f"`sampler` own: {type(model).__name__} hands on no cache of earlier tokens that could be sampled with; "
        "bring its rollouts by `rollouts`, or have a server sample by `sampler` openai"
    )


def length_limit(model: nn.Module) -> tuple[int, str] | None:
    """(most tokens of a sequence, what says so) where a longer one turns all of its tokens by other frequencies.

    The earlier tokens too: what was kept of them no longer holds, and in a batch the longest row decides for all. For
    `longrope` (Phi-3.5, Phi-4-mini) that is beyond the length of first training, for `dynamic` beyond the context.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for of in rope.values() if all(isinstance(of, dict) for of in rope.values()) else [rope]:
        kind = of.get("rope_type", "default")
        if kind == "longrope":
            limits.append((of["original_max_position_embeddings"], f"{kind}'s original_max_position_embeddings"))
        elif kind == "dynamic" and not of.get("alpha"):  # Hunyuan's alpha makes them fixed
            limits.append((config.max_position_embeddings, f"{kind} rope's max_position_embeddings"))
    return min(limits, default=None)


def refuse_lengths(model: nn.Module, longest: int, what: str) -> None:
    """Raise `InputError` where `what`, sequences of prompt and response, passes `length_limit`."""
    limit = length_limit(model)
    if limit is not None and longest > limit[0]:
        raise InputError(
            f"{what}: up to {longest} tokens with the prompt, and beyond {limit[0]} ({limit[1]}) this model turns a "
            f"sequence's earlier tokens otherwise than they were sampled; keep prompt and response within {limit[0]}"
        )
