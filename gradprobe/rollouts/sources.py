"""Where rollouts come from: sampled here, asked of a server, or read; each stretch of prompts at a time, judged."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from ..common.errors import InputError, raise_if_any
from ..dump.records import PromptKey, Rollout
from ..model.batches import Budget
from ..model.checkpoint import Checkpoint
from ..model.decoder import context_length
from ..model.past import refuse_lengths
from ..model.placement import input_device
from ..problems.data_set import Problem
from ..problems.verify import RunningVerifier
from .sample import Sampling, StopText, rollout_uniforms, sample_responses
from .server import CompletionsServer, ServerResponse, request_seed, sample_completions

log = logging.getLogger(__name__)

SHOWN_FAILURES = 5
ROUNDS_ON_A_GPU = 4


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

    def rounds_on(self, device: str) -> int:
        """How many times as many rollouts as run at once a stretch of prompts holds on "cpu" or "cuda"."""

    def opened(self, checkpoint: Checkpoint, sample_rows: int) -> Callable[[range], list[Rollout]]:
        """What gives the rollouts of a stretch of prompts."""


class GivenRollouts:
    """Rollouts of another dump or another tool."""

    def __init__(self, rollouts: Sequence[Rollout]):
        by_prompt: dict[PromptKey, list[Rollout]] = {}
        for rollout in rollouts:
            by_prompt.setdefault(rollout.prompt_idx, []).append(rollout)
        self.prompts, self._groups = list(by_prompt), list(by_prompt.values())
        self.rows_per_prompt = list(map(len, self._groups))
        self.n_tokens_at_most = sum(len(rollout.response_ids) for rollout in rollouts)

    def rounds_on(self, device: str) -> int:
        """See `Source`."""
        return 1

    def opened(self, checkpoint: Checkpoint, sample_rows: int) -> Callable[[range], list[Rollout]]:
        """See `Source`."""
        return lambda chunk: [rollout for index in chunk for rollout in self._groups[index]]


@dataclass
class SampledRollouts:
    """Responses of the probed model to problems, sampled here or by a server that runs it.

    Attributes:
        problems: prompts rendered.
        settings: how to sample.
        server: asked for responses in the place of our own sampler, `n_requests` at once.
        answers: the server's, of the last stretch of prompts, for comparison with our own scores.
    """

    problems: Sequence[Problem]
    settings: SamplingSettings
    server: CompletionsServer | None = None
    n_requests: int = 1
    answers: list[ServerResponse] = field(default_factory=list)

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

    def rounds_on(self, device: str) -> int:
        """See `Source`. On a GPU a step with few rollouts costs what one with many does; a kill costs a stretch."""
        return ROUNDS_ON_A_GPU if device != "cpu" and self.server is None else 1

    def opened(self, checkpoint: Checkpoint, sample_rows: int) -> Callable[[range], list[Rollout]]:
        """See `Source`.

        Raises:
            InputError: a prompt has no tokens, or leaves no room in the model's context; or a response could pass the
                length up to which the model's rotary embeddings stay as they are.
        """
        prompts = self._encoded(checkpoint)
        settings, context = self.settings, context_length(checkpoint.model)
        if context is not None and max(map(len, prompts)) + settings.max_new_tokens > context:
            log.info(f"note: responses end at the model's context of {context} tokens")
        stop = None if settings.stop is None else StopText(settings.stop, checkpoint.tokenizer.decode)
        sampling = Sampling(
            settings.num_samples, settings.max_new_tokens, settings.temperature, checkpoint.end_ids, context, stop
        )
        longest = max(len(prompt) + sampling.room_after(prompt) for prompt in prompts)
        refuse_lengths(checkpoint.model, longest, f"`max_new_tokens` {settings.max_new_tokens}")
        rounds = self.rounds_on(input_device(checkpoint.model).type)
        rows = Budget(rounds * sample_rows)

        def sample(chunk: range) -> list[Rollout]:
            prompts_of_chunk = [prompts[i] for i in chunk]
            idxs = [self.problems[i].idx for i in chunk]
            if self.server is None:
                responses = self._sampled(checkpoint.model, idxs, prompts_of_chunk, sampling, rows, rounds)
            else:
                responses = self._asked(self.server, checkpoint.model, idxs, prompts_of_chunk, sampling)
            return [
                self._rollout(checkpoint, self.problems[i], prompts[i], sample_idx, ids)
                for i, samples in zip(chunk, responses, strict=True)
                for sample_idx, ids in enumerate(samples)
            ]

        return sample

    def _encoded(self, checkpoint: Checkpoint) -> list[list[int]]:
        context, size = context_length(checkpoint.model), checkpoint.model.config.get_text_config().vocab_size
        encode = checkpoint.tokenizer
        prompts = [encode(problem.prompt, add_special_tokens=False)["input_ids"] for problem in self.problems]

        def faults() -> Iterator[str]:
            for problem, ids in zip(self.problems, prompts, strict=True):
                its_prompt = f"problem '{problem.id}': its prompt has"
                if not ids:
                    yield f"{its_prompt} 0 tokens, at least 1 is needed"
                elif context is not None and len(ids) >= context:
                    yield f"{its_prompt} {len(ids)} tokens, the model's context {context}"
                elif max(ids) >= size:
                    yield f"{its_prompt} token id {max(ids)}, the model's vocabulary {size}: another model's tokenizer?"

        raise_if_any(faults())
        return prompts

    def _sampled(
        self,
        model: nn.Module,
        idxs: list[int],
        prompts: list[list[int]],
        sampling: Sampling,
        rows: Budget,
        rounds: int,
    ) -> list[list[list[int]]]:
        n_steps = sampling.room_after([])
        uniforms = lambda p, s: rollout_uniforms(self.settings.seed, idxs[p], s, n_steps)  # noqa: E731
        batches = sample_responses(model, prompts, uniforms, sampling, rows, rounds)
        return [of_prompt for batch in batches for of_prompt in batch]

    def _asked(
        self, server: CompletionsServer, model: nn.Module, idxs: list[int], prompts: list[list[int]], sampling: Sampling
    ) -> list[list[list[int]]]:
        vocab_size = model.config.get_text_config().vocab_size
        by_prompt = list(
            sample_completions(
                server,
                prompts,
                lambda p, s: request_seed(self.settings.seed, idxs[p], s),
                sampling,
                vocab_size,
                self.n_requests,
            )
        )
        self.answers = [answer for samples in by_prompt for answer in samples]
        return [[answer.ids for answer in samples] for samples in by_prompt]

    def _rollout(
        self, checkpoint: Checkpoint, problem: Problem, prompt_ids: list[int], sample_idx: int, response_ids: list[int]
    ) -> Rollout:
        return Rollout(
            prompt_idx=problem.idx,
            sample_idx=sample_idx,
            problem_id=problem.id,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            entropies=[],
            logprobs=[],
            response=checkpoint.tokenizer.decode(response_ids, skip_special_tokens=True),
            ground_truth=problem.ground_truth,
            correct=None,  # still to be judged
        )


def judged(rollouts: Sequence[Rollout], running: RunningVerifier) -> list[Rollout]:
    """The rollouts with a verdict each; those on which the verifier fails are left out, and said so.

    Raises:
        InputError: it fails on all of several.
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
