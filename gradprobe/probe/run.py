"""The probe at work: sample, score, choose, differentiate and write, from wherever an earlier run ended."""

import logging
import platform
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..common.console import progress
from ..common.errors import InputError, first_of
from ..common.files import write_json
from ..dump import format as contract
from ..dump.buckets import buckets_of, choose_positions, pooled_tokens
from ..dump.consistency import checksums_of, read_content
from ..dump.on_policy import OFF_POLICY, Tokens, claims_on_policy, warning_of
from ..dump.records import PooledTokens, Position, Rollout, prompt_hash, write_records
from ..gradients.chosen import Chosen
from ..gradients.engine import GradientEngine
from ..model.batches import Budget
from ..model.checkpoint import Checkpoint, load_checkpoint
from ..model.identity import refuse_changed_checkpoint
from ..problems.verifiers import RunningVerifier
from ..rollouts.copies import problem_of_copies
from ..rollouts.early_word import early_word, refuse_too_few_mixed
from ..rollouts.places import in_words
from ..rollouts.sample import chunks_of
from ..rollouts.score import TokenScores, score_responses
from ..rollouts.server import mean_logprob_gap
from ..rollouts.sources import SampledRollouts, judged
from .output import Progress
from .plan import Plan, fitted_edges
from .rules import bucket_scores, rng_of
from .self_check import refuse_unfit
from .step import OF_STEP, along_step_of
from .stopwatch import Stopwatch

log = logging.getLogger(__name__)
LARGEST_LOGPROB_GAP = 0.1
"""Nats per token between a server's log-probs and ours: rounding gives hundredths at most, another model more."""


def run_probe(plan: Plan, watch: Stopwatch) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Do what is planned; yields each target's directory and manifest when that is written.

    The output directory must be locked and prepared (`output.prepare`).
    """
    settings = plan.settings
    with watch.phase("load"):
        checkpoint = load_checkpoint(settings.checkpoint, plan.device, plan.dtype, plan.attention, plan.placement)
        refuse_changed_model(plan, checkpoint)
        is_sampled = settings.rollouts is None and settings.sampler == "own"
        engine = GradientEngine(checkpoint.model, plan.targets)
        refuse_unfit(engine, settings.model_path, is_sampled)
    chunks = list(chunks_of(plan.source.rows_per_prompt, plan.computing["sample_rows"]))
    prompts = [[plan.source.prompts[i] for i in chunk] for chunk in chunks]
    with closing(Progress(settings.output_dir, prompts)) as growing:
        rollouts, notes = collect_rollouts(plan, checkpoint, chunks, growing, watch)
        tokens = Tokens.of(rollouts)
        on_policy = tokens.test(is_claimed=False)
        refuse_copies(plan, rollouts, on_policy.verdict == OFF_POLICY)
        if warning := warning_of(on_policy, plan.facts):
            log.warning(warning)
        for line in early_word(rollouts, checkpoint.end_ids, on_policy):
            log.info(line)
        refuse_too_few_mixed(rollouts, settings.min_mixed_prompts, plan.source.rows_per_prompt)
        rollouts, step = along_step_of(plan, checkpoint, rollouts, prompts, growing, watch)
        if settings.sample_only:
            return
        edges = plan.edges or fitted_edges(tokens.score, settings.bins)
        chosen = choose(plan, rollouts, np.array(edges["entropy_edges"]))
        write_gradients(plan, engine, rollouts, chosen, growing, watch)
    lines = lines_of(plan, rollouts, chosen, np.array(edges["entropy_edges"]))
    common = manifest_of(plan, checkpoint, edges, rollouts)
    common |= {"step": common["step"] | step} if step else {}
    common["on_policy"] = asdict(tokens.test(claims_on_policy(common)))
    refuse_changed_model(plan, checkpoint)  # weights may have been read until now
    for directory, target, row_dim in zip(plan.directories, plan.targets, plan.row_dims, strict=True):
        write_records(directory / contract.META, lines)
        content = read_content(directory)
        faulty = {"nonfinite_rows": content.nonfinite.tolist(), "zero_rows": content.zero.tolist()}
        manifest = {
            **target.described(checkpoint.model),
            "row_dim": row_dim,
            "num_positions": len(lines),
            **common,
            **faulty,
            **{f"num_{kind}": len(rows) for kind, rows in faulty.items()},
            **notes,
            "checksums": checksums_of(directory, content),
            "seconds": watch.total(),
        }
        write_json(directory / contract.MANIFEST, manifest)
        for rows, fault in zip(faulty.values(), ("not finite", "zero throughout"), strict=True):
            if rows:
                said = f"{len(rows)} rows are {fault}, which the manifest names and analyses leave out"
                log.warning(f"{directory}: {said} ({first_of(rows)})")
        yield directory, manifest
    (settings.output_dir / contract.PROGRESS).unlink()


def refuse_changed_model(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raise `InputError` if the checkpoint's files are no more those of the plan."""
    identity = plan.facts["model_identity"]
    refuse_changed_checkpoint(plan.settings.checkpoint, checkpoint.model, identity, plan.checkpoint_files)


