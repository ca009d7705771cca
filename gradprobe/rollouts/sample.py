"""Sampling from the policy itself; entropy and log-prob of every response token."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import Cache, DynamicCache

from ..common.errors import InputError
from ..model.batches import Budget, on_device, pad_left, run_in_batches
from ..model.past import cache_name, keeps_tokens_apart, no_cache, refuse_lengths, refuse_without_cache
from ..model.placement import input_device
from .key_values import KeyValues

FREE_AT_ONCE = 0.125
"""So large a share of the rows is given up at once."""
WORDS_PER_BLOCK = 256
STEPS_UNSEEN = {"cpu": 1, "cuda": 8}
"""How many tokens are drawn between two looks at which rollouts are over: a look waits for the device."""


@dataclass(frozen=True)
class Sampling:
    """How `n_samples` responses to each prompt are drawn from the full softmax, and what ends one.

    Attributes:
        temperature: divides the logits.
        end_ids: any of them ends a response, which keeps it.
        context: the most tokens of prompt and response together; None for no bound.
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

    def n_until_over(self, ids: list[int]) -> int:
        """How many of `ids` stand before a response is over, what ends it included; all where nothing does."""
        return next((n for n in range(1, len(ids) + 1) if self.ends(ids, n)), len(ids))

    def ends(self, ids: list[int], n: int) -> bool:
        """Whether the n-th of a response's `ids` ends it."""
        return ids[n - 1] in self.end_ids or (self.stop is not None and self.stop.ends(ids, n))


@dataclass(frozen=True)
class StopText:
    """A text that ends a response with the token in which it is complete; that token stays, as an end id does.

    Where a response ends hangs on nothing but the tokens before, so they are as much the policy's as any others.
    """

    text: str
    decode: Callable[[list[int]], str]

    def ends(self, ids: list[int], n: int) -> bool:
        """Whether the n-th of a response's `ids` completes the text."""
        # A token has a byte at least; one more, since tokenizers drop a blank before the first word.
        return self.text in self.decode(ids[max(0, n - len(self.text.encode()) - 1) : n])


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


