"""The last balanced box decides."""

import pytest

from gradprobe.verify import is_correct, last_boxed


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


def test_white_space_is_folded_and_nothing_else():
    assert is_correct("\\boxed{ 1\n +  2 }", "1 + 2")
    assert not is_correct(r"\boxed{1+2}", "1 + 2")
    assert not is_correct(r"\boxed{4.0}", "4")
    assert not is_correct("4", "4")
