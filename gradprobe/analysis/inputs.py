"""What the analysis scripts have in common: dumps in and checked, and what tells one from another."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..common.errors import InputError, first_of, raise_if_any
from ..dump.consistency import checksum_problems, load_dump, read_content
from ..dump.format import (
    GRADS,
    MANIFEST,
    META,
    Dump,
    find_rollouts,
    model_of,
    shown_projection,
    target_directories,
)
from ..dump.on_policy import OnPolicy, Tokens, claims_on_policy, is_chosen_by_prefix
from ..dump.records import PromptKey, iter_rollouts
from .differences import refuse_different_targets
from .pooled import Pooled
from .prompts import rollouts_of, with_prompts_once
from .summaries import LAYOUT
from .text import Table

log = logging.getLogger(__name__)

Tag = TypeVar("Tag", bound="str | None")


def open_dumps(
    paths: Mapping[Tag, Path], refusal: Callable[[Dump], str | None] = lambda dump: None
) -> dict[Tag, list[Dump]]:
    """Open every dump, read all of its gradients once, and leave out those that say nothing.

    Rows with a NaN or an infinity, and rows that are zero throughout, are left out, and prompts that stand twice are
    one; the dump's `warnings` say how many.

    Args:
        paths: of each tag.
        refusal: what makes a dump unfit, told before its gradients are read; None where nothing does.

    Returns:
        For each tag its dumps: one, or one for each target that was probed, in the order they were asked for.
    """
    dumps: dict[Tag, list[Dump]] = {}
    problems: list[str] = []
    for tag, path in paths.items():
        try:
            dumps[tag] = [_fit(load_dump(target), refusal) for target in target_directories(path)]
        except InputError as error:
            problems.extend(error.problems)
    raise_if_any(dict.fromkeys(problems))  # once, where two tags name the same dump
    refuse_different_targets(dumps)
    usable = {tag: [_usable(dump, problems) for dump in targets] for tag, targets in dumps.items()}
    raise_if_any(dict.fromkeys(problems))
    return usable


def _fit(dump: Dump, refusal: Callable[[Dump], str | None]) -> Dump:
    reason = refusal(dump)
    if reason is not None:
        raise InputError(f"{dump.path}: {reason}")
    return dump


def _usable(dump: Dump, problems: list[str]) -> Dump:
    """The dump without faulty rows; `problems` gets files that have changed since they were written."""
    content = read_content(dump.path)
    problems += checksum_problems(dump.path, dump.manifest, content)
    left_out = [
        f"{dump.path / GRADS}: {len(rows)} rows {fault} are left out ({first_of(rows.tolist())})"
        for rows, fault in ((content.nonfinite, "with NaN or infinity"), (content.zero, "that are zero throughout"))
        if len(rows)
    ]
    kept = np.setdiff1d(dump.row, np.concatenate([content.nonfinite, content.zero]))
    return with_prompts_once(replace(dump.only(kept), warnings=(*dump.warnings, *left_out)))


def pooled_of(dump: Dump) -> Pooled:
    """A pooled dump as arrays, and all of its rollouts: those of `rollouts.jsonl`, of its rows where that is absent.

    The outcome is the reward where every rollout has one, else whether it is correct; so too where a verifier was to
    judge in the place of whoever gave the rewards. Codes of prompts follow the order of their keys.

    Raises:
        ValueError: the dump is of single tokens.
    """
    if not dump.is_pooled:
        raise ValueError(f"{dump.path} is a dump of single tokens")
    rollouts = _rollouts_of(dump)
    keys = sorted({key for key, _ in rollouts} | set(dump.prompt_keys))
    code_of = {key: code for code, key in enumerate(keys)}
    codes = np.array([code_of[key] for key in dump.prompt_keys], np.int64)
    columns = np.array([list(facts) for facts in rollouts.values()], np.float64).reshape(-1, 3)
    weights = (dump.manifest.get("projection") or {}).get("weights", [])
    is_rewarded = len(columns) > 0 and not np.isnan(columns[:, 2]).any() and not is_judged_anew(dump.manifest)
    return Pooled(
        grads=dump.grads,
        prompt=codes[dump.prompt],
        sample=dump.sample_idx,
        bucket=dump.bin,
        n_tokens=dump.n_tokens,
        rare=dump.rare,
        rollout_prompt=np.array([code_of[key] for key, _ in rollouts], np.int64),
        rollout_sample=np.array([sample for _, sample in rollouts], np.int64),
        outcome=columns[:, 2 if is_rewarded else 0],
        correct=columns[:, 0] > 0,
        n_response_tokens=columns[:, 1].astype(np.int64),
        n_buckets=dump.bins,
        outcome_is="reward" if is_rewarded else "verdict",
        weights={weight["name"]: weight["offset"] for weight in weights} if len(weights) > 1 else {},
    )


def is_judged_anew(manifest: Mapping[str, Any]) -> bool:
    """Whether a verifier was to judge in the place of whoever gave the rewards."""
    return (manifest.get("rollouts_from") or {}).get("correct_from") == "verifier"


def _rollouts_of(dump: Dump) -> dict[tuple[PromptKey, int], tuple[float, float, float]]:
    """Whether it is correct, its tokens and its reward, or NaN, by each rollout's prompt and sample."""
    rewards = np.full(len(dump.row), np.nan) if dump.reward is None else dump.reward
    of_rows = {
        (dump.prompt_keys[prompt], sample): facts
        for prompt, sample, *facts in zip(
            dump.prompt.tolist(),
            dump.sample_idx.tolist(),
            dump.correct.astype(float).tolist(),
            dump.n_response_tokens.tolist(),
            rewards.tolist(),
            strict=True,
        )
    }
    file = find_rollouts(dump.path)
    if file is None:
        return of_rows
    found: dict[tuple[PromptKey, int], tuple[float, float, float]] = {}
    for rollout in rollouts_of(dump):
        key = rollout.prompt_idx, rollout.sample_idx
        if key in found:
            raise InputError(f"{file}: the rollout of prompt_idx {key[0]}, sample_idx {key[1]} stands twice")
        reward = np.nan if rollout.reward is None else rollout.reward
        found[key] = float(rollout.correct), len(rollout.response_ids), reward
    missing = [
        f"prompt_idx {prompt}, sample_idx {sample}" for prompt, sample in of_rows if (prompt, sample) not in found
    ]
    if missing:
        raise InputError(f"{dump.path / META}: {len(missing)} rollouts are not in {file} ({first_of(missing)})")
    return found