def collect_rollouts(
    plan: Plan, checkpoint: Checkpoint, chunks: list[range], growing: Progress, watch: Stopwatch
) -> tuple[list[Rollout], dict[str, Any]]:
    """All of this shard's rollouts, sampled (or taken from elsewhere), judged and scored, written chunk by chunk.

    Returns:
        The rollouts, and what the manifest says of how it went.
    """
    settings = plan.settings
    for chunk in growing.chunks:
        watch.add(chunk["notes"]["seconds"])
    if growing.chunks:
        log.info(f"continuing: {len(growing.chunks)} of {len(chunks)} batches of rollouts are there")
    left = chunks[len(growing.chunks) :]
    if left:
        rollouts_of = plan.source.opened(checkpoint, plan.computing["sample_rows"])
        tokens = Budget(plan.computing["batch_tokens"])
        with RunningVerifier(plan.verifier, settings.verifier_seconds) as running:
            for chunk in progress(left, "sampling and scoring", sum(map(len, left)), "prompts", len):
                before = dict(watch.seconds)
                with watch.phase("sample"):
                    sampled = rollouts_of(chunk)
                    verified = judged(sampled, running)
                with watch.phase("score"):
                    rollouts = score(plan, checkpoint, verified, tokens)
                notes = {"seconds": watch.since(before), "unverified": len(sampled) - len(rollouts)}
                if isinstance(plan.source, SampledRollouts):  # a server that ignores seeds, known before hours are lost
                    refuse_copies(plan, rollouts)
                    notes |= server_gap(verified, rollouts)
                growing.add_rollouts(rollouts, notes)
    rollouts = growing.finish_rollouts()
    if not rollouts:
        raise InputError(f"`verifier` {settings.verifier}: no rollout is left")
    return rollouts, summed([chunk["notes"] for chunk in growing.chunks])


def refuse_copies(plan: Plan, rollouts: list[Rollout], is_off_policy: bool = False) -> None:
    """Raise `InputError` if rollouts of a server or a file, scored, are copies of each other; our own sampler's aren't.

    Args:
        is_off_policy: the tokens themselves say that they are not from this model's full softmax.
    """
    settings, is_file = plan.settings, plan.settings.rollouts is not None
    if not is_file and settings.sampler == "own":
        return
    if claims_on_policy(plan.facts):
        sampled_at, is_off_policy = 1.0, False
    else:
        origin = plan.facts.get("rollouts_from", {}).get("identity")
        sampled_at = None if is_file else settings.temperature
        is_off_policy |= origin not in (None, plan.facts["model_identity"])
    problem = problem_of_copies(rollouts, sampled_at, is_off_policy and is_file)
    if problem and is_file:
        raise InputError(
            f"`rollouts` {in_words(settings.rollouts)}: {problem}; was it written twice? leave the copies out"
        )
    if problem:
        raise InputError(f"`base_url` {settings.base_url}: {problem}; does the server ignore a request's seed?")


def server_gap(sampled: list[Rollout], scored: list[Rollout]) -> dict[str, float]:
    """How far the log-probs that a server gave with its rollouts are from ours; nothing where it gave none."""
    gap = mean_logprob_gap([r.logprobs for r in sampled], [r.logprobs for r in scored])
    if gap is not None and gap > LARGEST_LOGPROB_GAP:
        log.warning(f"the server's log-probs are {gap:.2f} nats per token from this checkpoint's: another model's?")
    return {} if gap is None else {"logprob_gap": gap}


