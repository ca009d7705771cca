"""Rollouts from elsewhere: every shape, text that does not come back from its ids, and what must be refused."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from gradprobe.common.errors import InputError
from gradprobe.dump.records import iter_rollouts
from gradprobe.model.checkpoint import load_checkpoint
from gradprobe.problems.boxed import is_correct
from gradprobe.problems.data_set import Problem, load_problems
from gradprobe.problems.verifiers import RunningVerifier, Verdict, load_verifier
from gradprobe.rollouts import files as rollout_files
from gradprobe.rollouts import formats, places
from gradprobe.rollouts.files import ForeignRollouts, Vocabulary, read_rollouts
from gradprobe.rollouts.score import score_responses
from gradprobe.rollouts.sources import judged

HERE = Path(__file__).parents[1]
DATA = HERE / "data" / "rollouts"
DEMO = HERE.parent / "demo"
VOCAB_SIZE, IM_END, END_OF_TEXT = 350, 349, 347
OWN = list(iter_rollouts(DATA / "gradprobe.jsonl"))
"""The six rollouts that `vllm.jsonl` and `verl.jsonl` hold as well."""


@pytest.fixture(scope="module")
def tokenizer():
    """The demo model's."""
    return AutoTokenizer.from_pretrained(DEMO / "base")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """The demo's first five problems, under other indices than in the files."""
    lines = (DEMO / "problems.jsonl").read_text().splitlines()[:5]
    records = [json.loads(line) for line in lines]
    return [Problem(10 + i, r["id"], r["prompt"], r["ground_truth"]) for i, r in enumerate(records)]


def read(file: Path | list[Path], tokenizer, context: int | None = None, **options) -> ForeignRollouts:
    """`read_rollouts` for the demo model."""
    vocabulary = Vocabulary(tokenizer, VOCAB_SIZE, frozenset({IM_END, END_OF_TEXT}), context)
    return read_rollouts(file, vocabulary, **options)


def written(directory: Path, *records: dict | str, name: str = "rollouts.jsonl") -> Path:
    """A JSONL file of these records."""
    file = directory / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return file


def vllm_line(prompt: str = "1+2", *outputs: dict, **more) -> dict:
    """A line of vLLM's shape, by default of one right answer as text."""
    return {"prompt": prompt, "outputs": list(outputs) or [{"text": "We see 3."}], "ground_truth": "3", **more}


# Every shape gives the rollouts that went into it


def ids_of(rollouts: ForeignRollouts) -> list[tuple[list[int], list[int]]]:
    """Prompt and response ids."""
    return [(r.prompt_ids, r.response_ids) for r in rollouts.rollouts]


IDS_OF_OWN = [(r.prompt_ids, r.response_ids) for r in OWN]


def test_own_rollouts_are_read_as_a_dumps_are(tokenizer):
    found = read(DATA / "gradprobe.jsonl", tokenizer)
    assert found.report.format == "gradprobe"
    assert found.rollouts == OWN


@pytest.mark.parametrize(
    ("file", "file_format"),
    [("vllm.jsonl", "vllm"), ("verl.jsonl", "verl")],
)
def test_shapes_with_the_data_set_give_its_indices(tokenizer, problems, file, file_format):
    found = read(DATA / file, tokenizer, problems=problems)
    assert found.report.format == file_format
    assert [(r.prompt_idx, r.sample_idx) for r in found.rollouts] == [(10 + i, k) for i in range(3) for k in range(2)]
    assert [r.problem_id for r in found.rollouts] == [r.problem_id for r in OWN]
    assert [r.ground_truth for r in found.rollouts] == [r.ground_truth for r in OWN]
    expected = [(p, ids if file_format != "verl" else ids[:-1]) for p, ids in IDS_OF_OWN]  # verl strips the end
    assert ids_of(found) == expected
    with RunningVerifier(load_verifier("boxed")) as running:
        assert [r.correct for r in judged(found.rollouts, running)] == [r.correct for r in OWN]


def test_what_vllms_server_answered(tokenizer, problems):
    found = read(DATA / "vllm_server.jsonl", tokenizer, problems=problems)
    assert found.report.format == "openai"
    assert [(r.prompt_idx, r.sample_idx) for r in found.rollouts] == [(10 + i, k) for i in range(3) for k in range(2)]
    lines = [json.loads(line) for line in (DATA / "vllm_server.jsonl").read_text().splitlines()]
    choices = [choice for line in lines for choice in line["response"]["choices"]]
    assert ids_of(found) == [(choice["prompt_token_ids"], choice["token_ids"]) for choice in choices]
    assert [r.response for r in found.rollouts] == [
        tokenizer.decode(c["token_ids"]).removesuffix("<|im_end|>") for c in choices
    ]


def test_own_and_foreign_rollouts_are_judged_alike(tokenizer):
    assert {r.correct for r in OWN} == {True, False}
    found = read(DATA / "vllm.jsonl", tokenizer)
    assert {r.correct for r in found.rollouts} == {None}
    assert found.report.n_to_verify == 6
    assert [r.response for r in found.rollouts] == [r.response for r in OWN]
    assert [(r.prompt_idx, r.sample_idx) for r in found.rollouts] == [(i, k) for i in range(3) for k in range(2)]


