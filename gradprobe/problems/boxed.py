"""The answer in a response's last \\boxed{...}, and whether it is the right one."""

BOX = "\\boxed{"


def last_boxed(text: str) -> str | None:
    """The content of the last balanced `\\boxed{...}` of `text`, or None where there is none.

    Escaped braces (`\\{`, `\\}`) do not count towards the balance.
    """
    # A box that never closes leaves those around it open too: they close before it begins, or not at all. So each
    # character is looked at once, however often a response repeats an open box.
    start, end = text.rfind(BOX), len(text)
    while start != -1:
        content = _balanced_content(text, start + len(BOX), end)
        if content is not None:
            return content
        start, end = text.rfind(BOX, 0, start), start
    return None


def _balanced_content(text: str, start: int, end: int) -> str | None:
    depth, i = 1, start
    while i < end:
        if text[i] == "\\":
            i += 2  # the next character is escaped, or part of a command's name
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
        i += 1
    return None


def is_correct(response: str, ground_truth: str) -> bool:
    """Whether the last balanced box of `response` equals `ground_truth`, white space folded."""
    answer = last_boxed(response)
    return answer is not None and answer.split() == ground_truth.split()
