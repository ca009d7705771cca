"""What the full softmax says of every response token."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from ..model.batches import Budget, on_device, pad_left, pad_right, run_in_batches
from ..model.decoder import decoder_hidden, head_logits, positions_per_head_block
from ..model.past import keeps_tokens_apart, refuse_lengths
from ..model.placement import input_device, is_spread
from ..model.softmax import Softmax

WORTH_SHARING = 0.8
"""A prompt is shared where that leaves at most so much of the tokens; else its second pass would cost more."""


class TokenScores(NamedTuple):
    """Of each token of one response, [n_tokens] each, from π, the full softmax at temperature 1 that it was drawn from.

    Attributes:
        entropies: of π, nats, float32.
        logprobs: log π of the token, nats, float32.
        tail_mass: 1 - max π, float64: the chance of all words but the likeliest, exact also where that is tiny.
        logit_norms: ‖onehot - π‖, the length of ∇ log π with respect to the logits, float32.
        sum_p2: Σ π², float64.
    """

    entropies: np.ndarray
    logprobs: np.ndarray
    tail_mass: np.ndarray
    logit_norms: np.ndarray
    sum_p2: np.ndarray


Measure = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""Takes the model, hidden states, [n, hidden], and the tokens that they predict, [n], and gives numbers, [n] each."""

States = Callable[[nn.Module, list[list[int]], list[list[int]]], list[torch.Tensor]]
"""Takes the model, prompts and responses, and gives hidden states that predict each response, [n_tokens, hidden]."""


def score_responses(
    model: nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    batch_tokens: int | Budget,
) -> Iterator[dict[int, TokenScores]]:
    """Score every response token by a teacher-forced pass, full softmax, temperature 1; see `each_token`.

    Yields:
        For one batch: each response's scores by its index.
    """
    for batch in each_token(model, prompts, responses, batch_tokens, _score, torch.inference_mode):
        yield {i: TokenScores._make(of_response) for i, of_response in batch.items()}


def each_token(
    model: nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    batch_tokens: int | Budget,
    measure: Measure,
    context: Callable[[], AbstractContextManager],
    states: States | None = None,
) -> Iterator[dict[int, tuple[np.ndarray, ...]]]:
    """What a teacher-forced pass says of every response token.

    Args:
        prompts, responses: token ids; prompts not empty.
        batch_tokens: padded tokens in one forward pass, a prompt's counted for each of its responses.
        measure: of a batch's tokens.
        context: entered around each batch.
        states: another way to the hidden states.

    Yields:
        For one batch: each response's numbers, [n_tokens] each, by its index.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    refuse_lengths(model, max(lengths, default=0), "`rollouts`")
    budget = batch_tokens if isinstance(batch_tokens, Budget) else Budget(batch_tokens)
    shared = _lengths_behind_shared_prompts(prompts, responses) if keeps_tokens_apart(model) else {}
    alone = {i: length for i, length in enumerate(lengths) if i not in shared}
    for of_kind, length_of in ((_states_behind_shared_prompts, shared), (_states, alone)):
        members = list(length_of)

        def run(batch: list[int], states=states or of_kind, members=members) -> list[np.ndarray]:
            batch = [members[j] for j in batch]
            with context():
                predicting = torch.cat(states(model, [prompts[i] for i in batch], [responses[i] for i in batch]))
                token_ids = on_device([token for i in batch for token in responses[i]], predicting.device)
                found = measure(model, predicting, token_ids)
                together = torch.stack([of.double() for of in found]).cpu()  # one copy, so one wait for the device
                return [of.to(each.dtype).numpy() for of, each in zip(together, found, strict=True)]

        for batch, scores in run_in_batches(list(length_of.values()), budget, run):
            cuts = np.cumsum([len(responses[members[j]]) for j in batch])[:-1]
            of_each = zip(*(np.split(score, cuts) for score in scores), strict=True)
            yield dict(zip([members[j] for j in batch], of_each, strict=True))


def _lengths_behind_shared_prompts(prompts: list[list[int]], responses: list[list[int]]) -> dict[int, int]:
    """Of the responses whose prompt had better be run once for all of them: the padded length of prompt and response.

    Responses of one prompt stay together, so the shorter ones are padded, where `run_in_batches` would have put them
    beside others of their length.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(tuple(prompt), []).append(i)
    lengths = {}
    for prompt, of_prompt in members.items():
        longest = max(len(responses[i]) for i in of_prompt)
        apart = sum(len(prompt) + len(responses[i]) for i in of_prompt)
        if len(prompt) + longest * len(of_prompt) < WORTH_SHARING * apart:
            lengths |= dict.fromkeys(of_prompt, len(prompt) + longest)
    return lengths


