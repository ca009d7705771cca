"""Which checkpoint, and a look at its folder: what is none of ours is refused before a library reads it."""

import errno
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from ..common.errors import InputError, first_of, raise_if_any, reason_of
from ..common.files import read_json
from .batches import is_out_of_memory
from .soundness import faults_of_config, faults_of_files, has_whole_weights

WEIGHTS_ERRORS = (OSError, ValueError, ImportError, SafetensorError)
"""What loaders raise on weights that are torn or missing, and on libraries that a checkpoint or an attention needs."""
READING_ERRORS = (
    *WEIGHTS_ERRORS,
    *(StrictDataclassError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
)
"""What transformers raises besides on a tokenizer's or a configuration's JSON that says something impossible."""
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
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

    @property
    def options(self) -> dict[str, Any]:
        """What every loader of transformers is told."""
        options = self.options_of(self.path)
        return options if self.revision is None else options | {"revision": self.revision}

    def options_of(self, path: str) -> dict[str, Any]:
        """The same for what is read from another place."""
        return {"local_files_only": Path(path).exists(), "trust_remote_code": self.trust_remote_code}

    @property
    def tokenizer_place(self) -> tuple[str, str]:
        """The parameter that says where the tokenizer is read from, and its value.

        An adapter's own comes before the checkpoint's: it was trained with that one's end token and chat template.

        Raises:
            InputError: there is no such adapter on the Hub.
        """
        if self.tokenizer is not None:
            return "tokenizer", self.tokenizer
        if self.adapter is not None and has_tokenizer(self.adapter, "adapter"):
            return "adapter", self.adapter
        return "model_path", self.path


def has_tokenizer(path: str, parameter: str, revision: str | None = None) -> bool:
    """Whether a directory, or a name on the Hub, brings a tokenizer.

    Raises:
        InputError: there is no such name on the Hub, or it is out of reach.
    """
    if Path(path).exists():
        return any((Path(path) / name).is_file() for name in OF_A_TOKENIZER)
    with faults_as_input(f"`{parameter}` {path}: no such directory, and as a name on the Hub", WEIGHTS_ERRORS):
        try:
            hf_hub_download(path, TOKENIZER_CONFIG, revision=revision)
        except LocalEntryNotFoundError:  # out of reach, which tells nothing
            raise
        except EntryNotFoundError:
            return False
    return True


def blaming(source: CheckpointSource, kinds: tuple[type[Exception], ...]) -> AbstractContextManager[None]:
    where = source.path if Path(source.path).exists() else f"{source.path}: no such directory, and as a name on the Hub"
    return faults_as_input(f"`model_path` {where}: can't be loaded", kinds)


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


def refuse_unsound(source: CheckpointSource) -> None:
    """Raise `InputError` where a look at files and config tells that it is no checkpoint of ours."""
    _refuse_incomplete(source)
    with blaming(source, READING_ERRORS):
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
    raise_if_any(_other_than_a_checkpoint(directory, path))
    faults = []
    if not (directory / CONFIG).is_file():
        faults.append(f"`model_path` {path}: no config.json in it")
    if not any(directory.glob("*.safetensors")):
        faults.append(f"`model_path` {path}: no *.safetensors in it; other formats, which can hold code, are not read")
    raise_if_any(faults)
    raise_if_any(f"`model_path` {path}: {fault}" for fault in faults_of_files(directory))
    generation_config = directory / "generation_config.json"
    if generation_config.is_file():
        read_json(generation_config)  # transformers passes over a broken one, and so over end-of-sequence ids


def _other_than_a_checkpoint(directory: Path, path: str) -> Iterator[str]:
    """What trainers leave besides: an adapter, and a folder of checkpoints."""
    if (directory / ADAPTER_CONFIG).is_file() and not has_whole_weights(directory):
        base = read_json(directory / ADAPTER_CONFIG).get(BASE) or "which it does not name"
        yield f"`model_path` {path}: is an adapter; give it as `adapter`, and as `model_path` its base, {base}"
    elif not (directory / CONFIG).is_file() and (inside := checkpoints_inside(directory)):
        yield f"`model_path` {path}: no config.json in it; name one of the checkpoints inside: {first_of(inside)}"


def checkpoints_inside(directory: Path) -> list[str]:
    """Names of folders with a checkpoint or an adapter, `checkpoint-20` before `checkpoint-100`."""
    found = [file.parent.name for name in (CONFIG, ADAPTER_CONFIG) for file in directory.glob(f"*/{name}")]
    return sorted(set(found), key=lambda name: (len(name), name))