def on_policy_by_bucket(dump: Dump) -> list[OnPolicy | None]:
    """Of each bucket, whether its tokens were drawn from the model.

    None where the rollouts are not at hand, or buckets were chosen by the very tokens drawn.
    """
    file = find_rollouts(dump.path)
    if file is None or not is_chosen_by_prefix(dump.manifest):
        return [None] * dump.bins
    edges = np.array(dump.manifest["entropy_edges"])
    return list(Tokens.of(iter_rollouts(file)).test_by_bucket(edges, claims_on_policy(dump.manifest)))


def first_targets(dumps: Mapping[Tag, list[Dump]]) -> dict[Tag, Dump]:
    """Each tag's first target: the one that tables and headline figures show."""
    return {tag: targets[0] for tag, targets in dumps.items()}


def warn(dumps: Mapping[Tag, list[Dump]]) -> None:
    """Say each dump's warnings."""
    for targets in dumps.values():
        for dump in targets:
            for warning in dump.warnings:
                log.warning(warning)


def default_output_dir(dump: Path) -> Path:
    """`exp12_figures` beside `dump`, where the launcher keeps a study's results."""
    return Path(os.path.abspath(dump)).parent / "exp12_figures"


def directory_name(path: Path) -> str:
    """The name of a directory, also where it is given as `.` or `..`."""
    return os.path.basename(os.path.abspath(path))


def fingerprint(dump: Path) -> str:
    """SHA-256 of a dump's manifest, hexadecimal."""
    try:
        return hashlib.sha256((dump / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{dump / MANIFEST}: {error.strerror}") from error


def fingerprints_of(dumps: Mapping[Tag, list[Any]]) -> dict[Tag, list[str]]:
    """Of each tag's targets: what summaries and figures are about."""
    return {tag: [fingerprint(dump.path) for dump in targets] for tag, targets in dumps.items()}


def about_study(
    parts: Mapping[Tag, Mapping[str, Any]], dumps: Mapping[Tag, list[Dump]], differences: Mapping[Tag, list[str]]
) -> dict[Tag, dict[str, Any]]:
    """A whole summary: each tag's numbers, behind whose they are, and in what the tag differs from the first."""
    fingerprints = fingerprints_of(dumps)
    return {
        tag: {
            "layout": LAYOUT,
            "model": model_of(first.manifest),
            "target": first.manifest["target"],
            "row_idx": first.manifest["row_idx"],
            "projection": shown_projection(first.manifest),
            "bins": first.bins,
            **parts[tag],
            "differences": differences[tag],
            "manifest_sha256": fingerprints[tag],
        }
        for tag, (first, *_) in dumps.items()
    }


def print_results(tables: Sequence[Table], output_dir: Path, written: Sequence[str]) -> None:
    """What a reader of the terminal gets: the tables; where files went is no result and goes to stderr."""
    print("\n\n".join(table.text() for table in tables))
    log.info(f"wrote {output_dir}: {', '.join(written)}")
