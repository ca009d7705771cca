"""What the full softmax says of every response token."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..model.batches import Budget, pad_right, run_in_batches
from ..model.decoder import decoder_hidden, head_logits, positions_per_head_block
from ..model.placement import input_device


class TokenScores(NamedTuple):
    """Of each token of one response, [n_tokens] each, from π, the full softmax at temperature 1 that it was drawn from.

    Attributes:
        entropies: of π, nats, float32.
        logprobs: log π of the token, nats, float32.
        tail_mass: 1 - max π, float64: the chance of all words but the likeliest, exact also where that is tiny.
        logit_norms: ‖onehot - π‖, the length of ∇ log π with respect to the logits, float32.
    """

    entropies: np.ndarray
    logprobs: np.ndarray
    tail_mass: np.ndarray
    logit_norms: np.ndarray


def score_responses(
    model: nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    batch_tokens: int | Budget,
) -> Iterator[dict[int, TokenScores]]:
    """Score every response token by one teacher-forced pass, full softmax, temperature 1.

    Args:
        prompts, responses: token ids; prompts not empty.
        batch_tokens: padded tokens in one forward pass.

    Yields:
        For one batch: each response's scores by its index.
    """
    sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
    device = input_device(model)

    @torch.inference_mode()
    def run(batch: list[int]) -> TokenScores:
        hidden = decoder_hidden(model, pad_right([sequences[i] for i in batch], device))
        # The token at index q of a sequence is predicted at index q - 1.
        predicting = [hidden[row, len(prompts[i]) - 1 : len(sequences[i]) - 1] for row, i in enumerate(batch)]
        token_ids = torch.tensor([token for i in batch for token in responses[i]], dtype=torch.long)
        return _score(model, torch.cat(predicting), token_ids.to(device))

    for batch, scores in run_in_batches([len(sequence) for sequence in sequences], batch_tokens, run):
        cuts = np.cumsum([len(responses[i]) for i in batch])[:-1]
        of_each = zip(*(np.split(score, cuts) for score in scores), strict=True)
        yield dict(zip(batch, map(TokenScores._make, of_each), strict=True))


def _score(model: nn.Module, hidden: torch.Tensor, token_ids: torch.Tensor) -> TokenScores:
    """[n, hidden], [n] -> scores of [n]; the vocabulary is never unfolded for all n at once."""
    step = positions_per_head_block(model)
    blocks = [score_block(head_logits(model, hidden[:0]), token_ids[:0])]
    for start in range(0, len(hidden), step):
        blocks.append(score_block(head_logits(model, hidden[start : start + step]), token_ids[start : start + step]))
    return TokenScores(*(torch.cat(parts).numpy() for parts in zip(*blocks, strict=True)))


def score_block(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[n, vocab], [n] -> what `TokenScores` holds, on the CPU."""
    log_probs = torch.log_softmax(logits, dim=-1)
    probs = log_probs.exp()
    logprobs = log_probs.gather(-1, token_ids[:, None])[:, 0]
    # clamped: -0.0 or a rounding below it is no entropy
    entropies = -(probs * log_probs).sum(-1).clamp_(max=0)
    # ‖onehot - π‖² = (1 - π_y)² + Σ_k≠y π_k², and 1 - π_y = Σ_k≠y π_k: no difference of nearly equal numbers.
    not_drawn = probs.scatter_(-1, token_ids[:, None], 0.0)
    logit_norms = (not_drawn.sum(-1) ** 2 + (not_drawn * not_drawn).sum(-1)).sqrt()
    # What the others weigh relative to the likeliest word, w: their share of all is w / (1 + w), with no 1 - max in it.
    top = logits.max(dim=-1, keepdim=True)
    relative = (logits - top.values).exp().scatter_(-1, top.indices, 0.0)
    others = relative.sum(dim=-1, dtype=torch.float64)
    return entropies.cpu(), logprobs.cpu(), (others / (1 + others)).cpu(), logit_norms.cpu()
