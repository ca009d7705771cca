"""Whether a checkpoint's weights are the model's: what its files hold, and what loading left over."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..common.errors import first_of
from ..common.files import read_json
from .source import CONFIG, INDEX, WEIGHTS, faults_as_input

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "DistributedDataParallel or DeepSpeed",
    "policy": "a trainer that keeps others beside its policy",
    "pretrained_model": "TRL's model with a value head",
    "base_model": "PEFT",
}
"""What trainers wrap a model in, by the name that it leaves in those of the weights; those with _ at any depth."""


def faults_of_files(directory: Path, skeleton: nn.Module) -> Iterator[str]:
    """Weights saved inside a wrapper, of which none would be found, or as integers, which would load in silence."""
    of_the_model = {name for name, _ in skeleton.named_children()}
    types, wrapped = _types_of_weights(directory), {}
    for name in types:
        for depth, part in enumerate(name.split(".")):
            is_outermost = depth == 0 and part not in of_the_model
            if part in WRAPPERS and (is_outermost or part.startswith("_")):
                wrapped.setdefault(part, name)
    if wrapped:
        whose = " and ".join(f"'{part}.' of {WRAPPERS[part]}" for part in wrapped)
        yield (
            f"its weights were saved inside a wrapper, with {whose} in their names ({next(iter(wrapped.values()))}); "
            "save the model that is inside, or take that out of the names"
        )
    integers = [name for name, kind in types.items() if kind[0] in "IU" or kind == "BOOL"]
    if integers and "quantization_config" not in read_json(directory / CONFIG):
        yield f"has integers for weights, and its config no quantization_config: {first_of(integers, 3)}"


def _types_of_weights(directory: Path) -> dict[str, str]:
    """What the headers say, by the weights' names, of all files that would be loaded."""
    is_one = (directory / WEIGHTS).exists()
    files = [WEIGHTS] if is_one else sorted(set(read_json(directory / INDEX)["weight_map"].values()))
    found = {}
    for file in files:
        blame = faults_as_input(f"`model_path` {directory}: {file}: can't be loaded")
        with blame, safe_open(directory / file, framework="pt") as weights:
            found |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return found


def faults_of_weights(model: nn.Module, found: Mapping[str, Any]) -> Iterator[str]:
    """Weights that the checkpoint lacks, has in another shape, or has for parts that the model has otherwise.

    Args:
        found: transformers' loading info.
    """
    without_place = set(found["unexpected_keys"]) - weights_left_out(model, found)
    faults = {
        "lacks weights of its architecture": found["missing_keys"],
        "has weights of other shapes than its config's": [key[0] for key in found["mismatched_keys"]],
        "has weights that its config leaves no place for": without_place,
    }
    for fault, names in faults.items():
        if names:
            yield f"{fault}: {first_of(sorted(names), 3)}"


def weights_left_out(model: nn.Module, found: Mapping[str, Any]) -> set[str]:
    """Names of weights that belong to no part of the model, such as a value head: they are not loaded.

    They lie neither among its layers nor in another module that it has.
    """
    modules = dict(model.named_modules())
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))

    def is_within(key: str) -> bool:
        return key.startswith(lists) or key.rpartition(".")[0] in modules

    # The weights of a bare decoder lack the prefix that it has inside a model.
    return {
        key for key in found["unexpected_keys"] if not any(map(is_within, (key, f"{model.base_model_prefix}.{key}")))
    }
