"""Records of a file: JSON lines, JSON or parquet. What a record's fields mean is for whoever asked to say."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError, reason_of
from .extras import library

PARQUET_MAGIC = b"PAR1"
NO_OBJECT = "not a JSON object"
NO_PAIRS = ', but a list; of messages? for each write {"prompt": the question, "ground_truth": the answer}'
JSONL, JSON, PARQUET = "JSONL", "JSON", "parquet"


@dataclass(frozen=True)
class Record:
    """One record: where it stands (for messages), its index in the source, its fields."""

    place: str
    idx: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class RecordFile:
    """A source that has been opened; `read(keys)` gives its records, with at least the fields named.

    `keys` are the names of all fields, those inside of others dotted (`reward_model.ground_truth`). `sha256` is that
    of a file's bytes, and empty where the source is not one file. `faults` are the lines that are no records: their
    places, and why.
    """

    source: str
    kind: str
    sha256: str
    keys: list[str]
    read: Callable[[Sequence[str]], list[Record]]
    faults: list[tuple[str, str]] = field(default_factory=list)


def open_record_file(file: Path, parameter: str) -> RecordFile:
    """Open a file of records: parquet by its ending or its beginning, else JSON or JSON lines.

    A file that ends in `.jsonl` has one JSON object a line; any other is a list of them if its first character is `[`,
    and one object, or one a line, if it is `{`. `parameter` is what the file was given as, for messages.
    """
    named = f"`{parameter}` {file}"
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if file.suffix == ".parquet" or content.startswith(PARQUET_MAGIC):
        return _parquet(str(file), named, sha256, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{named}: not UTF-8 at byte {error.start}") from error
    first = "{" if file.suffix == ".jsonl" else text.lstrip()[:1]
    if first not in ("[", "{", ""):
        raise InputError(
            f"{named}: neither JSON lines, JSON nor parquet, by its ending and its first character "
            f"'{first}'; other formats are to be converted"
        )
    found, faults = _rows_of_json(file, named, text) if first == "[" else _json_lines(file, text)
    records: list[Record] = []
    for place, fields in found:
        if isinstance(fields, dict):
            records.append(Record(place, len(records), fields))
        else:
            faults.append((place, NO_OBJECT + (NO_PAIRS if isinstance(fields, list) else "")))
    keys = list(dict.fromkeys(key for record in records for key in _dotted(record.fields)))
    return RecordFile(str(file), JSON if first == "[" else JSONL, sha256, keys, lambda keys: records, faults)


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


def _rows_of_json(file: Path, named: str, text: str) -> tuple[list[tuple[str, Any]], list[tuple[str, str]]]:
    try:
        return [(f"{file}: row {i}", record) for i, record in enumerate(json.loads(text))], []
    except ValueError as error:
        raise InputError(f"{named}: not JSON ({error})") from error


def _json_lines(file: Path, text: str) -> tuple[list[tuple[str, Any]], list[tuple[str, str]]]:
    """What stands in each line, at its place, and the lines that are no JSON; one object over many lines is a row."""
    found, faults = [], []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            found += [(f"{file}:{number}", json.loads(line))] if line.strip() else []
        except ValueError as error:
            faults.append((f"{file}:{number}", f"not JSON ({error})"))
    if faults and text.startswith("{\n"):
        with suppress(ValueError):
            return [(f"{file}: row 0", json.loads(text))], []
    return found, faults


def _dotted(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in record.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _parquet(source: str, named: str, sha256: str, content: bytes) -> RecordFile:
    parquet, arrow = (library(name, "data", f"{named}: parquet") for name in ("pyarrow.parquet", "pyarrow"))
    try:
        schema = parquet.read_schema(arrow.BufferReader(content))
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{named}: not readable as parquet ({reason_of(error)})") from error

    def read(keys: Sequence[str]) -> list[Record]:
        table = parquet.read_table(arrow.BufferReader(content), columns=columns_of(keys, schema.names))
        return numbered(source, table.to_pylist())

    return RecordFile(source, PARQUET, sha256, arrow_keys(schema), read)


def numbered(source: str, records: list[dict[str, Any]]) -> list[Record]:
    """Records by their row numbers, from 0."""
    return [Record(f"{source}: row {i}", i, record) for i, record in enumerate(records)]


def arrow_keys(fields: Iterable[Any], prefix: str = "") -> list[str]:
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
