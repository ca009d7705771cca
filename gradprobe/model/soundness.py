"""Whether a checkpoint's weights are the model's: what its files name, and what loading left over."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..common.errors import InputError, first_of, raise_if_any
from ..common.files import read_json
from .source import INDEX, WEIGHTS, faults_as_input

log = logging.getLogger(__name__)
WRAPPERS = {"module", "policy", "pretrained_model", "base_model"}
"""What DistributedDataParallel, DeepSpeed, trainers with an actor, TRL's value head and PEFT put before all names."""
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put at any depth."""


def refuse_wrapped(directory: Path, skeleton: nn.Module) -> None:
    """Raise `InputError` where a file of weights is cut, or was saved inside a wrapper: no name would be found."""
    wrappers = WRAPPERS - {name for name, _ in skeleton.named_children()}
    is_one = (directory / WEIGHTS).exists()
    for file in [WEIGHTS] if is_one else sorted(set(read_json(directory / INDEX)["weight_map"].values())):
        whose = f"`model_path` {directory}"
        with faults_as_input(f"{whose}: {file}: can't be loaded"), safe_open(directory / file, "pt") as weights:
            names = list(weights.keys())
        wrapped = [n for n in names if n.split(".")[0] in wrappers or any(inner in n for inner in INNER_WRAPPERS)]
        if wrapped:
            raise InputError(
                f"{whose}: its weights were saved inside a wrapper of a trainer's or of torch.compile ({wrapped[0]}); "
                "save the model that is inside, or take that out of the names"
            )


def refuse_other_weights(model: nn.Module, found: Mapping[str, Any], whose: str) -> None:
    """Raise `InputError` where weights are missing, of other shapes, or for parts that the model has otherwise.

    Those of no part of the model (neither among its layers nor of another module), such as a value head, are left out,
    with a warning.

    Args:
        found: transformers' loading info.
        whose: how a fault begins.
    """
    modules = dict(model.named_modules())
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))

    def is_within(key: str) -> bool:
        return key.startswith(lists) or key.rpartition(".")[0] in modules

    # The weights of a bare decoder lack the prefix that it has inside a model.
    prefix, others = model.base_model_prefix, set(found["unexpected_keys"])
    without_place = {key for key in others if is_within(key) or is_within(f"{prefix}.{key}")}
    faults = {
        "lacks weights of its architecture": found["missing_keys"],
        "has weights of other shapes than its config's": [key[0] for key in found["mismatched_keys"]],
        "has weights that its config leaves no place for": without_place,
    }
    raise_if_any(f"{whose}: {fault}: {first_of(sorted(names), 3)}" for fault, names in faults.items() if names)
    if left_out := sorted(others - without_place):
        log.warning(f"{whose}: weights of no part of the model are left out: {first_of(left_out)}")
