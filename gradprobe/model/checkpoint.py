"""A checkpoint in: model and tokenizer, what identifies it, its layers, and its two halves (decoder and head)."""

import errno
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from ..common.errors import InputError, first_of, raise_if_any, reason_of
from ..common.files import read_json
from .batches import is_out_of_memory
from .placement import Placement, input_device
from .soundness import faults_of_config, faults_of_files, faults_of_size, faults_of_weights, weights_left_out

log = logging.getLogger(__name__)
WEIGHTS_ERRORS = (OSError, ValueError, ImportError, SafetensorError)
"""What loaders raise on weights that are torn or missing, and on libraries that a checkpoint or an attention needs."""
READING_ERRORS = (
    *WEIGHTS_ERRORS,
    *(StrictDataclassError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
)
"""What transformers raises besides on a tokenizer's or a configuration's JSON that says something impossible."""
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded causal language model, frozen, in eval mode."""

    model: nn.Module
    tokenizer: Any
    end_ids: frozenset[int]
    """All end-of-sequence ids: any of them ends a rollout."""


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU.

    Raises:
        InputError: a GPU is asked for and torch sees none, or something else than a GPU or the CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"`device` {name}: torch {torch.__version__} sees no GPU")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"`device` {name}: must be auto, cuda or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"`device` {name}: must be auto, cuda or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"`device` {name}: torch sees {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that have it and float32 elsewhere."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_bfloat16 else "float32"
    return DTYPES[name]


@dataclass(frozen=True)
class CheckpointSource:
    """Which checkpoint: `model_path` and what goes with it.

    Attributes:
        path: a local directory, or a name on the Hub.
        revision: branch, tag or commit of a name on the Hub; None for its default branch.
        adapter: a PEFT adapter (LoRA) merged into the weights: a local directory, or a name on the Hub.
        trust_remote_code: whether code that comes with the checkpoint may run.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What every loader of transformers is told."""
        is_local = Path(self.path).exists()
        options = {"local_files_only": is_local, "trust_remote_code": self.trust_remote_code}
        return options if self.revision is None else options | {"revision": self.revision}


def load_checkpoint(
    source: CheckpointSource | str,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    placement: Placement | None = None,
) -> Checkpoint:
    """Load model and tokenizer; safetensors only. An adapter is merged in float32, before the weights are rounded.

    Args:
        device: takes all of the model, unless there is a placement.
        attention: `sdpa`, `eager` or `flash_attention_2`, see `resolve_attention`.
        placement: spreads the weights over several devices.

    Raises:
        InputError: there is no such checkpoint, it can't be loaded, it lacks weights (transformers would draw them at
            random) or has others that its config leaves no place for, it can't be run, its tokenizer has no
            vocabulary, it names no end-of-sequence token, or an adapter would have to be merged into weights that are
            spread.
    """
    source = source if isinstance(source, CheckpointSource) else CheckpointSource(source)
    if placement is not None and source.adapter is not None:
        raise InputError(f"`adapter` {source.adapter}: can't go with `device_map`; merge it into a checkpoint first")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # its redrawn lines are noise in a log
    tokenizer = load_tokenizer(source)
    options = _where_weights_go(source, device, placement) | source.options
    with _blaming(source, WEIGHTS_ERRORS), _without_load_report():
        model, found = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype if source.adapter is None else torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    raise_if_any(f"`model_path` {source.path}: {fault}" for fault in faults_of_weights(model, found))
    if left_out := weights_left_out(model, found):
        log.warning(f"`model_path` {source.path}: weights of no part of the model are left out: {first_of(left_out)}")
    if source.adapter is not None:
        model = _with_adapter(model, source.adapter).to(dtype)
    if placement is None:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    checkpoint = Checkpoint(model, tokenizer, end_token_ids(model, tokenizer))
    _try_out(source, model)
    return checkpoint


def _try_out(source: CheckpointSource, model: nn.Module) -> None:
    """Raise `InputError` where the model can't be run: what a config says may load, and yet not fit together."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=input_device(model))
    with faults_as_input(f"`model_path` {source.path}: can't be run", READING_ERRORS), torch.inference_mode():
        model(input_ids=ids, use_cache=False)


def _where_weights_go(source: CheckpointSource, device: torch.device, placement: Placement | None) -> dict[str, Any]:
    """With accelerate, weights are read straight onto their device: the CPU never holds a copy of the model."""
    if placement is not None:
        return placement.options
    is_direct = source.adapter is None and is_accelerate_available()
    return {"device_map": {"": device}} if is_direct else {}


