"""Sequences of similar length run together, in batches that halve where memory runs out."""

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

log = logging.getLogger(__name__)


def on_device(numbers: Sequence[Any] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Whole numbers there, int64; nothing waits for the device, as `torch.tensor(..., device=...)` would."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


def pad_right(sequences: list[list[int]], device: torch.device) -> torch.Tensor:
    """Token ids as one [batch, length] tensor, each row's last token again behind its own.

    Not a padding token: its embedding is zero, where a norm has no derivative, and NaN would spread (Gemma 3n).
    """
    longest = max(map(len, sequences))
    rows = [sequence + (sequence[-1:] or [0]) * (longest - len(sequence)) for sequence in sequences]
    return on_device(rows, device)


def pad_left(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with each row's first token again before them, and a mask that is 0 there, both [batch, length]."""
    longest = max(map(len, sequences))
    ids = [sequence[:1] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return on_device(ids, device), on_device(mask, device)


Result = TypeVar("Result")


@dataclass
class Budget:
    """How much goes through the model at once: padded tokens, or rows. Halved for good where memory runs out."""

    tokens: int
    was_halved: bool = False


def run_in_batches(
    lengths: list[int],
    batch_tokens: int | Budget,
    run: Callable[[list[int]], Result],
    done: Collection[int] = (),
) -> Iterator[tuple[list[int], Result]]:
    """Run sequences of similar length together, longest first, at most `batch_tokens` padded tokens at a time.

    The longest come first so that what does not fit into memory shows at once. Where memory runs out, the batch is
    halved, once and for all, and run again; what was yielded before stays. A sequence longer than the budget is a
    batch of its own; where it alone does not fit, its error is raised.

    Args:
        lengths: of each sequence, in tokens.
        batch_tokens: the budget; a `Budget` is changed in place, so that it outlives the call.
        run: takes the indices of one batch; has no effect when it fails.
        done: indices left out: the first batches of an earlier call, so that the others come as they would have.

    Yields:
        (indices of a batch, what `run` returned for it).
    """
    budget = batch_tokens if isinstance(batch_tokens, Budget) else Budget(batch_tokens)
    left = set(range(len(lengths))) - set(done)
    waiting = sorted(left, key=lambda i: (-lengths[i], i))
    while waiting:
        n_rows = max(1, min(len(waiting), budget.tokens // max(1, lengths[waiting[0]])))
        batch = waiting[:n_rows]
        try:
            result = run(batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if n_rows == 1 or not is_out_of_memory(error):
                raise
        else:
            del waiting[:n_rows]
            yield batch, result
            continue
        # Outside the except block: the exception's traceback would keep the batch's tensors alive.
        gc.collect()
        torch.cuda.empty_cache()
        budget.tokens = n_rows * lengths[batch[0]] // 2
        message = f"out of memory with {n_rows} sequences of {lengths[batch[0]]} tokens: halving the batch"
        log.log(logging.DEBUG if budget.was_halved else logging.INFO, message)
        budget.was_halved = True


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises a plain RuntimeError where the CPU's allocator fails, the system an OSError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
