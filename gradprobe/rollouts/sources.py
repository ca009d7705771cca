"""Where rollouts come from: sampled here, asked of a server, or read; each stretch of prompts at a time, judged."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..common.errors import InputError, first_few
from ..dump.records import PromptKey, Rollout
from ..model.batches import Budget
from ..model.checkpoint import Checkpoint
from ..problems.data_set import Problem
from ..problems.verifiers import RunningVerifier
from .sample import Sampling, rollout_uniforms, sample_responses
from .server import CompletionsServer, ServerResponse, request_seed, sample_completions

log = logging.getLogger(__name__)

SHOWN_FAILURES = 5


class GivenRollouts:
    """A shard's part, whole prompts, of the rollouts of another dump or another tool; `of_all_shards` are all.

    Attributes:
        prompts: that are due, in order.
        rows_per_prompt: how many rollouts each of them has.
        n_tokens_at_most: the most response tokens that all of them can have.
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
        """What gives the rollouts of a stretch of prompts."""
        return lambda chunk: [rollout for index in chunk for rollout in self._groups[index]]


class SampledRollouts:
    """Responses of the probed model to problems, sampled here or by a server that runs it; as `GivenRollouts`.

    Args:
        prompt_ids: the tokens of each problem's prompt.
        server: asked for responses in the place of our own sampler, `n_requests` at once; they carry its log-probs.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        prompt_ids: Sequence[list[int]],
        sampling: Sampling,
        seed: int,
        server: CompletionsServer | None = None,
        n_requests: int = 1,
    ):
        self.prompts: list[PromptKey] = [problem.idx for problem in problems]
        self.rows_per_prompt = [sampling.n_samples] * len(problems)
        self.n_tokens_at_most = sum(self.rows_per_prompt) * sampling.max_new_tokens
        self._problems, self._prompt_ids, self._sampling, self._seed = problems, prompt_ids, sampling, seed
        self._server, self._n_requests = server, n_requests

    def opened(self, checkpoint: Checkpoint, sample_rows: int) -> Callable[[range], list[Rollout]]:
        """What gives the rollouts of a stretch of prompts, without scores and verdicts."""
        sampling, seed, rows = self._sampling, self._seed, Budget(sample_rows)
        if any(sampling.room_after(ids) < sampling.max_new_tokens for ids in self._prompt_ids):
            log.info(f"note: responses end at the model's context of {sampling.context} tokens")
        n_steps, size = sampling.room_after([]), checkpoint.model.config.get_text_config().vocab_size

        def sample(chunk: range) -> list[Rollout]:
            idxs, prompts = [self.prompts[i] for i in chunk], [self._prompt_ids[i] for i in chunk]
            if self._server is None:
                uniforms = lambda p, s: rollout_uniforms(seed, idxs[p], s, n_steps)  # noqa: E731
                batches = sample_responses(checkpoint.model, prompts, uniforms, sampling, rows)
                found = [[ServerResponse(ids, []) for ids in samples] for batch in batches for samples in batch]
            else:
                seeds = lambda p, s: request_seed(seed, idxs[p], s)  # noqa: E731
                found = sample_completions(self._server, prompts, seeds, sampling, size, self._n_requests)
            return [
                Rollout(
                    prompt_idx=self.prompts[i],
                    sample_idx=sample_idx,
                    problem_id=self._problems[i].id,
                    prompt_ids=self._prompt_ids[i],
                    response_ids=response.ids,
                    entropies=[],
                    logprobs=response.logprobs,
                    response=checkpoint.tokenizer.decode(response.ids, skip_special_tokens=True),
                    ground_truth=self._problems[i].ground_truth,
                    correct=None,  # still to be judged
                )
                for i, samples in zip(chunk, found, strict=True)
                for sample_idx, response in enumerate(samples)
            ]

        return sample


Source = GivenRollouts | SampledRollouts


def judged(rollouts: Sequence[Rollout], running: RunningVerifier) -> list[Rollout]:
    """The rollouts with a verdict each; those on which the verifier fails are left out, and said so.

    Where it fails on all of several it is itself at fault, and `InputError` says so.
    """
    verdicts = [None if r.correct is not None else running.judge(r.response, r.ground_truth) for r in rollouts]
    pairs = list(zip(rollouts, verdicts, strict=True))
    failed = [(r, verdict.error) for r, verdict in pairs if verdict is not None and verdict.correct is None]
    left_out = "is left out, the verifier failed on it"
    said = [f"prompt {r.prompt_idx} sample {r.sample_idx} {left_out}: {error}" for r, error in failed]
    for line in first_few(said, f"of these {len(rollouts)}", SHOWN_FAILURES):
        log.warning(line)
    if len(failed) == len(rollouts) > 1:
        raise InputError(f"`verifier` {running.verifier.name}: failed on every answer, first with: {failed[0][1]}")
    return [
        r if verdict is None else replace(r, correct=verdict.correct)
        for r, verdict in pairs
        if verdict is None or verdict.correct is not None
    ]
