"""Where a model's weights live: on one device, or spread over GPUs, the CPU's memory and the disk by accelerate."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import is_accelerate_available

from ..common.errors import InputError, raise_if_any, reason_of
from ..common.files import read_json


@dataclass(frozen=True)
class Placement:
    """How the weights are spread.

    Attributes:
        device_map: `auto`, or for each module the number of a GPU, `cpu` or `disk`.
        max_memory: bytes of weights at most on each GPU (by number) and in the CPU's memory; what is not named is not
            used. None for all that is free, but a tenth.
        offload_dir: for weights that can't be read from the checkpoint as they are (mixtures of experts).
    """

    device_map: str | dict[str, int | str]
    max_memory: dict[int | str, int] | None = None
    offload_dir: Path | None = None

    @property
    def main_device(self) -> torch.device:
        """Where layers on the CPU or the disk are brought to when they run: the first GPU in use, else the CPU."""
        if isinstance(self.device_map, dict):
            used = self.device_map.values()
        else:
            used = self.max_memory or range(torch.cuda.device_count())
        gpus = [device for device in used if isinstance(device, int)]
        return torch.device("cuda", min(gpus)) if gpus else torch.device("cpu")

    @property
    def options(self) -> dict[str, Any]:
        """What transformers' loader is told."""
        return {
            "device_map": self.device_map,
            "max_memory": self.max_memory,
            "offload_folder": None if self.offload_dir is None else str(self.offload_dir),
        }


def read_placement(device_map: str, max_memory: str | None, offload_dir: Path | None, skeleton: nn.Module) -> Placement:
    """The placement that `device_map`, `max_memory` and `offload_dir` ask for.

    Args:
        device_map: `auto`, or a JSON file of module → number of a GPU, `cpu` or `disk`.
        max_memory: e.g. `0=70GiB,cpu=200GiB`.
        skeleton: the model without its weights, whose modules the file must name.

    Raises:
        InputError: accelerate is not installed, or a flag or the file asks for what can't be; all problems are named.
    """
    if not is_accelerate_available():
        raise InputError(f"`device_map` {device_map}: needs the library accelerate; install gradprobe[accelerate]")
    if device_map == "auto":
        limits = None if max_memory is None else _read_limits(max_memory)
        return Placement("auto", limits, offload_dir)
    placed = read_json(Path(device_map))
    problems = list(_faults_of_map(placed, skeleton))
    if max_memory is not None:
        problems.append(f"`max_memory` {max_memory}: only `device_map` auto asks how much there is room for")
    raise_if_any(f"`device_map` {device_map}: {p}" if not p.startswith("`") else p for p in problems)
    return Placement(placed, None, offload_dir)


def _read_limits(words: str) -> dict[int | str, int]:
    """`0=70GiB,cpu=200GiB` -> {0: bytes, "cpu": bytes}."""
    from accelerate.utils import convert_file_size_to_int

    limits: dict[int | str, int] = {}
    problems = []
    for word in words.split(","):
        name, _, size = word.strip().partition("=")
        device = int(name) if name.isdecimal() else name
        try:
            limits[device] = convert_file_size_to_int(size)
        except (ValueError, OverflowError):
            problems.append(f"`max_memory` {words}: '{word}' is not like 0=70GiB or cpu=200GiB")
            continue
        if device == "disk" or not _is_there(device):
            problems.append(f"`max_memory` {words}: '{name}' is not cpu or {_gpus()}")
    raise_if_any(dict.fromkeys(problems))
    return limits


def _is_there(device: int | str) -> bool:
    return device in ("cpu", "disk") or (type(device) is int and 0 <= device < torch.cuda.device_count())


def _gpus() -> str:
    return f"one of the {torch.cuda.device_count()} GPUs that torch sees, from 0"


def _faults_of_map(placed: dict[str, Any], skeleton: nn.Module) -> Iterator[str]:
    from accelerate.utils import check_device_map

    known = {name for name, _ in (*skeleton.named_modules(), *skeleton.named_parameters(remove_duplicate=False))}
    for module, device in placed.items():
        if not _is_there(device):
            yield f'{module!r}: {device!r} is not "cpu", "disk" or {_gpus()}'
        if module not in known:
            yield f"{module!r}: the model has no such module"
        around = [
            other for other in placed if other != module and f"{module}.".startswith(f"{other}." if other else "")
        ]
        if around:
            yield f"{module!r}: has its place by {around[0]!r} already"
    try:
        with warnings.catch_warnings():  # of unknown modules, which are named above
            warnings.simplefilter("ignore")
            check_device_map(skeleton, placed)
    except ValueError as error:
        yield reason_of(error, 200)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go and logits come back: the device of the embedding, or where its weights are brought to."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)  # accelerate's, on models spread by it
    if hook is None:
        return model.device
    return torch.device(getattr(hook, "hooks", [hook])[0].execution_device)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate brings weights to where they are needed: a module that does not run may have none."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())
