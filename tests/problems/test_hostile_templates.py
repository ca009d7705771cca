"""Chat templates that fail, or never end, or print without end: one error each, in bounded time and memory."""

import json
import shutil
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gradprobe.common.errors import InputError
from gradprobe.model.checkpoint import CheckpointSource, load_tokenizer
from gradprobe.problems import chat
from gradprobe.problems.chat import ChatTemplate
from gradprobe.problems.child import Child
from gradprobe.problems.data_set import load_problems
from gradprobe.problems.templates import render_prompts
from gradprobe.rollouts.files import Vocabulary, read_rollouts

DATA = Path(__file__).parents[1] / "data" / "problems"
MANY = "{% for a in range(99999) %}"
FINE = ""

TEMPLATES = {
    "endless": (MANY * 9 + "{% endfor %}" * 9, "took longer than 3 s"),
    "endless in one expression": ("{{ 10 ** (10 ** 9) }}", "took longer than 3 s"),
    "endless in a filter": (MANY * 3 + "{{ messages|tojson }}" + "{% endfor %}" * 3, "can't be used"),
    "a range of 10^9": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "text without end": ("{% set x = 'x' * 10**8 %}" + MANY + "{{ x }}{% endfor %}", "MiB of memory"),
    "10^8 characters": ("{{ 'x' * 10**8 }}", "100000000 characters"),
    "10^11 characters": ("{{ 'x' * 10**11 }}", "MiB of memory"),
    "padded to 10^11": ("{{ '%100000000000d' % 1 }}", "can't be used"),
    "centred in 10^10": ("{{ 'x'|center(10**10) }}", "MiB of memory"),
    "joined to 10^10": ("{{ (['x' * 10**5] * 10**5)|join }}", "MiB of memory"),
    "a list of 10^10": ("{{ ([1] * 10**10)|length }}", "MiB of memory"),
    "a macro that calls itself": ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "RecursionError"),
    "a loop that calls itself": (
        "{% set x = namespace(a=[1]) %}{% for a in x.a recursive %}{{ loop(x.a) }}{% endfor %}", "RecursionError",
    ),
    "nested deeply": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "refuses problem '0'"),
    "blocks nested deeply": ("{% if 1 %}" * 300 + "{% endif %}" * 300, "refuses problem '0'"),
    "a number too long": ("{{ " + "7" * 9000 + " }}", "refuses problem '0'"),
    "a number too long to print": ("{{ 10 ** 5000 }}", "refuses problem '0'"),
    "a shift too far": ("{{ 'x' * (2 ** 70) }}", "OverflowError"),
    "include": ("{% include '/etc/passwd' %}", "refuses problem '0'"),
    "import": ("{% import 'os' as os %}", "refuses problem '0'"),
    "extends": ("{% extends 'base' %}", "refuses problem '0'"),
    "undefined": ("{{ nothing.at.all }}", "'nothing' is undefined"),
    "a message that is not there": ("{{ messages[5].content }}", "has no element 5"),
    "a message that is not there, printed": ("{{ messages[5] }}", "makes nothing"),
    "its own refusal": ("{{ raise_exception('no, by `me`\n\x1b[31m') }}", "no, by 'me'"),
    "an endless refusal": ("{{ raise_exception('x' * 10**7) }}", "refuses problem '0'"),
    "division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "types that don't add": ("{{ 'a' + 1 }}", "TypeError"),
    "a call of what is none": ("{{ messages() }}", "TypeError"),
    "a date that is none": ("{{ strftime_now(7) }}", "TypeError"),
    "out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses problem '0'"),
    "out by format": ("{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}", "refuses problem '0'"),
    "changes its messages": ("{{ messages.append(1) }}", "refuses problem '0'"),
    "broken": ("{% if %}", "refuses problem '0'"),
    "unclosed": ("{% for m in messages %}x", "refuses problem '0'"),
    "a tag unheard of": ("{% exec 'x' %}", "refuses problem '0'"),
    "a filter unheard of": ("{{ messages|evaluate }}", "refuses problem '0'"),
    "nothing": ("{# nothing #}", "makes nothing"),
    "half a surrogate": ("\ud800{{ messages }}", "half a surrogate"),
    "half a surrogate, printed": ("{{ '%c' % 55296 }}", "half a surrogate"),
    "NUL and escapes": ("\0\x1b[31m{{ messages[0].content }}\x9b", FINE),
    "what is no text": (["{{ 1 }}"], "of type list"),
    "several without a default": ({"rag": "x"}, "tokenizer has none"),
    "several with a default": ({"rag": "x", "default": "y"}, FINE),
    "a default that is no text": ({"default": 7}, "of type int"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(checkpoint_dir):
    return AutoTokenizer.from_pretrained(checkpoint_dir)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in TEMPLATES.items()])
