"""The readers: every meta line is placed by its `row`, and what contradicts itself is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradprobe.common.errors import InputError
from gradprobe.common.files import write_json
from gradprobe.dump.consistency import load_dump

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
