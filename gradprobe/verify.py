"""Was the answer right? The content of the last balanced \\boxed{...} against the ground truth."""

BOX = "\\boxed{"


def last_boxed(text: str) -> str | None:
    """The content of the last balanced `\\boxed{...}` of `text`, or None where there is none.

    Escaped braces (`\\{`, `\\}`) do not count towards the balance.
    """
    start = text.rfind(BOX)
    while start != -1:
        content = _balanced_content(text, start + len(BOX))
        if content is not None:
            return content
        start = text.rfind(BOX, 0, start)
    return None


def _balanced_content(text: str, start: int) -> str | None:
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 2  # the next character is escaped, or part of a command's name
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
        i += 1
    return None


def fold_whitespace(text: str) -> str:
    """`text` without outer white space and with every inner run of it as one blank."""
    return " ".join(text.split())


def is_correct(response: str, ground_truth: str) -> bool:
    """Whether the last balanced box of `response` equals `ground_truth`, white space folded."""
    answer = last_boxed(response)
    return answer is not None and fold_whitespace(answer) == fold_whitespace(ground_truth)
