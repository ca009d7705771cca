"""The modules that a user's module is made of: what identifies code that lies in several files."""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Collection, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]
INSTALLED = {"site-packages", "dist-packages"}
"""Directories of this name hold libraries; their modules have versions and are not looked into."""
LOADERS = {"import_module", "__import__"}


def identity_of(name: str, loaded_before: Collection[str] = ()) -> dict[str, Any]:
    """The hash of a loaded module's source and of all that it imports from the user's own directories.

    These are the modules that its source names, inside functions too, and theirs in turn; and those that importing it
    has loaded. What is computed when it runs (`import_module(variable)`) and other files that it reads are not seen.

    Args:
        name: of the module, which is imported already.
        loaded_before: modules that were loaded before it was.

    Returns:
        `source_sha256`, for a single file that of its bytes; and `modules`, where there are others, their names.
    """
    files = dict(_imported_from(name))
    for other, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if other not in loaded_before and isinstance(file, str) and _is_own(Path(file)):
            files.setdefault(other, Path(file))
    hashes = {other: hashlib.sha256(file.read_bytes()).hexdigest() for other, file in sorted(files.items())}
    if set(hashes) <= {name}:
        file = getattr(sys.modules[name], "__file__", None)
        return {"source_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "no file"}
    listed = "".join(f"{other} {sha256}\n" for other, sha256 in hashes.items())
    return {"source_sha256": hashlib.sha256(listed.encode()).hexdigest(), "modules": list(hashes)}


def _imported_from(name: str) -> Iterator[tuple[str, Path]]:
    """(name, file) of a module and of all that it imports, as far as they are the user's own; nothing is run."""
    seen: set[str] = set()
    left = [name]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        package = name.rpartition(".")[0]
        left += [package] if package else []
        spec = _spec_of(name)
        if spec is None or not spec.has_location or not _is_own(Path(spec.origin)):
            continue
        file = Path(spec.origin)
        yield name, file
        if file.suffix == ".py":
            is_package = spec.submodule_search_locations is not None
            left += _names_in(file.read_bytes(), name if is_package else package)


def _spec_of(name: str) -> ModuleSpec | None:
    """Where a module is, found without importing the packages around it."""
    path, spec = None, None
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:n]), path)
        if spec is None or (n < len(parts) and spec.submodule_search_locations is None):
            return None
        path = spec.submodule_search_locations
    return spec


def _is_own(file: Path) -> bool:
    """Whether it is the user's: part neither of Python, nor of what is installed, nor of this package."""
    file = file.absolute()
    foreign = [Path(sysconfig.get_path(which)) for which in ("stdlib", "platstdlib")]
    foreign.append(Path(__file__).parents[1])
    return file.is_file() and not INSTALLED & set(file.parts) and not any(map(file.is_relative_to, foreign))


def _names_in(source: bytes, package: str) -> Iterator[str]:
    """What a source may import, anywhere in it: modules, and names that are modules or something else."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # it could not be imported either
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")
            base = ".".join(around[: len(around) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in LOADERS and isinstance(node.args[0].value, str):
                yield node.args[0].value.lstrip(".")
