"""Whether a checkpoint is what it says: its config in numbers, its files and their headers, what loading left over.

A look at these comes before anything is built or allocated: a config that asks for 10^9 layers, or an index that
names a file elsewhere, costs no more than a sound one.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..common.errors import InputError, first_of
from ..common.fields import Kind, faults_of
from ..common.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN_WEIGHTS = 3
MOST_LAYERS, MOST_EXPERTS, MOST_LABELS, MOST_WIDTH = 1000, 1 << 14, 1 << 20, 1 << 31
AT_ANY_DEPTH = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
OUTERMOST = {
    "module": "DistributedDataParallel or DeepSpeed",
    "policy": "a trainer that keeps others beside its policy",
    "pretrained_model": "TRL's model with a value head",
    "base_model": "PEFT",
}
"""What trainers wrap a model in, by the name that it leaves in those of the weights."""
MOST_WEIGHTS_PER_BYTE = 8
"""Of what a config describes, for each byte of the files: one bit a weight is the least that anybody stores."""
INTEGERS = re.compile("[IU][0-9]+|BOOL")
"""Weights of these types are no weights, unless the config says how they are quantised."""


def _count(most: int, least: int = 1) -> Kind:
    """An integer, null, or a list of them, as where layers differ."""

    def accepts(value: Any) -> bool:
        listed = value if isinstance(value, list) else [value]
        return all(each is None or (type(each) is int and least <= each <= most) for each in listed)

    return Kind(accepts, f"an integer from {least} to {most}", is_optional=True)


def _is_small(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1)


SMALL = Kind(_is_small, "a number from 0 to below 1", is_optional=True)
CONFIG_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _count(MOST_LAYERS)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _count(MOST_EXPERTS, 0)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), _count(MOST_WIDTH)),
    **dict.fromkeys(("vocab_size", "hidden_size", "n_embd", "max_position_embeddings"), _count(MOST_WIDTH)),
    **dict.fromkeys(("intermediate_size", "n_inner"), _count(MOST_WIDTH, 0)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), SMALL),
    "num_labels": _count(MOST_LABELS, 0),
}


def faults_of_config(config: Any) -> Iterator[str]:
    """Numbers in a config.json, and in the configs inside it, that no model has."""
    if not isinstance(config, dict):
        yield "not a JSON object"
        return
    yield from faults_of(config, CONFIG_KINDS)
    if config.get("use_sliding_window") is not False:
        yield from faults_of(config, {"sliding_window": _count(MOST_WIDTH)})
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(heads) is int and type(groups) is int and min(heads, groups) > 0 and heads % groups:
        yield f"'num_attention_heads' {heads} is not a multiple of 'num_key_value_heads' {groups}"
    for name, inner in config.items():
        if name.endswith("_config") and isinstance(inner, dict):
            yield from (f"{name}: {fault}" for fault in faults_of_config(inner))


def has_whole_weights(directory: Path) -> bool:
    """Whether a directory has the files that a model's weights are loaded from."""
    return (directory / WEIGHTS).exists() or (directory / INDEX).exists()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that are loaded: `model.safetensors` or, without one, those that the index names.

    Raises:
        InputError: the index is none, or names what is no file inside the directory.
    """
    index = directory / INDEX
    if (directory / WEIGHTS).exists() or not index.is_file():
        return [file for file in (directory / WEIGHTS,) if file.exists()]
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(name, str) for name in file_of.values()):
        raise InputError(f"{index}: 'weight_map' is not an object that names the file of each weight")
    names = sorted(set(file_of.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{index}: names files outside its directory: {first_of(outside, SHOWN_WEIGHTS)}")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(f"{index}: names files that are missing: {first_of(missing, SHOWN_WEIGHTS)}")
    return [directory / name for name in names]


def faults_of_files(directory: Path) -> Iterator[str]:
    """What is wrong with a checkpoint's weight files as such: their kind, their headers, their types."""
    odd = [file.name for file in sorted(directory.glob("*.safetensors")) if not file.is_file()]
    if odd:
        yield f"not a regular file: {first_of(odd, SHOWN_WEIGHTS)}"
        return
    integers: list[str] = []
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as weights:
                names = weights.keys()
                integers += [name for name in names if INTEGERS.fullmatch(weights.get_slice(name).get_dtype())]
        except (SafetensorError, OSError) as error:
            yield f"{file.name}: can't be loaded: {error}"
    if integers and "quantization_config" not in read_json(directory / "config.json"):
        yield f"has integers for weights, and its config no quantization_config: {first_of(integers, SHOWN_WEIGHTS)}"


def faults_of_size(directory: Path, skeleton: nn.Module) -> Iterator[str]:
    """A config that describes more weights than the files can hold: they would be allocated all the same."""
    files = weight_files(directory)
    n_described = sum(tensor.numel() for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    n_bytes = sum(file.stat().st_size for file in files)
    if files and n_described > MOST_WEIGHTS_PER_BYTE * n_bytes:
        yield f"its config (hidden_size, ...) describes {n_described} weights, its files have {n_bytes} bytes"


def faults_of_names(directory: Path, skeleton: nn.Module) -> Iterator[str]:
    """Weights that were saved together with something around the model, whose name stands in all of theirs."""
    of_the_model = {name for name, _ in skeleton.named_children()}
    found: dict[str, str] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 it is no mapping
                parts = name.split(".")
                around = [part for part in parts if part in AT_ANY_DEPTH]
                if parts[0] in OUTERMOST and parts[0] not in of_the_model:
                    around.append(parts[0])
                for part in around:
                    found.setdefault(part, name)
    if found:
        whose = " and ".join(f"'{part}.' of {(AT_ANY_DEPTH | OUTERMOST)[part]}" for part in found)
        yield (
            f"its weights were saved inside a wrapper, with {whose} in their names ({next(iter(found.values()))}); "
            "save the model that is inside, or take that out of the names"
        )


def faults_of_weights(model: nn.Module, found: Mapping[str, Any]) -> Iterator[str]:
    """Weights that the checkpoint lacks, has in another shape, or has for parts that the model has otherwise.

    Args:
        found: transformers' loading info.
    """
    without_place = sorted(set(found["unexpected_keys"]) - _beside(model, found))
    faults = (
        ("lacks weights of its architecture", sorted(found["missing_keys"])),
        ("has weights of other shapes than its config's", sorted(str(key[0]) for key in found["mismatched_keys"])),
        ("has weights that its config leaves no place for", without_place),
    )
    for fault, names in faults:
        if names:
            yield f"{fault}: {first_of(names, SHOWN_WEIGHTS)}"


def weights_left_out(model: nn.Module, found: Mapping[str, Any]) -> list[str]:
    """Names of weights that belong to no part of the model, such as a value head: they are not loaded."""
    return sorted(_beside(model, found))


def _beside(model: nn.Module, found: Mapping[str, Any]) -> set[str]:
    """Of the unexpected keys those that lie neither among the model's layers nor in another module that it has."""
    modules = dict(model.named_modules())
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))

    def is_within(key: str) -> bool:
        return key.startswith(lists) or key.rpartition(".")[0] in modules

    # The weights of a bare decoder lack the prefix that it has inside a model.
    return {
        key for key in found["unexpected_keys"] if not any(map(is_within, (key, f"{model.base_model_prefix}.{key}")))
    }
