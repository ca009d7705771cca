"""Libraries that few need and that are installed apart: the extras of pyproject.toml."""

import importlib
from types import ModuleType

from .errors import InputError


def library(name: str, extra: str, what: str) -> ModuleType:
    """The library of that name, imported; `what` takes it, and `extra` brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise InputError(f"{what} takes the library '{package}'; pip install 'gradprobe[{extra}]'") from error
