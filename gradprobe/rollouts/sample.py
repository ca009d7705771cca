"""Sampling from the policy itself; entropy and log-prob of every response token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from ..common.errors import InputError
from ..model.batches import Budget, pad_left, run_in_batches
from ..model.placement import input_device

COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn from the full softmax, and what ends one.

    Attributes:
        n_samples: responses to each prompt.
        max_new_tokens: tokens of a response at most.
        temperature: divides the logits.
        end_ids: any of them ends a response, which keeps it.
        context: the most tokens of prompt and response together; None for no bound.
        stop: ends a response too; None for no such text.
    """

    n_samples: int
    max_new_tokens: int
    temperature: float = 1.0
    end_ids: frozenset[int] = frozenset()
    context: int | None = None
    stop: "StopText | None" = None

    def room_after(self, prompt: list[int]) -> int:
        """How many tokens a response to `prompt` can have."""
        room = self.max_new_tokens if self.context is None else self.context - len(prompt)
        return min(room, self.max_new_tokens)

    def is_over(self, ids: list[int]) -> bool:
        """Whether the last of `ids`, at least one, ends a response."""
        return ids[-1] in self.end_ids or (self.stop is not None and self.stop.ends(ids))


@dataclass(frozen=True)
class StopText:
    """A text that ends a response with the token in which it is complete; that token stays, as an end id does.

    Where a response ends hangs on nothing but the tokens before, so they are as much the policy's as any others.
    """

    text: str
    decode: Callable[[list[int]], str]

    def ends(self, ids: list[int]) -> bool:
        """Whether the last of `ids` completes the text."""
        # A token has a byte at least; one more, since tokenizers drop a blank before the first word.
        return self.text in self.decode(ids[-len(self.text.encode()) - 1 :])


Uniforms = Callable[[int, int], np.ndarray]
"""(prompt number, sample number) -> [max_new_tokens] in [0, 1)."""


def rollout_uniforms(seed: int, prompt_idx: int, sample_idx: int, n: int) -> np.ndarray:
    """The uniform numbers of one rollout's steps: a pure function of (seed, prompt, sample, step)."""
    return np.random.Generator(np.random.Philox([seed, prompt_idx, sample_idx])).random(n)


def chunks_of(rows_per_prompt: Sequence[int], max_rows: int) -> Iterator[range]:
    """Yield stretches of consecutive prompts with at most `max_rows` responses together, but at least one prompt."""
    start = n_rows = 0
    for index, n in enumerate(rows_per_prompt):
        if index > start and n_rows + n > max_rows:
            yield range(start, index)
            start, n_rows = index, 0
        n_rows += n
    if start < len(rows_per_prompt):
        yield range(start, len(rows_per_prompt))


def sample_from(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """Inverse-CDF sampling from the full softmax: the first token whose cumulative probability exceeds u.

    Args:
        logits: [batch, vocab].
        uniforms: [batch] float64 in [0, 1).
        temperature: divides the logits.

    Returns:
        [batch] token ids.

    Raises:
        InputError: a row of logits makes no distribution (NaN, or +infinity).
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    if not cumulative[:, -1].isfinite().all():
        raise InputError("the model's logits are not finite, so no token can be drawn: is the checkpoint sound?")
    # Scaled to the last entry, which is 1 only up to rounding, so that u never lies beyond the table.
    u = (uniforms * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, u, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def sample_responses(
    model: nn.Module,
    prompts: list[list[int]],
    uniforms: Uniforms,
    sampling: Sampling,
    max_rows: int | Budget = 256,
) -> Iterator[list[list[list[int]]]]:
    """Sample responses to each prompt from the model's full softmax.

    The model's generation config plays no part: neither top-k, top-p nor penalties apply. One uniform number decides
    each token, so a response depends on the batch around it only through rounding.

    Args:
        prompts: token ids of each prompt.
        uniforms: gives the uniform numbers of (number of the prompt, number of the sample).
        max_rows: how many responses are sampled at once.

    Yields:
        The next few prompts' responses: [prompt][sample][token].
    """
    n_samples = sampling.n_samples

    def run(batch: list[int]) -> list[list[int]]:
        steps = np.stack([uniforms(p, s)[: sampling.max_new_tokens] for p in batch for s in range(n_samples)])
        rooms = np.repeat([sampling.room_after(prompts[p]) for p in batch], n_samples)
        return _sample_batch(model, [prompts[p] for p in batch], sampling, steps, rooms)

    # Every prompt counts for as many rows as it has samples, so that prompts keep their order.
    for _, rows in run_in_batches([n_samples] * len(prompts), max_rows, run):
        yield [rows[i : i + n_samples] for i in range(0, len(rows), n_samples)]


@torch.inference_mode()
def _sample_batch(
    model: nn.Module, prompts: list[list[int]], sampling: Sampling, uniforms: np.ndarray, rooms: np.ndarray
) -> list[list[int]]:
    """One batch: prompts are run once, then their caches are repeated for the samples.

    Args:
        uniforms: [prompts * n_samples, steps].
        rooms: [prompts * n_samples] the most tokens of each response.
    """
    device = input_device(model)
    ends = torch.tensor(sorted(sampling.end_ids), device=device)
    input_ids, mask = pad_left(prompts, device)
    cache = DynamicCache(config=model.config)
    position_ids = (mask.cumsum(-1) - 1).clamp_(min=0)
    logits = _next_logits(model, cache, input_ids, mask, position_ids)
    cache.batch_repeat_interleave(sampling.n_samples)
    logits = logits.repeat_interleave(sampling.n_samples, dim=0)
    mask = mask.repeat_interleave(sampling.n_samples, dim=0)
    next_position = position_ids[:, -1].repeat_interleave(sampling.n_samples) + 1

    n_rows, n_steps = uniforms.shape
    tokens = torch.zeros((n_rows, n_steps), dtype=torch.long, device=device)
    u = torch.from_numpy(uniforms).to(device)
    lengths = torch.from_numpy(rooms).to(device)
    row_of = torch.arange(n_rows, device=device)  # which row of `tokens` each row of the batch is
    live = torch.ones(n_rows, dtype=torch.bool, device=device)
    for step in range(n_steps):
        drawn = sample_from(logits, u[row_of, step], sampling.temperature)
        tokens[row_of, step] = drawn
        ended = live & (torch.isin(drawn, ends) | (lengths[row_of] == step + 1))
        if sampling.stop is not None:
            so_far = tokens[row_of, : step + 1].tolist()
            ended |= live & torch.tensor([sampling.stop.ends(ids) for ids in so_far], device=device)
        lengths[row_of[ended]] = step + 1
        live &= ~ended
        n_live = int(live.sum())
        if n_live == 0 or step + 1 == n_steps:
            break
        if n_live <= COMPACT_BELOW * len(live):
            kept = live.nonzero()[:, 0]
            cache.batch_select_indices(kept.cpu())  # layers may lie on several devices
            drawn, mask, next_position, row_of, live = (x[kept] for x in (drawn, mask, next_position, row_of, live))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = _next_logits(model, cache, drawn[:, None], mask, next_position[:, None])
        next_position = next_position + 1
    return [row[:n].tolist() for row, n in zip(tokens.cpu(), lengths.tolist(), strict=True)]


def _next_logits(
    model: nn.Module, cache: DynamicCache, input_ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """[batch, vocab] logits after the last of `input_ids`, [batch, new]; the cache grows by these."""
    return model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
