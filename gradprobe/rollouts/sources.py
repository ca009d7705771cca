"""Where rollouts come from: sampled here, asked of a server, or read; each stretch of prompts at a time, judged."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..common.errors import InputError
from ..dump.records import PromptKey, Rollout
from ..model.batches import Budget
from ..model.checkpoint import Checkpoint
from ..model.decoder import context_length
from ..problems.data_set import Problem
from ..problems.verifiers import RunningVerifier
from .sample import Sampling, StopText, rollout_uniforms, sample_responses
from .server import CompletionsServer, ServerResponse, request_seed, sample_completions

log = logging.getLogger(__name__)

SHOWN_FAILURES = 5


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled."""

    num_samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    stop: str | None = None


class Source(Protocol):
    """Gives a shard's rollouts, without scores, and without verdicts where `correct` is None."""

    prompts: list[PromptKey]
    """The prompts that are due, in order."""

    rows_per_prompt: list[int]
    """How many rollouts each of them has."""

    n_tokens_at_most: int
    """The most response tokens that all of them can have."""

    def opened(self, checkpoint: Checkpoint, sample_rows: int) -> Callable[[range], list[Rollout]]:
        """What gives the rollouts of a stretch of prompts."""


class GivenRollouts:
    """A shard's part, whole prompts, of the rollouts of another dump or another tool.

    Attributes:
        of_all_shards: all of them.
    """

    def __init__(self, rollouts: Sequence[Rollout], shard_index: int = 0, num_shards: int = 1):
        self.of_all_shards = rollouts
        by_prompt: dict[PromptKey, list[Rollout]] = {}
        for rollout in rollouts:
            by_prompt.setdefault(rollout.prompt_idx, []).append(rollout)
        if len(by_prompt) < num_shards:
            raise InputError(f"`num_shards` {num_shards}: `rollouts` has {len(by_prompt)} prompts")
        mine = np.array_split(np.arange(len(by_prompt)), num_shards)[shard_index]
        self.prompts = [list(by_prompt)[i] for i in mine]
        self._groups = [by_prompt[key] for key in self.prompts]
        self.rows_per_prompt = list(map(len, self._groups))
        self.n_tokens_at_most = sum(len(rollout.response_ids) for group in self._groups for rollout in group)

    def opened(self, checkpoint: Checkpoint, sample_rows: int) -> Callable[[range], list[Rollout]]:
        """See `Source`."""
        return lambda chunk: [rollout for index in chunk for rollout in self._groups[index]]


@dataclass(frozen=True)
class SampledRollouts:
    """Responses of the probed model to problems, sampled here or by a server that runs it.

    Attributes:
        problems: of the data set.
        prompt_ids: the tokens of each one's prompt.
        settings: how to sample.
        server: asked for responses in the place of our own sampler, `n_requests` at once; they carry its log-probs.
    """

    problems: Sequence[Problem]
    prompt_ids: Sequence[list[int]]
    settings: SamplingSettings
    server: CompletionsServer | None = None
    n_requests: int = 1

    @property
    def prompts(self) -> list[PromptKey]:
        """See `Source`."""
        return [problem.idx for problem in self.problems]

    @property
    def rows_per_prompt(self) -> list[int]:
        """See `Source`."""
        return [self.settings.num_samples] * len(self.problems)

    @property
    def n_tokens_at_most(self) -> int:
        """See `Source`."""
        return sum(self.rows_per_prompt) * self.settings.max_new_tokens

    def opened(self, checkpoint: Checkpoint, sample_rows: int) -> Callable[[range], list[Rollout]]:
        """See `Source`."""
        settings, context = self.settings, context_length(checkpoint.model)
        if context is not None and max(map(len, self.prompt_ids)) + settings.max_new_tokens > context:
            log.info(f"note: responses end at the model's context of {context} tokens")
        stop = None if settings.stop is None else StopText(settings.stop, checkpoint.tokenizer.decode)
        sampling = Sampling(
            settings.num_samples, settings.max_new_tokens, settings.temperature, checkpoint.end_ids, context, stop
        )
        rows = Budget(sample_rows)

        def sample(chunk: range) -> list[Rollout]:
            if self.server is None:
                responses = self._sampled(checkpoint, chunk, sampling, rows)
            else:
                responses = self._asked(self.server, checkpoint, chunk, sampling)
            return [
                self._rollout(checkpoint, number, sample_idx, response)
                for number, samples in zip(chunk, responses, strict=True)
                for sample_idx, response in enumerate(samples)
            ]

        return sample

    def _sampled(
        self, checkpoint: Checkpoint, chunk: range, sampling: Sampling, rows: Budget
    ) -> list[list[ServerResponse]]:
        seed, idxs, n_steps = self.settings.seed, [self.problems[i].idx for i in chunk], sampling.room_after([])
        uniforms = lambda p, s: rollout_uniforms(seed, idxs[p], s, n_steps)  # noqa: E731
        batches = sample_responses(checkpoint.model, [self.prompt_ids[i] for i in chunk], uniforms, sampling, rows)
        return [[ServerResponse(ids, []) for ids in samples] for batch in batches for samples in batch]

    def _asked(
        self, server: CompletionsServer, checkpoint: Checkpoint, chunk: range, sampling: Sampling
    ) -> list[list[ServerResponse]]:
        seed, idxs = self.settings.seed, [self.problems[i].idx for i in chunk]
        seeds = lambda p, s: request_seed(seed, idxs[p], s)  # noqa: E731
        prompts, size = [self.prompt_ids[i] for i in chunk], checkpoint.model.config.get_text_config().vocab_size
        return list(sample_completions(server, prompts, seeds, sampling, size, self.n_requests))

    def _rollout(self, checkpoint: Checkpoint, number: int, sample_idx: int, response: ServerResponse) -> Rollout:
        problem = self.problems[number]
        return Rollout(
            prompt_idx=problem.idx,
            sample_idx=sample_idx,
            problem_id=problem.id,
            prompt_ids=self.prompt_ids[number],
            response_ids=response.ids,
            entropies=[],
            logprobs=response.logprobs,
            response=checkpoint.tokenizer.decode(response.ids, skip_special_tokens=True),
            ground_truth=problem.ground_truth,
            correct=None,  # still to be judged
        )


def judged(rollouts: Sequence[Rollout], running: RunningVerifier) -> list[Rollout]:
    """The rollouts with a verdict each; those on which the verifier fails are left out, and said so.

    Where it fails on all of several it is itself at fault, and `InputError` says so.
    """
    verdicts = [None if r.correct is not None else running.judge(r.response, r.ground_truth) for r in rollouts]
    pairs = list(zip(rollouts, verdicts, strict=True))
    failed = [(r, verdict.error) for r, verdict in pairs if verdict is not None and verdict.correct is None]
    for r, error in failed[:SHOWN_FAILURES]:
        log.warning(f"prompt {r.prompt_idx} sample {r.sample_idx} is left out, the verifier failed on it: {error}")
    if len(failed) > SHOWN_FAILURES:
        log.warning(f"it failed on {len(failed) - SHOWN_FAILURES} more of these {len(rollouts)}")
    if len(failed) == len(rollouts) > 1:
        raise InputError(f"`verifier` {running.verifier.name}: failed on every answer, first with: {failed[0][1]}")
    return [
        r if verdict is None else replace(r, correct=verdict.correct)
        for r, verdict in pairs
        if verdict is None or verdict.correct is not None
    ]


def described_server(server: CompletionsServer) -> dict[str, Any]:
    """What the manifest says of a server: what it serves, not where."""
    return {"method": "completions server", "server_model": server.model}
