"""The readers: every meta line is placed by its `row`, and what contradicts itself is refused."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradprobe.common.errors import InputError
from gradprobe.common.files import write_json
from gradprobe.dump.consistency import load_dump
from gradprobe.dump.mapped import open_rows

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture
def dump_dir(tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(GOLDEN / "scrambled" / "s0", tmp_path / "dump"))
    for file in directory.iterdir():
        file.chmod(0o644)
    return directory


def edit_line(directory: Path, number: int, **changes: object) -> None:
    file = directory / "meta.jsonl"
    lines = file.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **changes})
    file.write_text("\n".join(lines) + "\n")


def test_lines_are_placed_by_row():
    aligned, scrambled = (load_dump(GOLDEN / kind / "s0") for kind in ("aligned", "scrambled"))
    for name in ("grads", "prompt", "sample_idx", "pos", "bin", "entropy", "correct"):
        np.testing.assert_array_equal(getattr(aligned, name), getattr(scrambled, name))
    in_line_order = [json.loads(line)["bin"] for line in (GOLDEN / "scrambled/s0/meta.jsonl").open()]
    assert np.mean(np.array(in_line_order) != aligned.bin) > 0.5  # by line number most labels are wrong


def test_merged_dumps_of_the_original_are_read_with_a_warning(dump_dir):
    assert not any("merge it again" in warning for warning in load_dump(dump_dir).warnings)
    manifest = json.loads((dump_dir / "manifest.json").read_text())
    (dump_dir / "manifest.json").write_text(json.dumps({**manifest, "shards": ["s0", "s1"]}))
    assert "merge it again from its shards" in load_dump(dump_dir).warnings[0]


def test_namespaced_prompts_are_read(dump_dir):
    edit_line(dump_dir, 0, prompt_idx=[1, 21])
    with pytest.raises(InputError, match="an integer in some lines"):
        load_dump(dump_dir)
    file = dump_dir / "meta.jsonl"
    records = [json.loads(line) for line in (GOLDEN / "scrambled" / "s0" / "meta.jsonl").open()]
    file.write_text("".join(json.dumps({**r, "prompt_idx": [1, r["prompt_idx"]]}) + "\n" for r in records))
    keys = load_dump(dump_dir).prompt_keys
    assert keys == [(1, p) for p in load_dump(GOLDEN / "aligned" / "s0").prompt_keys]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"row": 6}, "stands twice"),
        ({"row": 360}, "outside 0..359"),
        ({"bin": 5}, "outside 0..4"),
        ({"correct": 1}, "'correct'"),
        ({"entropy": "high"}, "'entropy'"),
        ({"prompt_idx": "7"}, "'prompt_idx' is not an integer from 0 or"),
        ({"pos": 1.5}, "'pos'"),
    ],
)
def test_faulty_lines_are_named(dump_dir, change, complaint):
    edit_line(dump_dir, 0, **change)
    with pytest.raises(InputError, match=complaint) as error:
        load_dump(dump_dir)
    assert f"meta.jsonl:{2 if 'row' in change and change['row'] < 360 else 1}: " in str(error.value)


def test_files_that_contradict_each_other(dump_dir):
    with (dump_dir / "meta.jsonl").open("a") as stream:
        stream.write(json.dumps({"row": 0}) + "\n")
    with pytest.raises(InputError, match="361 lines for the 360 rows"):
        load_dump(dump_dir)
    np.save(dump_dir / "grads.npy", np.zeros((360, 65), np.float32))
    with pytest.raises(InputError, match="row_dim is 64, but"):
        load_dump(dump_dir)


@pytest.mark.parametrize(
    "grads",
    [np.zeros((360, 64)), np.zeros((360, 64), ">f4"), np.zeros(360, np.float32), np.array([{}] * 360, dtype=object)],
)
def test_arrays_of_another_kind_are_refused(dump_dir, grads):
    np.save(dump_dir / "grads.npy", grads, allow_pickle=True)
    with pytest.raises(InputError, match="grads.npy"):
        load_dump(dump_dir)


def spoilt_header(rng: random.Random, header: bytes) -> bytes:
    """A header with some bytes changed, cut, doubled or written over by words that parsers know."""
    for _ in range(rng.choice((1, 1, 2, 6))):
        start, stop = sorted(rng.randrange(len(header)) for _ in range(2))
        header = (
            rng.choice(
                (
                    header[:start] + bytes([rng.randrange(256)]) + header[start + 1 :],
                    header[:start] + header[stop:],
                    header[:stop] + header[start:],
                    header[:start] + rng.choice(WORDS) + header[start:],
                    header.replace(*rng.choice(REPLACED)),
                )
            )
            or b"\x93"
        )
    return header


WORDS = (b"L", b"'", b'"""', b"\\\n", b"(", b"}", b"\x00", b"10L", b"{[(", b"9" * 5000, b"-", b"lambda:0", b"[" * 3000)
REPLACED = [
    (b"360", word) for word in (b"-360", b"360L", b"10**99", b"999999999999999999999", b"True", b"0", b"(3,)", b"3.6")
] + [
    (b"<f4", word)
    for word in (b"|O", b">f4", b"<f8", b"", b",", b"f4,f4", b"(2,)<f4", b"M8[ns]", b"<U9999999999", b"O, f4", b"\xff")
]
REPLACED += [(b"False", b"True"), (b"NUMPY\x01", b"NUMPY\x03"), (b"'<f4'", b"[('a', '<f4')]")]
REPLACED += [(b"'<f4'", b"('<f4', 2)"), *[(b", }", b"}  "), (b"(360, 64)", b"[360, 64]"), (b"64)", b"64 ")] * 2]


def test_no_header_crashes_the_reader_and_what_it_gives_is_the_file(tmp_path):
    """Every answer is an `InputError`, or rows that lie in the file as they are shown."""
    sound = (GOLDEN / "aligned" / "s0" / "grads.npy").read_bytes()
    file, rng = tmp_path / "grads.npy", random.Random(0)
    n_refused = 0
    for _ in range(600):
        content = spoilt_header(rng, sound[:128]) + sound[128:]
        file.write_bytes(content)
        try:
            rows = open_rows(file)
        except InputError:
            n_refused += 1
            continue
        assert rows.dtype == np.float32
        assert rows.ndim == 2
        assert content.endswith(rows.tobytes())
    assert 500 < n_refused < 600


def test_a_header_that_promises_another_header_of_gigabytes_is_not_believed(tmp_path):
    (tmp_path / "grads.npy").write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr'")
    with pytest.raises(InputError, match="not a readable"):
        open_rows(tmp_path / "grads.npy")


def test_truncated_and_missing_files_are_refused(dump_dir):
    content = (dump_dir / "grads.npy").read_bytes()
    (dump_dir / "grads.npy").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="grads.npy"):
        load_dump(dump_dir)
    (dump_dir / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a finished dump"):
        load_dump(dump_dir)


def test_nan_never_reaches_a_json_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "out.json", {"x": float("nan")})
    assert not (tmp_path / "out.json").exists()
