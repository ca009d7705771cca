"""A prompt is its token ids: their hash in the manifest, through merge, check and reader."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import planted
import pytest

from gradprobe import check
from gradprobe.common.errors import InputError
from gradprobe.dump.consistency import load_dump, problems_of
from gradprobe.dump.merge import merge_shards
from gradprobe.dump.records import prompt_hash

GOLDEN = planted.GOLDEN / "aligned"


def edit_manifest(directory: Path, **changes: object) -> None:
    file = directory / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shard(path: Path, source: str = "s0", **changes: object) -> Path:
    shutil.copytree(GOLDEN / source, path)
    for file in path.iterdir():
        file.chmod(0o644)
    edit_manifest(path, **changes)
    return path


def hashes_of(directory: Path) -> list[str]:
    keys = json.loads((directory / "manifest.json").read_text())["prompt_idxs"]
    return [prompt_hash([key]) for key in keys]


@pytest.mark.parametrize("ids", [[], [1, 2, 3], [151643, 0, 2**31 - 1]])
def test_a_hash_is_of_the_ids_as_little_endian_int32(ids: list[int]):
    assert prompt_hash(ids) == hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()[:16]


def test_hashes_differ_by_ids_and_their_order():
    assert len({prompt_hash(ids) for ids in ([1, 2], [2, 1], [1], [12], [1, 2, 0])}) == 5


def test_a_prompt_without_a_hash_is_refused(tmp_path: Path):
    dump = shard(tmp_path / "dump")
    keys = json.loads((dump / "manifest.json").read_text())["prompt_idxs"]
    edit_manifest(dump, prompt_idxs=[*keys[1:], 10**6], prompt_hashes=hashes_of(dump))
    with pytest.raises(InputError, match=f"prompt_idx {keys[0]} .*is not among the manifest's prompt_idxs"):
        load_dump(dump)


@pytest.mark.parametrize("data_set", [None, {"sha256": "a" * 64}], ids=["prompts of each shard", "one data set"])
def test_a_merge_unites_hashes_beside_their_prompts(data_set, tmp_path: Path):
    shards = [shard(tmp_path / name, name, dataset=data_set) for name in ("s0", "s1")]
    expected = {}
    for number, directory in enumerate(shards):
        keys = json.loads((directory / "manifest.json").read_text())["prompt_idxs"]
        if data_set and number:  # of one data set: no prompt is in both
            keys = [key + 1000 for key in keys]
            text = (directory / "meta.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            moved = [line | {"prompt_idx": line["prompt_idx"] + 1000} for line in lines]
            (directory / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in moved))
            edit_manifest(directory, prompt_idxs=keys)
        edit_manifest(directory, prompt_hashes=hashes_of(directory))
        expected |= {(key if data_set else (number, key)): prompt_hash([key]) for key in keys}
    list(merge_shards(tmp_path / "merged", shards))
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    keys = [key if data_set else tuple(key) for key in manifest["prompt_idxs"]]
    assert dict(zip(keys, manifest["prompt_hashes"], strict=True)) == expected
    load_dump(tmp_path / "merged")


def test_a_merge_refuses_a_prompt_of_other_ids_and_writes_nothing(tmp_path: Path):
    shards = [shard(tmp_path / name, "s0", dataset={"sha256": "a" * 64}) for name in ("s0", "s1")]
    lines = [json.loads(line) for line in (shards[1] / "meta.jsonl").read_text().splitlines()]
    moved = [line | {"sample_idx": line["sample_idx"] + 100} for line in lines]
    (shards[1] / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in moved))
    for directory in shards:
        edit_manifest(directory, prompt_hashes=hashes_of(directory))
    edit_manifest(shards[1], prompt_hashes=["0" * 16] * 6)
    with pytest.raises(InputError, match="has other token ids in one shard than in another"):
        list(merge_shards(tmp_path / "merged", shards))
    assert not (tmp_path / "merged").exists()


def test_a_merge_of_which_one_shard_has_none_has_none(tmp_path: Path):
    shards = [shard(tmp_path / name, name) for name in ("s0", "s1")]
    edit_manifest(shards[0], prompt_hashes=hashes_of(shards[0]))
    list(merge_shards(tmp_path / "merged", shards))
    assert "prompt_hashes" not in json.loads((tmp_path / "merged" / "manifest.json").read_text())


def test_check_holds_hashes_against_the_rollouts(tmp_path: Path, capsys):
    from numpy import ones

    dump = planted.write_pooled_dump(tmp_path / "dump", ones((2, 2, 2, 4)), ones((2, 2), bool), ones((2, 2, 2), int))
    first, right, wrong = (prompt_hash([n]) for n in (1, 2, 3))
    edit_manifest(dump, prompt_idxs=[0, 1], prompt_hashes=[first, right])
    before, _ = problems_of(dump)
    edit_manifest(dump, prompt_hashes=[first, wrong])
    problems, _ = problems_of(dump)
    assert [p for p in problems if p not in before] == [
        f"{dump / 'rollouts.jsonl'}: the ids of prompt 1 are not those of its prompt_hash in {dump / 'manifest.json'} "
        f"({right}, not {wrong})"
    ]
    assert check.main([str(dump)]) == 2
    assert "prompt_hash" in capsys.readouterr().err