def summed(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of all chunks together."""
    gaps = [note["logprob_gap"] for note in notes if "logprob_gap" in note]
    return {
        "num_unverified_rollouts": sum(note["unverified"] for note in notes),
        **({"server_logprob_gap": float(np.mean(gaps))} if gaps else {}),
    }


def score(plan: Plan, checkpoint: Checkpoint, rollouts: list[Rollout], batch_tokens: Budget) -> list[Rollout]:
    """The rollouts with what the probed model says of every response token, and what tokens are bucketed by."""
    batches = score_responses(
        checkpoint.model, [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], batch_tokens
    )
    scores: dict[int, TokenScores] = {}
    for batch in batches:
        scores.update(batch)
    if not all(np.isfinite(values).all() for of_rollout in scores.values() for values in of_rollout):
        raise InputError("the model gives log-probs that are not finite: is the checkpoint sound?")
    scored = []
    text_of = lru_cache(maxsize=None)(lambda token: checkpoint.tokenizer.decode([token]))
    for i, rollout in enumerate(rollouts):
        per_token = {
            "token_texts": [text_of(token) for token in rollout.response_ids],
            "entropies": scores[i].entropies.tolist(),
            "logprobs": scores[i].logprobs.tolist(),
            "tail_mass": scores[i].tail_mass.tolist(),
            "sum_p2": scores[i].sum_p2.tolist(),
            **({} if "step" in plan.facts and not plan.step_ends else {key: [] for key in OF_STEP}),
        }
        rollout = replace(rollout, **per_token)
        by_rule = bucket_scores(plan.settings.bucket_by, plan.settings.seed, rollout, scores[i].logit_norms)
        scored.append(replace(rollout, bucket_scores=by_rule))
    return scored


def choose(plan: Plan, rollouts: list[Rollout], edges: np.ndarray) -> list[Chosen]:
    """What to differentiate of each rollout: a pure function of rollout, edges and seed."""
    settings, buckets = plan.settings, [buckets_of(rollout, edges) for rollout in rollouts]
    if settings.is_pooled:
        return list(map(Chosen.pooled, buckets))
    n = settings.bins, settings.pos_per_bin_per_rollout
    rngs = [rng_of(settings.seed, rollout) for rollout in rollouts]
    return [Chosen.each(choose_positions(of, *n, rng)) for of, rng in zip(buckets, rngs, strict=True)]


def write_gradients(
    plan: Plan,
    engine: GradientEngine,
    rollouts: list[Rollout],
    chosen: list[Chosen],
    growing: Progress,
    watch: Stopwatch,
) -> None:
    """Differentiate and write `grads.npy` of every target, gradients in the order of rollouts and positions."""
    n_rows = [of.n_gradients for of in chosen]
    growing.begin_gradients(plan.directories, plan.row_dims, n_rows)
    done = [i for batch in growing.batches for i in batch["items"]]
    n_done = sum(n_rows[i] for i in done)
    if done:
        log.info(f"continuing: {n_done} of {sum(n_rows)} gradient rows are there")
    budget = Budget(growing.batches[-1]["batch_tokens"] if growing.batches else plan.computing["batch_tokens"])
    prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    batches = engine.batches(prompts, responses, chosen, budget, done)
    watch.add({"gradients": sum(batch["seconds"] for batch in growing.batches)})
    with watch.phase("gradients"):
        n_left = sum(n_rows) - n_done
        for items, rows, gradients in progress(batches, "gradients", n_left, "rows", lambda batch: len(batch[1])):
            growing.add_gradients(items, rows, [g.cpu().numpy() for g in gradients], budget.tokens)
    growing.finish_gradients()


def lines_of(
    plan: Plan, rollouts: list[Rollout], chosen: list[Chosen], edges: np.ndarray
) -> list[Position] | list[PooledTokens]:
    """The lines of `meta.jsonl`, in the order of the gradients."""
    if plan.settings.is_pooled:
        return list(pooled_tokens(rollouts, edges))
    lines: list[Position] = []
    for rollout, of_rollout in zip(rollouts, chosen, strict=True):
        buckets = buckets_of(rollout, edges)
        lines += [
            Position(
                row=len(lines) + k,
                prompt_idx=rollout.prompt_idx,
                sample_idx=rollout.sample_idx,
                pos=p,
                bin=int(buckets[p]),
                entropy=rollout.entropies[p],
                correct=rollout.correct,
                token_id=rollout.response_ids[p],
                logprob=rollout.logprobs[p],
                tail_mass=rollout.tail_mass[p],
            )
            for k, p in enumerate(of_rollout.positions.tolist())
        ]
    return lines


def manifest_of(plan: Plan, checkpoint: Checkpoint, edges: dict[str, Any], rollouts: list[Rollout]) -> dict[str, Any]:
    """What all targets' manifests have in common."""
    settings = plan.settings
    facts = plan.facts | edges | {"versions": {"python": platform.python_version(), **plan.facts["versions"]}}
    del facts["targets"]  # each target's manifest names its own
    hashes = {r.prompt_idx: prompt_hash(r.prompt_ids) for r in rollouts}
    prompt_idxs = sorted(hashes)
    return {
        "model_path": settings.model_path,
        **({"adapter_path": settings.adapter} if settings.adapter else {}),
        **({} if (place := settings.checkpoint.tokenizer_place)[0] == "model_path" else {"tokenizer_path": place[1]}),
        "num_prompts": len(prompt_idxs),
        "num_rollouts": len(rollouts),
        **facts,
        "num_correct_rollouts": sum(r.correct for r in rollouts),
        "prompt_idxs": prompt_idxs,
        "prompt_hashes": [hashes[idx] for idx in prompt_idxs],
        "prompts_due": sorted(plan.source.prompts),
        "num_rollouts_due": sum(plan.source.rows_per_prompt),
        "num_response_tokens": sum(len(r.response_ids) for r in rollouts),
        **plan.computing,
        "device_map": getattr(checkpoint.model, "hf_device_map", None) if plan.placement else None,
    }
