"""Problems into prompts: templates by hand and the tokenizer's own."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from gradprobe.common.errors import InputError
from gradprobe.problems.data_set import load_problems
from gradprobe.problems.templates import PLACEHOLDER, fill, preview, read_template, render_prompts

DATA = Path(__file__).parents[1] / "data" / "problems"
DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "base")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[5] }}", "makes nothing"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ],
)
def test_a_chat_template_at_fault_is_one_line(tokenizer, monkeypatch, template, says):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="^`chat_template`: problem '0': the tokenizer's chat template") as error:
        render_prompts(load_problems(DATA / "plain.jsonl"), None, True, None, tokenizer)
    assert says in str(error.value)


def prompts_of(problem_set) -> list[str]:
    return [problem.prompt for problem in problem_set.problems]


def test_the_chat_template_gives_the_prompts_that_the_demo_was_trained_on(tokenizer):
    bare = load_problems(DEMO / "problems.jsonl", problem_key="meta.problem")
    rendered = render_prompts(bare, chat=True, tokenizer=tokenizer)
    assert prompts_of(rendered) == prompts_of(load_problems(DEMO / "problems.jsonl"))
    assert prompts_of(rendered) != prompts_of(bare)
    assert rendered.notes == ()


def test_what_is_rendered_already_is_noted(tokenizer):
    rendered = render_prompts(load_problems(DEMO / "problems.jsonl"), chat=True, tokenizer=tokenizer)
    assert "2400 problems hold special tokens" in rendered.notes[0]
    assert "<|im_start|>" in rendered.notes[0]


def test_a_template_from_a_file():
    problem_set = load_problems(DATA / "math.json")
    rendered = render_prompts(problem_set, read_template(str(DATA / "template.txt")))
    assert prompts_of(rendered)[1] == (
        "Problem: Find $\\{x : x^2 = 4\\}$.\n\nAnswer in \\boxed{}, a set as \\boxed{\\{1, 2\\}}.\nSolution:\n"
    )
    assert rendered.rendering["prompt_template"] == (DATA / "template.txt").read_text()
    assert [p.ground_truth for p in rendered.problems] == [p.ground_truth for p in problem_set.problems]


def test_template_and_system_prompt_within_the_chat_template(tokenizer):
    rendered = render_prompts(load_problems(DATA / "plain.jsonl"), "Solve: {problem}", True, "Be brief.", tokenizer)
    assert prompts_of(rendered)[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSolve: What is 1+1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_messages_go_through_the_chat_template(tokenizer):
    messages = load_problems(DATA / "verl.parquet")
    rendered = render_prompts(messages, chat=True, tokenizer=tokenizer)
    assert prompts_of(rendered)[2] == (
        "<|im_start|>user\nWhat is 2+1? Answer in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert all(problem.messages == () for problem in rendered.problems)
    for others in ((), ("{problem}", True, None, tokenizer)):
        with pytest.raises(InputError, match=r"lists of chat messages \(problem '10'\); `chat_template` alone"):
            render_prompts(messages, *others)


def test_without_any_of_it_prompts_stay_as_they_are():
    problem_set = load_problems(DATA / "original.jsonl")
    assert render_prompts(problem_set) == problem_set
    assert problem_set.rendering == {}


def test_all_that_changes_a_prompt_changes_the_description(tokenizer):
    problem_set = load_problems(DATA / "plain.jsonl")
    ways = [("{problem}",), ("{problem} ",), (None, True, None, tokenizer), (None, True, "", tokenizer)]
    hashes = {render_prompts(problem_set, *way).rendering["prompts_sha256"] for way in ways}
    assert len(hashes) == len(ways)


def test_a_tokenizer_without_a_chat_template(checkpoint_dir):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    with pytest.raises(InputError, match="`chat_template`: this checkpoint's tokenizer has none"):
        render_prompts(load_problems(DATA / "plain.jsonl"), chat=True, tokenizer=tokenizer)


def test_a_chat_template_that_refuses_or_prints_the_date(checkpoint_dir):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    tokenizer.chat_template = "{{ raise_exception('no system role') if messages[0].role == 'system' else 'ok' }}"
    problem_set = load_problems(DATA / "plain.jsonl")
    assert prompts_of(render_prompts(problem_set, None, True, None, tokenizer)) == ["ok", "ok"]
    with pytest.raises(
        InputError, match="problem '0': .* does not take its prompt \\(TemplateError: no system role\\)"
    ):
        render_prompts(problem_set, None, True, "system", tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}"
    assert "date" in render_prompts(problem_set, None, True, None, tokenizer).notes[0]


def test_a_second_system_message_is_an_error(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "?"}], "answer": 1}')
    assert render_prompts(load_problems(file), chat=True, tokenizer=tokenizer).problems[0].prompt.count("system") == 1
    with pytest.raises(InputError, match="`system_prompt`: problem '0' brings a system message"):
        render_prompts(load_problems(file), None, True, "s", tokenizer)


def in_messages(file: Path, *roles_and_contents: tuple[str, str]) -> Path:
    messages = [{"role": role, "content": content} for role, content in roles_and_contents]
    lines = [[*messages[:-1]], messages] if messages[-1]["role"] == "assistant" else [messages]
    file.write_text("".join(json.dumps({"prompt": line, "answer": 1}) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("role", ["assistant", "gpt", "Assistant", "model"])
def test_a_solution_in_the_messages_is_refused_under_any_name(role, tokenizer, tmp_path):
    messages = [{"from": "human", "value": "1+2?"}, {"from": role, "value": "That is \\boxed{3}."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": messages, "answer": "3"}))
    with pytest.raises(InputError, match=r"end in one of the role assistant .*`problem_key`.*`continue_final_message`"):
        render_prompts(load_problems(tmp_path / "a.jsonl"), chat=True, tokenizer=tokenizer)
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": messages[:1], "answer": "3"}))
    (problem,) = render_prompts(load_problems(tmp_path / "a.jsonl"), chat=True, tokenizer=tokenizer).problems
    assert problem.prompt == "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"


def test_a_message_of_the_assistant_at_the_end_is_refused_or_gone_on_with(tokenizer, tmp_path):
    file = in_messages(tmp_path / "a.jsonl", ("user", "1+2?"), ("assistant", "Let me see: 1 "))
    problem_set = load_problems(file)
    complaint = r"`dataset` .*: messages end in one of the role assistant \(problem '1'\); .*`continue_final_message`"
    with pytest.raises(InputError, match=complaint):
        render_prompts(problem_set, chat=True, tokenizer=tokenizer)
    rendered = render_prompts(problem_set, chat=True, tokenizer=tokenizer, continue_final_message=True)
    opened = "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts_of(rendered) == [opened, opened + "Let me see: 1 "]
    for problem, prompt in zip(problem_set.problems, prompts_of(rendered), strict=True):
        messages = [{"role": role, "content": content} for role, content in problem.messages]
        is_begun = messages[-1]["role"] == "assistant"
        options = {"continue_final_message": is_begun, "add_generation_prompt": not is_begun}
        assert prompt == tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_nothing_to_go_on_with_is_an_error(tokenizer, tmp_path):
    for file in (in_messages(tmp_path / "a.jsonl", ("user", "?")), DATA / "plain.jsonl"):
        with pytest.raises(InputError, match="`continue_final_message`: no prompt of .* ends in an assistant's"):
            render_prompts(load_problems(file), chat=True, tokenizer=tokenizer, continue_final_message=True)


def adding_bos(tokenizer):
    """One that puts a token before every text, as Gemma's and Llama's do."""
    adding = copy.deepcopy(tokenizer)
    adding.add_special_tokens({"bos_token": "<|im_start|>"})
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", adding.bos_token_id)]
    )
    assert adding("")["input_ids"] == [adding.bos_token_id]
    return adding


def test_plain_prompts_that_get_no_special_tokens_are_noted(tokenizer):
    problem_set, bare = load_problems(DATA / "plain.jsonl"), "tokenised without the special tokens"
    rendered = render_prompts(problem_set, tokenizer=adding_bos(tokenizer))
    assert prompts_of(rendered) == prompts_of(problem_set)
    (note,) = rendered.notes
    assert note.startswith("2 prompts are text, tokenised without the special tokens that this tokenizer would add ")
    assert "`prompt_template` '<|im_start|>{problem}'" in note
    assert bare in render_prompts(problem_set, "Q: {problem}", tokenizer=adding_bos(tokenizer)).notes[0]
    for way in (
        {"tokenizer": tokenizer},
        {"template": "<|im_start|>{problem}", "tokenizer": adding_bos(tokenizer)},
        {"chat": True, "tokenizer": adding_bos(tokenizer)},
    ):
        assert not any(bare in said for said in render_prompts(problem_set, **way).notes)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "No such file"), (b"Solve {question}", "no {problem} in it"), (b"{problem}\xff", "not UTF-8 at byte 9")],
)
def test_templates_that_are_none(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_template(str(tmp_path / "t.txt"))
    assert complaint in str(error.value)


PIECES = st.lists(st.sampled_from(["{", "}", "problem", "{0}", "%s", "\\", "$", "x"])).map("".join)


@given(PIECES.filter(lambda text: PLACEHOLDER not in text), st.one_of(PIECES, st.just(PLACEHOLDER)))
def test_a_problem_is_put_in_letter_by_letter(around, problem):
    assert fill(around + PLACEHOLDER + around, problem) == around + problem + around
    assert fill(PLACEHOLDER + around + PLACEHOLDER, problem) == problem + around + problem


def test_a_preview_leaves_out_the_middle_of_a_long_prompt():
    problem = render_prompts(load_problems(DATA / "plain.jsonl"), "<" + "x" * 5000 + "{problem}>").problems[0]
    shown = preview(problem)
    assert len(shown) < 800
    assert shown.startswith("problem '0', answer '2', prompt: <xxx")
    assert shown.endswith("What is 1+1?>")
    assert f"[... {len(problem.prompt) - 600} characters ...]" in shown
