"""What a report shows of a dump's rollouts: facts known before any gradient, two of them as text, commonest tokens."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import FaultyRecord
from ..common.fields import is_index
from ..common.files import iter_jsonl
from ..dump.format import META, find_rollouts
from ..dump.on_policy import Tokens
from ..dump.records import PromptKey, Rollout, iter_rollouts, prompt_key_from_json
from ..rollouts.early_word import early_word
from .tokens import Token, commonest_tokens, head_of, shaded, two_of_one_prompt

MAX_TOKENS_READ = 200_000
"""Of a file of rollouts: seconds of reading; more would move no share of the commonest tokens."""
MAX_TOKENS_SHOWN = 250

Commonest = Sequence[Sequence[tuple[str, float]]]
"""Of each bucket, its commonest tokens and their shares of it."""


@dataclass(frozen=True)
class RolloutText:
    """A rollout for people: a line about it, its first tokens, and how many more there are."""

    head: str
    tokens: Sequence[Token]
    n_more: int


@dataclass(frozen=True)
class RolloutsSeen:
    """What was seen of a dump's rollouts.

    Attributes:
        facts: lines about them; the first says of how many where not all were read.
        texts: a correct and an incorrect one of one prompt, or what there is; none where texts were not kept.
        commonest: by the dump's own buckets; none where texts were not kept.
        commonest_of_signal: by the buckets of Exp 3; none without these.
    """

    facts: Sequence[str]
    texts: Sequence[RolloutText]
    commonest: Commonest
    commonest_of_signal: Commonest


def see_rollouts(
    dump: Path, manifest: Mapping[str, Any], edges_of_signal: Sequence[float] | None = None
) -> RolloutsSeen | None:
    """Read what a report shows; None of a dump without rollouts. Of a large file only the first part is read.

    Args:
        dump: its directory.
        manifest: of it.
        edges_of_signal: of the entropy buckets of Exp 3.

    Raises:
        InputError: a line of the rollouts is malformed.
    """
    file = find_rollouts(dump)
    rollouts = [] if file is None else first_rollouts(iter_rollouts(file))
    if not rollouts:
        return None
    facts = list(_facts(rollouts, manifest))
    with_texts = [rollout for rollout in rollouts if rollout.token_texts]
    if not with_texts:
        return RolloutsSeen([*facts, "its rollouts.jsonl keeps no texts of tokens: none are shown"], (), (), ())
    edges = np.array(manifest["entropy_edges"], dtype=np.float64)
    shown = two_of_one_prompt(with_texts) or with_texts[:2]
    picked = picked_positions(dump / META, shown)
    texts = [
        RolloutText(
            head_of(one), list(shaded(_cut(one), edges, of_it)), max(0, len(one.token_texts) - MAX_TOKENS_SHOWN)
        )
        for one, of_it in zip(shown, picked, strict=True)
    ]
    of_signal = () if edges_of_signal is None else commonest_tokens(with_texts, np.array(edges_of_signal))
    return RolloutsSeen(facts, texts, commonest_tokens(with_texts, edges), of_signal)


def first_rollouts(rollouts: Iterable[Rollout], most_tokens: int = MAX_TOKENS_READ) -> list[Rollout]:
    """The first ones that together have `most_tokens`, those without any left out."""
    found, n_tokens = [], 0
    for rollout in rollouts:
        if rollout.response_ids:
            found.append(rollout)
        n_tokens += len(rollout.response_ids)
        if n_tokens >= most_tokens:
            break
    return found


def picked_positions(meta: Path, rollouts: Sequence[Rollout]) -> list[set[int]]:
    """Of each rollout, the positions whose gradients the dump holds; none where its meta.jsonl is gone."""
    found: dict[tuple[PromptKey, int], set[int]] = defaultdict(set)
    wanted = {(rollout.prompt_idx, rollout.sample_idx) for rollout in rollouts}
    for _, record in iter_jsonl(meta) if meta.is_file() else ():
        try:
            key = (prompt_key_from_json(record.get("prompt_idx")), record.get("sample_idx"))
        except FaultyRecord:
            continue  # the analyses, which rest on these lines, refuse them
        if key in wanted and is_index(record.get("pos")):
            found[key].add(record["pos"])
    return [found[rollout.prompt_idx, rollout.sample_idx] for rollout in rollouts]


def _facts(rollouts: Sequence[Rollout], manifest: Mapping[str, Any]) -> Iterable[str]:
    if len(rollouts) < manifest["num_rollouts"]:
        yield f"of {manifest['num_rollouts']:,} rollouts, the first {len(rollouts):,} in the file"
    end_ids = manifest.get("end_ids")
    if isinstance(end_ids, list) and all(map(is_index, end_ids)):  # without them nobody knows which were cut off
        yield from early_word(rollouts, frozenset(end_ids), Tokens.of(rollouts).test(is_claimed=False))


def _cut(rollout: Rollout) -> Rollout:
    """Its first tokens, as far as a page shows them."""
    kept = slice(MAX_TOKENS_SHOWN)
    per_token = ("token_texts", "entropies", "bucket_scores", "step")
    return replace(rollout, **{name: getattr(rollout, name)[kept] for name in per_token})