def test_llama_cpp_ids_stand_beside_the_logprobs(tokenizer):
    found = read(DATA / "llama_cpp.jsonl", tokenizer)
    assert found.report.format == "openai"
    assert all(r.response_ids[-1] == IM_END for r in found.rollouts)
    assert found.report.n_prompts == 3
    assert not found.report.notes  # its texts are what this tokenizer makes of its ids


def test_ids_from_a_file_are_where_the_server_had_them(tokenizer):
    """llama.cpp tokenised the prompts itself; our pass gives its log-probs, so both saw the same ids in place."""
    found = read(DATA / "llama_cpp.jsonl", tokenizer).rollouts
    model = load_checkpoint(str(DEMO / "base"), torch.device("cpu"), torch.float32).model
    lines = [json.loads(line) for line in (DATA / "llama_cpp.jsonl").read_text().splitlines()]
    recorded = [choice["logprobs"]["content"] for line in lines for choice in line["response"]["choices"]]
    for batch in score_responses(model, [r.prompt_ids for r in found], [r.response_ids for r in found], 4096):
        for i, (_, logprobs, *_) in batch.items():
            np.testing.assert_allclose(logprobs, [entry["logprob"] for entry in recorded[i]], atol=0.02)


def test_openai_batch_drops_failed_requests_and_appends_ends(tokenizer, problems):
    report = read(DATA / "openai_batch.jsonl", tokenizer, problems=problems).report
    assert report.dropped == {formats.FAILED_REQUEST: 1}
    assert report.notes == {rollout_files.END_APPENDED: 6, rollout_files.FROM_DATASET: 6}
    assert any("openai_batch.jsonl:4" in line for line in report.lines())


def test_openai_batch_with_ids_needs_no_guess(tokenizer, problems):
    found = read(DATA / "openai_batch_ids.jsonl", tokenizer, problems=problems)
    assert found.report.notes == {}
    assert [(r.prompt_idx, r.sample_idx) for r in found.rollouts] == [(10 + i, k) for i in range(3) for k in range(2)]
    assert all(r.response_ids[-1] == IM_END for r in found.rollouts)


@pytest.mark.parametrize("name", ["openai_batch.jsonl", "openai_batch_ids.jsonl"])
def test_batch_lines_of_completions_read_as_those_of_chats(tokenizer, problems, tmp_path, name):
    """`/v1/completions` says `text` where `/v1/chat/completions` has a message, and the prompt's ids in the choice."""
    lines = [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    for line in lines[:3]:
        body = line["response"]["body"]
        for choice in body["choices"]:
            choice |= {"text": choice.pop("message")["content"], "prompt_token_ids": body["prompt_token_ids"]}
        del body["prompt_token_ids"]
    found = read(written(tmp_path, *lines, name=name), tokenizer, problems=problems)
    assert ids_of(found) == ids_of(read(DATA / name, tokenizer, problems=problems))
    assert [r.problem_id for r in found.rollouts] == [f"demo-0000{i}" for i in range(3) for _ in range(2)]


def test_the_requests_of_a_batch_serve_as_its_data_set(tokenizer, tmp_path):
    """Output lines have no prompt; the input file has, under the same `custom_id`."""
    demo = [json.loads(line) for line in (DEMO / "problems.jsonl").read_text().splitlines()[:3]]
    requests = [
        {"custom_id": r["id"], "body": {"prompt": r["prompt"]}, "ground_truth": r["ground_truth"]} for r in demo
    ]
    file = written(tmp_path, *requests, name="requests.jsonl")
    of_requests = load_problems(str(file), "body.prompt", "ground_truth", "custom_id").problems
    found = read(DATA / "openai_batch.jsonl", tokenizer, problems=of_requests)
    assert [r.prompt_idx for r in found.rollouts] == [0, 0, 1, 1, 2, 2]
    assert {tuple(r.prompt_ids) for r in found.rollouts} == {tuple(tokenizer(r["prompt"])["input_ids"]) for r in demo}


def test_openai_batch_without_prompts_needs_the_data_set(tokenizer):
    with pytest.raises(InputError, match=r"openai_batch.jsonl:1: .*`dataset`"):
        read(DATA / "openai_batch.jsonl", tokenizer, correct_from="verifier")


def test_trl_text_and_chat_logs_hold_the_same_rollouts(tokenizer, problems):
    text = read(DATA / "trl.parquet", tokenizer, problems=problems, correct_above=0.5)
    chat = read(DATA / "trl_chat.parquet", tokenizer, correct_from="boxed_answer", correct_above=0.5)
    assert ids_of(text) == ids_of(chat)
    assert [r.correct for r in text.rollouts] == [r.correct for r in chat.rollouts] == [True, True, False, False]
    assert [r.correct for r in text.rollouts] == [is_correct(r.response, r.ground_truth) for r in text.rollouts]
    assert [r.prompt_idx for r in text.rollouts] == [11, 11, 10, 10]
    assert [r.prompt_idx for r in chat.rollouts] == [0, 0, 1, 1]
    assert chat.report.notes[rollout_files.RENDERED] == 4
    assert text.report.notes == {rollout_files.END_UNKNOWN: 4}


def test_chat_prompts_are_found_in_the_data_set_once_rendered(tokenizer, problems):
    found = read(DATA / "trl_chat.parquet", tokenizer, problems=problems, correct_from="verifier")
    assert [r.prompt_idx for r in found.rollouts] == [11, 11, 10, 10]
    assert found.report.notes == {rollout_files.RENDERED: 4, rollout_files.END_UNKNOWN: 4}


def test_verl_takes_its_bool_or_its_score(tokenizer, problems):
    by_acc = read(DATA / "verl.jsonl", tokenizer, problems=problems)
    by_score = read(DATA / "verl.jsonl", tokenizer, problems=problems, correct_from="score", correct_above=0.5)
    assert [r.correct for r in by_acc.rollouts] == [r.correct for r in by_score.rollouts] == [r.correct for r in OWN]
    assert by_acc.report.notes[rollout_files.FROM_DATASET] == 6


def test_verl_prompts_without_their_special_tokens_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"verl.jsonl:1: verl writes prompts without their special tokens"):
        read(DATA / "verl.jsonl", tokenizer)


