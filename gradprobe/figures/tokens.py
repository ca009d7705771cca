"""Rollouts as people read them: each token with its entropy, its bucket, and whether its gradient was taken."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..common.console import printable
from ..common.errors import InputError
from ..dump.buckets import buckets_of
from ..dump.format import Dump
from ..dump.records import PromptKey, Rollout

MOST_COMMON = 12


@dataclass(frozen=True)
class Token:
    """One response token as people see it.

    Attributes:
        text: escaped: what a model writes reaches no terminal raw.
        shade: from 0 to 1, its entropy in the highest bucket's lower edge, cut off at twice that.
        push: from -1 to 1, where RL's step pushes it, in the rollout's largest but one in twenty; 0 without a step.
        is_high: whether it is in the highest bucket.
        is_picked: whether its gradient is in the dump.
    """

    text: str
    entropy: float
    shade: float
    is_high: bool
    is_picked: bool
    push: float = 0.0


def head_of(rollout: Rollout) -> str:
    """A line about a rollout."""
    verdict = "correct" if rollout.correct else "incorrect"
    mean = float(np.mean(rollout.entropies)) if rollout.entropies else 0.0
    return printable(
        f"prompt {rollout.prompt_idx} sample {rollout.sample_idx} ('{rollout.problem_id}'): {verdict}, answer "
        f"'{rollout.ground_truth}', {len(rollout.response_ids)} tokens, mean entropy {mean:.2f} nats"
    )


def tokens_of(rollout: Rollout, dump: Dump) -> Iterator[Token]:
    """A rollout's tokens, in order.

    Raises:
        InputError: the dump is of a time when texts of tokens were not kept.
    """
    if not rollout.token_texts:
        raise InputError(
            f"{dump.path}: its rollouts.jsonl has no token_texts; probe it again by `rollouts` to add them"
        )
    own = (dump.sample_idx == rollout.sample_idx) & (dump.prompt == _code_of(dump, rollout.prompt_idx))
    picked = set() if dump.pos is None else set(dump.pos[own].tolist())
    return shaded(rollout, np.array(dump.manifest["entropy_edges"]), picked)


def shaded(rollout: Rollout, edges: np.ndarray, picked: Collection[int]) -> Iterator[Token]:
    """A rollout's tokens, in order.

    Args:
        rollout: with its tokens' texts.
        edges: [bins + 1] of the buckets.
        picked: positions whose gradients were taken.
    """
    buckets, high = buckets_of(rollout, edges), max(edges[-2], 1e-9)
    d = np.array(rollout.step or [0.0] * len(rollout.entropies))
    pushes = np.clip(d / max(float(np.quantile(np.abs(d), 0.95)) if len(d) else 0.0, 1e-12), -1.0, 1.0)
    for k, (text, entropy) in enumerate(zip(rollout.token_texts, rollout.entropies, strict=True)):
        shade = min(max(entropy, 0.0) / (2 * high), 1.0)
        yield Token(visible(text), entropy, shade, bool(buckets[k] == len(edges) - 2), k in picked, float(pushes[k]))


def _code_of(dump: Dump, key: PromptKey) -> int:
    return dump.prompt_keys.index(key) if key in dump.prompt_keys else -1


def visible(text: str) -> str:
    """A token's text with line ends kept and all other control characters escaped."""
    return "\n".join(map(printable, text.split("\n")))


def two_of_one_prompt(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """A correct and an incorrect rollout of one prompt, of lengths as typical of their kind as there are together."""
    prompts = [list(of_prompt) for _, of_prompt in groupby(rollouts, lambda r: r.prompt_idx)]
    typical = {
        kind: np.median([len(r.response_ids) for own in prompts for r in own if r.correct is kind] or [0])
        for kind in (True, False)
    }

    def off(rollout: Rollout) -> float:
        return abs(len(rollout.response_ids) - typical[rollout.correct])

    pairs = []
    for own in prompts:
        kinds = [[r for r in own if r.correct is kind] for kind in (True, False)]
        if all(kinds):
            pairs.append([min(of_kind, key=off) for of_kind in kinds])
    return min(pairs, key=lambda pair: sum(map(off, pair)), default=[])


def commonest_tokens(
    rollouts: Iterable[Rollout], edges: np.ndarray, n: int = MOST_COMMON
) -> list[list[tuple[str, float]]]:
    """Of each bucket its commonest tokens, each with its share of the bucket's tokens.

    Args:
        edges: [bins + 1] of the buckets.

    Returns:
        For each bucket at most `n` pairs of text (escaped) and share; none where texts were not kept.
    """
    counts = [Counter() for _ in range(len(edges) - 1)]
    for rollout in rollouts:
        for text, bucket in zip(rollout.token_texts, buckets_of(rollout, edges).tolist(), strict=False):
            counts[bucket][text] += 1
    return [[(printable(text), k / of_bucket.total()) for text, k in of_bucket.most_common(n)] for of_bucket in counts]
