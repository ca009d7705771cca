"""What every figure is looked at for."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text


def texts_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def assert_nothing_is_cut_off(figure: Figure, name: str = "") -> None:
    """No title, label, note or legend runs over the edge, and no two titles over each other."""
    figure.canvas.draw()
    page, axes = figure.bbox.padded(1), figure.findobj(Axes)
    ticks = {tick for ax in axes for tick in (*ax.get_xticklabels(), *ax.get_yticklabels())}
    hidden = {text for ax in axes if not ax.get_visible() for text in ax.findobj(Text)}
    hidden |= {axis.label for ax in axes if not ax.axison for axis in (ax.xaxis, ax.yaxis)}
    for text in set(figure.findobj(Text)) - ticks - hidden:
        if text.get_text():
            box = text.get_window_extent()
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, f"{name}: {text.get_text()!r} is cut off"
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, f"{name}: {text.get_text()!r} is cut off"
    boxes = [title.get_window_extent() for ax in axes for title in (ax.title, ax._left_title) if title.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), f"{name}: titles overlap"
