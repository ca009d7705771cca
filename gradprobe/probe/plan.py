"""What a probe will do, decided before a weight is loaded: targets, whose rollouts, buckets, device; all its facts."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import nn

from .. import __version__
from ..common.errors import InputError, first_of
from ..common.files import read_json
from ..dump import format as contract
from ..dump.buckets import BUCKET, POOLING, fit_edges
from ..dump.on_policy import are_same_weights
from ..gradients.step import refuse_other_parameters
from ..gradients.targets import AnyTarget, Projection, expand_projected, expand_targets
from ..model.checkpoint import (
    end_token_ids,
    load_skeleton,
    load_tokenizer,
    resolve_attention,
    resolve_device,
    resolve_dtype,
)
from ..model.decoder import context_length
from ..model.identity import FileStates, checkpoint_identity, file_states, hardware_of
from ..model.past import refuse_lengths, refuse_without_cache
from ..model.placement import Placement, read_placement
from ..model.source import CheckpointSource
from ..problems.data_set import ProblemSet, load_problems, shard_of_study
from ..problems.gym import ENTRY, GYM_VERIFIER
from ..problems.templates import encode_prompts, preview, read_template, render_prompts
from ..problems.verifiers import Verifier, load_verifier
from ..rollouts.files import Vocabulary, read_rollouts
from ..rollouts.independence import shared_noise
from ..rollouts.places import in_words, rollout_files
from ..rollouts.sample import Sampling, StopText
from ..rollouts.server import connect, key_in
from ..rollouts.sources import GivenRollouts, SampledRollouts, Source
from .rules import ENTROPY, LOGIT_NORM, bucket_scores, score_key_of
from .settings import BATCH_TOKENS, ProbeSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepEnd:
    """Another checkpoint at an end of a step, and its files as they were when its identity was made."""

    source: CheckpointSource
    identity: dict[str, str]
    files: FileStates


@dataclass(frozen=True)
class Plan:
    """All that is decided before a weight is loaded.

    Attributes:
        row_dims: the length of each target's gradient.
        directories: where each target's dump goes; the output directory itself where there is one target.
        source: gives this shard's rollouts.
        edges: those that were asked for, or that a whole file gives; None: they are fitted.
        device: takes the model, unless there is a placement.
        computing: what rounds sums in another order and changes nothing else: `threads` on a CPU, `batch_tokens`
            (padded, in one pass) and `sample_rows`.
        step_ends: the ends of a step that are other checkpoints, under "to" and "from"; empty without one.
        facts: all that changes the dump's bytes, as the manifest has it.
        checkpoint_files: as they were when their identity was made.
    """

    settings: ProbeSettings
    targets: list[AnyTarget]
    row_dims: list[int]
    directories: list[Path]
    source: Source
    verifier: Verifier
    edges: dict[str, Any] | None
    device: torch.device
    placement: Placement | None
    dtype: torch.dtype
    attention: str
    computing: dict[str, int]
    step_ends: dict[str, StepEnd]
    facts: dict[str, Any]
    checkpoint_files: FileStates

    @property
    def identity(self) -> dict[str, Any]:
        """The facts that a run which continues another must share: without paths, for a moved file is the same file."""
        names = {"model_identity": "model"}
        return {names.get(key, key): contract.without_path(fact) for key, fact in self.facts.items()}

    def in_numbers(self) -> dict[str, Any]:
        """What the launcher asks for: how much there will be at most."""
        n_rows, settings = self.source.n_tokens_at_most, self.settings
        per_bucket = 1 if settings.is_pooled else settings.pos_per_bin_per_rollout
        if per_bucket > 0:
            n_rows = min(n_rows, sum(self.source.rows_per_prompt) * settings.bins * per_bucket)
        return {
            "bytes_at_most": n_rows * 4 * sum(self.row_dims),
            "positions_at_most": n_rows,
            "row_dims": self.row_dims,
            "targets": len(self.targets),
        }


def make_plan(settings: ProbeSettings) -> Plan:
    """Resolve and check everything that can be known without the weights; nothing is written."""
    # 1. Which weights, or which of their rows.
    checkpoint_files = file_states(settings.checkpoint)
    skeleton, tokenizer = load_skeleton(settings.checkpoint), load_tokenizer(settings.checkpoint)
    targets = targets_of(settings, skeleton)
    # 2. Whose tokens, judged by whom, in which buckets.
    verifier = load_verifier(settings.verifier)
    read = read_problem_source if settings.rollouts is None else read_rollout_source
    source, facts_of_source = read(settings, skeleton, tokenizer, verifier)
    # 3. Where and how it is computed.
    placement = None
    if settings.device_map is not None:
        placement = read_placement(settings.device_map, settings.max_memory, settings.offload_dir, skeleton)
    device = resolve_device(settings.device) if placement is None else placement.main_device
    dtype, attention = resolve_dtype(settings.dtype, device), resolve_attention(settings.attention, skeleton)
    model_identity = checkpoint_identity(settings.checkpoint, skeleton)
    edges = given_edges(settings) or edges_of_file(settings, source, facts_of_source, model_identity)
    step_ends = ends_of_step(settings, skeleton, model_identity)
    step = facts_of_step(settings, step_ends, model_identity)
    if step is None and are_same_weights((facts_of_source.get("rollouts_from") or {}).get("identity"), model_identity):
        step = facts_of_source.get("step")  # what was taken along one before stays true
    facts_of_source.pop("step", None)
    # 4. What makes the dump this one and no other.
    facts = {
        "format_version": contract.FORMAT_VERSION,
        "model_identity": model_identity,
        "end_ids": sorted(end_token_ids(skeleton, tokenizer)),
        "targets": [target.directory for target in targets],
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "device": hardware_of(device),
        "versions": {
            "gradprobe": __version__,
            **{library.__name__: library.__version__ for library in (torch, transformers, tokenizers, np)},
        },
        "shard": {
            "index": settings.shard_index,
            "num_shards": settings.num_shards,
            **({"skip_prompts": settings.skip_prompts} if settings.skip_prompts else {}),
        },
        "bins": settings.bins,
        "pos_per_bin_per_rollout": settings.pos_per_bin_per_rollout,
        "seed": settings.seed,
        "entropy_edges": edges and edges["entropy_edges"],
        **({POOLING: BUCKET, "bucket_by": settings.bucket_by} if settings.is_pooled else {}),
        **({} if step is None else {"step": step}),
        **facts_of_source,
    }
    output = settings.output_dir
    return Plan(
        settings=settings,
        targets=targets,
        row_dims=[target.row_dim(skeleton) for target in targets],
        directories=[output] if len(targets) == 1 else [output / target.directory for target in targets],
        source=source,
        verifier=verifier,
        edges=edges,
        device=device,
        placement=placement,
        dtype=dtype,
        attention=attention,
        computing={
            "threads": torch.get_num_threads(),
            "batch_tokens": settings.batch_tokens or BATCH_TOKENS[device.type],
            "sample_rows": settings.sample_rows,
        },
        step_ends=step_ends,
        facts=facts,
        checkpoint_files=checkpoint_files,
    )


def targets_of(settings: ProbeSettings, skeleton: nn.Module) -> list[AnyTarget]:
    """Rows of weights, or with `project` whole weights."""
    where = (skeleton, settings.layer, settings.param_suffix)
    if settings.project is None:
        return expand_targets(*where, settings.row_idx, settings.seed)
    targets = expand_projected(*where, Projection.of(settings.project, settings.seed))
    for target in targets:
        if left_out := target.left_out(skeleton):
            n, names = left_out["n_parameters"], first_of(left_out["names"])
            log.info(f"note: all-linear takes no part of {n} parameters that lie in no linear map: {names}")
    return targets


def ends_of_step(settings: ProbeSettings, skeleton: nn.Module, model: dict[str, str]) -> dict[str, StepEnd]:
    """The other checkpoints of a step, with the same parameters as the probed one, and not that itself."""
    ends = {}
    for end, source in settings.step_ends.items():
        files, other = file_states(source), load_skeleton(source)
        refuse_other_parameters(skeleton, other, f"`step_{end}` {source.path}")
        ends[end] = StepEnd(source, checkpoint_identity(source, other), files)
    identities = [model, *(end.identity for end in ends.values())][-2:]
    if ends and are_same_weights(*identities):
        raise InputError(f"`step_{next(iter(ends))}`: both ends of the step are the same weights")
    return ends


def facts_of_step(settings: ProbeSettings, ends: dict[str, StepEnd], model: dict[str, str]) -> dict[str, Any] | None:
    """What the manifest says of the step before it is taken; None without one."""
    if not ends:
        return None
    paths = {end: of.source.adapter or of.source.path for end, of in ends.items()}
    probed = settings.adapter or settings.model_path
    return {
        **{end: paths.get(end, probed) for end in ("from", "to")},
        "identities": {end: ends[end].identity if end in ends else model for end in ("from", "to")},
        "logprobs_of": "to" if "to" in ends else "from",
        **({"by_weight": True} if settings.step_by_weight else {}),
    }


def given_edges(settings: ProbeSettings) -> dict[str, Any] | None:
    """Edges, and over what they were fitted, from the manifest that `entropy_edges` names; None where it names none."""
    if settings.entropy_edges is None:
        return None
    file = settings.entropy_edges
    file = file / contract.MANIFEST if file.is_dir() else file
    manifest, bins = read_json(file), settings.bins
    edges = manifest.get("entropy_edges")
    if not isinstance(edges, list) or len(edges) != bins + 1 or not contract.are_edges(edges):
        raise InputError(f"`entropy_edges` {file}: no {bins + 1} increasing entropy_edges (`bins` {bins})")
    if manifest.get("bucket_by", ENTROPY) != settings.bucket_by:
        raise InputError(f"`entropy_edges` {file}: not of {settings.bucket_by}, by which tokens are to be bucketed")
    return {
        "entropy_edges": edges,
        "entropy_edges_over": manifest.get("entropy_edges_over", "dumped_positions"),
        "entropy_edges_from": str(file),
    }


def edges_of_file(
    settings: ProbeSettings, source: Source, facts: dict[str, Any], model: dict[str, str]
) -> dict[str, Any] | None:
    """Edges over all tokens of the file of rollouts that pooled shards share; None where each fits its own."""
    if not isinstance(source, GivenRollouts) or not settings.is_pooled:
        return None
    rule = settings.bucket_by
    if are_same_weights(facts["rollouts_from"]["identity"], model) and rule != LOGIT_NORM:
        scores = [bucket_scores(rule, settings.seed, r) or r.entropies for r in source.of_all_shards]
        return fitted_edges(np.concatenate(scores), settings.bins)
    if settings.num_shards > 1:
        raise InputError(
            f"`num_shards` {settings.num_shards}: pooled shards need the same edges, and "
            f"{in_words(settings.rollouts)} does not hold this model's {rule} of every token; name edges by "
            "`entropy_edges`, or take one shard"
        )
    return None


def fitted_edges(scores: np.ndarray, bins: int) -> dict[str, Any]:
    """Edges fitted over all response tokens. `scores`: [n]."""
    if len(scores) < bins:
        raise InputError(f"`bins` {bins}: the rollouts have {len(scores)} response tokens in all")
    return {"entropy_edges": fit_edges(scores, bins).tolist(), "entropy_edges_over": "response_tokens"}


def read_problem_source(
    settings: ProbeSettings, skeleton: nn.Module, tokenizer: Any, verifier: Verifier
) -> tuple[Source, dict[str, Any]]:
    """This shard's problems, to be sampled; and the facts of the sampling.

    Problems are read, drawn, rendered and encoded, in this order: all of the study's, so that its shards agree.
    """
    problem_set = read_problems(settings)
    of_study = {"num_prompts": settings.num_prompts, "seed": settings.seed, "skip": settings.skip_prompts}
    draw = partial(shard_of_study, problem_set.n_read, **of_study)
    shard = draw(shard_index=settings.shard_index, num_shards=settings.num_shards)
    study = sorted(draw().tolist())
    problem_set = rendered(settings, problem_set.only(study), tokenizer)
    context = context_length(skeleton)
    prompts = encode_prompts(problem_set.problems, tokenizer, skeleton.config.get_text_config().vocab_size, context)
    longest = max(map(len, prompts)) + settings.max_new_tokens
    refuse_lengths(skeleton, min(longest, context or longest), f"`max_new_tokens` {settings.max_new_tokens}")
    mine = np.searchsorted(study, shard)
    problems, prompts = [problem_set.problems[i] for i in mine], [prompts[i] for i in mine]
    log.info(f"for example {preview(problems[0])}")
    sampling = Sampling(
        settings.num_samples,
        settings.max_new_tokens,
        settings.temperature,
        end_token_ids(skeleton, tokenizer),
        context,
        None if settings.stop is None else StopText(settings.stop, tokenizer.decode),
    )
    server = None
    if settings.sampler == "openai":
        server = connect(settings.base_url, settings.server_model, api_key=key_in(settings.api_key_env))
    else:
        refuse_without_cache(skeleton)
    method = {"method": "inverse CDF of Philox(seed, prompt_idx, sample_idx)"}
    facts = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "num_samples_per_prompt": settings.num_samples,
        "dataset": problem_set.description,
        **({"prompts": problem_set.rendering} if problem_set.rendering else {}),
        "sampling": {
            "distribution": "full softmax",
            **(method if server is None else {"method": "completions server", "server_model": server.model}),
            "temperature": settings.temperature,
            "max_new_tokens": settings.max_new_tokens,
            "num_samples_per_prompt": settings.num_samples,
            "seed": settings.seed,
            "num_prompts_of_study": settings.num_prompts,
            **({} if settings.stop is None else {"stop": settings.stop}),
            "verifier": verifier.described(settings.verifier_seconds),
        },
    }
    source = SampledRollouts(problems, prompts, sampling, settings.seed, server, settings.server_requests)
    return source, facts


def read_problems(settings: ProbeSettings) -> ProblemSet:
    """The data set; what was read is said."""
    answer_key = settings.answer_key or (ENTRY if settings.verifier == GYM_VERIFIER else None)
    problem_set = load_problems(settings.dataset, settings.problem_key, answer_key, settings.id_key)
    log.info(problem_set.summary)
    return problem_set


def rendered(settings: ProbeSettings, problem_set: ProblemSet, tokenizer: Any) -> ProblemSet:
    """With its prompts as the model is to see them; what may be a mistake is said."""
    template = None if settings.prompt_template is None else read_template(settings.prompt_template)
    problem_set = render_prompts(
        problem_set,
        template,
        settings.chat_template,
        settings.system_prompt,
        tokenizer,
        settings.continue_final_message,
    )
    for note in problem_set.notes:
        log.info(f"note: {note}")
    return problem_set


def read_rollout_source(
    settings: ProbeSettings, skeleton: nn.Module, tokenizer: Any, verifier: Verifier
) -> tuple[Source, dict[str, Any]]:
    """This shard's part of the rollouts that were given; and the facts of them."""
    files = rollout_files(settings.rollouts)
    for file in files:
        if file.resolve() == (settings.output_dir / contract.ROLLOUTS).resolve():
            raise InputError(f"`rollouts` {file}: is the output directory's own; choose another `output_dir`")
    size, end_ids = skeleton.config.get_text_config().vocab_size, end_token_ids(skeleton, tokenizer)
    problem_set = None if settings.dataset is None else rendered(settings, read_problems(settings), tokenizer)
    found = read_rollouts(
        files,
        Vocabulary(tokenizer, size, end_ids, context_length(skeleton)),
        file_format=settings.rollouts_format,
        problems=problem_set and problem_set.problems,
        copies=problem_set.copies if problem_set else {},
        correct_from=settings.correct_from,
        correct_above=settings.correct_above,
        score_key=score_key_of(settings.bucket_by),
    )
    longest = max(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in found.rollouts)
    refuse_lengths(skeleton, longest, f"`rollouts` {in_words(files)}")
    # Their manifest says how they were sampled; without one that stays unknown.
    manifest_file = contract.find_manifest(files[0])
    origin = {} if manifest_file is None else read_json(manifest_file)
    recorded = origin.get("checksums")
    if isinstance(recorded, dict) and recorded.get(contract.ROLLOUTS, found.report.sha256) != found.report.sha256:
        raise InputError(
            f"`rollouts` {files[0]}: has changed since its dump was written (its SHA-256 is not that in "
            f"{manifest_file}); restore it, or, if that is meant, copy it to where there is no manifest"
        )
    for line in found.report.lines():
        log.info(line)
    noise = shared_noise(found.rollouts)
    log.log(logging.WARNING if noise.is_shared else logging.INFO, noise.line())
    source = GivenRollouts(found.rollouts, settings.shard_index, settings.num_shards)
    judge = {} if found.report.n_to_verify == 0 else {"verifier": verifier.described(settings.verifier_seconds)}
    facts = {
        "max_new_tokens": origin.get("max_new_tokens"),
        "temperature": origin.get("temperature"),
        "num_samples_per_prompt": origin.get("num_samples_per_prompt", max(source.rows_per_prompt)),
        "dataset": origin.get("dataset"),
        "sampling": origin.get("sampling"),
        "step": origin.get("step"),
        "rollouts_from": {
            "path": str(files[0]) if len(files) == 1 else [str(file) for file in files],
            "sha256": found.report.sha256,
            "model_path": origin.get("model_path"),
            "identity": origin.get("model_identity"),
            **found.report.as_dict(),
            "correct_from": settings.correct_from,
            "correct_above": settings.correct_above,
            "shared_noise": noise.as_dict(),
            **judge,
        },
    }
    return source, facts
