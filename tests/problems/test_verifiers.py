"""The last balanced box decides; or a value, a library, a function of one's own, stopped when it takes too long."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import probe_grad_vectors
from gradprobe.common.errors import InputError
from gradprobe.problems.boxed import BOX, is_correct, last_boxed
from gradprobe.problems.verifiers import RunningVerifier, Verdict, Verifier, load_verifier

ROOT = Path(__file__).parents[2]


def judged(verifier: Verifier, pairs: list[tuple[str, str]], seconds: float = 10.0) -> list[Verdict]:
    """The verdict on each (response, ground truth), by one process."""
    with RunningVerifier(verifier, seconds) as running:
        return [running.judge(response, ground_truth) for response, ground_truth in pairs]


@pytest.fixture(scope="module")
def numeric() -> Iterator[RunningVerifier]:
    """The verifier by value, running."""
    with RunningVerifier(load_verifier("numeric"), seconds=20) as running:
        yield running


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed{", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def slow_last_boxed(text: str) -> str | None:
    """The same by the definition: from each box, the last first, to the end of the text."""
    for start in range(len(text), -1, -1):
        depth, i = 1, start + len(BOX)
        while text.startswith(BOX, start) and i < len(text):
            if text[i] == "\\":
                i += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len(BOX) : i]
            i += 1
    return None


@given(st.lists(st.sampled_from([BOX, "{", "}", "\\", "x", "boxed{"]), max_size=14).map("".join))
def test_last_boxed_by_its_definition(text):
    assert last_boxed(text) == slow_last_boxed(text)


@pytest.mark.parametrize(
    "text", [BOX * 20_000, "9" * 100_000, "1,111" * 20_000, "5" + " " * 100_000, "\\frac{" * 20_000, "1/" * 50_000]
)
def test_a_degenerate_response_takes_no_time(numeric, text):
    start = time.perf_counter()
    assert numeric.judge(text, "3") == Verdict(False)
    assert time.perf_counter() - start < 10


def test_white_space_is_folded_and_nothing_else():
    assert is_correct("\\boxed{ 1\n +  2 }", "1 + 2")
    assert not is_correct(r"\boxed{1+2}", "1 + 2")
    assert not is_correct(r"\boxed{4.0}", "4")
    assert not is_correct("4", "4")


EQUAL_NUMBERS = [
    ("-.5", r"-\frac{1}{2}"),
    ("\u22123", "-3"),
    (r"1\frac{1}{2}", "3/2"),
    (r"50\%", "0.5"),
    ("50%", "50"),
    ("1{,}234.50", "1234.5"),
    (r"1.2 \times 10^{5}", "120000"),
    ("5 cm", "5"),
    ("x+1", "1+x"),
]
UNEQUAL_NUMBERS = [
    ("0.333", "1/3"),
    ("1,23", "123"),
    ("50%", "5"),
    ("1/0", "1"),
    ("(1, 2)", "12"),
    ("x", "1"),
    ("", "0"),
    ("1e999999999", "1"),
    ("9" * 5000, "9"),
    ("1e3", "1000"),  # equal by our own reading, which math-verify has replaced
]


@pytest.mark.parametrize(("answer", "truth"), EQUAL_NUMBERS)
def test_equal_values_are_correct(numeric, answer, truth):
    assert numeric.judge(f"so \\boxed{{{answer}}}", truth) == Verdict(True)
    assert numeric.judge(f"so \\boxed{{{truth}}}", answer) == Verdict(True)


@pytest.mark.parametrize(("answer", "truth"), UNEQUAL_NUMBERS)
def test_unequal_values_are_not(numeric, answer, truth):
    assert numeric.judge(f"so \\boxed{{{answer}}}", truth) == Verdict(False)
    assert numeric.judge(f"so \\boxed{{{truth}}}", answer) == Verdict(False)


@pytest.mark.parametrize("name", ["boxed", "numeric", "math-verify"])
def test_a_hundred_pairs_are_judged_as_the_docs_show(name):
    pairs = [json.loads(line) for line in (ROOT / "tests/data/answers.jsonl").read_text().splitlines()]
    verdicts = judged(load_verifier(name), [(pair["response"], pair["truth"]) for pair in pairs], 60)
    assert len(pairs) == 100
    assert [verdict.correct for verdict in verdicts] == [pair[name] for pair in pairs]
    shown, column = (ROOT / "docs/problems.md").read_text(), 3 + ["boxed", "numeric", "math-verify"].index(name)
    for kind in {pair["kind"] for pair in pairs}:
        (line,) = [line.split(" | ") for line in shown.splitlines() if line.startswith(f"| {kind} | ")]
        alike = [pair[name] == pair["right"] for pair in pairs if pair["kind"] == kind]
        assert [int(line[1]), int(line[column - 1].strip(" |"))] == [len(alike), sum(alike)]


def test_what_is_no_mathematics_equals_its_own_text_only(numeric):
    assert numeric.judge(r"\boxed{}", "") == Verdict(True)
    assert numeric.judge(r"\boxed{5}", "") == Verdict(False)
    assert numeric.judge("nothing", "x") == Verdict(False)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789.,/%$\\{}-+ frac\n"))
def test_any_text_is_judged_without_a_fault(numeric, text):
    for response in (text, f"\\boxed{{{text}}}"):
        verdict = numeric.judge(response, text)
        assert verdict.error == ""
        assert verdict.correct >= is_correct(response, text)


# Verifiers in a process of their own

FUNCTIONS = """
import os, subprocess, sys, time

