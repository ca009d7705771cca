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
    places = [(i, p) for i, of_rollout in enumerate(positions) for p in of_rollout]
    for rollouts, rows, gradients in GradientEngine(model, targets, by_hand).batches(
        prompts, responses, positions, batch_tokens
    ):
        assert {places[row][0] for row in rows} == set(rollouts)
        for t, of_target in enumerate(gradients):
            for row, gradient in zip(rows, of_target, strict=True):
                assert (t, *places[row]) not in found
                found[(t, *places[row])] = gradient
    return found


def likeliest_responses(model, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Of each prompt the n words that the model takes for the likeliest, one after another."""
    responses = [[] for _ in prompts]
    for prompt, response in zip(prompts, responses, strict=True):
        for _ in range(n):
            response.append(int(model(input_ids=torch.tensor([prompt + response])).logits[0, -1].argmax()))
    return responses
