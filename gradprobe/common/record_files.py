"""Records of a file: JSON lines, JSON or parquet. What a record's fields mean is for whoever asked to say."""

import codecs
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .errors import InputError, reason_of
from .extras import library

PARQUET_MAGIC = b"PAR1"
ROWS_AT_ONCE, HEAD = 4096, 4096
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
    """A source that has been opened; `read(keys)` gives its records one by one, with at least the fields named.

    `keys` are the names of all fields, those inside of others dotted (`reward_model.ground_truth`). `sha256` is that
    of a file's bytes, and empty where the source is not one file. `faults` are the lines that are no records: their
    places, and why.
    """

    source: str
    kind: str
    sha256: str
    keys: list[str]
    read: Callable[[Sequence[str]], Iterable[Record]]
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
    # As a memory map is to a file: text and parsed records would take many times the bytes.
    head = content[:HEAD].removeprefix(codecs.BOM_UTF8).lstrip()
    first = "{" if file.suffix == ".jsonl" else head[:4].decode(errors="replace")[:1]
    if first not in ("[", "{", ""):
        raise InputError(
            f"{named}: neither JSON lines, JSON nor parquet, by its ending and its first character "
            f"'{first}'; other formats are to be converted"
        )
    found = partial(_json_lines, file, named, content)
    if first == "[" or (head.startswith(b"{\n") and any(fault for *_, fault in found())):
        found = _rows_of_json(file, named, content) or found  # or one object over many lines
    keys: dict[str, None] = {}
    faults = []
    for place, fields, fault in found():
        if fault:
            faults.append((place, fault))
        else:
            keys.update(dict.fromkeys(_dotted(fields)))

    def read(keys: Sequence[str]) -> Iterator[Record]:
        records = ((place, fields) for place, fields, fault in found() if not fault)
        return (Record(place, i, fields) for i, (place, fields) in enumerate(records))

    return RecordFile(str(file), JSON if first == "[" else JSONL, sha256, list(keys), read, faults)


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


Found = tuple[str, Any, str]
"""The place of what may be a record, its fields, and why it is none ("" where it is one)."""


def _found(place: str, fields: Any) -> Found:
    if isinstance(fields, dict):
        return place, fields, ""
    return place, None, NO_OBJECT + (NO_PAIRS if isinstance(fields, list) else "")


def _rows_of_json(file: Path, named: str, content: bytes) -> Callable[[], Iterable[Found]] | None:
    """The entries of a list, or one object over many lines; None where that is not JSON either."""
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{named}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        if content[:HEAD].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return None
        raise InputError(f"{named}: not JSON ({error})") from error
    rows = rows if isinstance(rows, list) else [rows]
    return lambda: (_found(f"{file}: row {i}", fields) for i, fields in enumerate(rows))


def _json_lines(file: Path, named: str, content: bytes) -> Iterator[Found]:
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    stream = io.BytesIO(content)  # shares the bytes
    stream.seek(start)
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode()
            if text.strip():
                yield _found(f"{file}:{number}", json.loads(text))
        except UnicodeDecodeError as error:
            raise InputError(f"{named}: not UTF-8 at byte {start + error.start}") from error
        except ValueError as error:
            yield f"{file}:{number}", None, f"not JSON ({error})"
        start += len(line)


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

    def read(keys: Sequence[str]) -> Iterator[Record]:
        opened = parquet.ParquetFile(arrow.BufferReader(content))
        batches = opened.iter_batches(ROWS_AT_ONCE, columns=columns_of(keys, schema.names))
        return numbered(source, (row for batch in batches for row in batch.to_pylist()))

    return RecordFile(source, PARQUET, sha256, arrow_keys(schema), read)


def numbered(source: str, records: Iterable[dict[str, Any]]) -> Iterator[Record]:
    """Records by their row numbers, from 0."""
    return (Record(f"{source}: row {i}", i, record) for i, record in enumerate(records))


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
