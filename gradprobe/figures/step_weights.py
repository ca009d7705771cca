"""What a step between two checkpoints is like, in the look of `look`: layers by kinds of weight, and a table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..analysis.text import MISSING, Table, number, share
from ..exp3.by_weight import kind_and_layer
from .look import NOTE_COLOUR, new_figure, shortened, styled

SUMMARY = "step_summary.json"
WEIGHTS = "step_weights.png"
MEASURES = {
    "relative_norm": "length of the change, over the weight's",
    "unchanged_share": "entries that did not change",
    "top1_energy": "the change's energy in one direction",
}

Step = Mapping[str, Any]
"""What `step_summary.json` holds: from, to, and weights by name."""


def by_kind(step: Step) -> dict[str, dict[int | None, Mapping[str, Any]]]:
    """The weights of each kind by their layers; those outside of layers by their own names, under None."""
    found: dict[str, dict[int | None, Mapping[str, Any]]] = {}
    for name, weight in step["weights"].items():
        kind, layer = kind_and_layer(name)
        found.setdefault(kind, {})[layer] = weight
    return found


def table_by_kind(step: Step) -> Table:
    """The medians over layers of every kind of weight, the largest change first."""
    rows, left_out = [], 0
    for kind, weights in by_kind(step).items():
        medians = [_median([one[measure] for one in weights.values()]) for measure in (*MEASURES, "rank95")]
        left_out += sum(one["is_left_out"] for one in weights.values())
        rows.append((medians[0] or 0.0, [kind, str(len(weights)), *_cells(*medians)]))
    notes = [f"{left_out} spectra are left out for time"] if left_out else []
    header = ["kind", "weights", "‖Δ‖ / ‖W‖", "unchanged", "top-1 energy", "rank95"]
    return Table(
        f"from {step['from']} to {step['to']}: medians over layers",
        header,
        [cells for _, cells in sorted(rows, key=lambda row: -row[0])],
        notes,
    )


def _cells(relative: float | None, unchanged: float, top1: float | None, rank: float | None) -> list[str]:
    length = MISSING if relative is None else f"{relative:.2g}"
    return [length, share(unchanged), MISSING if top1 is None else share(top1), number(rank, 0)]


def _is_matrix(weight: Mapping[str, Any]) -> bool:
    return weight["top1_energy"] is not None or weight["is_left_out"]


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


@styled
def draw_weights(step: Step) -> Figure:
    """Heat maps of layers by kinds of matrix; vectors and what lies outside of layers stand in the table alone."""
    kinds = {kind: of for kind, of in by_kind(step).items() if None not in of and any(map(_is_matrix, of.values()))}
    layers = sorted({layer for of in kinds.values() for layer in of})
    figure = new_figure(17.0, 1.8 + 0.42 * max(6, len(kinds)))
    for ax, (measure, title) in zip(figure.subplots(1, 3, sharey=True), MEASURES.items(), strict=True):
        values = [[kinds[kind].get(layer, {}).get(measure) for layer in layers] for kind in kinds]
        _heat_map(ax, np.array(values, dtype=float).reshape(len(kinds), len(layers)), layers, list(kinds), measure)
        ax.set_title(title, loc="left")
    ends = " ".join(f"{end} {shortened(step[end])}" for end in ("from", "to"))
    figure.suptitle(f"What did the step change? {ends}")
    return figure


def _heat_map(ax: Axes, values: np.ndarray, layers: list[int], kinds: list[str], measure: str) -> None:
    image = ax.imshow(np.ma.masked_invalid(values), cmap="cividis", vmin=0.0, aspect="auto")
    every = -(-len(layers) // 12) if layers else 1
    ax.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_xlabel("layer")
    ax.grid(visible=False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8)
    if measure != "relative_norm":
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if not np.isfinite(values).any():
        ax.text(0.5, 0.5, "left out", transform=ax.transAxes, ha="center", color=NOTE_COLOUR)
