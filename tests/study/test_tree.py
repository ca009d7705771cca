"""Data flows one way through gradprobe's folders, and so do their imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gradprobe"
FOLDERS = ("common", "dump", "problems", "model", "rollouts", "gradients", "probe", "analysis")
EXPERIMENTS = ("exp1", "exp2", "exp3")
HEIGHT = {
    **{name: height for height, name in enumerate(FOLDERS)},
    **dict.fromkeys(EXPERIMENTS, len(FOLDERS)),  # side by side: none may import from another
    "figures": len(FOLDERS) + 1,
    # Doors: nothing inside goes through them.
    **dict.fromkeys(("library", "check", "show", "verify"), len(FOLDERS) + 2),
    **dict.fromkeys(("__init__", "__main__"), len(FOLDERS) + 3),  # open the doors
}
SAID_AT_THE_DOOR = {"__version__"}
"""What `gradprobe/__init__.py` says before anything is imported; every folder may ask for it."""


def upward_imports(source: str, module: str) -> list[str]:
    """Imports of a module, `gradprobe.exp1.measure` or of a folder `gradprobe.exp1.__init__`, that do not go down."""
    here = module.split(".")[1]
    return [
        f"{module}:{line}: imports {there}"
        for line, there in _imported(ast.parse(source), module)
        if there != here and HEIGHT[there] >= HEIGHT[here]
    ]


def _imported(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, folder or door) of everything of gradprobe that is imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = node.module.split(".") if node.module else []
            base = module.split(".")[: -node.level] + named if node.level else named
            paths = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for package, *inside in paths:
            if package == PACKAGE.name and (not inside or inside[0] not in SAID_AT_THE_DOOR):
                yield node.lineno, inside[0] if inside and inside[0] in HEIGHT else "__init__"


def modules() -> dict[str, Path]:
    """Every module of the package by its name; a folder's own is called `__init__`."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join([PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts]): file for file in files}


def test_every_folder_has_its_place():
    assert {name.split(".")[1] for name in modules()} == set(HEIGHT)


def test_imports_go_down():
    assert [found for name, file in modules().items() for found in upward_imports(file.read_text(), name)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gradprobe.analysis.pooled", "from ..exp1.spectrum import energies"),
        ("gradprobe.analysis.pooled", "from .. import exp1"),
        ("gradprobe.analysis.pooled", "import gradprobe.figures.look as look"),
        ("gradprobe.dump.merge", "from gradprobe.probe import plan"),
        ("gradprobe.dump.merge", "def f():\n    from ..model.batches import Budget"),
        ("gradprobe.dump.__init__", "from ..figures import look"),
        ("gradprobe.exp2.measure", "from ..exp1.spectrum import Spectrum"),
        ("gradprobe.exp3.signal", "import json, gradprobe.exp2.direction"),
        ("gradprobe.figures.look", "from .. import library"),
        ("gradprobe.figures.look", "from gradprobe import load_dump"),
        ("gradprobe.figures.look", "import gradprobe"),
    ],
)
def test_an_upward_import_is_found(module, source):
    assert len(upward_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gradprobe.exp2.measure", "from .direction import alignment\nfrom . import summary"),
        ("gradprobe.exp2.measure", "from ..analysis.bucket import Bucket\nimport numpy, gradprobe.dump.format"),
        ("gradprobe.dump.__init__", "from .format import load_dump\nfrom ..common import files"),
        ("gradprobe.probe.plan", "from .. import __version__\nfrom ..dump import format as contract"),
        ("gradprobe.figures.exp1", "from ..exp1.measure import Exp1\nfrom ..exp2 import direction"),
        ("gradprobe.check", "from .dump.consistency import problems_of"),
    ],
)
def test_a_downward_import_passes(module, source):
    assert upward_imports(source, module) == []