# Text


def test_text_gives_the_ids_it_was_made_of(tokenizer, tmp_path):
    lines = [json.loads(line) for line in (DATA / "vllm.jsonl").read_text().splitlines()]
    for line in lines:
        del line["prompt_token_ids"]
        for output in line["outputs"]:
            del output["token_ids"]
    found = read(written(tmp_path, *lines), tokenizer)
    assert ids_of(found) == IDS_OF_OWN
    assert found.report.notes == {rollout_files.END_APPENDED: 6}


def test_text_that_does_not_come_back_is_dropped_counted_and_named(tokenizer, tmp_path):
    decomposed = "We see e\u0301 is 3."  # the tokenizer normalises to NFC
    file = written(tmp_path, vllm_line("1+2", {"text": "We see 3."}, {"text": decomposed}), vllm_line("2+2"))
    found = read(file, tokenizer)
    assert found.report.dropped == {rollout_files.NOT_ROUND_TRIP: 1}
    assert f"dropped 1 {rollout_files.NOT_ROUND_TRIP} (rollouts.jsonl:1)" in found.report.lines()
    assert [r.response for r in found.rollouts] == ["We see 3.", "We see 3."]


def test_text_with_lost_bytes_is_dropped(tokenizer, tmp_path):
    """U+FFFD in a server's text stands for bytes of no character; its own ids would be others."""
    lost = "3 \ufffd"
    assert tokenizer.decode(tokenizer(lost)["input_ids"]) == lost
    outputs = [{"text": lost}, {"text": "3 \ud800"}, {"text": "3"}]
    found = read(written(tmp_path, vllm_line("1+2", *outputs)), tokenizer)
    assert found.report.dropped == {rollout_files.NOT_ROUND_TRIP: 2}


def test_llama_cpp_answers_that_lack_some_ids_are_dropped(tokenizer, tmp_path):
    lines = [json.loads(line) for line in (DATA / "llama_cpp.jsonl").read_text().splitlines()]
    del lines[0]["response"]["choices"][1]["logprobs"]["content"][3]
    found = read(written(tmp_path, *lines), tokenizer)
    assert found.report.dropped == {formats.INCOMPLETE_IDS: 1}
    assert [(r.prompt_idx, r.sample_idx) for r in found.rollouts][:2] == [(0, 0), (1, 0)]


def test_samples_keep_their_number_when_one_before_is_dropped(tokenizer, tmp_path):
    file = written(tmp_path, vllm_line("1+2", {"text": "e\u0301"}, {"text": "We see 3."}))
    assert [r.sample_idx for r in read(file, tokenizer).rollouts] == [1]


def test_prompt_that_does_not_come_back_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"rollouts.jsonl:1: its prompt does not come back"):
        read(written(tmp_path, vllm_line("e\u0301")), tokenizer)
    with pytest.raises(InputError, match=r"rollouts.jsonl:1: its prompt does not come back"):
        read(written(tmp_path, vllm_line("1 \ud800")), tokenizer)
    assert read(written(tmp_path, vllm_line("1 \ufffd")), tokenizer).report.n_rollouts == 1


def test_prompt_and_completion_are_tokenised_each_for_itself(tokenizer, tmp_path):
    (joined,) = read(written(tmp_path, vllm_line("We s", {"text": "ee 3."})), tokenizer).rollouts
    assert tokenizer.decode(joined.prompt_ids) == "We s"
    assert joined.prompt_ids + joined.response_ids != tokenizer("We see 3.")["input_ids"]


@pytest.mark.parametrize(
    ("output", "last", "note"),
    [
        ({"finish_reason": "stop"}, IM_END, rollout_files.END_APPENDED),
        ({"finish_reason": "stop", "stop_reason": END_OF_TEXT}, END_OF_TEXT, rollout_files.END_APPENDED),
        ({"finish_reason": "stop", "stop_reason": "\n\n"}, None, None),
        ({"finish_reason": "length"}, None, None),
        ({}, None, rollout_files.END_UNKNOWN),
    ],
)
def test_end_of_sequence_is_appended_only_where_the_file_says_so(tokenizer, tmp_path, output, last, note):
    found = read(written(tmp_path, vllm_line("1+2", {"text": "We see 3.", **output})), tokenizer)
    text_ids = tokenizer("We see 3.", add_special_tokens=False)["input_ids"]
    assert found.rollouts[0].response_ids == text_ids + ([] if last is None else [last])
    assert list(found.report.notes) == ([] if note is None else [note])


def test_text_that_has_its_end_gets_no_second_one(tokenizer, tmp_path):
    found = read(written(tmp_path, vllm_line("1+2", {"text": "3<|im_end|>", "finish_reason": "stop"})), tokenizer)
    assert found.rollouts[0].response_ids == [*tokenizer("3")["input_ids"], IM_END]
    assert found.rollouts[0].response == "3"


