"""Random rollouts through the engine, for tests of several rooms."""

import numpy as np
import torch
from tiny import VOCAB_SIZE

from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.targets import Target

DOWN = "mlp.down_proj.weight"
TARGETS = [Target(0, DOWN, 3), Target(0, DOWN, 15), Target(1, DOWN, 3), Target(1, "self_attn.k_proj.weight", 2)]


def random_rollouts(n: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    # Two tokens at least: with a single key, attention does not depend on it and k_proj's gradient vanishes.
    prompts = [rng.integers(VOCAB_SIZE, size=rng.integers(2, 9)).tolist() for _ in range(n)]
    responses = [rng.integers(VOCAB_SIZE, size=rng.integers(1, 14)).tolist() for _ in range(n)]
    return prompts, responses


def engine_rows(model, targets, prompts, responses, positions, batch_tokens, by_hand=True) -> dict[tuple, torch.Tensor]:
    """Rows by (target number, rollout, position)."""
    found = {}
    engine = GradientEngine(model, targets, by_hand)
    for rollouts, ks, rows in engine.batches(prompts, responses, positions, batch_tokens):
        for n, (i, k) in enumerate(zip(rollouts, ks, strict=True)):
            for t in range(len(targets)):
                assert (t, i, positions[i][k]) not in found
                found[t, i, positions[i][k]] = rows[t][n]
    return found


def likeliest_responses(model, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Of each prompt the n words that the model takes for the likeliest, one after another."""
    responses = [[] for _ in prompts]
    for prompt, response in zip(prompts, responses, strict=True):
        for _ in range(n):
            response.append(int(model(input_ids=torch.tensor([prompt + response])).logits[0, -1].argmax()))
    return responses