def load_tokenizer(source: CheckpointSource) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        InputError: there is none, or it has no vocabulary.
    """
    _refuse_unsound(source)
    with _blaming(source, READING_ERRORS):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.options)
    if len(tokenizer) <= len(tokenizer.added_tokens_encoder):
        raise InputError(f"`model_path` {source.path}: its tokenizer has no vocabulary (tokenizer.json is missing?)")
    return tokenizer


def load_skeleton(source: CheckpointSource) -> nn.Module:
    """The checkpoint's module tree and generation config without its weights: enough to resolve targets, at no cost.

    Raises:
        InputError: there is no such checkpoint, or no causal language model in it.
    """
    _refuse_unsound(source)
    with _blaming(source, READING_ERRORS), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.path, **source.options)
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    directory = Path(source.path)
    if directory.is_dir():
        raise_if_any(f"`model_path` {source.path}: {fault}" for fault in faults_of_size(directory, skeleton))
    with suppress(OSError):  # many checkpoints have none
        skeleton.generation_config = GenerationConfig.from_pretrained(
            source.path, **{key: value for key, value in source.options.items() if key != "trust_remote_code"}
        )
    return skeleton


def _with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    """The model with a PEFT adapter's change of its weights added to them."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise InputError(f"`adapter` {adapter}: needs the library peft; install gradprobe[peft], or peft") from error
    directory = Path(adapter)
    is_local = directory.exists()
    if is_local and not (directory / "adapter_model.safetensors").is_file():
        raise InputError(f"`adapter` {adapter}: no adapter_model.safetensors in it; other formats are not read")
    fault = f"`adapter` {adapter}: can't be merged"
    with faults_as_input(fault, READING_ERRORS):
        config = PeftConfig.from_pretrained(adapter, local_files_only=is_local)
    # RuntimeError where shapes are others; and peft asks transformers by a name that the latter is giving up.
    with faults_as_input(fault, (*WEIGHTS_ERRORS, RuntimeError)), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = PeftModel.from_pretrained(
            model, adapter, config=config, use_safetensors=True, local_files_only=is_local
        )
        return adapted.merge_and_unload()


def resolve_attention(name: str, model: nn.Module) -> str:
    """`auto` is `sdpa` where the architecture has it, else (Gemma 2) `eager`."""
    if name == "auto":
        return "sdpa" if type(model)._supports_sdpa else "eager"
    return name


def _blaming(source: CheckpointSource, kinds: tuple[type[Exception], ...]) -> AbstractContextManager[None]:
    where = source.path if Path(source.path).exists() else f"{source.path}: no such directory, and as a name on the Hub"
    return faults_as_input(f"`model_path` {where}: can't be loaded", kinds)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Without transformers' coloured table of weights that are missing or left over, unless it was asked to say more.

    These weights are refused, or named in a line.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(before if before < logging.WARNING else logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def faults_as_input(what: str, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Exceptions of `kinds` that another library raises here are the input's fault; memory that runs out is not.

    Nothing of ours is to be called inside: its bugs would pass for bad input.
    """
    try:
        yield
    except kinds as error:
        if is_out_of_memory(error) or getattr(error, "errno", None) == errno.ENOMEM:
            raise
        raise InputError(f"{what}: {reason_of(error)}") from error


def _refuse_unsound(source: CheckpointSource) -> None:
    """Raise `InputError` where a look at files and config tells that it is no checkpoint of ours."""
    _refuse_incomplete(source)
    with _blaming(source, READING_ERRORS):
        config, _ = PreTrainedConfig.get_config_dict(source.path, **source.options)
    raise_if_any(f"`model_path` {source.path}: can't be loaded: config.json: {f}" for f in faults_of_config(config))


def _refuse_incomplete(source: CheckpointSource) -> None:
    """Raise `InputError` where a look at the directory tells that it is no checkpoint of ours."""
    path = source.path
    directory = Path(path)
    if not directory.exists():
        if not HUB_NAME.fullmatch(path):
            raise InputError(f"`model_path` {path}: no such directory")
        return
    if source.revision is not None:
        raise InputError(f"`revision` {source.revision}: only names on the Hub have revisions, {path} is a directory")
    if not directory.is_dir():
        raise InputError(f"`model_path` {path}: is a file; a checkpoint is a directory")
    faults = []
    if not (directory / "config.json").is_file():
        faults.append(f"`model_path` {path}: no config.json in it")
    if not any(directory.glob("*.safetensors")):
        faults.append(f"`model_path` {path}: no *.safetensors in it; other formats, which can hold code, are not read")
    raise_if_any(faults)
    raise_if_any(f"`model_path` {path}: {fault}" for fault in faults_of_files(directory))
    generation_config = directory / "generation_config.json"
    if generation_config.is_file():
        read_json(generation_config)  # transformers passes over a broken one, and so over end-of-sequence ids


def end_token_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The union of what generation config, model config and tokenizer call end of sequence.

    Raises:
        InputError: one of them calls something else than ids of the vocabulary so, or none names any.
    """
    found: set[int] = set()
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    size = model.config.get_text_config().vocab_size
    generation_config = getattr(model, "generation_config", None)
    for source in (generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int for i in listed):
            fault = f"eos_token_id is neither a token id nor a list of them: {ids!r}"
            raise InputError(f"`model_path` {name}: {type(source).__name__}: {fault}")
        # A tokenizer may know more tokens than the model, which then never draws them; a config that does is wrong.
        if source is not tokenizer and not all(0 <= i < size for i in listed):
            fault = f"eos_token_id {ids!r} is not within the vocabulary of {size}"
            raise InputError(f"`model_path` {name}: {type(source).__name__}: {fault}")
        found.update(listed)
    if not found:
        raise InputError(f"`model_path` {name}: neither its configs nor its tokenizer name an end-of-sequence token")
    return frozenset(found)