def test_end_is_not_appended_where_a_stop_string_was_asked_for(tokenizer, tmp_path):
    line = {
        "request": {"prompt": "1+2", "stop": ["\n"]},
        "response": {"choices": [{"index": 0, "text": "3", "finish_reason": "stop"}]},
        "ground_truth": "3",
    }
    found = read(written(tmp_path, line), tokenizer)
    assert found.rollouts[0].response_ids == tokenizer("3")["input_ids"]
    assert found.report.notes == {rollout_files.END_UNKNOWN: 1}
    line["response"]["choices"][0]["stop_reason"] = None  # vLLM: no stop string, so the end of sequence
    assert read(written(tmp_path, line), tokenizer).rollouts[0].response_ids[-1] == IM_END


def test_empty_responses_are_dropped_but_a_bare_end_is_one_token(tokenizer, tmp_path):
    outputs = [{"text": ""}, {"token_ids": []}, {"text": "", "finish_reason": "stop"}, {"token_ids": [IM_END]}]
    found = read(written(tmp_path, vllm_line("1+2", *outputs)), tokenizer)
    assert found.report.dropped == {rollout_files.EMPTY: 2}
    assert [r.response_ids for r in found.rollouts] == [[IM_END], [IM_END]]


def test_padding_is_cut_and_an_end_inside_stays(tokenizer, tmp_path):
    outputs = [{"token_ids": [18, IM_END, END_OF_TEXT, END_OF_TEXT]}, {"token_ids": [18, IM_END, 19]}]
    found = read(written(tmp_path, vllm_line("1+2", *outputs)), tokenizer)
    assert [r.response_ids for r in found.rollouts] == [[18, IM_END], [18, IM_END, 19]]
    assert found.report.notes == {rollout_files.PADDING_CUT: 1}


def test_text_of_another_tokenizer_is_said(tokenizer, tmp_path):
    file = written(tmp_path, vllm_line("1+2", {"text": "Hello", "token_ids": [18, 19]}))
    assert read(file, tokenizer).report.notes == {rollout_files.TEXT_DIFFERS: 1}


def test_own_rollouts_under_another_tokenizer_are_said(tokenizer, tmp_path):
    lines = [json.loads(line) for line in (DATA / "gradprobe.jsonl").read_text().splitlines()]
    swapped = AutoTokenizer.from_pretrained(swapped_digits(tmp_path))
    assert rollout_files.TEXT_DIFFERS not in read(DATA / "gradprobe.jsonl", tokenizer).report.notes
    report = read(DATA / "gradprobe.jsonl", swapped).report
    assert report.notes[rollout_files.TEXT_DIFFERS] == len(lines)


def swapped_digits(directory: Path) -> Path:
    """The demo's tokenizer, but for 1 and 7, which change places."""
    for file in (DEMO / "base").glob("token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    content = json.loads((directory / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["1"], vocab["7"] = vocab["7"], vocab["1"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "config.json").write_bytes((DEMO / "base" / "config.json").read_bytes())
    return directory


def test_what_exceeds_the_context_is_dropped(tokenizer, tmp_path):
    file = written(tmp_path, vllm_line("1+2", {"text": "We see 3."}, {"text": "3"}))
    found = read(file, tokenizer, context=5)
    assert found.report.dropped == {rollout_files.TOO_LONG: 1}
    assert [r.response for r in found.rollouts] == ["3"]


# Verdicts and problems


def test_correct_is_taken_where_given(tokenizer, tmp_path):
    outputs = [{"text": "3", "correct": False}, {"text": "3", "correct": True}]
    found = read(written(tmp_path, vllm_line("1+2", *outputs)), tokenizer)
    assert [r.correct for r in found.rollouts] == [False, True]
    assert found.report.lines()[0] == "vllm rollouts: 2 of 1 prompts, verdict from 'correct'"
    assert found.report.as_dict()["verdict_from"] == "correct"
    anew = read(written(tmp_path, vllm_line("1+2", *outputs, {"text": "3"})), tokenizer, correct_from="verifier")
    assert [r.correct for r in anew.rollouts] == [None] * 3
    assert anew.report.as_dict()["verdict_from"] == "verifier"


def verl_line(output: str = "3", **more) -> dict:
    """A line of verl's shape."""
    return {"input": "<|im_start|>1+2", "output": output, "gts": "3", **more}


@pytest.mark.parametrize(
    ("line", "options", "correct", "verdict_from"),
    [
        (verl_line(acc=1.0, score=0.0), {}, True, "acc"),
        (verl_line(acc=0, score=1.0), {}, False, "acc"),
        (verl_line(acc=0.0, score=1.0), {"correct_from": "acc"}, False, "acc"),
        (verl_line(acc=1.0), {"correct_from": "acc", "correct_above": 1.5}, False, "acc > 1.5"),
        (verl_line(acc=0.5, score=1.0), {"correct_above": 0.7}, True, "score > 0.7"),
        (vllm_line("1+2", {"text": "3", "correct": 1}), {}, True, "correct"),
        (vllm_line("1+2", {"text": "3", "correct": 1}), {"correct_above": 1.5}, False, "correct > 1.5"),
        ({"prompt": "1+2", "completion": "3", "boxed": 1.0}, {"correct_above": 0.5}, True, "boxed > 0.5"),
    ],
)
def test_a_field_becomes_the_verdict_and_the_report_says_which(
    tokenizer, tmp_path, line, options, correct, verdict_from
):
    found = read(written(tmp_path, line), tokenizer, **options)
    assert [r.correct for r in found.rollouts] == [correct]
    assert found.report.as_dict()["verdict_from"] == verdict_from


ABOVE = {"correct_above": 0.7}


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([vllm_line(correct=True), vllm_line()], {}, r":2: .* verdict from the verifier, .*:1 from 'correct'"),
        ([vllm_line(), vllm_line(correct=True)], {}, r":2: .* verdict from 'correct', .*:1 from the verifier"),
        ([verl_line(acc=1.0), verl_line(acc=0.5, score=1.0)], ABOVE, r":2: .*'score > 0.7', .*:1 from 'acc'"),
        ([verl_line(acc=True), verl_line(score=1.0)], ABOVE, r":2: .*'score > 0.7', .*:1 from 'acc'"),
        ([vllm_line(correct=True), vllm_line(correct=None)], {}, r":2: .* the verifier, .*:1 from 'correct'"),
        ([vllm_line(reward=0.5), vllm_line(score=1.0)], ABOVE, r":2: .*'score > 0.7', .*'reward > 0.7'"),
        ([vllm_line(reward=0.5), vllm_line(reward=None)], ABOVE, r":2: .* the verifier, .*:1"),
        ([vllm_line(), vllm_line(reward=float("nan"))], ABOVE, r":2: 'reward' is NaN, no verdict:"),
        ([vllm_line(correct=None)], {"correct_from": "correct"}, r":1: 'correct' is null, no verdict: .*verifier"),
        ([verl_line(acc=1.0, score=1.0)], ABOVE, r"`correct_above` 0.7: .* verdicts are taken from 'acc'"),
    ],
)  # fmt: skip
def test_verdicts_of_several_kinds_in_one_file_are_refused(tokenizer, tmp_path, lines, options, message):
    with pytest.raises(InputError, match=message):
        read(written(tmp_path, *lines), tokenizer, **options)


