"""Records of a file: JSON lines, JSON or parquet. What a record's fields mean is for whoever asked to say."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, reason_of
from .files import read_bytes

PARQUET_MAGIC = b"PAR1"
JSONL, JSON, PARQUET = "JSONL", "JSON", "parquet"


@dataclass(frozen=True)
class Record:
    """One record: where it stands (for messages), its index in the source, its fields."""

    place: str
    idx: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class RecordFile:
    """A source that has been opened.

    `keys` are the names of all fields, those inside of others dotted (`reward_model.ground_truth`). `sha256` is that
    of a file's bytes, and empty where the source is not one file. `faults` are the lines that are no records.
    `read(keys)` gives the records, with at least the fields named.
    """

    source: str
    kind: str
    sha256: str
    keys: list[str]
    read: Callable[[Sequence[str]], list[Record]]
    faults: list[str] = field(default_factory=list)


def open_record_file(file: Path, parameter: str) -> RecordFile:
    """Open a file of records: parquet by its ending or its beginning, else JSON or JSON lines.

    A file that ends in `.jsonl` has one JSON object a line; any other is JSON if its first character is `[`, and JSON
    lines, or one JSON object, if it is `{`.

    Args:
        parameter: what the file was given as, for messages.

    Raises:
        InputError: the file can't be read, or the library that reads it is not installed.
    """
    named = f"`{parameter}` {file}"
    try:
        content = read_bytes(file)
    except OSError as error:
        raise InputError(f"{named}: {error.strerror}") from error
    if file.suffix == ".parquet" or content.startswith(PARQUET_MAGIC):
        return _open_parquet(str(file), named, content)
    return _open_text(str(file), named, file.suffix, content)


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


def _open_text(source: str, named: str, suffix: str, content: bytes) -> RecordFile:
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{named}: not UTF-8 at byte {error.start}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    first = text.lstrip()[:1]
    if suffix == ".jsonl" or first in ("{", ""):
        return _json_lines(source, named, suffix, text, sha256)
    if first == "[" or suffix == ".json":
        return _json_list(source, named, text, sha256)
    raise InputError(
        f"{named}: neither JSON lines, JSON nor parquet, by its ending and its first character "
        f"'{first}'; other formats are to be converted"
    )


def _json_lines(source: str, named: str, suffix: str, text: str, sha256: str) -> RecordFile:
    records, faults = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record, fault = parse_json(line)
        if fault or not isinstance(record, dict):
            faults.append(f"{source}:{number}: {fault or 'not a JSON object'}")
        else:
            records.append(Record(f"{source}:{number}", len(records), record))
    if suffix == ".json" and not records and faults:
        # An object over many lines: its faults line by line would say nothing.
        whole, _ = parse_json(text)
        if not isinstance(whole, dict):
            raise InputError(f"{named}: not a list of JSON objects, nor one JSON object a line")
        records, faults = numbered(source, [whole]), []
    return RecordFile(
        source, JSONL, sha256, _keys_of(record.fields for record in records), lambda keys: records, faults
    )


def _json_list(source: str, named: str, text: str, sha256: str) -> RecordFile:
    records, fault = parse_json(text)
    if fault:
        raise InputError(f"{named}: {fault}")
    if not isinstance(records, list):
        raise InputError(f"{named}: not a list of JSON objects but of type {type(records).__name__}")
    records = numbered(source, records)
    faults = [f"{record.place}: not a JSON object" for record in records if not isinstance(record.fields, dict)]
    records = [record for record in records if isinstance(record.fields, dict)]
    return RecordFile(source, JSON, sha256, _keys_of(record.fields for record in records), lambda keys: records, faults)


def parse_json(text: str) -> tuple[Any, str]:
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


def _open_parquet(source: str, named: str, content: bytes) -> RecordFile:
    parquet, arrow = library("pyarrow.parquet", named), library("pyarrow", named)
    if not content:
        return RecordFile(source, PARQUET, hashlib.sha256(content).hexdigest(), [], lambda keys: [])
    try:
        file = parquet.ParquetFile(arrow.BufferReader(content))
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{named}: not readable as parquet ({reason_of(error)})") from error

    def read(keys: Sequence[str]) -> list[Record]:
        columns = columns_of(keys, file.schema_arrow.names)
        try:
            records = file.read(columns=columns).to_pylist()
        except (arrow.ArrowException, OSError) as error:
            raise InputError(f"{named}: not readable as parquet ({reason_of(error)})") from error
        return numbered(source, records)

    return RecordFile(source, PARQUET, hashlib.sha256(content).hexdigest(), arrow_keys(file.schema_arrow), read)


def numbered(source: str, records: list[dict[str, Any]]) -> list[Record]:
    return [Record(f"{source}: row {i}", i, record) for i, record in enumerate(records)]


def arrow_keys(fields: Any, prefix: str = "") -> list[str]:
    """Dotted names of a pyarrow schema or struct type."""
    keys = []
    for column in fields:
        keys.append(prefix + column.name)
        if str(column.type).startswith("struct<"):
            keys += arrow_keys(column.type.fields, f"{prefix}{column.name}.")
    return keys


def columns_of(keys: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns that hold `keys`, so that the others (long generations, images) are never read."""
    return list(dict.fromkeys(key if key in columns else key.partition(".")[0] for key in keys))


def library(name: str, named: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(f"{named}: reading it takes the library '{package}'; pip install 'gradprobe[data]'") from error