def _states(model: nn.Module, prompts: list[list[int]], responses: list[list[int]]) -> list[torch.Tensor]:
    """The last hidden states that predict each response's tokens, [n_tokens, hidden] each."""
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    hidden = decoder_hidden(model, pad_right(sequences, input_device(model)))
    # The token at index q of a sequence is predicted at index q - 1.
    return [of[len(p) - 1 : len(p) + len(r) - 1] for of, p, r in zip(hidden, prompts, responses, strict=True)]


def _states_behind_shared_prompts(
    model: nn.Module, prompts: list[list[int]], responses: list[list[int]]
) -> list[torch.Tensor]:
    """The same up to rounding; a prompt is run once, and its responses behind copies of its keys and values."""
    row_of_prompt = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    device = input_device(model)
    rows = on_device([row_of_prompt[tuple(prompt)] for prompt in prompts], device)
    input_ids, mask = pad_left([list(prompt) for prompt in row_of_prompt], device)
    position_ids = (mask.cumsum(-1) - 1).clamp_(min=0)
    cache = DynamicCache()
    is_padded = len(set(map(len, row_of_prompt))) > 1
    behind = {"attention_mask": mask if is_padded else None, "position_ids": position_ids, "past_key_values": cache}
    first = decoder_hidden(model, input_ids, **behind)[rows, -1:]  # [responses, 1, hidden]
    input_ids = pad_right([response[:-1] for response in responses], device)
    if input_ids.shape[1] == 0:
        return [of[: len(response)] for of, response in zip(first, responses, strict=True)]
    cache.batch_select_indices(rows.cpu() if is_spread(model) else rows)  # layers may lie anywhere
    behind["attention_mask"] = torch.cat([mask[rows], torch.ones_like(input_ids)], dim=1)
    behind["position_ids"] = position_ids[rows, -1:] + 1 + torch.arange(input_ids.shape[1], device=device)
    later = decoder_hidden(model, input_ids, **behind)
    return [of[: len(response)] for of, response in zip(torch.cat([first, later], dim=1), responses, strict=True)]


def _score(model: nn.Module, hidden: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[n, hidden], [n] -> what `TokenScores` holds."""
    return in_blocks(model, hidden, token_ids, score_block)


def in_blocks(
    model: nn.Module,
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    of_logits: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]],
) -> tuple[torch.Tensor, ...]:
    """`of_logits`, [n, vocab] and [n], in blocks: the vocabulary is never unfolded for all n at once."""
    step = positions_per_head_block(model)
    starts = range(0, max(1, len(hidden)), step)
    blocks = [
        of_logits(head_logits(model, hidden[start : start + step]), token_ids[start : start + step]) for start in starts
    ]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def score_block(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[n, vocab], [n] -> what `TokenScores` holds."""
    dtype, softmax = logits.dtype, Softmax(logits)
    scores = softmax.entropy.to(dtype), softmax.log_prob(token_ids).to(dtype), softmax.tail_mass
    return *scores, softmax.logit_norm(token_ids).to(dtype), softmax.sum_p2