def test_what_is_dropped_needs_no_verdict(tokenizer, tmp_path):
    outputs = [{"text": "3", "correct": True}, {"text": ""}]
    assert read(written(tmp_path, vllm_line("1+2", *outputs)), tokenizer).report.n_rollouts == 1


def test_verdicts_fall_to_those_without_one_and_none_leaves_a_rollout_out(tokenizer, tmp_path):
    outputs = [{"text": "3"}, {"text": "4"}, {"text": "5"}, {"text": "6"}]
    rollouts = read(written(tmp_path, vllm_line("1+2", *outputs)), tokenizer).rollouts
    rollouts[0] = dataclasses.replace(rollouts[0], correct=False)
    with RunningVerifier(load_verifier("boxed")) as running:
        running.judge = lambda response, truth: {"4": Verdict(True), "5": Verdict(None, "no"), "6": Verdict(False)}[
            response
        ]
        assert [(r.response, r.correct) for r in judged(rollouts, running)] == [
            ("3", False), ("4", True), ("6", False)
        ]  # fmt: skip


@pytest.mark.parametrize("where", ["files._ground_truth", "verdicts.Verdicts.of", "formats._vllm"])
def test_a_bug_of_ours_is_no_faulty_line(tokenizer, tmp_path, monkeypatch, where):
    """A ValueError planted in a reader comes through as a traceback, not as a line of the user's that is at fault."""

    def planted(*args: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(f"gradprobe.rollouts.{where}", planted)
    if where == "formats._vllm":
        monkeypatch.setitem(formats.SHAPES, "vllm", (lambda record: True, planted))
    with pytest.raises(ValueError, match="^a bug$"):
        read(written(tmp_path, vllm_line("1+2", {"text": "3"})), tokenizer)


def test_rewards_need_a_threshold(tokenizer, tmp_path):
    file = written(tmp_path, vllm_line("1+2", {"text": "3", "reward": 0.5}, {"text": "4", "reward": 1.0}))
    with pytest.raises(InputError, match=r"rollouts.jsonl:1: 'reward' is a number: `correct_above` THRESHOLD"):
        read(file, tokenizer)
    rollouts = read(file, tokenizer, correct_above=0.5).rollouts
    assert [r.correct for r in rollouts] == [False, True]
    assert [r.reward for r in rollouts] == [0.5, 1.0]
    # What judges anew leaves no reward of the file's, by which Exp 3 would weigh.
    assert [r.reward for r in read(file, tokenizer, correct_from="verifier").rollouts] == [None, None]


def test_scores_of_ones_own_are_read_of_every_shape_with_the_rollout(tokenizer, tmp_path):
    lines = [json.loads(line) for line in (DATA / "vllm.jsonl").read_text().splitlines()]
    for line in lines:
        for output in line["outputs"]:
            output["mine"] = [i / 2 for i in range(len(output["token_ids"]))]
            output["token_ids"] += [END_OF_TEXT] * 2  # padding, which is cut
            output["mine"] += [99.0, 99.0]
    found = read(written(tmp_path, *lines), tokenizer, score_key="mine")
    assert [r.bucket_scores for r in found.rollouts] == [[i / 2 for i in range(len(r.response_ids))] for r in OWN]
    lines[1]["outputs"][0]["mine"].pop()
    with pytest.raises(InputError, match=r":2: `bucket_by`: 'mine' is not a list of finite numbers, one for each of"):
        read(written(tmp_path, *lines), tokenizer, score_key="mine")


def test_several_rewards_must_be_told_apart(tokenizer):
    with pytest.raises(InputError, match=r"trl_chat.parquet: row 0: several rewards; .* boxed_answer, brevity"):
        read(DATA / "trl_chat.parquet", tokenizer, correct_above=0.5)


def test_threshold_without_rewards_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"`correct_above` 0.5: .*vllm.jsonl has no reward"):
        read(DATA / "vllm.jsonl", tokenizer, correct_above=0.5)


