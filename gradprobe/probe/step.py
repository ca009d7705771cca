"""The probe along a step: of every response token its derivative, and its log-prob under the other end."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.console import progress
from ..common.errors import InputError
from ..dump.records import PromptKey, Rollout
from ..gradients.along_weights import along_weights
from ..gradients.step import along_step, described, subtract
from ..model.batches import Budget
from ..model.checkpoint import Checkpoint, load_checkpoint
from ..model.identity import refuse_changed_checkpoint
from ..rollouts.score import score_responses
from .output import Progress
from .plan import Plan
from .stopwatch import Stopwatch

log = logging.getLogger(__name__)
OF_STEP = ("step", "step_logprobs", "step_by_weight")
"""What rollouts have along a step."""


def along_step_of(
    plan: Plan,
    checkpoint: Checkpoint,
    rollouts: list[Rollout],
    prompts: Sequence[Sequence[PromptKey]],
    growing: Progress,
    watch: Stopwatch,
) -> tuple[list[Rollout], dict[str, Any]]:
    """The rollouts with their step, written chunk by chunk, and what the manifest says of it; as they are without one.

    All log-probs under the other end come first: then its weights make room for Δ, and two models are all there is.

    Args:
        prompts: of each chunk of rollouts.
    """
    if not plan.step_ends or growing.stepped is not None:
        return rollouts, growing.stepped or {}
    chunk_of = {key: place for place, keys in enumerate(prompts) for key in keys}
    chunks: list[list[Rollout]] = [[] for _ in prompts]
    for rollout in rollouts:
        chunks[chunk_of[rollout.prompt_idx]].append(rollout)
    left = chunks[len(growing.steps) :]
    if growing.steps:
        log.info(f"continuing: {len(growing.steps)} of {len(chunks)} batches of rollouts are there along the step")
    tokens = Budget(plan.computing["batch_tokens"])
    with watch.phase("step"):
        other = _loaded(plan, "to" if "to" in plan.step_ends else "from", plan.device)
        logprobs = [_of_chunk(score_responses(other, *_ids(chunk), tokens), "logprobs") for chunk in left]
        step = _difference(plan, checkpoint.model, other)
        said = described(step)
        if plan.settings.step_by_weight:
            said["weights"] = list(step)
            n_tokens = sum(len(r.prompt_ids) + len(r.response_ids) for chunk in left for r in chunk)
            passes = f"{sum(map(len, left)):,} rollouts one at a time, {n_tokens:,} tokens in all"
            log.info(f"parts of {len(step)} weights: also a forward and a backward pass of {passes}")
        if said["unchanged"]:
            names = said["unchanged_tensors"]
            whole = f", of which {len(names)} parameters as a whole: {', '.join(names[:3])}" if names else ""
            log.info(f"the step leaves {said['unchanged']:,} of {said['parameters']:,} numbers as they are{whole}")
        for chunk, of_chunk in zip(left, logprobs, strict=True):
            batches = along_step(checkpoint.model, step, *_ids(chunk), tokens)
            batches = progress(batches, "along the step", len(chunk), "rollouts", len)
            found = dict(itertools.chain.from_iterable(batch.items() for batch in batches))
            parts = [np.zeros(0)] * len(chunk)
            if plan.settings.step_by_weight:
                by_weight = along_weights(checkpoint.model, step, *_ids(chunk))
                parts = list(progress(by_weight, "by weight", len(chunk), "rollouts"))
            if not all(np.isfinite(values).all() for values in (*found.values(), *parts)):
                raise InputError("the derivatives along the step are not finite: are both checkpoints sound?")
            in_order = [(found[i].tolist(), of_chunk[i], parts[i].tolist()) for i in range(len(chunk))]
            growing.add_step([dict(zip(OF_STEP, of_rollout, strict=True)) for of_rollout in in_order])
    per_rollout = itertools.chain.from_iterable(entry["found"] for entry in growing.steps)
    rollouts = [replace(rollout, **found) for rollout, found in zip(rollouts, per_rollout, strict=True)]
    growing.finish_step(rollouts, list(map(len, chunks)), said)
    return rollouts, said


def _ids(chunk: list[Rollout]) -> tuple[list[list[int]], list[list[int]]]:
    return [rollout.prompt_ids for rollout in chunk], [rollout.response_ids for rollout in chunk]


def _of_chunk(batches: Iterator[dict[int, Any]], name: str) -> dict[int, list[float]]:
    return {i: getattr(scores, name).tolist() for batch in batches for i, scores in batch.items()}


def _loaded(plan: Plan, end: str, device: torch.device) -> nn.Module:
    """Another checkpoint, as the probed one is, and the one that was planned with."""
    of = plan.step_ends[end]
    model = load_checkpoint(of.source, device, plan.dtype, plan.attention).model
    refuse_changed_checkpoint(of.source, model, of.identity, of.files)
    return model


def _difference(plan: Plan, model: nn.Module, other: nn.Module) -> dict[str, torch.Tensor]:
    """Δ on the model's device, in the place of the other's weights; a third checkpoint comes to the CPU."""
    if len(plan.step_ends) == 2:
        return subtract(other, _loaded(plan, "from", torch.device("cpu")), other)
    return subtract(other, model, other) if "to" in plan.step_ends else subtract(model, other, other)
