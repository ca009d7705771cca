"""A model's layers and linear weights, and its two halves: decoder and head."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from ..common.errors import InputError

LOGITS_PER_BLOCK = 1 << 25
MASKS_KNOWN = {"find_packed_sequence_indices": None, "fast_all": False}
"""What transformers asks of positions and masks, and waits for the device each time; here a row is one sequence, and a
mask is given where something is masked."""
MODELS_OWN_CODE = ("transformers.models.", "transformers_modules.")


def context_length(model: nn.Module) -> int | None:
    """The most tokens the model takes, or None where its config sets no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and module of the decoder's layers: of a module list with as many entries as the config has layers."""
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise InputError(f"{type(model).__name__}: no list of {n_layers} layers in the module tree")
    return min(lists, key=lambda named: named[0].count("."))


def linear_weights(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a layer by their weight's name inside it, e.g. `mlp.down_proj.weight`."""
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return {f"{name}.weight": linear for name, linear in linears.items() if _is_linear_map(linear)}


def _is_linear_map(linear: nn.Module) -> bool:
    """Not so of what a model's own code derives from it: Llama 4's router gives a pair, DeepSeek V4's map groups."""
    if not type(linear).__module__.startswith(MODELS_OWN_CODE):
        return True
    try:
        output = linear(linear.weight.new_zeros(2, n_inputs(linear)))
    except RuntimeError:
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, n_output_rows(linear))


def n_output_rows(linear: nn.Module) -> int:
    """The number of rows of W in y = W x; GPT-2's `Conv1D` stores the transpose."""
    return linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]


def n_inputs(linear: nn.Module) -> int:
    """The length of a row of W in y = W x."""
    return linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]


def decoder_of(model: nn.Module) -> nn.Module:
    """The module whose hidden states the model hands to its head.

    That is its base model; but OPT and the decoders of Bart and its kin go past theirs, which is a shell, and Llama 4
    gives its text model the prefix of the model around it. A decoder of Bart's kind that counts positions by itself,
    from the padding on, is refused.
    """
    base = model.base_model
    base = model.model if base is model and hasattr(model, "model") else base
    inner = getattr(base, "decoder", None)
    if not isinstance(inner, PreTrainedModel):
        return base
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        raise InputError(f"{type(model).__name__}: {type(inner).__name__} takes no position ids, as padding needs them")
    return inner


def decoder_hidden(model: nn.Module, input_ids: torch.Tensor, **behind: Any) -> torch.Tensor:
    """The decoder's last hidden states, [batch, length, hidden], final norm included, on the device of `input_ids`.

    No attention mask: under causal attention the padding at a row's right end is never seen by its own tokens.

    Args:
        input_ids: [batch, length], padded on the right.
        behind: `past_key_values` of the tokens before, where there are any, with mask and position ids of all.
    """
    with masks_known():
        output = decoder_of(model)(input_ids=input_ids, use_cache="past_key_values" in behind, **behind)
    return output.last_hidden_state.to(input_ids.device)


@contextmanager
def masks_known() -> Iterator[None]:
    """Inside, transformers is told what `MASKS_KNOWN` says, where it would look."""
    asked = {name: getattr(masking_utils, name) for name in MASKS_KNOWN if hasattr(masking_utils, name)}
    for name in asked:
        setattr(masking_utils, name, lambda *_, answer=MASKS_KNOWN[name]: answer)
    try:
        yield
    finally:
        for name, function in asked.items():
            setattr(masking_utils, name, function)


def head_logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits, [n, vocab], float32 at least, of chosen hidden states, [n, hidden], through the model's own head.

    The whole model is called with its decoder standing still, so that whatever else the head does (logit
    soft-capping, scaling) is done here too.
    """
    with _decoder_returning(model, hidden[None]):
        dummy_ids = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
        logits = model(input_ids=dummy_ids, use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def positions_per_head_block(model: nn.Module) -> int:
    """How many positions go through the head at once, so that their float32 logits take about 128 MiB."""
    return max(1, LOGITS_PER_BLOCK // model.config.get_text_config().vocab_size)


class _DecoderOutput(BaseModelOutputWithPast):
    """Hidden states alone; what else a model's forward hands on of its decoder's output is None."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _decoder_returning(model: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    attributes = vars(decoder_of(model))
    of_its_own = {"forward": attributes["forward"]} if "forward" in attributes else {}  # accelerate puts one there
    attributes["forward"] = lambda *args, **kwargs: _DecoderOutput(last_hidden_state=hidden)
    try:
        yield
    finally:
        del attributes["forward"]  # uncovers the class's
        attributes.update(of_its_own)
