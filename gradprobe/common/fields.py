"""JSON objects held against a table: which fields, what each holds, and the words for it where it does not."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

MOST = 1 << 62
"""What integers and numbers in a file stay below: more would not fit an array."""


@dataclass(frozen=True)
class Kind:
    """What a field holds: what it `accepts`, and in `words`, after "is not", what it has to be."""

    accepts: Callable[[Any], bool]
    words: str
    is_optional: bool = False

    def optional(self) -> "Kind":
        """The kind of a field that may be missing."""
        return replace(self, is_optional=True)

    def or_null(self) -> "Kind":
        """The kind of a field that may be missing or null."""
        return Kind(lambda value: value is None or self.accepts(value), self.words, is_optional=True)


def faults_of(record: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Iterator[str]:
    """Each field that is missing or of another kind than its own; fields that are not in `kinds` are free."""
    for name, kind in kinds.items():
        if name not in record:
            if not kind.is_optional:
                yield f"'{name}' is missing"
        elif not kind.accepts(record[name]):
            yield f"'{name}' is not {kind.words}"


def is_index(value: Any) -> bool:
    """Whether it is an integer from 0 (true and false are none)."""
    return type(value) is int and 0 <= value < MOST


def is_finite(value: Any) -> bool:
    """Whether it is a number that an array can hold (true and false are none)."""
    return type(value) in (int, float) and abs(value) < MOST


def list_of(accepts: Callable[[Any], bool], words: str) -> Kind:
    """Lists, empty ones too."""
    return Kind(lambda value: isinstance(value, list) and all(map(accepts, value)), f"a list of {words}")


def _of_type(kind: type, words: str) -> Kind:
    return Kind(lambda value: isinstance(value, kind), words)


INDEX = Kind(is_index, "an integer from 0")
NUMBER = Kind(is_finite, "a finite number")
TEXT, TRUE_OR_FALSE, LIST = _of_type(str, "a text"), _of_type(bool, "true or false"), _of_type(list, "a list")
