"""Reading problems, and slicing them into shards."""

import json

import numpy as np
import pytest

from gradprobe.errors import InputError
from gradprobe.problems import load_problems, shard_of_study

GOOD = {"id": "a", "prompt": "1+1?", "ground_truth": "2", "meta": {}}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_shards_are_disjoint_and_together_hold_the_same_prompts(num_shards):
    whole = shard_of_study(100, 20, seed=3)
    shards = [shard_of_study(100, 20, 3, i, num_shards) for i in range(num_shards)]
    assert np.concatenate(shards).tolist() == whole.tolist()
    assert len(set(whole.tolist())) == 20
    assert whole.tolist() != shard_of_study(100, 20, seed=4).tolist()


@pytest.mark.parametrize("arguments", [(5, 6, 0), (9, 2, 0, 0, 3), (9, 4, 0, 2, 2), (9, 4, 0, -1, 2)])
def test_slices_that_do_not_exist(arguments):
    with pytest.raises(InputError):
        shard_of_study(*arguments)


def test_numbers_become_text_and_blank_lines_are_skipped(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": 7, "ground_truth": 4}) + "\n")
    problems = load_problems(file).problems
    assert [(p.idx, p.id, p.ground_truth) for p in problems] == [(0, "a", "2"), (1, "7", "4")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no problems"),
        (b'{"id": "a"', ":1: not JSON"),
        (b"[1]\n", ":1: not a JSON object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "prompt"}).encode(), ":1: key 'prompt' is missing"),
        (json.dumps({**GOOD, "prompt": 3}).encode(), ":1: 'prompt' is of type int"),
        ((json.dumps(GOOD) + "\n" + json.dumps(GOOD)).encode(), ":2: id 'a' was used in line 1"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_faults_are_named_with_file_and_line(tmp_path, content, complaint):
    file = tmp_path / "problems.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match="problems.jsonl") as error:
        load_problems(file)
    assert complaint in str(error.value)


def test_all_faults_are_named_at_once(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("x\n" + json.dumps(GOOD) + "\n[]\n")
    with pytest.raises(InputError) as error:
        load_problems(file)
    assert len(error.value.problems) == 2
