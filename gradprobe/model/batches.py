"""Sequences of similar length run together, in batches that halve where memory runs out."""

import gc
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

log = logging.getLogger(__name__)


def pad_right(sequences: list[list[int]], device: torch.device, length: int | None = None) -> torch.Tensor:
    """Token ids as one [batch, length] tensor, zeros behind each row's own tokens."""
    length = length or max(len(sequence) for sequence in sequences)
    padded = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return padded.to(device)


def pad_left(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with zeros before them, and a mask that is 0 there, both [batch, length]."""
    length = max(map(len, sequences))
    padded = torch.zeros((len(sequences), length), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, sequence in enumerate(sequences):
        padded[i, length - len(sequence) :] = torch.tensor(sequence)
        mask[i, length - len(sequence) :] = 1
    return padded.to(device), mask.to(device)


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
    batch of its own.

    Args:
        lengths: of each sequence, in tokens.
        batch_tokens: the budget; a `Budget` is changed in place, so that it outlives the call.
        run: takes the indices of one batch; has no effect when it fails.
        done: indices left out: the first batches of an earlier call, so that the others come as they would have.

    Yields:
        (indices of a batch, what `run` returned for it).

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: a single sequence does not fit.
    """
    budget = batch_tokens if isinstance(batch_tokens, Budget) else Budget(batch_tokens)
    left = set(range(len(lengths))) - set(done)
    waiting = deque(sorted(left, key=lambda i: (-lengths[i], i)))
    while waiting:
        n_rows = max(1, min(len(waiting), budget.tokens // max(1, lengths[waiting[0]])))
        batch = [waiting[k] for k in range(n_rows)]
        try:
            result = run(batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if n_rows == 1 or not is_out_of_memory(error):
                raise
            result = None
        if result is None:
            # Outside the except block: the exception's traceback would keep the batch's tensors alive.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            budget.tokens = n_rows * lengths[waiting[0]] // 2
            message = f"out of memory with {n_rows} sequences of {lengths[waiting[0]]} tokens: halving the batch"
            log.log(logging.DEBUG if budget.was_halved else logging.INFO, message)
            budget.was_halved = True
            continue
        for _ in batch:
            waiting.popleft()
        yield batch, result


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises a plain RuntimeError where the CPU's allocator fails."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
