"""Which checkpoint, and a look at its folder: what is none of ours is called by its name before a library reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from ..common.errors import InputError, first_of, reason_of
from ..common.files import read_json
from .batches import is_out_of_memory

READING_ERRORS = (OSError, ValueError, LookupError, ImportError, SafetensorError, StrictDataclassError)
"""What loaders raise on files that are torn, missing or ill-edited, and on libraries that a checkpoint needs."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model_name_or_path"
"""Of an adapter's config: what it was trained on."""
TOKENIZER_CONFIG = "tokenizer_config.json"
OF_A_TOKENIZER = (TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with none of them has no tokenizer."""


@dataclass(frozen=True)
class CheckpointSource:
    """Which checkpoint: `model_path` and what goes with it.

    Attributes:
        path: a local directory, or a name on the Hub.
        revision: branch, tag or commit of a name on the Hub; None for its default branch.
        adapter: a PEFT adapter (LoRA) merged into the weights: a local directory, or a name on the Hub.
        trust_remote_code: whether code that comes with the checkpoint may run.
        tokenizer: a local directory, or a name on the Hub; None for the adapter's own or else the checkpoint's.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None

    def options_of(self, path: str) -> dict[str, Any]:
        """What transformers' loaders are told of what is read from `path`."""
        options = {"local_files_only": Path(path).exists(), "trust_remote_code": self.trust_remote_code}
        return options if self.revision is None or path != self.path else options | {"revision": self.revision}

    @property
    def tokenizer_place(self) -> tuple[str, str]:
        """Parameter and path that a tokenizer is read from: an adapter was trained with its own's end and template."""
        if self.tokenizer is not None:
            return "tokenizer", self.tokenizer
        if self.adapter is not None and has_tokenizer(self.adapter, "adapter"):
            return "adapter", self.adapter
        return "model_path", self.path


def has_tokenizer(path: str, parameter: str, revision: str | None = None) -> bool:
    """Whether a directory, or a name on the Hub, brings a tokenizer."""
    if Path(path).exists():
        return any((Path(path) / name).is_file() for name in OF_A_TOKENIZER)
    with faults_as_input(named(parameter, path)):
        try:
            hf_hub_download(path, TOKENIZER_CONFIG, revision=revision)
        except LocalEntryNotFoundError:  # out of reach, which tells nothing
            raise
        except EntryNotFoundError:
            return False
    return True


def named(parameter: str, path: str) -> str:
    """How a fault of what `parameter` gives begins."""
    return f"`{parameter}` {path}" + ("" if Path(path).exists() else ": no such directory, and as a name on the Hub")


@contextmanager
def faults_as_input(what: str, kinds: tuple[type[Exception], ...] = READING_ERRORS) -> Iterator[None]:
    """Exceptions of `kinds` that another library raises here are the input's fault; memory that runs out is not.

    Nothing of ours is to be called inside: its bugs would pass for bad input.
    """
    try:
        yield
    except kinds as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what}: {reason_of(error)}") from error


def refuse_other_folders(source: CheckpointSource) -> None:
    """Raise `InputError` where a directory is no checkpoint; trainers leave adapters, and folders of checkpoints."""
    directory, whose = Path(source.path), f"`model_path` {source.path}"
    if not directory.exists():
        return
    if source.revision is not None:
        raise InputError(f"`revision` {source.revision}: only names on the Hub have revisions, {whose} is a directory")
    has_weights = any((directory / name).exists() for name in (WEIGHTS, INDEX))
    if (directory / ADAPTER_CONFIG).is_file() and not has_weights:
        base = read_json(directory / ADAPTER_CONFIG).get(BASE) or "which it does not name"
        raise InputError(f"{whose}: is an adapter; give it as `adapter`, and as `model_path` its base, {base}")
    if not (directory / CONFIG).is_file():
        raise InputError(f"{whose}: no {CONFIG} in it{what_lies_inside(directory)}")
    if not has_weights:
        raise InputError(f"{whose}: no {WEIGHTS} in it, nor its index; formats that can hold code are not read")
    if (directory / GENERATION_CONFIG).is_file():
        read_json(directory / GENERATION_CONFIG)  # transformers passes over a torn one, and so over end tokens


def what_lies_inside(directory: Path) -> str:
    """The end of a refusal that names folders with a checkpoint or an adapter, `checkpoint-20` before `-100`."""
    found = {file.parent.name for name in (CONFIG, ADAPTER_CONFIG) for file in directory.glob(f"*/{name}")}
    names = sorted(found, key=lambda name: (len(name), name))
    return f"; name one of the checkpoints inside: {first_of(names)}" if names else ""