sys.setrecursionlimit(500)

def same(response, ground_truth):
    print("what a verifier prints is no verdict")
    return response == ground_truth

def odd(response, ground_truth):
    if response == "raise": raise ValueError("no such\\nanswer")
    if response == "sleep": time.sleep(1000)
    if response == "spin": sum(range(10**12))
    if response == "loop":
        while True:
            try: time.sleep(1)
            except BaseException: pass
    if response == "leak": return bool(bytearray(1 << 37))  # 128 GiB
    if response == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        open(ground_truth, "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(1000)
    if response == "exit": os._exit(7)
    if response == "leave": sys.exit("bye")
    if response == "deep": return odd2(response)
    if response == "int": return 1
    if response == "none": return None
    return response == ground_truth

def odd2(response):
    return odd2(response)

class Grader:
    @staticmethod
    def judge(response, ground_truth): return True

def one_argument(response): return True

not_a_function = 3
"""


@pytest.fixture
def own_verifiers(tmp_path, monkeypatch):
    """A directory with `own.py`, as the current one."""
    (tmp_path / "own.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "lacking.py").write_text("import no_such_library\n")
    (tmp_path / "leaving.py").write_text("import sys; sys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.05)


def test_boxed_runs_here_and_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    pairs = [(r"\boxed{0.5}", "1/2"), (r"\boxed{1/2}", "1/2")]
    assert judged(load_verifier("boxed"), pairs) == [Verdict(False), Verdict(True)]
    assert load_verifier("boxed").description == {"name": "boxed"}


def test_a_function_of_ones_own(own_verifiers, capfd):
    verifier = load_verifier("own:same")
    sha256 = hashlib.sha256((own_verifiers / "own.py").read_bytes()).hexdigest()
    assert verifier.description == {"name": "own:same", "source_sha256": sha256}
    pairs = [("a", "a"), ("a", "b"), ("\ud800", "\ud800"), ("x" * 10**6, "x" * 10**6), ("a\nb", "a\nb")]
    assert [verdict.correct for verdict in judged(verifier, pairs)] == [True, False, True, True, True]
    assert capfd.readouterr().out == ""  # a result of ours would stand there
    assert judged(load_verifier("own:Grader.judge"), [("a", "b")]) == [Verdict(True)]


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("raise", "raised ValueError: no such\nanswer"),
        ("deep", "raised RecursionError: maximum recursion depth exceeded"),
        ("int", "returned int, not bool"),
        ("leak", "raised MemoryError"),
        ("none", "returned NoneType, not bool"),
        ("exit", "its process ended by itself (exit status 7)"),
        ("leave", "its process ended by itself (exit status 1)"),
    ],
)
def test_no_verdict_is_an_error_and_the_next_answer_is_judged(own_verifiers, response, error):
    verdicts = judged(load_verifier("own:odd"), [("a", "a"), (response, response), ("a", "a"), ("a", "b")])
    assert [verdict.correct for verdict in verdicts] == [True, None, True, False]
    assert verdicts[1].error.startswith(error)


@pytest.mark.parametrize("response", ["sleep", "spin", "loop"])
def test_a_verifier_that_hangs_is_stopped(own_verifiers, response):
    verifier = load_verifier("own:odd")
    start = time.monotonic()
    verdicts = judged(verifier, [("a", "a"), (response, response), ("a", "b")], seconds=2)
    assert time.monotonic() - start < 60
    assert verdicts == [Verdict(True), Verdict(None, "took longer than 2 s"), Verdict(False)]


def test_what_a_stopped_verifier_started_is_stopped_too(own_verifiers):
    assert judged(load_verifier("own:odd"), [("child", "pids.txt")], seconds=3)[0].correct is None
    wait_until_gone([int(pid) for pid in (own_verifiers / "pids.txt").read_text().split()])


def test_one_process_judges_all_answers_until_it_has_to_be_stopped(own_verifiers):
    (own_verifiers / "whoami.py").write_text(
        "import os, time\ndef f(response, ground_truth):\n    open(ground_truth, 'w').write(str(os.getpid()))\n"
        "    time.sleep(1000 if response == 'sleep' else 0)\n    return True\n"
    )
    with RunningVerifier(load_verifier("whoami:f"), seconds=2) as running:
        verdicts = [running.judge(response, str(i)) for i, response in enumerate(["", "", "sleep", "", ""])]
        pids = [int((own_verifiers / str(i)).read_text()) for i in range(5)]
        assert is_running(pids[4])
    assert [verdict.correct for verdict in verdicts] == [True, True, None, True, True]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4]
    assert not any(map(is_running, pids))


def test_leaving_half_way_ends_the_process(own_verifiers):
    (own_verifiers / "whoami.py").write_text(
        "import os\ndef f(response, ground_truth):\n    open('pid.txt', 'w').write(str(os.getpid()))\n    return True\n"
    )
    with RunningVerifier(load_verifier("whoami:f")) as running:
        assert running.judge("a", "a").correct
        pid = int((own_verifiers / "pid.txt").read_text())
        assert is_running(pid)
    assert not is_running(pid)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_process_dies_with_its_parent_even_while_it_hangs(own_verifiers, how):
    (own_verifiers / "stuck.py").write_text(
        "import os\ndef f(response, ground_truth):\n"
        "    open('pid.tmp', 'w').write(str(os.getpid())); os.rename('pid.tmp', 'pid.txt')\n"
        "    return sum(range(10**12)) > 0\n"
    )
    script = (
        "from gradprobe.problems.verifiers import RunningVerifier, load_verifier; "
        "RunningVerifier(load_verifier('stuck:f'), 600).judge('', '')"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 30
        while not (own_verifiers / "pid.txt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pid = int((own_verifiers / "pid.txt").read_text())
        assert is_running(pid)
        parent.send_signal(how)
    finally:
        parent.kill()
        parent.wait()
    wait_until_gone([pid])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nix", "not one of boxed, numeric, math-verify, gym, nor of the form module:function"),
        ("own:", "not one of"),
        ("own:same()", "not one of"),
        ("../own:same", "not one of"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("lacking:f", "its module can't be imported (No module named 'no_such_library')"),
        ("broken:f", "its module, when imported, raised ZeroDivisionError"),
        ("leaving:f", "its process ended by itself (exit status 3)"),
        ("own:nix", "'own' has no 'nix'"),
        ("own:not_a_function", "'not_a_function' is of type int, not a function"),
        ("own:one_argument", "can't be called with (response, ground_truth): too many positional arguments"),
    ],
)
def test_verifiers_that_are_none(own_verifiers, name, complaint):
    with pytest.raises(InputError) as error:
        load_verifier(name)
    assert str(error.value).startswith(f"`verifier` {name}: {complaint}")


@pytest.mark.parametrize("name", ["numeric", "math-verify"])
def test_without_its_library_a_verifier_names_the_extra(own_verifiers, name):
    (own_verifiers / "math_verify.py").write_text("raise ImportError('as if it were not installed')\n")
    with pytest.raises(InputError, match=rf"`verifier` {name}: .*pip install 'gradprobe\[math\]'"):
        load_verifier(name)


MATH_EQUAL = [
    ("x+1", "1+x"),
    (r"\frac12", "0.5"),
    (r"\{1, 2\}", r"\{2,1\}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"50\%", "0.5"),
    ("1,234", "1234"),
    (r"\text{yes}", "yes"),
    ("(1,2)", "(1, 2)"),
    (r"\frac{1}{2}", r"$\frac{1}{2}$"),
]
MATH_UNEQUAL = [("x+1", "x-1"), ("5", "6"), ("(1,2)", "(2,1)"), ("", "3"), (r"\frac{1}{", "3"), ("no", "yes")]


@pytest.mark.slow
def test_math_verify():
    verifier = load_verifier("math-verify")
    assert verifier.description["name"] == "math-verify"
    assert verifier.description["version"]
    pairs = [(f"so $\\boxed{{{answer}}}$.", truth) for answer, truth in MATH_EQUAL + MATH_UNEQUAL]
    verdicts = judged(verifier, pairs, 60)
    wrong = [
        (pair, verdict)
        for i, (pair, verdict) in enumerate(zip(pairs, verdicts, strict=True))
        if verdict != Verdict(i < len(MATH_EQUAL))
    ]
    assert wrong == []
    # A ground truth without any mathematics is nobody's wrong answer.
    assert judged(verifier, [(r"\boxed{5}", "")])[0].error.startswith("raised ValueError: no mathematics")


@pytest.mark.slow
def test_math_verify_is_stopped_too():
    pairs = [(r"\boxed{9^{9^9}}", "5"), (r"\boxed{5}", "5")]
    assert judged(load_verifier("math-verify"), pairs, 5) == [Verdict(None, "took longer than 5 s"), Verdict(True)]


# What identifies its code

MODULES = {
    "checker.py": "from helper import same\nimport json, numpy\n\ndef f(response, ground_truth):\n"
    "    return same(response, ground_truth)\n",
    "helper.py": "from tools.texts import clean\n\ndef same(a, b): return clean(a) == clean(b)\n",
    "tools/texts.py": "from .inner import strip as clean\n",
    "tools/inner.py": "def strip(text): return text.strip()\n",
    "beside.py": "never imported\n",
}


@pytest.fixture
def several(tmp_path, monkeypatch) -> Path:
    """A verifier that imports from three files around it."""
    for name, content in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_verifier_imports_is_part_of_its_description(several):
    description = load_verifier("checker:f").description
    imported = {name.removesuffix(".py").replace("/", ".") for name in MODULES} - {"beside"}
    assert set(description["modules"]) == imported


@pytest.mark.parametrize("name", MODULES)
def test_a_change_of_what_it_imports_changes_its_description(several, name):
    before = load_verifier("checker:f").description
    with (several / name).open("a") as file:
        file.write("# changed\n")
    assert (load_verifier("checker:f").description != before) == (name != "beside.py")


def test_a_package_of_ones_own_is_seen_whole(several):
    (several / "graders").mkdir()
    (several / "graders/__init__.py").write_text("from . import rules\n")
    (several / "graders/rules.py").write_text("from .words import f\n")
    (several / "graders/words.py").write_text("def f(response, ground_truth): return True\n")
    before = load_verifier("graders.rules:f").description
    assert before["modules"] == ["graders", "graders.rules", "graders.words"]
    (several / "graders/__init__.py").write_text("from . import rules  # changed\n")
    assert load_verifier("graders.rules:f").description["source_sha256"] != before["source_sha256"]


def test_a_change_while_it_runs_is_refused(several):
    verifier = load_verifier("checker:f")
    (several / "helper.py").write_text("def same(a, b): return True\n")
    with RunningVerifier(verifier) as running, pytest.raises(InputError, match="`verifier` checker:f: its source has"):
        running.judge("a", "b")


def test_a_helper_edited_between_kill_and_resume_is_refused(
    several, checkpoint_dir, problems_file, monkeypatch, capsys
):
    arguments = ["--model-path", checkpoint_dir, "--dataset", problems_file, "--output-dir", several / "out"]
    arguments += ["--num-prompts", 2, "--num-samples", 2, "--max-new-tokens", 5, "--device", "cpu", "--bins", 2]
    arguments = [*map(str, arguments), "--verifier", "checker:f"]

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gradprobe.probe.run.write_gradients", interrupted)
        assert probe_grad_vectors.main(arguments) == 130
    shutil.copytree(several / "out", several / "copy")
    (several / "tools/inner.py").write_text("def strip(text): return text.strip().lower()\n")
    assert probe_grad_vectors.main(arguments) == 2
    assert "source_sha256" in capsys.readouterr().err
    assert (several / "out/rollouts.jsonl").read_bytes() == (several / "copy/rollouts.jsonl").read_bytes()
    (several / "tools/inner.py").write_text(MODULES["tools/inner.py"])
    assert probe_grad_vectors.main(arguments) == 0
