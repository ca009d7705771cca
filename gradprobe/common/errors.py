"""The one exception that means "the input is at fault, not the program"."""

from collections.abc import Iterable


class InputError(ValueError):
    """Bad usage or bad input: the scripts print it on one line and exit with status 2.

    Validators collect every problem they find and raise once.
    """

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("; ".join(problems))


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one `InputError` naming all `problems`, or return if there are none."""
    found = tuple(problems)
    if found:
        raise InputError(*found)
