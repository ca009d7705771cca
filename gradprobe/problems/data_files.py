"""Where a data set lies: in a file, in a directory that `datasets` wrote, on the Hub, or in nothing but its rules."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.errors import InputError, reason_of
from ..common.files import read_json
from ..common.record_files import (
    Record,
    RecordFile,
    arrow_keys,
    columns_of,
    library,
    numbered,
    open_record_file,
)
from .gym import GYM, open_gym

HUB = "hf:"
DIRECTORY, HUB_DATASET = "datasets directory", "Hub data set"


def open_data_set(source: str) -> RecordFile:
    """Open a data set named as on the command line.

    - `hf:NAME[:CONFIG][:SPLIT]`: a data set of the Hub, or a local directory of data files, through the library
      `datasets`. Nothing else touches the network.
    - `gym:NAME[:key=value,...]`: one that reasoning-gym makes up, see `open_gym`.
    - a directory: one that `datasets.save_to_disk` wrote; of several splits one is named as `DIR/SPLIT`.
    - a file: see `open_record_file`.

    Raises:
        InputError: there is no such source, it can't be read, or the library that reads it is not installed.
    """
    if source.startswith(HUB):
        return _open_hub(source)
    if source.startswith(GYM):
        return open_gym(source)
    path = Path(source)
    if path.is_dir():
        return _open_directory(path)
    return open_record_file(path, "dataset")


def _open_directory(path: Path) -> RecordFile:
    splits_file = path / "dataset_dict.json"
    if splits_file.is_file():
        splits = read_json(splits_file).get("splits")
        if not splits:
            raise InputError(f"`dataset` {splits_file}: names no splits")
        if len(splits) != 1:
            raise InputError(f"`dataset` {path}: has the splits {', '.join(splits)}; name one: {path / 'SPLIT'}")
        path = path / splits[0]
    if not (path / "state.json").is_file():
        raise InputError(
            f"`dataset` {path}: a directory, but not one that datasets.save_to_disk wrote; "
            f"name a file in it, or give {HUB}{path} for a directory of data files"
        )
    datasets, arrow = library("datasets", f"`dataset` {path}"), library("pyarrow", f"`dataset` {path}")
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, arrow.ArrowException) as error:
        raise InputError(f"`dataset` {path}: not readable as a datasets directory ({reason_of(error)})") from error
    return _records_of(str(path), DIRECTORY, dataset)


def _open_hub(source: str) -> RecordFile:
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise InputError(f"`dataset` {source}: not of the form {HUB}NAME[:CONFIG][:SPLIT]")
    datasets = library("datasets", f"`dataset` {source}")
    try:
        config, split = _config_and_split(datasets, source, name, rest)
        dataset = datasets.load_dataset(name, config, split=split)
    # What the library is known to raise: no connection, no such data set, a broken one, one that is a script.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"`dataset` {source}: {reason_of(error)}") from error
    return _records_of(source, HUB_DATASET, dataset)


def _config_and_split(datasets: ModuleType, source: str, name: str, rest: list[str]) -> tuple[str, str]:
    """A single part after the name is a configuration if the data set has one so called, else a split."""
    configs = datasets.get_dataset_config_names(name)
    config = rest[0] if rest and (len(rest) == 2 or rest[0] in configs) else ""
    split = rest[-1] if rest and (len(rest) == 2 or not config) else ""
    if not config and len(configs) > 1:
        there = ", ".join(configs)
        raise InputError(f"`dataset` {source}: has the configurations {there}; name one: {HUB}{name}:CONFIG")
    config = config or configs[0]
    if config not in configs:
        raise InputError(f"`dataset` {source}: no configuration '{config}' (there: {', '.join(configs)})")
    splits = datasets.get_dataset_split_names(name, config)
    if not split and len(splits) > 1:
        there = ", ".join(splits)
        raise InputError(f"`dataset` {source}: has the splits {there}; name one: {HUB}{name}:{config}:SPLIT")
    split = split or splits[0]
    if split not in splits:
        raise InputError(f"`dataset` {source}: no configuration or split '{split}' (splits: {', '.join(splits)})")
    return config, split


def _records_of(source: str, kind: str, dataset: Any) -> RecordFile:
    def read(keys: Sequence[str]) -> list[Record]:
        return numbered(source, dataset.select_columns(columns_of(keys, dataset.column_names)).to_list())

    return RecordFile(source, kind, "", arrow_keys(dataset.features.arrow_schema), read)
