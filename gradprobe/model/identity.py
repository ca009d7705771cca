"""What a checkpoint is, by content: another tokenizer makes other numbers out of the same weights."""

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..common.errors import InputError
from ..common.files import sha256_of
from .source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, GENERATION_CONFIG, CheckpointSource

MODEL = (CONFIG, "*.safetensors")
ADAPTER = (ADAPTER_CONFIG, "*.safetensors")
CODE = ("*.py",)
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
TOKENIZER += ("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*")
"""The files that transformers reads a tokenizer and its chat templates from."""

FileStates = list[tuple[str, int, int, int, int]]


def checkpoint_identity(source: CheckpointSource, model: nn.Module) -> dict[str, str]:
    """What a checkpoint is: hashes of a local one's files, the commit of one from the Hub.

    `weights_sha256` is over the configuration and the weights, `tokenizer_sha256` over the tokenizer's files and chat
    templates, wherever they are read from (`tokenizer` is one's name on the Hub, where it is not the checkpoint's),
    `code_sha256` over code that may run; with an adapter `adapter`, its hash, or its name on the Hub.
    """
    directory = Path(source.path)
    if directory.is_dir():
        beside = ADAPTER_WEIGHTS  # an adapter's, which are left out
        identity = {"weights_sha256": sha256_of(*(f for f in _matching(directory, MODEL) if f.name != beside))}
    else:
        identity = {"revision": getattr(model.config, "_commit_hash", None) or "unknown"}
    parameter, tokenizer = source.tokenizer_place
    if Path(tokenizer).is_dir():
        identity["tokenizer_sha256"] = _sha256_by_name(Path(tokenizer), TOKENIZER)
    elif parameter != "model_path":
        identity["tokenizer"] = tokenizer
    if directory.is_dir() and source.trust_remote_code and _matching(directory, CODE):
        identity["code_sha256"] = _sha256_by_name(directory, CODE)
    if source.adapter is None:
        return identity
    adapter = Path(source.adapter)
    is_local = (adapter / ADAPTER_CONFIG).is_file()
    return identity | {"adapter": sha256_of(*_matching(adapter, ADAPTER)) if is_local else source.adapter}


def file_states(source: CheckpointSource) -> FileStates:
    """Name, size, inode and times of every local file that an identity is made of: cheap, and other after a write."""
    places = [
        (source.path, (*MODEL, *CODE, GENERATION_CONFIG)),
        (source.adapter, ADAPTER),
        (source.tokenizer_place[1], TOKENIZER),
    ]
    found = (_matching(Path(path), patterns) for path, patterns in places if path is not None and Path(path).is_dir())
    files = dict.fromkeys(file for of_place in found for file in of_place)
    return [(str(f), s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for f in files for s in (f.stat(),)]


def refuse_changed_checkpoint(
    source: CheckpointSource, model: nn.Module, identity: Mapping[str, str], states: FileStates
) -> None:
    """Raise `InputError` if the files are no more those of `identity`: hashed again where `states` before it differ."""
    if file_states(source) != states and checkpoint_identity(source, model) != identity:
        raise InputError(
            f"`model_path` {source.path}: its files have changed while they were read; probe a copy that stays as it is"
        )


def hardware_of(device: torch.device) -> str:
    """What does the arithmetic, for another rounds its own way: the GPU's name, or the CPU's kind and vector units."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def _matching(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files, each once, in the order of the patterns and of their names."""
    return list(dict.fromkeys(f for pattern in patterns for f in sorted(directory.glob(pattern)) if f.is_file()))


def _sha256_by_name(directory: Path, patterns: tuple[str, ...]) -> str:
    lines = (f"{file.relative_to(directory)} {sha256_of(file)}\n" for file in _matching(directory, patterns))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
