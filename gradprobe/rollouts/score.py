"""Entropy and log-prob of every response token under the full softmax."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ..model.batches import Budget, pad_right, run_in_batches
from ..model.decoder import decoder_hidden, head_logits, positions_per_head_block
from ..model.placement import input_device


def score_responses(
    model: nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    batch_tokens: int | Budget,
) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Entropy and log-prob of every response token by one teacher-forced pass, full softmax, temperature 1.

    Args:
        prompts, responses: token ids; prompts not empty.
        batch_tokens: padded tokens in one forward pass.

    Yields:
        For one batch: {index: (entropies, logprobs)}, float32 [n_tokens] each, in nats.
    """
    sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
    device = input_device(model)

    @torch.inference_mode()
    def run(batch: list[int]) -> tuple[np.ndarray, np.ndarray]:
        hidden = decoder_hidden(model, pad_right([sequences[i] for i in batch], device))
        # The token at index q of a sequence is predicted at index q - 1.
        predicting = [hidden[row, len(prompts[i]) - 1 : len(sequences[i]) - 1] for row, i in enumerate(batch)]
        token_ids = torch.tensor([token for i in batch for token in responses[i]], dtype=torch.long)
        return _score(model, torch.cat(predicting), token_ids.to(device))

    for batch, scores in run_in_batches([len(sequence) for sequence in sequences], batch_tokens, run):
        cuts = np.cumsum([len(responses[i]) for i in batch])[:-1]
        yield dict(zip(batch, zip(*(np.split(score, cuts) for score in scores), strict=True), strict=True))


def _score(model: nn.Module, hidden: torch.Tensor, token_ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[n, hidden], [n] -> entropies [n], logprobs [n]; the vocabulary is never unfolded for all n at once."""
    step = positions_per_head_block(model)
    entropies, logprobs = [torch.zeros(0)], [torch.zeros(0)]
    for start in range(0, len(hidden), step):
        log_probs = torch.log_softmax(head_logits(model, hidden[start : start + step]), dim=-1)
        # clamped: -0.0 or a rounding below it is no entropy
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).clamp_(max=0).cpu())
        logprobs.append(log_probs.gather(-1, token_ids[start : start + step, None])[:, 0].cpu())
    return torch.cat(entropies).numpy(), torch.cat(logprobs).numpy()
