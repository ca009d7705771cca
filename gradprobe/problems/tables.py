"""Rows of a data set from wherever it lies: JSON lines, JSON, parquet, a `datasets` directory, or the Hub.

What a row's fields mean is not decided here: see problems.py.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.errors import InputError

HUB = "hf:"
PARQUET_MAGIC = b"PAR1"
JSONL, JSON, PARQUET, DIRECTORY, HUB_DATASET = "JSONL", "JSON", "parquet", "datasets directory", "Hub data set"


@dataclass(frozen=True)
class Row:
    """One row: where it stands (for messages), its index in the source, its fields."""

    place: str
    idx: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A source that has been opened.

    `keys` are the names of all fields, those inside of others dotted (`reward_model.ground_truth`). `sha256` is that
    of a file's bytes, and empty where the source is not one file. `faults` are the lines that are no rows.
    `read(keys)` gives the rows, with at least the fields named.
    """

    source: str
    kind: str
    sha256: str
    keys: list[str]
    read: Callable[[Sequence[str]], list[Row]]
    faults: list[str] = field(default_factory=list)


def open_table(source: str) -> Table:
    """Open a data set named as on the command line.

    - `hf:NAME[:CONFIG][:SPLIT]`: a data set of the Hub, or a local directory of data files, through the library
      `datasets`. Nothing else touches the network.
    - a directory: one that `datasets.save_to_disk` wrote; of several splits one is named as `DIR/SPLIT`.
    - a file ending in `.parquet`, or that begins as parquet does.
    - a file ending in `.jsonl`: one JSON object a line.
    - any other file: JSON if the first character is `[`, JSON lines if it is `{`.

    Raises:
        InputError: there is no such source, it can't be read, or the library that reads it is not installed.
    """
    if source.startswith(HUB):
        return _open_hub(source)
    path = Path(source)
    if path.is_dir():
        return _open_directory(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"`dataset` {source}: {error.strerror}") from error
    if path.suffix == ".parquet" or content.startswith(PARQUET_MAGIC):
        return _open_parquet(source, content)
    return _open_text(source, path.suffix, content)


def lookup(fields: dict[str, Any], key: str) -> Any:
    """The value under a dotted key; a field of that very name goes first. What is inside of null is null.

    Raises:
        KeyError: there is none.
    """
    if key in fields:
        return fields[key]
    value: Any = fields
    for part in key.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise KeyError(key)
        value = value[part]
    return value


# JSON and JSON lines


def _open_text(source: str, suffix: str, content: bytes) -> Table:
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"`dataset` {source}: not UTF-8 at byte {error.start}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    first = text.lstrip()[:1]
    if suffix == ".jsonl" or first in ("{", ""):
        return _json_lines(source, suffix, text, sha256)
    if first == "[" or suffix == ".json":
        return _json_list(source, text, sha256)
    raise InputError(
        f"`dataset` {source}: neither JSON lines, JSON nor parquet, by its ending and its first character "
        f"'{first}'; other formats are to be converted"
    )


def _json_lines(source: str, suffix: str, text: str, sha256: str) -> Table:
    rows, faults = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record, fault = _parse_json(line)
        if fault or not isinstance(record, dict):
            faults.append(f"{source}:{number}: {fault or 'not a JSON object'}")
        else:
            rows.append(Row(f"{source}:{number}", len(rows), record))
    if suffix == ".json" and not rows and faults:
        # An object over many lines: its faults line by line would say nothing.
        raise InputError(f"`dataset` {source}: not a list of JSON objects, nor one JSON object a line")
    return Table(source, JSONL, sha256, _keys_of(row.fields for row in rows), lambda keys: rows, faults)


def _json_list(source: str, text: str, sha256: str) -> Table:
    records, fault = _parse_json(text)
    if fault:
        raise InputError(f"`dataset` {source}: {fault}")
    if not isinstance(records, list):
        raise InputError(f"`dataset` {source}: not a list of JSON objects but of type {type(records).__name__}")
    rows = _numbered(source, records)
    faults = [f"{row.place}: not a JSON object" for row in rows if not isinstance(row.fields, dict)]
    rows = [row for row in rows if isinstance(row.fields, dict)]
    return Table(source, JSON, sha256, _keys_of(row.fields for row in rows), lambda keys: rows, faults)


