"""Files that unpack to more than they seem to be, or are no files of records at all: refused, within bounded memory."""

import io
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradprobe.common import record_files
from gradprobe.common.errors import InputError
from gradprobe.common.record_files import open_record_file

ROOT = Path(__file__).parents[2]
MANY = 6_000_000
MOST_MEMORY = 3 << 30
READ = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
from gradprobe.common.errors import InputError
from gradprobe.common.record_files import open_record_file
try:
    opened = open_record_file(Path(sys.argv[1]), "rollouts")
    print(len(opened.read(opened.keys)), "records;", *opened.faults)
except InputError as error:
    print("refused:", error)
"""


def one_million_long_cells() -> pa.Table:
    """A dictionary of one text of a megabyte, and rows that all point to it."""
    return pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), ["x" * (1 << 20)])})


def nested(value: object, depth: int) -> object:
    for _ in range(depth):
        value = [value]
    return value


TABLES: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "rows of nothing": (lambda: pa.table({"prompt": pa.nulls(MANY)}), "rows"),
    "rows of one number": (lambda: pa.table({"prompt": pa.array([7] * MANY, pa.int8())}), "rows"),
    "one list of 140 million": (
        lambda: pa.table({"ids": pa.FixedSizeListArray.from_arrays(pa.nulls(140_000_000, pa.int8()), 140_000_000)}),
        "values|ArrowMemoryError",
    ),
    "a dictionary of one long text": (one_million_long_cells, "bytes"),
    "a column of them inside of lists": (
        lambda: pa.table({"texts": pa.ListArray.from_arrays([0, 10**6], one_million_long_cells()["text"].chunk(0))}),
        "dictionary inside of it",
    ),
    "a column named twice": (lambda: pa.table([[1], [2]], names=["a", "a"]), "twice"),
    "lists in lists": (lambda: pa.table({"a": [nested(1, 60)]}), "nested"),
}  # fmt: skip


def read_with_little_memory(file: Path) -> str:
    """What comes of reading it in a process of its own that can't have more than `MOST_MEMORY`."""
    command = [sys.executable, "-c", READ, str(file), str(MOST_MEMORY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", TABLES)
def test_a_parquet_bomb_is_refused_within_bounded_memory(tmp_path, name):
    table, says = TABLES[name]
    file = tmp_path / "bomb.parquet"
    pq.write_table(table(), file, row_group_size=MANY)
    assert file.stat().st_size < 10 << 20
    said = read_with_little_memory(file)
    assert said.startswith("refused: "), said
    assert re.search(says, said), said
    assert "bomb.parquet" in said


def test_what_fits_is_read(tmp_path):
    records = [{"prompt": f"{i}", "ids": [i, 2], "of": {"truth": "3"}} for i in range(3000)]
    table = pa.Table.from_pylist(records)
    table = table.set_column(0, "prompt", table["prompt"].dictionary_encode())
    pq.write_table(table, tmp_path / "sound.parquet", row_group_size=700)
    opened = open_record_file(tmp_path / "sound.parquet", "rollouts")
    assert opened.keys == ["prompt", "ids", "of", "of.truth"]
    assert [record.fields for record in opened.read(opened.keys)] == records
    assert [record.fields for record in opened.read(["of.truth"])] == [{"of": {"truth": "3"}}] * 3000
    assert record_files.MOST_BATCH_ROWS < 3000


@pytest.mark.parametrize("end", ["jsonl", "json"])
def test_json_has_its_limits(tmp_path, monkeypatch, end):
    file = tmp_path / f"long.{end}"
    file.write_text('[{"a": "' + "x" * 2000 + '"}]' if end == "json" else '{"a": 1}\n{"a": "' + "x" * 2000 + '"}\n')
    assert not open_record_file(file, "rollouts").faults
    monkeypatch.setattr(record_files, "MOST_JSON_BYTES", 1000)
    with pytest.raises(InputError, match="more than 1,000 characters of JSON in one piece"):
        raise InputError(*open_record_file(file, "rollouts").faults)
    for limit in ("MOST_BYTES", "MOST_FILE_BYTES"):
        monkeypatch.setattr(record_files, limit, 1500)
        with pytest.raises(InputError, match="`rollouts` .*long.*: has more than 1,500 bytes"):
            open_record_file(file, "rollouts")
        monkeypatch.undo()


def test_a_device_without_end_is_refused():
    with pytest.raises(InputError, match="is a device"):
        open_record_file(Path("/dev/zero"), "dataset")


def test_a_file_beyond_the_limit_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(record_files, "MOST_FILE_BYTES", 1 << 20)
    (tmp_path / "large.jsonl").write_bytes(b" " * (1 << 21))
    with pytest.raises(InputError, match="more than 1,048,576 bytes"):
        open_record_file(tmp_path / "large.jsonl", "dataset")


def test_a_text_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "latin.parquet"
    pq.write_table(pa.table({"prompt": ["abcdefgh"]}), file, compression="none", use_dictionary=False)
    file.write_bytes(file.read_bytes().replace(b"abcdefgh", b"\xff\xfebcdefgh"[:8]))
    opened = open_record_file(file, "rollouts")
    with pytest.raises(InputError, match="latin.parquet: not readable as parquet"):
        opened.read(opened.keys)


def test_damaged_metadata_of_columns_does_not_end_the_process(tmp_path):
    """pyarrow aborts, or fails to decode a name, where a damaged column is asked for its metadata."""
    stream = io.BytesIO()
    pq.write_table(pa.table({"ids": [[1, 2], [3]] * 3, "text": ["a", "b"] * 3}), stream)
    sound, rng = stream.getvalue(), random.Random(0)
    start = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    for number in range(2000):
        changed = bytearray(sound)
        changed[rng.randrange(start, len(sound))] ^= 1 << rng.randrange(8)
        (tmp_path / f"{number}.parquet").write_bytes(changed)
    loop = READ[: READ.index("try:")] + (
        "for file in Path(sys.argv[1]).iterdir():\n    try:\n        opened = open_record_file(file, 'rollouts')\n"
        "        opened.read(opened.keys)\n    except InputError:\n        pass\n"
    )
    done = subprocess.run([sys.executable, "-c", loop, tmp_path, str(MOST_MEMORY)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]
