"""Reading problems from every shape they come in, and slicing them into shards."""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from gradprobe.common.errors import InputError
from gradprobe.problems.data_set import final_answer, load_problems, shard_of_study

DATA = Path(__file__).parents[1] / "data" / "problems"
GOOD = {"id": "a", "prompt": "1+1?", "ground_truth": "2", "meta": {}}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_shards_are_disjoint_and_together_hold_the_same_prompts(num_shards):
    whole = shard_of_study(100, 20, seed=3)
    shards = [shard_of_study(100, 20, 3, i, num_shards) for i in range(num_shards)]
    assert np.concatenate(shards).tolist() == whole.tolist()
    assert len(set(whole.tolist())) == 20
    assert whole.tolist() != shard_of_study(100, 20, seed=4).tolist()


@pytest.mark.parametrize("arguments", [(5, 6, 0), (9, 2, 0, 0, 3)])
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
        (f'{json.dumps(GOOD)}\n{json.dumps({**GOOD, "ground_truth": "3"})}'.encode(), ":2: id 'a' was used in line 1"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_faults_are_named_with_file_and_line(tmp_path, content, complaint):
    file = tmp_path / "problems.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match="problems.jsonl") as error:
        load_problems(file)
    assert complaint in str(error.value)


@pytest.mark.parametrize("keys", [{}, {"id_key": "none"}])
@pytest.mark.parametrize("prompt", ["1+1?", [{"role": "user", "content": "1+1?"}]])
@pytest.mark.parametrize("ids", [[7, 7, 7, 8], [7, 8, 9, 7], [7, 8, 9, 10]])
def test_copies_are_one_problem_and_counted(tmp_path, keys, prompt, ids):
    """As in DAPO-Math-17k, where each problem stands about a hundred times; what is drawn is drawn of problems."""
    rows = [{"prompt": prompt, "reward_model": {"ground_truth": "2"}, "extra_info": {"index": i}} for i in ids[:3]]
    rows.append({"prompt": "1+2?", "reward_model": {"ground_truth": "3"}, "extra_info": {"index": 11}})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    problem_set = load_problems(tmp_path / "a.json", **keys)
    assert [(p.idx, p.ground_truth) for p in problem_set.problems] == [(0, "2"), (3, "3")]
    assert problem_set.n_read == 2
    assert "4 rows, 2 problems" in problem_set.summary
    assert "dropped 2: 2 copies of another row: the same prompt and answer" in problem_set.summary


def test_the_original_schema_too_holds_lists_in_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**GOOD, "ground_truth": '["7"]'}))
    assert [p.ground_truth for p in load_problems(tmp_path / "a.jsonl").problems] == ["7"]
    (tmp_path / "a.jsonl").write_text(json.dumps({**GOOD, "ground_truth": '["7", "8"]'}))
    with pytest.raises(InputError, match="a.jsonl:1: 'ground_truth' has several answers"):
        load_problems(tmp_path / "a.jsonl")


