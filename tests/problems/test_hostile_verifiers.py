"""Verifiers that print, forge, hang, fork and break what they find: an error or their own verdict, nothing else."""

import logging
import shutil
import time
from pathlib import Path

import pytest

import probe_grad_vectors
from gradprobe.common.errors import InputError
from gradprobe.problems.verify import RunningVerifier, Verdict, load_verifier

FORGE = """
    for fd in range(3, 64):
        try: os.write(fd, LINE)
        except OSError: pass
"""
TRUE = r"b'{\"correct\": true}\n'"
LATER = """
    def later():
        time.sleep(0.2)
        for fd in range(3, 64):
            try: os.write(fd, LINE)
            except OSError: pass
    threading.Thread(target=later, daemon=True).start()
    time.sleep(0.5)
    return False
"""
READ = """
    for fd in range(3, 64):
        try: os.set_blocking(fd, False); os.read(fd, 999)
        except OSError: pass
    return True
"""
CALLS_ITSELF_IN_C = """
    sys.setrecursionlimit(10**9)
    class A:
        def __repr__(self): return repr(self)
    repr(A())
"""
SIZE = 1 << 37  # 128 GiB

HOSTILE = {
    "writes a verdict to every descriptor": (FORGE.replace("LINE", TRUE), "through its channel"),
    "writes two": (FORGE.replace("LINE", TRUE + " * 2"), "through its channel"),
    "writes one with a token of its own": (
        FORGE.replace("LINE", r"b'0' * 32 + b' {\"correct\": true}\n'"), "through its channel",
    ),
    "writes half a line": (FORGE.replace("LINE", "b'{'"), "through its channel"),
    "writes without end": (FORGE.replace("LINE", "b'x' * 10**7"), "answer is longer"),
    "writes what is nested": (FORGE.replace("LINE", r"b'[' * 60000 + b'\n'"), "through its channel"),
    "reads the next question": (READ, True),
    "forges later, from a thread": (LATER.replace("LINE", TRUE), "through its channel"),
    "prints megabytes": ("    print('\\x1b[31mred' * 10**6); return True\n", True),
    "prints to the descriptors": (
        "    os.write(1, b'\\x1b]0;t\\x07' * 9); os.write(2, b'\\x9b31m'); return True\n", True,
    ),
    "lets a child print": ("    subprocess.run(['echo', '\\x1b[31m']); return True\n", True),
    "prints without end": ("    while True: os.write(2, b'x' * 65536)\n", "took longer than"),
    "forks, and both return": ("    os.fork(); return True\n", True),
    "forks, and leaves the copy": ("    if os.fork(): os._exit(3)\n    time.sleep(60)\n", "exit status 3"),
    "leaves": ("    sys.exit('bye \\x1b[31m')\n", "exit status 1), after printing 'bye \\x1b[31m'"),
    "leaves at once": ("    os._exit(0)\n", "exit status 0"),
    "kills itself": ("    os.kill(os.getpid(), 9)\n", "exit status -9"),
    "is interrupted": ("    raise KeyboardInterrupt\n", "ended by itself"),
    "stops itself": ("    os.kill(os.getpid(), signal.SIGSTOP)\n", "took longer than"),
    "closes all descriptors": ("    os.closerange(0, 256); return True\n", "ended by itself"),
    "calls itself": ("    return f(response, ground_truth)\n", "raised RecursionError"),
    "calls itself in C": (CALLS_ITSELF_IN_C, None),
    "takes 128 GiB": (f"    b'x' * {SIZE}\n", "raised MemoryError"),
    "breaks json": ("    json.dumps = lambda *a, **k: 'null'; return True\n", "through its channel"),
    "lets json say one": ("    json.dumps = lambda *a, **k: '{\"correct\": 1}'; return True\n", "neither a verdict"),
    "breaks builtins": ("    import builtins; builtins.isinstance = lambda *a: True; return 'yes'\n", None),
    "breaks open and print": ("    import builtins; builtins.open = builtins.print = None; return True\n", True),
    "breaks stdout": ("    sys.stdout = sys.stderr = None; return True\n", True),
    "handles signals": (
        "    for s in (1, 2, 3, 10, 12, 13, 14, 15): signal.signal(s, signal.SIG_IGN)\n    time.sleep(60)\n",
        "took longer than",
    ),
    "sets an alarm": ("    signal.alarm(1); time.sleep(1.5); return True\n", "exit status -14"),
    "returns what lies about its type": (
        "    class B(int): __class__ = bool\n    return B(7)\n", None,
    ),
    "returns numpy's true": ("    import numpy; return numpy.True_\n", "returned bool"),
    "raises what can't be printed": (
        "    class E(Exception):\n        def __str__(self): raise RuntimeError\n    raise E\n", "raised E",
    ),
    "raises a long message": ("    raise ValueError('x' * 10**8)\n", "raised ValueError: xxx"),
    "raises half a surrogate": ("    raise ValueError('\\ud800\\x1b')\n", "raised ValueError"),
}  # fmt: skip


