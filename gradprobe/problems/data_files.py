"""Where a data set lies: in a file, in a directory that `datasets` wrote, on the Hub, or in nothing but its rules."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import InputError, reason_of
from ..common.extras import library
from ..common.record_files import (
    ROWS_AT_ONCE,
    Record,
    RecordFile,
    arrow_keys,
    columns_of,
    numbered,
    open_record_file,
)
from .gym import GYM, open_gym

HUB = "hf:"
DIRECTORY, HUB_DATASET = "datasets directory", "Hub data set"


def open_data_set(source: str) -> RecordFile:
    """Open a data set named as on the command line.

    - `hf:NAME[:CONFIG][:SPLIT]`: one of the Hub, or a local directory of data files. Nothing else touches the network.
    - `gym:NAME[:key=value,...]`: one that reasoning-gym makes up.
    - a directory that `datasets.save_to_disk` wrote; of several splits one is named as `DIR/SPLIT`; or a file.
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
    named = f"`dataset` {path}"
    datasets = library("datasets", "data", named)
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        hint = f"name a file in it, or give {HUB}{path} for a directory of data files"
        raise InputError(f"{named}: {reason_of(error)}; {hint}") from error
    return _records_of(str(path), DIRECTORY, _only_split(found, named, str(path / "SPLIT")))


def _open_hub(source: str) -> RecordFile:
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise InputError(f"`dataset` {source}: not of the form {HUB}NAME[:CONFIG][:SPLIT]")
    datasets = library("datasets", "data", f"`dataset` {source}")
    try:
        # A single part after the name is a configuration if the data set has one so called, else a split.
        is_split = len(rest) == 1 and rest[0] not in datasets.get_dataset_config_names(name)
        config, split = (None, *rest) if is_split else (*rest, None, None)[:2]
        found = datasets.load_dataset(name, config, split=split)
    # What the library is known to raise: no connection, no such data set, a broken one, one that is a script.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"`dataset` {source}: {reason_of(error)}") from error
    form = f"{HUB}{name}:{config + ':' if config else ''}SPLIT"
    return _records_of(source, HUB_DATASET, _only_split(found, f"`dataset` {source}", form))


def _only_split(found: Any, named: str, form: str) -> Any:
    """A data set, or the one of a dictionary of them."""
    splits = dict(found) if isinstance(found, dict) else {"": found}
    if len(splits) != 1:
        raise InputError(f"{named}: has the splits {', '.join(splits)}; name one: {form}")
    return next(iter(splits.values()))


def _records_of(source: str, kind: str, dataset: Any) -> RecordFile:
    def read(keys: Sequence[str]) -> Iterator[Record]:
        columns = dataset.select_columns(columns_of(keys, dataset.column_names))
        starts = range(0, len(columns), ROWS_AT_ONCE)
        parts = (columns.select(range(start, min(start + ROWS_AT_ONCE, len(columns)))) for start in starts)
        return numbered(source, (row for part in parts for row in part.to_list()))

    return RecordFile(source, kind, "", arrow_keys(dataset.features.arrow_schema), read)