def test_one_prompt_with_two_answers_is_said(tmp_path):
    rows = [{"id": i, "problem": "?", "answer": answer} for i, answer in enumerate("1213")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (note,) = load_problems(tmp_path / "a.json").notes
    assert note.startswith("1 prompts stand with several answers (such as that of problem '0')")


def test_all_faults_are_named_at_once(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("x\n" + json.dumps(GOOD) + "\n[]\n")
    with pytest.raises(InputError) as error:
        load_problems(file)
    assert len(error.value.problems) == 2


def read(name: str, **keys) -> list[tuple]:
    return [(p.idx, p.id, p.prompt, p.ground_truth) for p in load_problems(DATA / name, **keys).problems]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """What `datasets` prepares goes into the test's directory, and it never asks the network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_the_original_schema_is_taken_as_it_is():
    problem_set = load_problems(DATA / "original.jsonl")
    assert [(p.idx, p.id, p.ground_truth) for p in problem_set.problems] == [(0, "a", "2"), (1, "7", "4")]
    assert problem_set.problems[0].prompt == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert problem_set.sha256 == hashlib.sha256((DATA / "original.jsonl").read_bytes()).hexdigest()
    # Dumps made before there were other shapes have just these, and must compare as equal.
    assert set(problem_set.description) == {"path", "sha256", "num_problems"}


def test_common_names():
    assert read("plain.jsonl") == [(0, "0", "What is 1+1?", "2"), (1, "1", "What is $\\frac{1}{2}+1$?", "3/2")]
    assert read("capitals.jsonl")[1] == (1, "2024-I-2", "?", "33")


MATH = [
    (0, "test/algebra/1.json", "Find $x$ with $2x = 1$.", r"\frac{1}{2}"),
    (1, "test/algebra/2.json", r"Find $\{x : x^2 = 4\}$.", r"\{-2, 2\}"),
]


@pytest.mark.parametrize("name", ["math.json", "saved"])
def test_worked_solutions_give_their_last_box(name):
    assert read(name) == MATH


def test_gsm8k_in_parquet_and_what_is_dropped_is_counted():
    problem_set = load_problems(DATA / "gsm8k.parquet")
    assert [(p.idx, p.ground_truth) for p in problem_set.problems] == [(0, "7"), (1, "12034")]
    assert problem_set.n_rows == 5
    assert problem_set.dropped == {
        "without a final answer (#### or \\boxed{}) in 'answer'": 1,
        "without 'question'": 1,
        "without 'answer'": 1,
    }
    assert "5 rows, 2 problems" in problem_set.summary
    assert "dropped 3" in problem_set.summary
    assert problem_set.description["num_dropped"] == problem_set.dropped
    assert problem_set.sha256 == hashlib.sha256((DATA / "gsm8k.parquet").read_bytes()).hexdigest()


def test_verl_has_messages_and_nested_answers():
    problem_set = load_problems(DATA / "verl.parquet")
    assert [(p.idx, p.id, p.ground_truth) for p in problem_set.problems][:2] == [(0, "10", "1"), (1, "11", "2")]
    assert problem_set.problems[0].messages == (("user", "What is 0+1? Answer in \\boxed{}."),)
    assert problem_set.problems[0].prompt == ""
    assert problem_set.columns["answer"] == "reward_model.ground_truth"


def test_fields_can_be_named():
    found = read("verl.parquet", problem_key="extra_info.question", answer_key="data_source", id_key="none")
    assert found[1] == (1, "1", "What is 1+1?", "openai/gsm8k")
    with pytest.raises(InputError, match=r"`answer_key` nix: not in .* \(there: .*reward_model.ground_truth"):
        read("verl.parquet", answer_key="nix")


def test_hub_data_sets():
    main = load_problems(f"hf:{DATA}/hub:main:train")
    assert [p.ground_truth for p in main.problems] == ["7", "12034"]
    short = load_problems(f"hf:{DATA}/hub:short")
    assert [p.ground_truth for p in short.problems] == ["7"]
    assert short.sha256 != main.sha256 == load_problems(f"hf:{DATA}/hub:main:test").sha256


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        ("", "pick one among the available configs: ['main', 'short']"),
        (":main", "has the splits train, test; name one"),
        (":main:nix", "Unknown split \"nix\". Should be one of ['train', 'test']"),
        (":nix:test", "BuilderConfig 'nix' not found. Available: ['main', 'short']"),
        (":a:b:c", "not of the form"),
        ("/nix", "hub/nix"),
    ],
)
def test_hub_data_sets_that_are_not_there(rest, complaint):
    with pytest.raises(InputError) as error:
        load_problems(f"hf:{DATA}/hub{rest}")
    assert complaint in str(error.value)


def test_without_a_network_a_hub_data_set_is_an_input_error():
    with pytest.raises(InputError, match="`dataset` hf:nobody/no-such-data-set: "):
        load_problems("hf:nobody/no-such-data-set")


def test_what_is_not_one_file_is_hashed_by_its_problems(tmp_path):
    records = [{"problem": "1+1", "answer": "2"}, {"problem": "1+2", "answer": "3"}]
    hashes = []
    for i, rows in enumerate((records, [{"other": 1, **record} for record in records], records[::-1])):
        Dataset.from_list(rows).save_to_disk(str(tmp_path / str(i)))
        hashes.append(load_problems(tmp_path / str(i)).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_splits_of_a_datasets_directory(tmp_path):
    split = Dataset.from_list([{"problem": "1+1", "answer": "2"}])
    DatasetDict(test=split).save_to_disk(str(tmp_path / "one"))
    assert len(load_problems(tmp_path / "one").problems) == 1
    DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(InputError, match=r"has the splits train, test; name one: .*two/SPLIT"):
        load_problems(tmp_path / "two")
    assert len(load_problems(tmp_path / "two" / "test").problems) == 1


@pytest.mark.parametrize(("name", "library"), [("gsm8k.parquet", "pyarrow.parquet"), ("saved", "datasets")])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"takes the library '{library.split('.')[0]}'.*gradprobe\[data\]"):
        load_problems(DATA / name)


def test_text_needs_no_library(monkeypatch):
    for library in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, library, None)
    assert len(read("math.json")) == 2


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.parquet", b"", "not readable as parquet"),
        ("a.parquet", b"PAR1 nothing more", "not readable as parquet"),
        ("a.parquet", (DATA / "gsm8k.parquet").read_bytes()[:-40], "not readable as parquet"),
        ("a.json", b'{"a": [1, 2]}', "a.json:1: key 'prompt' is missing"),
        ("a.json", b'{\n "a": 1\n}', "a.json: row 0: key 'prompt' is missing"),
        ("a.json", b'{\n "a": 1,\n}', "a.json:1: not JSON"),
        ("a.json", b"3", "neither JSON lines, JSON nor parquet"),
        ("a.json", b"[3]", "row 0: not a JSON object"),
        ("a.json", b"[{]", "not JSON"),
        ("a.json", b"[]", "no problems in it"),
        ("a.csv", b"problem,answer\n1+1,2\n", "neither JSON lines, JSON nor parquet"),
        ("a.jsonl", b'{"problem": "?"}', "key 'ground_truth' is missing, and so are 'reward_model.ground_truth'"),
        ("a.jsonl", b'{"problem": "?", "answer": 1}\n{"problem": "?"}', ":2: key 'answer' is missing"),
        ("a.jsonl", b'{"problem": 3, "answer": 1}', ":1: 'problem' is of type int"),
        ("a.jsonl", b'{"problem": "?", "answer": true}', ":1: 'answer' is of type bool"),
        ("a.jsonl", b'{"problem": "?", "answer": {}}', ":1: 'answer' is of type dict"),
        ("a.jsonl", b'{"problem": ["?"], "answer": 1}', "not one of chat messages"),
        ("a.jsonl", b'{"prompt": [{"role": "user"}], "answer": 1}', "role or content is not text"),
        ("a.jsonl", b'{"problem": "\\ud800", "answer": 1}', ":1: half a surrogate pair ('\\ud800')"),
        ("a.jsonl", b'{"problem": " ", "answer": 1}', "no problems in it; dropped: 1 without 'problem'"),
        ("a.jsonl", b'{"problem": "?", "answer": 1, "id": null}', ":1: 'id' is of type NoneType"),
        (
            "a.jsonl",
            b'{"problem": "?", "answer": 1, "id": 1}\n{"problem": "??", "answer": 1, "id": "1"}',
            ":2: id '1' was used in line 1, for another problem or answer",
        ),
        ("a.jsonl", b"x\n" * 50, "jsonl:1: not JSON (Expecting value: line 1 column 1 (char 0)) (and 49 more like it)"),
        ("a.jsonl", b'{"problem": 3, "answer": 1}\n' * 9, ":1: 'problem' is of type int (and 8 more like it)"),
        (
            "a.jsonl",
            b"".join(b'{"problem": "%d", "answer": 1, "id": %d}\n' % (i, i // 2) for i in range(8)),
            "a.jsonl:2: id '0' was used in line 1, for another problem or answer (and 3 more like it)",
        ),
        (
            "a.json",
            b'[[{"from": "human", "value": "?"}, {"from": "assistant", "ground_truth": {"value": "7"}}]]',
            'row 0: not a JSON object, but a list; of messages? for each write {"prompt": the question',
        ),
    ],
)
def test_faults_of_other_shapes(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}") as error:
        load_problems(tmp_path / name)
    assert complaint in str(error.value)


@pytest.mark.parametrize(("name", "error"), [("nix.jsonl", FileNotFoundError), (".", InputError)])
def test_sources_that_are_not_there(tmp_path, name, error):
    with pytest.raises(error, match=str(tmp_path)):
        load_problems(f"{tmp_path}/{name}")


def test_a_path_may_have_a_newline(tmp_path):
    (tmp_path / "a\nb.jsonl").write_text(json.dumps(GOOD))
    assert len(load_problems(tmp_path / "a\nb.jsonl").problems) == 1


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json", "a.ndjson"])
def test_the_content_decides_where_the_ending_does_not(tmp_path, name):
    lines = json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "id": "b", "prompt": "2"}) + "\n"
    (tmp_path / name).write_text("\ufeff" + lines)
    assert [p.id for p in load_problems(tmp_path / name).problems] == ["a", "b"]
    (tmp_path / name).write_text(json.dumps([GOOD], indent=2))
    assert [p.id for p in load_problems(tmp_path / name).problems] == ["a"]
    (tmp_path / name).write_bytes((DATA / "gsm8k.parquet").read_bytes())
    if name != "a.json":
        assert [p.id for p in load_problems(tmp_path / name).problems] == ["0", "1"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([4, 2.5, 3.0, "  5 "], ["4", "2.5", "3", "5"]),
        ([4.0, float("nan"), None, ""], ["4"]),
        ([["7"], [8], [], ["1", "2"]], ["7", "8"]),
        # A list of texts in a text (Skywork-OR1); an interval is none. Dollars (TRL's DeepMath).
        (['["7"]', ' ["x, y"]', '["1", "2"]', "[0, 1]", "[8]", '["a'], ["7", "x, y", "[0, 1]", "[8]", '["a']),
        (["$x$", "$1$ or $2$", "$5", "a", "so $\\boxed{7}$"], ["x", "$1$ or $2$", "$5", "a", "7"]),
        # One answer that looks worked among plain ones makes no worked column.
        (["a", "so \\boxed{b}", "c"], ["a", "b", "c"]),
        (["x\n#### 1,234", "x\n#### $1,234.5", "x\n#### 1,23", "#### not the last\nline"], ["1234", "$1234.5", "1,23"]),
    ],
)
def test_answers(tmp_path, answers, expected):
    file = tmp_path / "a.jsonl"
    lines = [{"problem": f"{number}?", "answer": answer} for number, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    problem_set = load_problems(file)
    assert [p.ground_truth for p in problem_set.problems] == expected
    assert sum(problem_set.dropped.values()) == len(answers) - len(expected)


def test_the_first_common_name_goes_first(tmp_path):
    row = {"question": "q", "problem": "p", "prompt": "the prompt"}
    row |= {"solution": "by solution", "answer": "by answer", "final_answer": "by final_answer"}
    for key in ("final_answer", "answer", "solution"):
        (tmp_path / "a.json").write_text(json.dumps([row]))
        problem = load_problems(tmp_path / "a.json").problems[0]
        assert (problem.prompt, problem.ground_truth) == ("the prompt", f"by {key}")
        del row[key]


@given(st.text(alphabet="ab\\{}# \n"), st.integers(-(10**12), 10**12))
def test_the_final_answer_of_any_solution(solution, number):
    assert final_answer(f"{solution}\n#### {number:,}") == str(number)
    assert final_answer(f"{solution} \\boxed{{{number}}}.") == str(number)


def test_a_bug_of_ours_is_no_faulty_row(monkeypatch):
    def planted(*args: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("gradprobe.problems.data_set.answer_of", planted)
    with pytest.raises(ValueError, match="^a bug$"):
        read("math.json")


SHOWN = [
    line.strip("| ").split(" | ")
    for line in (DATA.parents[2] / "docs/problems.md").read_text().splitlines()
    if line.startswith("| ") and line.count(" | ") == 3 and line.split(" | ")[1].startswith("`")
]


def test_the_docs_table_has_every_layout():
    assert sorted(file for _, file, *_ in SHOWN) == sorted(f"`{file.stem}`" for file in (DATA / "public").iterdir())


@pytest.mark.parametrize(("name", "file", "columns", "how"), SHOWN, ids=[row[0] for row in SHOWN])
def test_public_data_sets_are_read_as_the_docs_say(name, file, columns, how):
    (path,) = (DATA / "public").glob(f"{file.strip('`')}.*")
    answer_key = how.partition("--answer-key ")[2].strip("`") or None
    if how.startswith("refused: "):
        with pytest.raises(InputError, match=re.escape(how.removeprefix("refused: "))):
            load_problems(path)
        return
    problem_set = load_problems(path, answer_key=answer_key)
    (problem,) = problem_set.problems
    assert problem.ground_truth == "7"
    asked = problem.prompt or problem.messages[-1][1]
    assert asked.endswith(("3+4?", "How many?"))
    assert bool(problem.messages) == ("--chat-template" in how)
    assert bool(problem_set.dropped) == ("copies are dropped" in how)
