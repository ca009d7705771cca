"""The reader: every meta line is placed by its `row`. What it refuses: tests/faults/test_bad_input.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradprobe.common.files import write_json
from gradprobe.dump.consistency import load_dump

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture
def dump_dir(tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(GOLDEN / "scrambled" / "s0", tmp_path / "dump"))
    for file in directory.iterdir():
        file.chmod(0o644)
    return directory


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


def test_nan_never_reaches_a_json_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "out.json", {"x": float("nan")})
    assert not (tmp_path / "out.json").exists()


def test_rows_that_an_earlier_version_lost_to_rounding_are_said(dump_dir):
    """Of a token with 1 − π of 1e-8; its tail mass tells it, or where none is known its entropy."""
    for key, value in (("tail_mass", 1e-8), ("entropy", 2e-7)):
        records = [{**json.loads(line), "tail_mass": 0.1} for line in (dump_dir / "meta.jsonl").open()]
        place = next(i for i, r in enumerate(records) if r["bin"] == 0)
        records[place][key] = value
        if key == "entropy":
            records = [{k: v for k, v in record.items() if k != "tail_mass"} for record in records]
        (dump_dir / "meta.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        warning = load_dump(dump_dir).warnings[-1]
        assert f"1 of {len(records)} rows are of tokens of which the model was certain" in warning
    manifest = json.loads((dump_dir / "manifest.json").read_text())
    (dump_dir / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    assert not any("certain" in warning for warning in load_dump(dump_dir).warnings)
