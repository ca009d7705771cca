"""`gradprobe COMMAND`: what has no script of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from gradprobe import __main__ as command

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert f"\n    {name} " in command.__doc__


def test_an_unknown_command_is_refused_in_a_line(capsys):
    assert command.main(["\x1b[2Jcheck"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no command")
    assert "\x1b" not in said


def test_what_is_installed_holds_every_script():
    installed = (ROOT / "pyproject.toml").read_text().partition("py-modules = [")[2].partition("]")[0]
    scripts = sorted(file.stem for file in ROOT.glob("*.py"))
    assert sorted(installed.replace('"', "").replace(",", " ").split()) == scripts


def test_the_exit_status_is_the_scripts():
    ran = subprocess.run(
        [sys.executable, "-m", "gradprobe", "check", "nowhere"], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 2
    assert "nowhere" in ran.stderr
