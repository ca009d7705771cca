"""What the step between two checkpoints is like: of each weight its size, what stayed, and in how many directions."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

RANK_SHARE = 0.95
EXACT_UP_TO = 2048
"""Of larger Gram matrices eigenvalues are taken in float32: those of 95% of the energy are far above its rounding."""


@dataclass(frozen=True)
class StepOfWeight:
    """One parameter's Δ.

    Attributes:
        relative_norm: ‖Δ‖ / ‖W‖; None where the start is all zero.
        unchanged_share: of the entries, those that are the same number at the checkpoints' own precision.
        top1_energy: σ₁² / Σσ² of Δ; None where it is no matrix, or zero, or left out for time.
        rank95: the fewest singular directions that hold 95% of ‖Δ‖²; None likewise.
        is_left_out: whether the spectrum was left out for time.
    """

    relative_norm: float | None
    unchanged_share: float
    top1_energy: float | None
    rank95: int | None
    is_left_out: bool


@torch.inference_mode()
def weights_of_step(start: nn.Module, end: nn.Module, seconds: float) -> Iterator[tuple[str, StepOfWeight]]:
    """Every parameter's Δ by its name, the cheap spectra first; once `seconds` have gone, spectra are left out."""
    ends: Mapping[str, nn.Parameter] = dict(end.named_parameters())
    began = time.perf_counter()
    for name, before in sorted(start.named_parameters(), key=lambda named: _cost(named[1])):
        after = ends[name]
        delta, length = after.float() - before.float(), float(before.float().norm())
        is_matrix, is_late = delta.dim() == 2 and min(delta.shape) > 1, time.perf_counter() - began > seconds
        energies = _energies(delta) if is_matrix and not is_late else torch.zeros(0)
        total = float(energies.sum())
        reached = torch.cumsum(energies, 0) >= RANK_SHARE * total
        yield (
            name,
            StepOfWeight(
                relative_norm=float(delta.norm()) / length if length > 0 else None,
                unchanged_share=float((after == before).float().mean()),
                top1_energy=float(energies[0]) / total if total > 0 else None,
                rank95=int(reached.int().argmax()) + 1 if total > 0 else None,
                is_left_out=is_matrix and is_late,
            ),
        )


def _cost(parameter: torch.Tensor) -> int:
    """About the products that a spectrum takes."""
    return parameter.numel() * min(parameter.shape) if parameter.dim() == 2 else 0


def _energies(delta: torch.Tensor) -> torch.Tensor:
    """Squared singular values, descending, by the smaller Gram matrix. `delta`: [m, n]."""
    delta = delta.T if delta.shape[0] > delta.shape[1] else delta
    delta = delta.double() if len(delta) <= EXACT_UP_TO else delta
    return torch.linalg.eigvalsh(delta @ delta.T).flip(0).clamp(min=0.0).double()
