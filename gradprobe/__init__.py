"""Exact per-token policy gradients of language models by entropy bucket, and what their directions say about RL.

    from gradprobe import alignment, jackknife, load_dump, participation_ratio, row_gradients

docs/library.md shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["alignment", "jackknife", "load_dump", "participation_ratio", "row_gradients"]

if TYPE_CHECKING:
    from .library import alignment, jackknife, load_dump, participation_ratio, row_gradients


def __getattr__(name: str) -> Any:
    """The public functions, imported when first asked for: the scripts that need no torch don't wait for it."""
    if name in __all__:
        return getattr(import_module(".library", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
