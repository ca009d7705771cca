"""What scripts say: how much, in which colour, and that nothing raw reaches a terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import analyze_exp1_compression
import analyze_exp2_direction
import analyze_exp3_signal
import describe_step
import merge_grad_vector_shards
import plot_exp12_intuitive
import probe_grad_vectors
from gradprobe import __version__, check, show, verify
from gradprobe.common import console

SCRIPTS = [
    probe_grad_vectors,
    merge_grad_vector_shards,
    analyze_exp1_compression,
    analyze_exp2_direction,
    analyze_exp3_signal,
    describe_step,
    plot_exp12_intuitive,
    check,
    show,
    verify,
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_tells_its_version_and_its_flags(script, capsys):
    for flag, expected in (("--version", f"gradprobe {__version__}"), ("--help", "--quiet")):
        with pytest.raises(SystemExit) as ended:
            script.main([flag])
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out


ENDS = """
import importlib, sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "scipy", "matplotlib", "jinja2"]))  # importing one raises
for script, *argv in eval(sys.argv[1]):
    try:
        status = importlib.import_module(script).main(argv)
    except SystemExit as end:
        status = end.code
    print(f"{script} {argv[0]} ends with {status}")
"""


def test_flags_are_told_and_judged_without_the_libraries_that_take_seconds():
    lines = [(script.__name__, flag) for script in SCRIPTS for flag in ("--help", "--version", "--no-such-flag")]
    lines += [("probe_grad_vectors", "--bins=1", "--model-path=m", "--output-dir=d"), ("analyze_exp3_signal", "a")]
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, repr(lines)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    found = [line for line in ended.stdout.splitlines() if " ends with " in line]
    statuses = [0 if line[1] in ("--help", "--version") else 2 for line in lines]
    assert found == [f"{line[0]} {line[1]} ends with {status}" for line, status in zip(lines, statuses, strict=True)]


@pytest.mark.parametrize(
    ("stream", "no_colour", "coloured"), [(Terminal, "", True), (Terminal, "1", False), (io.StringIO, "", False)]
)
def test_colours_are_for_terminals_and_not_where_nobody_wants_them(monkeypatch, stream, no_colour, coloured):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("NO_COLOR", no_colour)
    console.script_main(lambda argv: console.log.warning("odd \x1b[2J rows") or 0)([])
    said = sys.stderr.getvalue()
    assert ("\x1b[33mwarning\x1b[0m: odd" in said) == coloured
    assert "\x1b[2J" not in said
    assert r"odd \x1b[2J rows" in said


def test_a_locale_without_the_letters_loses_no_run(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "iso-8859-1"))
    assert console.script_main(lambda argv: print("ρ is 1 ± 0.5 ‹x›") or 0)([]) == 0
    assert written.getvalue() == b"\\u03c1 is 1 \xb1 0.5 \\u2039x\\u203a\n"


def test_figures_are_drawn_whatever_backend_a_notebook_has_left(tmp_path):
    code = "from gradprobe.figures.look import new_figure, save; from pathlib import Path; import sys; "
    code += "save({'a.png': new_figure(1, 1)}, Path(sys.argv[1]))"
    inline = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=inline, check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "a.png").stat().st_size > 0


def test_quiet_leaves_warnings_and_errors(capsys):
    @console.script_main
    def main(argv):
        parser = console.argparse.ArgumentParser()
        console.add_common_flags(parser)
        parser.parse_args(argv)
        assert list(console.progress(range(3), "steps", 3, "steps")) == [0, 1, 2]
        console.log.info("a note")
        console.log.warning("mind this")
        return 0

    assert main(["--quiet"]) == 0
    assert capsys.readouterr().err == "warning: mind this\n"
    assert main([]) == 0  # the flag does not outlive its run
    said = capsys.readouterr().err
    assert "a note" in said
    assert "steps: 3/3 steps" in said
    assert "left" in said


BAD_TAGS = ["a\x1b[2J", "a\nerror: forged", "a\u202eb", "a\u200bb", "a\x00b", "  ", "../a", "/a", "..", "a\\b"]


@pytest.mark.parametrize("tag", BAD_TAGS)
def test_tags_that_are_no_names_are_refused_in_one_line_that_shows_them(tag, tmp_path, capsys):
    arguments = [f"{tag}=nowhere", "b=nowhere", "--output-dir", str(tmp_path / "out")]
    assert analyze_exp2_direction.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: tag '")
    assert "is no name" in said
    assert said[:-1].isprintable()
    assert not (tmp_path / "out").exists()
