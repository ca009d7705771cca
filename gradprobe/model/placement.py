"""Where a model's weights live: on one device, or spread over GPUs, the CPU's memory and the disk by accelerate."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.utils import is_accelerate_available

from ..common.errors import InputError
from ..common.files import read_json
from .source import faults_as_input


@dataclass(frozen=True)
class Placement:
    """How the weights are spread.

    Attributes:
        device_map: `auto`, or for each module the number of a GPU, `cpu` or `disk`.
        max_memory: of weights at most on each GPU (by number) and in the CPU's memory, like `70GiB`; what is not named
            is not used. None for all that is free, but a tenth.
        offload_dir: for weights that can't be read from the checkpoint as they are (mixtures of experts).
    """

    device_map: str | dict[str, int | str]
    max_memory: dict[int | str, str] | None = None
    offload_dir: Path | None = None

    @property
    def main_device(self) -> torch.device:
        """Where layers on the CPU or the disk are brought to when they run: the first GPU in use, else the CPU."""
        of_auto = self.max_memory or range(torch.cuda.device_count())
        used = of_auto if self.device_map == "auto" else self.device_map.values()
        gpus = [device for device in used if isinstance(device, int)]
        return torch.device("cuda", min(gpus)) if gpus else torch.device("cpu")


def read_placement(device_map: str, max_memory: str | None, offload_dir: Path | None, skeleton: nn.Module) -> Placement:
    """A `Placement` of flags: `device_map` is `auto` or a JSON file, `max_memory` like `0=70GiB,cpu=200GiB`."""
    if not is_accelerate_available():
        raise InputError(f"`device_map` {device_map}: needs the library accelerate; install gradprobe[accelerate]")
    if device_map == "auto":
        pairs = [word.strip().partition("=") for word in (max_memory or "").split(",") if word]
        limits = {int(name) if name.isdecimal() else name: size for name, _, size in pairs}
        return Placement("auto", limits or None, offload_dir)
    if max_memory is not None:
        raise InputError(f"`max_memory` {max_memory}: only `device_map` auto asks how much there is room for")
    from accelerate.utils import check_device_map

    placed = read_json(Path(device_map))
    with faults_as_input(f"`device_map` {device_map}"):
        check_device_map(skeleton, placed)
    return Placement(placed, None, offload_dir)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go and logits come back: the device of the embedding, or where its weights are brought to."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)  # accelerate's, on models spread by it
    if hook is None:
        return model.device
    return torch.device(getattr(hook, "hooks", [hook])[0].execution_device)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate brings weights to where they are needed: a module that does not run may have none."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())
