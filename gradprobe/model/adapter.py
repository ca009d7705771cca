"""An adapter (PEFT, LoRA) merged into the weights of the model that it was trained on."""

import logging
import warnings
from pathlib import Path

from torch import nn

from ..common.errors import InputError, first_of
from .source import ADAPTER_WEIGHTS, BASE, READING_ERRORS, faults_as_input, what_lies_inside

log = logging.getLogger(__name__)


def with_adapter(model: nn.Module, adapter: str, base: str) -> nn.Module:
    """The model, which comes from `base`, with a PEFT adapter's change of its weights added to them."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise InputError(f"`adapter` {adapter}: needs the library peft; install gradprobe[peft], or peft") from error
    is_local = Path(adapter).exists()
    if is_local and not (Path(adapter) / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"`adapter` {adapter}: no {ADAPTER_WEIGHTS} in it{what_lies_inside(Path(adapter))}")
    fault = f"`adapter` {adapter}: can't be merged"
    with faults_as_input(fault):
        config = PeftConfig.from_pretrained(adapter, local_files_only=is_local)
    its_base = getattr(config, BASE)
    if its_base and not _are_alike(its_base, base):
        log.warning(f"`adapter` {adapter}: was trained on {its_base}, and is merged into {base}; is that the same?")
    # RuntimeError where shapes are others. What peft warns of is refused below, or a name that transformers gives up.
    options = {"use_safetensors": True, "local_files_only": is_local}
    with faults_as_input(fault, (*READING_ERRORS, RuntimeError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, adapter, config=config, **options)
        # Once more, for what it says: weights that found no place are passed over above.
        found = adapted.load_adapter(adapter, "default", **options)
    without_place, lacking = (first_of(names, 3) for names in (found.unexpected_keys, found.missing_keys))
    if without_place:
        raise InputError(f"{fault}: has weights of which the model has no part: {without_place}")
    if lacking:
        raise InputError(f"{fault}: lacks weights for parts of the model: {lacking}")
    _untie(adapted.get_base_model())
    return adapted.merge_and_unload()


def _untie(model: nn.Module) -> None:
    """Where embedding and head share their weight, and one of them has an adapter, each gets a weight of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embedding, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if head is not None and embedding.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False


def _are_alike(one: str, other: str) -> bool:
    """Whether paths or names on the Hub may mean the same model: the last part of one is a part of the other."""
    whole = (Path(path).resolve() if Path(path).exists() else Path(path) for path in (one, other))
    parts = [[part.rpartition("--")[2].lower() for part in path.parts] for path in whole]
    return parts[0][-1] in parts[1] or parts[1][-1] in parts[0]