def test_neither_verdict_nor_ground_truth_is_refused(tokenizer, tmp_path):
    line = vllm_line()
    del line["ground_truth"]
    with pytest.raises(InputError, match=r"rollouts.jsonl:1: neither a verdict"):
        read(written(tmp_path, line), tokenizer)
    line["outputs"][0]["correct"] = True
    assert read(written(tmp_path, line), tokenizer).rollouts[0].ground_truth == ""


def test_data_set_must_know_the_prompts_and_agree_on_the_answers(tokenizer, problems, tmp_path):
    strange = vllm_line("1+2")
    wrong = vllm_line(problems[0].prompt, ground_truth="124")
    with pytest.raises(InputError) as caught:
        read(written(tmp_path, strange, wrong), tokenizer, problems=problems)
    assert re.search(r":1: its prompt is none of the data set's", caught.value.problems[0])
    assert re.search(r":2: its ground truth is '124', that of problem 'demo-00000' '123'", caught.value.problems[1])


def test_prompt_other_than_the_data_sets_is_probed_as_written_and_said(tokenizer, problems, tmp_path):
    line = vllm_line("1+2", problem_id=problems[0].id, ground_truth="123")
    found = read(written(tmp_path, line), tokenizer, problems=problems)
    assert found.rollouts[0].prompt_ids == tokenizer("1+2")["input_ids"]
    assert found.rollouts[0].prompt_idx == 10
    assert found.report.notes[rollout_files.OTHER_THAN_DATASET] == 1


def test_the_same_prompt_in_several_lines_is_one_prompt(tokenizer, tmp_path):
    found = read(written(tmp_path, vllm_line("1+2"), vllm_line("2+1"), vllm_line("1+2")), tokenizer)
    assert [(r.prompt_idx, r.sample_idx) for r in found.rollouts] == [(0, 0), (1, 0), (0, 1)]