def _parse_json(text: str) -> tuple[Any, str]:
    try:
        return json.loads(text), ""
    except ValueError as error:
        return None, f"not JSON ({error})"
    except RecursionError:
        return None, "not JSON that can be read (nested too deeply)"


def _keys_of(records: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in _dotted(record)))


def _dotted(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in record.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


# Parquet and `datasets`


def _open_parquet(source: str, content: bytes) -> Table:
    parquet, arrow = _library("pyarrow.parquet", source), _library("pyarrow", source)
    if not content:
        return Table(source, PARQUET, hashlib.sha256(content).hexdigest(), [], lambda keys: [])
    try:
        file = parquet.ParquetFile(arrow.BufferReader(content))
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"`dataset` {source}: not readable as parquet ({_first_line(error)})") from error

    def read(keys: Sequence[str]) -> list[Row]:
        columns = _top_level(keys, file.schema_arrow.names)
        try:
            records = file.read(columns=columns).to_pylist()
        except (arrow.ArrowException, OSError) as error:
            raise InputError(f"`dataset` {source}: not readable as parquet ({_first_line(error)})") from error
        return _numbered(source, records)

    return Table(source, PARQUET, hashlib.sha256(content).hexdigest(), _arrow_keys(file.schema_arrow), read)


def _open_directory(path: Path) -> Table:
    splits_file = path / "dataset_dict.json"
    if splits_file.is_file():
        found, fault = _parse_json(splits_file.read_text(encoding="utf-8", errors="replace"))
        splits = found.get("splits") if isinstance(found, dict) else None
        if not splits or not isinstance(splits, list):
            raise InputError(f"`dataset` {splits_file}: {fault or 'names no splits'}")
        if len(splits) != 1:
            raise InputError(f"`dataset` {path}: has the splits {', '.join(splits)}; name one: {path / 'SPLIT'}")
        path = path / splits[0]
    if not (path / "state.json").is_file():
        raise InputError(
            f"`dataset` {path}: a directory, but not one that datasets.save_to_disk wrote; "
            f"name a file in it, or give {HUB}{path} for a directory of data files"
        )
    datasets, arrow = _library("datasets", str(path)), _library("pyarrow", str(path))
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, arrow.ArrowException) as error:
        raise InputError(f"`dataset` {path}: not readable as a datasets directory ({_first_line(error)})") from error
    return _table_of_dataset(str(path), DIRECTORY, dataset)


def _open_hub(source: str) -> Table:
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise InputError(f"`dataset` {source}: not of the form {HUB}NAME[:CONFIG][:SPLIT]")
    datasets = _library("datasets", source)
    try:
        config, split = _config_and_split(datasets, source, name, rest)
        dataset = datasets.load_dataset(name, config, split=split)
    except InputError:
        raise
    # What the library is known to raise: no connection, no such data set, a broken one, one that is a script.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"`dataset` {source}: {_first_line(error)}") from error
    return _table_of_dataset(source, HUB_DATASET, dataset)


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


def _table_of_dataset(source: str, kind: str, dataset: Any) -> Table:
    def read(keys: Sequence[str]) -> list[Row]:
        return _numbered(source, dataset.select_columns(_top_level(keys, dataset.column_names)).to_list())

    return Table(source, kind, "", _arrow_keys(dataset.features.arrow_schema), read)


def _numbered(source: str, records: list[dict[str, Any]]) -> list[Row]:
    return [Row(f"{source}: row {i}", i, record) for i, record in enumerate(records)]


def _arrow_keys(fields: Any, prefix: str = "") -> list[str]:
    """Dotted names of a pyarrow schema or struct type."""
    keys = []
    for column in fields:
        keys.append(prefix + column.name)
        if str(column.type).startswith("struct<"):
            keys += _arrow_keys(column.type.fields, f"{prefix}{column.name}.")
    return keys


def _top_level(keys: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns that hold `keys`, so that the others (long generations, images) are never read."""
    return list(dict.fromkeys(key if key in columns else key.partition(".")[0] for key in keys))


def _library(name: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(
            f"`dataset` {source}: reading it takes the library '{package}'; pip install 'gradprobe[data]'"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
