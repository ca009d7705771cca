"""Records of a file: JSON lines, JSON or parquet. What a record's fields mean is for whoever asked to say."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, one_line, reason_of
from .files import no_key_twice, read_bytes

PARQUET_MAGIC = b"PAR1"
MOST_FILE_BYTES, MOST_BYTES, MOST_JSON_BYTES = 1 << 31, 1 << 30, 1 << 28
"""Of a file; of what is in it, unpacked (all of a JSONL file, the columns read of parquet); of one JSON text, a line or
a file, whose objects take up to 20 times more memory."""
MOST_ROWS, MOST_VALUES = 5_000_000, 1 << 27
"""Of parquet: rows, and entries of its columns, those of lists too. A few bytes can say "the same, a billion times"."""
BATCH_BYTES, MOST_BATCH_ROWS = 1 << 28, 1024
MOST_LEVELS = 50
"""Of objects and lists inside of each other; what compares or prints deeper ones would run out of stack."""
TOO_DEEP = "not JSON that can be read (nested too deeply)"
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
        content = read_bytes(file, MOST_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{named}: {error.strerror}") from error
    _raise_if_more(len(content), MOST_FILE_BYTES, f"{named}: has", "bytes")
    if file.suffix == ".parquet" or content.startswith(PARQUET_MAGIC):
        return _open_parquet(str(file), named, content)
    return _open_text(str(file), named, file.suffix, content)


def _raise_if_more(n: int, most: int, has: str, what: str) -> None:
    if n > most:
        raise InputError(f"{has} more than {most:,} {what}; split it, or leave out columns that nobody asks for")


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
    _raise_if_more(len(content), MOST_BYTES, f"{named}: has", "bytes")
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
    """What the text holds, or why it is not read: no JSON, a key twice in one object, nested too deeply, too long."""
    if len(text) > MOST_JSON_BYTES:
        return None, f"more than {MOST_JSON_BYTES:,} characters of JSON in one piece; write more and shorter lines"
    try:
        found = json.loads(text, object_pairs_hook=no_key_twice)
    except ValueError as error:
        return None, f"not JSON ({error})"
    except RecursionError:
        return None, TOO_DEEP
    return (None, TOO_DEEP) if is_deeper(found, MOST_LEVELS) else (found, "")


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects of JSON lie inside of each other more than `most` deep."""
    level = [[value]]
    for _ in range(most + 1):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


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
    faults = (arrow.ArrowException, OSError, ValueError, OverflowError, LookupError)
    try:
        file = parquet.ParquetFile(arrow.BufferReader(content))
        schema = file.schema_arrow
    except faults as error:
        raise InputError(f"{named}: not readable as parquet ({reason_of(error)})") from error
    if len(set(schema.names)) < len(schema.names):
        raise InputError(f"{named}: a column's name stands twice")
    keys = arrow_keys(schema, named=named)

    def read(keys: Sequence[str]) -> list[Record]:
        columns = columns_of(keys, schema.names)
        batch_rows = _bounded(file.metadata, named)
        records: list[dict[str, Any]] = []
        n_bytes = n_values = 0
        try:
            for batch in file.iter_batches(batch_rows, columns=columns):
                batch = _unpacked(arrow, batch)
                n_bytes += batch.nbytes
                n_values += sum(_n_values(arrow, column) for column in batch.columns)
                _raise_if_more(n_values, MOST_VALUES, f"{named}: has", "values")
                _raise_if_more(n_bytes, MOST_BYTES, f"{named}: unpacks to", "bytes")
                _raise_if_more(len(records) + len(batch), MOST_ROWS, f"{named}: has", "rows")
                records += batch.to_pylist()
        except faults as error:
            raise InputError(f"{named}: not readable as parquet ({reason_of(error)})") from error
        return numbered(source, records)

    return RecordFile(source, PARQUET, hashlib.sha256(content).hexdigest(), keys, read)


def _bounded(metadata: Any, named: str) -> int:
    """How many rows can be read at once, whatever a cell can hold by what the file says of itself.

    Only of its row groups: asking pyarrow for a column's metadata ends the process where they are damaged.

    Raises:
        InputError: there are more rows than are read.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    _raise_if_more(sum(group.num_rows for group in groups), MOST_ROWS, f"{named}: has", "rows")
    # A cell of a dictionary can stand in every row, and is at most as large as all of its row group.
    return min(MOST_BATCH_ROWS, max(1, BATCH_BYTES // max([1, *(group.total_byte_size for group in groups)])))


def _n_values(arrow: ModuleType, column: Any) -> int:
    """How many entries a column has, those of its lists and structs too."""
    kind = column.type
    if arrow.types.is_struct(kind):
        return len(column) + sum(_n_values(arrow, part) for part in column.flatten())
    is_list = kind.num_fields == 1 and hasattr(column, "flatten") and not arrow.types.is_map(kind)
    return len(column) + (_n_values(arrow, column.flatten()) if is_list else 0)


def _unpacked(arrow: ModuleType, batch: Any) -> Any:
    """The batch with every text in its place, where it was a number in a dictionary."""
    columns = [
        column.dictionary_decode() if arrow.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    return arrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def numbered(source: str, records: list[dict[str, Any]]) -> list[Record]:
    return [Record(f"{source}: row {i}", i, record) for i, record in enumerate(records)]


def arrow_keys(fields: Any, prefix: str = "", named: str = "", n_levels: int = 0) -> list[str]:
    """Dotted names of a pyarrow schema or struct type.

    Raises:
        InputError: nested too deeply, or dictionaries inside of lists or structs, which would unpack unseen.
    """
    if n_levels > MOST_LEVELS:
        raise InputError(f"{named}: nested too deeply")
    keys = []
    for column in fields:
        keys.append(prefix + column.name)
        kind = column.type
        if "dictionary<" in str(kind) and (prefix or not str(kind).startswith("dictionary<")):
            raise InputError(f"{named}: column '{one_line(prefix + column.name, 60)}' has a dictionary inside of it")
        if str(kind).startswith("struct<"):
            keys += arrow_keys(kind.fields, f"{prefix}{column.name}.", named, n_levels + 1)
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