def sample_from(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling from the full softmax: the first token whose cumulative probability exceeds u.

    Summed block by block and then inside one block only: no float64 table of the vocabulary, no wait for the device.

    Args:
        logits: [batch, vocab].
        uniforms: [batch] float64 in [0, 1).

    Returns:
        (token ids, whether the logits made a distribution), both [batch].
    """
    logits = logits.float()
    weights = torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    size = weights.shape[-1]
    n_whole = size // WORDS_PER_BLOCK
    whole = weights[:, : n_whole * WORDS_PER_BLOCK].unflatten(-1, (n_whole, WORDS_PER_BLOCK)).sum(-1)
    rest = weights[:, n_whole * WORDS_PER_BLOCK :].sum(-1, keepdim=True)
    up_to = torch.cat([whole, rest], dim=-1).cumsum(-1, dtype=torch.float64)
    # Scaled to the last entry, which is 1 only up to rounding, so that u never lies beyond the table.
    u = uniforms[:, None] * up_to[:, -1:]
    block = torch.searchsorted(up_to, u, right=True).clamp_(max=n_whole)
    before = torch.where(block > 0, up_to.gather(1, (block - 1).clamp_(min=0)), 0.0)
    words = block * WORDS_PER_BLOCK + torch.arange(WORDS_PER_BLOCK, device=weights.device)
    inside = torch.where(words < size, weights.gather(1, words.clamp(max=size - 1)), 0.0)
    inside = inside.cumsum(-1, dtype=torch.float64)
    # The block's own sum, float32, may differ in its last digit: its last word of any weight takes what is over.
    last = inside[:, -1:].nextafter(torch.zeros_like(u))
    place = torch.searchsorted(inside, torch.minimum(u - before, last), right=True)
    drawn = words.gather(1, place.clamp_(max=WORDS_PER_BLOCK - 1))[:, 0].clamp_(max=size - 1)
    return drawn, up_to[:, -1].isfinite()


def _raise_unless(is_sound: bool) -> None:
    if not is_sound:
        raise InputError("the model's logits are not finite, so no token can be drawn: is the checkpoint sound?")


def sample_responses(
    model: nn.Module,
    prompts: list[list[int]],
    uniforms: Uniforms,
    sampling: Sampling,
    max_rows: int | Budget = 256,
) -> Iterator[list[list[list[int]]]]:
    """Sample responses to each prompt, `max_rows` at once; yields the next few prompts': [prompt][sample][token].

    The model's generation config plays no part: neither top-k, top-p nor penalties apply. One uniform number decides
    each token, so a response depends on the batch around it only through rounding.
    """
    refuse_lengths(model, max((len(p) + sampling.room_after(p) for p in prompts), default=0), "`max_new_tokens`")
    if not keeps_tokens_apart(model):
        yield from _one_prompt_at_a_time(model, prompts, uniforms, sampling, max_rows)
        return
    n_samples = sampling.n_samples

    def run(batch: list[int]) -> list[list[int]]:
        steps = np.stack([uniforms(p, s)[: sampling.max_new_tokens] for p in batch for s in range(n_samples)])
        return _Rows(model, sampling, [prompts[p] for p in batch], steps).run()

    # Every prompt counts for as many rows as it has samples, so that prompts keep their order.
    for _, rows in run_in_batches([n_samples] * len(prompts), max_rows, run):
        yield [rows[i : i + n_samples] for i in range(0, len(rows), n_samples)]


def _one_prompt_at_a_time(
    model: nn.Module, prompts: list[list[int]], uniforms: Uniforms, sampling: Sampling, max_rows: int | Budget
) -> Iterator[list[list[list[int]]]]:
    """As `sample_responses`, with whatever cache is the model's own: rows of one prompt in step, so nothing is padded.

    Rows that are over run on with the others until all are.
    """
    refuse_without_cache(model)
    name, device = cache_name(model), input_device(model)
    named = inspect.signature(type(model).forward).parameters
    last_alone = {"logits_to_keep": 1} if "logits_to_keep" in named else {}

    @torch.inference_mode()
    def responses_to(prompt: list[int], u: torch.Tensor) -> list[list[int]]:
        found, is_over = [[] for _ in u], [False] * len(u)
        new, behind, n_seen = on_device([prompt] * len(u), device), {}, 0
        for step in range(sampling.room_after(prompt)):
            if "position_ids" in named:  # Bamba counts from 0 behind any cache
                behind["position_ids"] = torch.arange(n_seen, n_seen + new.shape[1], device=device).expand_as(new)
            n_seen += new.shape[1]
            output = model(input_ids=new, use_cache=True, **last_alone, **behind)
            behind = {name: getattr(output, name, None)}
            if not isinstance(behind[name], Cache):  # of another kind, which a batch may not pass through unharmed
                raise InputError(no_cache(model))
            drawn, is_sound = sample_from(output.logits[:, -1], u[:, step], sampling.temperature)
            *tokens, is_all_sound = torch.cat([drawn, is_sound.all()[None]]).tolist()
            _raise_unless(is_all_sound)
            for row, token in enumerate(tokens):
                if not is_over[row]:
                    found[row].append(token)
                    is_over[row] = sampling.ends(found[row], step + 1)
            if all(is_over):
                break
            new = drawn[:, None]
        return found

    budget = max_rows if isinstance(max_rows, Budget) else Budget(max_rows)
    for p, prompt in enumerate(prompts):
        steps = torch.from_numpy(np.stack([uniforms(p, s) for s in range(sampling.n_samples)]))
        run = lambda b: responses_to(prompt, steps[b].to(device, non_blocking=True))  # noqa: B023, E731
        batches = run_in_batches([1] * len(steps), budget, run)
        yield [[ids for _, found in batches for ids in found]]


class _Rows:
    """Rollouts under way side by side, each in a row of its own; what is over gives its row up.

    One may run on past its end, until it is looked at; what it draws there is cut off. Each of the `prompts` has
    `sampling.n_samples` rows of `uniforms`, [rows, steps].
    """

    def __init__(self, model: nn.Module, sampling: Sampling, prompts: list[list[int]], uniforms: np.ndarray) -> None:
        self._model, self._sampling, self._prompts, self._device = model, sampling, prompts, input_device(model)
        self._responses: list[list[int]] = [[] for _ in uniforms]
        self._step, self._unseen = 0, STEPS_UNSEEN[self._device.type]
        self._ends = on_device(sorted(sampling.end_ids), self._device)
        self._is_sound = torch.ones((), dtype=torch.bool, device=self._device)
        # Of each row: which rollout is in it (-1: it is over), and the column where its prompt begins.
        self._row = np.arange(len(uniforms))
        n_prompt = np.repeat(list(map(len, prompts)), sampling.n_samples)
        self._start = n_prompt.max() - n_prompt
        room = np.repeat([sampling.room_after(prompt) for prompt in prompts], sampling.n_samples)
        self._room, self._n_prompt = on_device(room, self._device), on_device(n_prompt, self._device)
        # The last column of both is for what is cut off.
        self._u = torch.from_numpy(np.pad(uniforms, ((0, 0), (0, 1)))).to(self._device, non_blocking=True)
        self._tokens = torch.zeros(self._u.shape, dtype=torch.long, device=self._device)
        self._is_over = torch.zeros(len(uniforms), dtype=torch.bool, device=self._device)

    @torch.inference_mode()
    def run(self) -> list[list[int]]:
        """[rows][tokens] all responses."""
        cache = self._begin()
        while len(self._row):
            cache.begin = int(self._start[self._row >= 0].min())
            for _ in range(self._unseen):
                self._advance(cache)
            self._look()
            is_left = self._row >= 0
            if (~is_left).sum() >= FREE_AT_ONCE * len(self._row) or not is_left.any():
                self._keep(np.flatnonzero(is_left), cache)
        return self._responses

    def _begin(self) -> KeyValues:
        """Run the prompts, each once, and draw the first tokens."""
        input_ids, mask = pad_left(self._prompts, self._device)
        filled = DynamicCache()
        logits = _next_logits(self._model, filled, input_ids, mask, (mask.cumsum(-1) - 1).clamp_(min=0))
        prompt_of = torch.arange(len(self._prompts), device=self._device).repeat_interleave(self._sampling.n_samples)
        self._draw(logits[prompt_of])
        most = max(map(self._sampling.room_after, self._prompts))
        return KeyValues(filled, prompt_of, input_ids.shape[1] + most + self._unseen)

    def _draw(self, logits: torch.Tensor) -> None:
        at = min(self._step, self._tokens.shape[1] - 1)
        self._last, is_sound = sample_from(logits, self._u[:, at], self._sampling.temperature)
        self._tokens[:, at] = self._last
        self._step += 1
        self._is_over |= torch.isin(self._last, self._ends) | (self._step >= self._room)
        self._is_sound &= is_sound.all()

    def _advance(self, cache: KeyValues) -> None:
        """One more token in every row."""
        columns = torch.arange(cache.begin, cache.end + 1, device=self._device)
        mask = (columns >= on_device(self._start, self._device)[:, None]).long()
        # A rollout that runs on past its end must not leave the model's context.
        position = self._n_prompt + self._room.clamp(max=self._step) - 1
        logits = _next_logits(self._model, cache, self._last[:, None], mask, position[:, None])
        cache.end += 1
        self._draw(logits)

    def _look(self) -> None:
        """Take out what is over."""
        told = torch.cat([self._is_over, self._is_sound[None]]).cpu().numpy()  # one copy, so one wait for the device
        _raise_unless(told[-1])
        is_over, stop = told[:-1] & (self._row >= 0), self._sampling.stop
        if stop is None and not is_over.any():
            return
        tokens = self._tokens.cpu()
        if stop is not None:
            new = range(max(1, self._step - self._unseen), self._step + 1)
            is_over |= [
                row >= 0 and any(stop.ends(ids, n) for n in new)
                for row, ids in zip(self._row, tokens.tolist(), strict=True)
            ]
        for row in np.flatnonzero(is_over).tolist():
            prompt = self._prompts[self._row[row] // self._sampling.n_samples]
            ids = tokens[row, : self._sampling.room_after(prompt)].tolist()
            self._responses[self._row[row]] = ids[: self._sampling.n_until_over(ids)]
            self._row[row] = -1

    def _keep(self, rows: np.ndarray, cache: KeyValues) -> None:
        """Go on with these rows alone."""
        at = on_device(rows, self._device)
        cache.keep(at)
        self._row, self._start = self._row[rows], self._start[rows]
        self._tokens, self._u, self._is_over = self._tokens[at], self._u[at], self._is_over[at]
        self._last, self._room, self._n_prompt = self._last[at], self._room[at], self._n_prompt[at]


def _next_logits(
    model: nn.Module, cache: Cache, input_ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor
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
