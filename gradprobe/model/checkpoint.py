"""A checkpoint in: model and tokenizer, device and dtype, attention, and what ends a rollout."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from ..common.errors import InputError, first_of, raise_if_any
from ..common.files import read_json
from .adapter import with_adapter
from .decoder import decoder_of
from .placement import Placement
from .source import ADAPTER_CONFIG, INDEX, WEIGHTS, CheckpointSource, faults_as_input, named, refuse_other_folders
from .tokenizer import load_tokenizer

log = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WRAPPERS = {"module", "policy", "pretrained_model", "base_model"}
"""What DistributedDataParallel, DeepSpeed, trainers with an actor, TRL's value head and PEFT put before all names."""
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put at any depth."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded causal language model, frozen, in eval mode."""

    model: nn.Module
    tokenizer: Any
    end_ids: frozenset[int]
    """All end-of-sequence ids: any of them ends a rollout."""


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in ("cpu", *(("cuda", *gpus) if gpus else ())):
        seen = f"torch {torch.__version__} sees {len(gpus)} GPUs, counted from 0"
        raise InputError(f"`device` {name}: must be auto, cpu, cuda or cuda:N; {seen}")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that have it and float32 elsewhere."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_bfloat16 else "float32"
    return DTYPES[name]


def resolve_attention(name: str, model: nn.Module) -> str:
    """`auto` is `sdpa` where the architecture has it, else (Gemma 2) `eager`."""
    if name == "auto":
        return "sdpa" if type(model)._supports_sdpa else "eager"
    return name


def load_skeleton(source: CheckpointSource) -> nn.Module:
    """The checkpoint's module tree and generation config without its weights: enough to resolve targets, at no cost."""
    refuse_other_folders(source)
    with faults_as_input(f"{named('model_path', source.path)}: can't be loaded"), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.path, **source.options_of(source.path))
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    decoder_of(skeleton)  # refuses what we can't serve
    if Path(source.path).is_dir():
        refuse_wrapped(Path(source.path), skeleton)
    options = {key: value for key, value in source.options_of(source.path).items() if key != "trust_remote_code"}
    with suppress(OSError):  # many checkpoints have none
        skeleton.generation_config = GenerationConfig.from_pretrained(source.path, **options)
    return skeleton


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


def load_checkpoint(
    source: CheckpointSource | str,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    placement: Placement | None = None,
) -> Checkpoint:
    """Load model and tokenizer; safetensors only. An adapter is merged in float32, before the weights are rounded.

    Weights that it lacks (transformers would draw them at random), or that its config leaves no place for, are refused.

    Args:
        device: takes all of the model, unless there is a placement.
        attention: `sdpa`, `eager` or `flash_attention_2`, see `resolve_attention`.
        placement: spreads the weights over several devices.
    """
    source = source if isinstance(source, CheckpointSource) else CheckpointSource(source)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # its redrawn lines are noise in a log
    refuse_other_folders(source)
    tokenizer = load_tokenizer(source)
    if source.tokenizer_place[0] == "adapter":
        log.info(f"`adapter` {source.adapter}: its own tokenizer is taken, with its end token and chat template")
    where: dict[str, Any] = {}
    if placement is not None:
        where = {"device_map": placement.device_map, "max_memory": placement.max_memory}
        where["offload_folder"] = placement.offload_dir
    elif source.adapter is None and is_accelerate_available():
        where = {"device_map": {"": device}}  # straight there: the CPU never holds a copy of the model
    with faults_as_input(f"{named('model_path', source.path)}: can't be loaded"), _without_load_report():
        model, found = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype if source.adapter is None else torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            # With peft, an adapter whose files lie beside whole weights would be put on top of them.
            adapter_kwargs={"subfolder": "no adapter is looked for"},
            **where,
            **source.options_of(source.path),
        )
    whose = f"`model_path` {source.path}"
    refuse_other_weights(model, found, whose)
    if (Path(source.path) / ADAPTER_CONFIG).is_file():
        what = "holds whole weights and an adapter beside them, which is left out"
        log.warning(f"{whose}: {what}; where it is no part of them yet, name it by `adapter`")
    if source.adapter is not None:
        model = with_adapter(model, source.adapter, source.path).to(dtype)
    if placement is None:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    return Checkpoint(model, tokenizer, end_token_ids(model, tokenizer))


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


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Without transformers' table of weights that are missing or left over, unless it was asked to say more."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(before if before < logging.WARNING else logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def end_token_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The union of what generation config, model config and tokenizer call end of sequence."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if not found:
        whose = f"`model_path` {getattr(model.config, 'name_or_path', '') or type(model).__name__}"
        raise InputError(f"{whose}: neither its configs nor its tokenizer name an end-of-sequence token")
    return frozenset(found)