def test_a_hostile_template(tokenizer, monkeypatch, case):
    template, says = case
    monkeypatch.setattr(tokenizer, "chat_template", template)
    if "longer than 3 s" in says:
        monkeypatch.setattr(chat, "SECONDS_PER_PROMPT", 3.0)
    problem_set = load_problems(DATA / "plain.jsonl")
    start = time.monotonic()
    if says == FINE:
        assert render_prompts(problem_set, None, True, None, tokenizer).problems[0].prompt
    else:
        with pytest.raises(InputError) as error:
            render_prompts(problem_set, None, True, None, tokenizer)
        assert str(error.value).startswith("`chat_template`")
        assert says in str(error.value)
        assert len(str(error.value)) < 600
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe{{ messages }}"),
        ("tokenizer_config.json", {"chat_template": 7}),
        ("tokenizer_config.json", {"chat_template": ["x"]}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
        ("tokenizer_config.json", {"chat_template": {"default": None}}),
    ],
)
def test_a_template_that_is_none_in_the_tokenizers_files(checkpoint_dir, tmp_path, name, content):
    model = Path(shutil.copytree(checkpoint_dir, tmp_path / "model"))
    if isinstance(content, dict):
        content = json.dumps({**json.loads((model / name).read_text()), **content}).encode()
    (model / name).write_bytes(content)
    with pytest.raises(InputError):
        render_prompts(
            load_problems(DATA / "plain.jsonl"), None, True, None, load_tokenizer(CheckpointSource(str(model)))
        )


@pytest.fixture
def rollouts(tmp_path) -> Path:
    """Rollouts with messages in place of prompts, as another tool writes them."""
    lines = [
        {"prompt": [{"role": role, "content": "2+1"}], "completion": "3", "correct": True} for role in ("user", "x")
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "rollouts.jsonl"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / (messages[0].role == 'user') }}", "rollouts.jsonl:2"),
        ("{{ messages() }}", "TypeError"),
        (MANY * 9 + "{% endfor %}" * 9, "`chat_template`: the tokenizer's can't be used: took longer than 3 s"),
        ("{{ 'x' * 10**8 }}", "`chat_template`: the tokenizer's can't be used: it makes 100000000 characters"),
    ],
)
def test_a_hostile_template_of_rollouts_in_messages(tokenizer, rollouts, monkeypatch, template, says):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    if "longer than 3 s" in says:
        monkeypatch.setattr(chat, "SECONDS_PER_PROMPT", 3.0)
    with pytest.raises(InputError) as error:
        read_rollouts(rollouts, Vocabulary(tokenizer, 260, frozenset({257})), file_format="trl")
    assert says in str(error.value)


def test_all_prompts_are_rendered_by_one_process_as_transformers_renders_them(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "demo" / "base")
    begun = []
    monkeypatch.setattr(chat, "Child", lambda *given: begun.append(1) or Child(*given))
    monkeypatch.setattr(chat, "_renderers", {})
    chats = [[{"role": "user", "content": text}] for text in ("", "é\n\u2028", "<|im_end|>", "{{ x }}", "𝒙" * 10**5)]
    chats += [[{"role": "system", "content": "s", "extra": [1.5, None, {"a": True}]}, *chats[0]]]
    rendered = [ChatTemplate(tokenizer).render(messages) for messages in chats]
    assert rendered == [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    assert len(begun) == 1