# What must be refused


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (["{broken"], r"rollouts.jsonl:1: not JSON \(Expecting"),
        ([vllm_line(), "[1]"], r"rollouts.jsonl:2: not a JSON object"),
        ([], r"no rollouts in it"),
        ([{"a": 1}], r"rollouts.jsonl:1: of no known shape: its keys are a; `rollouts_format`"),
        ([vllm_line(), {"input": "1", "output": "2"}], r"rollouts.jsonl:2: not of the shape vllm"),
        ([vllm_line("1+2", {"token_ids": [VOCAB_SIZE]})], r":1: its response ids have 350, the model's are 0 to 349"),
        ([vllm_line("1+2", {"token_ids": [-1]})], r":1: its response ids have -1"),
        ([vllm_line("1+2", {"token_ids": [1.0]})], r":1: its response ids are not a list of integers"),
        ([vllm_line("1+2", {"token_ids": [True]})], r":1: its response ids are not a list of integers"),
        ([vllm_line("1+2", prompt_token_ids=[999])], r":1: its prompt ids have 999"),
        ([vllm_line("1+2", prompt_token_ids=[])], r":1: its prompt has no tokens"),
        ([vllm_line("1+2", {"index": 0})], r":1: neither text nor token ids of the completion"),
        ([vllm_line(None)], r":1: neither text nor token ids of the prompt"),
        ([json.dumps(vllm_line()).replace("1+2", "1\x00")], r":1: not JSON"),
        ([vllm_line(ground_truth={})], r":1: 'ground_truth' is of type dict"),
        ([vllm_line("1+2", {"text": ""})], r"no rollouts left; dropped 1 completions without response tokens"),
        ([{"prompt": ["a", "b"], "choices": [{"text": "c"}]}], r":1: several prompts in one line"),
        ([{"prompt": "a", "echo": True, "choices": [{"text": "ab"}]}], r":1: asked for with 'echo'"),
        ([{"prompt": "a", "choices": "b"}], r":1: 'choices' is not a list of objects"),
        ([{"prompt": "a", "completion": [{"role": "a"}, {"role": "b"}]}], r":1: its completion is of several turns"),
    ],
)
def test_bad_files_are_refused_with_their_line(tokenizer, tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        read(written(tmp_path, *records), tokenizer)


ANSWER = {"prompt": "1+2", "ground_truth": "3", "id": "cmpl-1", "choices": [{"index": 0, "text": "We see 3."}]}


@pytest.mark.parametrize(
    "line",
    [
        vllm_line("1+2", {"index": 0, "text": "3"}, {"index": 1, "text": "4"}, request_id="7"),
        ANSWER,
        {"custom_id": "demo", "ground_truth": "3", "prompt": "1+2", "response": {"body": ANSWER}},
    ],
)
def test_a_request_that_stands_twice_is_refused(tokenizer, tmp_path, line):
    other = json.loads(json.dumps(line).replace("1+2", "2+1").replace("cmpl-1", "cmpl-2").replace('"7"', '"8"'))
    with pytest.raises(InputError, match=r":3: request '(7|cmpl-1)' stands at .*:1 .*written twice.*leave the copies"):
        read(written(tmp_path, line, other, line), tokenizer)
    assert read(written(tmp_path, line, other), tokenizer).report.n_prompts == 2


def test_runs_that_number_their_requests_alike_are_no_copies(tokenizer, tmp_path):
    """vLLM counts from 0 in every process; a short answer can come twice."""
    lines = [vllm_line(f"{i}+2", {"index": 0, "text": text}, request_id=str(i)) for text in "34" for i in range(2)]
    lines[2]["outputs"][0]["text"] = "3"
    assert read(written(tmp_path, *lines), tokenizer).report.n_rollouts == 4


def test_all_faults_are_named_at_once_up_to_a_bound(tokenizer, tmp_path):
    lines = [vllm_line("1+2", {"token_ids": [900 + i // 2]}) for i in range(60)]
    with pytest.raises(InputError) as caught:
        read(written(tmp_path, *lines), tokenizer)
    assert len(caught.value.problems) == 21
    assert re.search(r":3: its response ids have 901, .* \(and 1 more like it\)$", caught.value.problems[1])
    assert caught.value.problems[-1] == "and 10 more faults"


def test_named_format_is_held_against_the_file(tokenizer):
    with pytest.raises(InputError, match=r"vllm.jsonl:1: not of the shape verl: its keys are ground_truth, outputs"):
        read(DATA / "vllm.jsonl", tokenizer, file_format="verl")


def test_own_rollouts_take_no_data_set(tokenizer, problems):
    with pytest.raises(InputError, match="leave `dataset` out"):
        read(DATA / "gradprobe.jsonl", tokenizer, problems=problems)


def test_several_training_steps_are_said(tokenizer, tmp_path):
    rows = pyarrow.parquet.read_table(DATA / "trl.parquet").to_pylist()
    rows[3]["step"] = 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "steps.parquet")
    found = read(tmp_path / "steps.parquet", tokenizer, correct_above=0.5)
    assert found.report.notes[formats.OTHER_STEPS] == 1


# Several files, and folders


def test_several_files_of_one_shape_are_read_as_one(tokenizer, tmp_path):
    whole = read(DATA / "vllm.jsonl", tokenizer)
    lines = (DATA / "vllm.jsonl").read_text().splitlines()
    parts = [written(tmp_path, line, name=f"{i}.jsonl") for i, line in enumerate(lines)]
    found = read(parts, tokenizer)
    assert found.rollouts == whole.rollouts
    assert found.report.sha256 not in (whole.report.sha256, read(parts[:1], tokenizer).report.sha256)
    assert found.report.sha256 != read(parts[::-1], tokenizer).report.sha256
    with pytest.raises(InputError, match=r"verl.jsonl:1: not of the shape vllm"):
        read([DATA / "vllm.jsonl", DATA / "verl.jsonl"], tokenizer)
    with pytest.raises(InputError, match=r"request '0' stands at vllm.jsonl:1 already"):
        read([DATA / "vllm.jsonl", written(tmp_path, *lines, name="copy.jsonl")], tokenizer)


PLACES = [
    ([], None, "no rollouts.jsonl there, nor completions_[*].parquet$"),
    (["rollouts.jsonl", "completions_00001.parquet"], "rollouts.jsonl", None),
    (["completions_00007.parquet", "log.jsonl"], "completions_00007.parquet", None),
    (["completions/completions_00007.parquet"], "completions/completions_00007.parquet", None),
    (
        [f"completions/completions_{step:05d}.parquet" for step in (9, 100_000, 10)],
        None,
        "of 3 training steps, each .*; name one file, from completions_00009.parquet to completions_100000.parquet in",
    ),
    (
        ["2.jsonl", "1.jsonl", "notes.txt"],
        None,
        "nor completions_[*].parquet; name one or several of 1.jsonl, 2.jsonl$",
    ),
]


@pytest.mark.parametrize(("names", "file", "message"), PLACES)
def test_a_folder_is_a_dump_or_one_step_or_says_what_stands_there(tmp_path, names, file, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if message is None:
        assert places.rollout_files([tmp_path]) == [tmp_path / file]
        return
    with pytest.raises(InputError, match=message):
        places.rollout_files([tmp_path])


def test_a_dump_goes_alone_and_no_file_stands_twice(tmp_path):
    one, dump = written(tmp_path, vllm_line(), name="one.jsonl"), tmp_path / "dump"
    dump.mkdir()
    written(dump, name="rollouts.jsonl")
    (dump / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"rollouts.jsonl: is a dump's, and goes with no other; merge"):
        places.rollout_files([one, dump])
    with pytest.raises(InputError, match="one.jsonl and 1 more: a file is given twice"):
        places.rollout_files([one, dump / ".." / "one.jsonl"])


def test_report_for_the_manifest_is_json_without_paths(tokenizer, problems):
    report = read(DATA / "openai_batch.jsonl", tokenizer, problems=problems).report.as_dict()
    assert str(DATA) not in json.dumps(report)
    assert (report["n_completions"], report["n_rollouts"], report["n_prompts"]) == (6, 6, 3)


# The lines in docs/rollouts.md


@dataclass
class CompletionOutput:
    """The fields of vLLM's class of this name that the documented writer reads, and some that it does not."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: None
    finish_reason: str | None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """As above."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


def code_blocks() -> list[str]:
    """The Python in docs/rollouts.md."""
    text = (HERE.parent / "docs" / "rollouts.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_documented_writer_makes_a_file_that_reads_back(tokenizer, tmp_path):
    (writer,) = [block for block in code_blocks() if "def write_rollouts" in block]
    written_by_docs: dict = {}
    exec(writer, written_by_docs)
    lines = [json.loads(line) for line in (DATA / "vllm.jsonl").read_text().splitlines()]
    outputs = [
        RequestOutput(
            line["request_id"],
            None,  # as vLLM leaves it for prompts given as ids
            line["prompt_token_ids"],
            [CompletionOutput(**{**output, "token_ids": tuple(output["token_ids"])}) for output in line["outputs"]],
        )
        for line in lines
    ]
    problems = [{"id": line["problem_id"], "ground_truth": line["ground_truth"]} for line in lines]
    written_by_docs["write_rollouts"](tmp_path / "vllm.jsonl", problems, outputs)
    found = read(tmp_path / "vllm.jsonl", tokenizer)
    assert ids_of(found) == IDS_OF_OWN
    assert [r.ground_truth for r in found.rollouts] == [r.ground_truth for r in OWN]


def test_every_file_in_the_docs_table_exists_and_is_read_here():
    table = (HERE.parent / "docs" / "rollouts.md").read_text(encoding="utf-8")
    named = set(re.findall(r"tests/data/rollouts/([\w.]+)", table))
    assert named == {file.name for file in DATA.iterdir()}
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    assert named <= set(re.findall(r'"([\w]+\.(?:jsonl|parquet))"', tests))


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "tool_calls"])
@pytest.mark.parametrize("shape", ["openai", "trl"])
def test_a_response_in_parts_is_refused_without_its_ids(key, shape, tokenizer, tmp_path):
    """What stood before `content`, and between both, was sampled too: other contexts, other tokens."""
    message, ids = {"role": "assistant", "content": "\\boxed{3}."}, tokenizer("1+2=3. \\boxed{3}.")["input_ids"]

    def line(message: dict, ids: list[int] | None) -> dict:
        told = {"prompt": "1+2", "correct": True}
        if shape == "trl":
            return told | {"completion": [message]} | ({} if ids is None else {"completion_ids": ids})
        return told | {"choices": [{"message": message, "finish_reason": "stop", "token_ids": ids}]}

    for apart in ({}, {key: None}, {key: ""}, {key: []}):
        assert len(read(written(tmp_path, line(message | apart, None)), tokenizer).rollouts) == 1
    apart = message | {key: "1+2=3." if "reasoning" in key else [{"name": "sum"}]}
    with pytest.raises(InputError, match=f":1: a part of its response .* in '{key}'.*no --reasoning-parser"):
        read(written(tmp_path, line(apart, None)), tokenizer)
    (rollout,) = read(written(tmp_path, line(apart, ids)), tokenizer).rollouts
    assert rollout.response_ids == ids


def test_truths_are_read_as_a_data_sets(tokenizer, tmp_path, problems):
    """TRL logs the columns of its data set: worked solutions, lists in texts, dollars."""
    truths = {"We get 1, \\boxed{2}, so \\boxed{3}.": "3", "1+2\n#### 3": "3", '["7"]': "7", "$x$": "x", "4": "4"}
    lines = [{"prompt": "1+2", "completion": "3", "solution": truth} for truth in truths]
    found = read(written(tmp_path, *lines), tokenizer).rollouts
    assert [r.ground_truth for r in found] == list(truths.values())
    several = {"prompt": "1+2", "completion": "3", "solution": '["1", "2"]'}
    report = read(written(tmp_path, *lines, several), tokenizer).report
    assert report.dropped == {"with several answers in 'solution'": 1}
    line = {"prompt": problems[0].prompt, "completion": "3", "solution": f"so \\boxed{{{problems[0].ground_truth}}}"}
    (rollout,) = read(written(tmp_path, line), tokenizer, problems=problems).rollouts
    assert rollout.ground_truth == problems[0].ground_truth


def test_a_prompt_that_ends_in_the_assistants_message_is_refused(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "It is"}]
    with pytest.raises(InputError, match=":1: its prompt ends in a message of the role assistant"):
        read(written(tmp_path, {"prompt": messages, "completion": "3", "correct": True}), tokenizer)


def test_requests_of_one_prompt_are_samples_of_one_problem(tokenizer, tmp_path):
    """A batch has a request for each sample; as a data set these are copies, whose ids still name their problem."""
    requests = [{"custom_id": f"r{i}", "body": {"prompt": f"{i // 3}+2"}, "ground_truth": "3"} for i in range(6)]
    asked = load_problems(
        written(tmp_path, *requests, name="requests.jsonl"),
        **{"id_key": "custom_id", "problem_key": "body.prompt", "answer_key": "ground_truth"},
    )
    body = {"choices": [{"text": "3", "finish_reason": "stop"}]}
    answers = [{"custom_id": f"r{i}", "response": {"body": body}} for i in range(6)]
    found = read(written(tmp_path, *answers), tokenizer, problems=asked.problems, copies=asked.copies).rollouts
    assert [(r.prompt_idx, r.sample_idx) for r in found] == [(p, s) for p in (0, 3) for s in range(3)]