def own(directory: Path, body: str) -> str:
    head = "import json, os, signal, subprocess, sys, threading, time\n\ndef f(response, ground_truth):\n"
    (directory / "own.py").write_text(f"{head}    if response != 'evil': return response == ground_truth\n{body}")
    return "own:f"


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in HOSTILE.items()])
def test_a_hostile_verifier(tmp_path, monkeypatch, capfd, caplog, case):
    body, outcome = case
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "gradprobe")
    started = time.monotonic()
    with RunningVerifier(load_verifier(own(tmp_path, body)), seconds=4.0) as running:
        before, verdict = running.judge("a", "a"), running.judge("evil", "wrong")
        after = [running.judge(*pair) for pair in [("a", "b"), ("a", "a"), ("a", "b")]]
    assert time.monotonic() - started < 60
    assert before == Verdict(True)
    # What it has broken may cost a few more answers their verdict, but never changes one.
    allowed = [(None, right) for right in (False, True, False)]
    assert all(verdict.correct in found for verdict, found in zip(after, allowed, strict=True))
    assert after[-1] == Verdict(False)
    if isinstance(outcome, bool):
        assert verdict == Verdict(outcome)
    elif outcome is not None:
        assert verdict.correct is None
        assert outcome in verdict.error
    assert len(verdict.error) < 1000
    out, err = capfd.readouterr()
    assert out == ""
    assert all(line.startswith("the verifier has printed ") and line.isprintable() for line in err.splitlines())
    assert all(c.isprintable() for record in caplog.records for c in record.getMessage())


def test_what_it_prints_is_said_once_and_clipped(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "gradprobe")
    name = own(tmp_path, "    print('\x1b[31mred `dataset`' * 10**5); os._exit(0)\n")
    with RunningVerifier(load_verifier(name)) as running:
        for _ in range(3):
            running.judge("evil", "")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the verifier has printed 1800001 bytes, the first of them: \\x1b[31mred 'dataset'")
    assert len(said) < 600


# What identifies its code

MODULES = {
    "checker.py": "from helper import same\nimport json, numpy\n\ndef f(response, ground_truth):\n"
    "    if response == 'never': import late\n    return same(response, ground_truth)\n",
    "helper.py": "import deeper\nfrom tools.texts import clean\n\ndef same(a, b): return clean(a) == clean(b)\n",
    "deeper.py": "import importlib\n\ndef g(): return importlib.import_module('named')\n",
    "late.py": "from tools import numbers\n",
    "named.py": "",
    "tools/texts.py": "from .inner import strip as clean\n",
    "tools/numbers.py": "import broken\n",
    "tools/inner.py": "def strip(text): return text.strip()\n",
    "broken.py": "def (\n",
    "beside.py": "never imported\n",
}


@pytest.fixture
def several(tmp_path, monkeypatch) -> Path:
    """A verifier that imports from six files around it, one of them broken and never reached."""
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
