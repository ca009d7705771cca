"""Are rollouts the probed model's own? A test that needs no gradient.

Where a token is drawn from π, log π(y) + H has mean zero whatever π is, given all tokens before it: E log π(y) = -H. So
has its sum over any tokens chosen by their prefix alone, such as those of an entropy bucket. Tokens drawn at another
temperature, cut to the likeliest words, or drawn from another model give another mean.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .buckets import bucket_of
from .records import Rollout

ON_POLICY, OFF_POLICY = "on-policy", "off-policy"
LARGEST_Z = 4.0
MIN_RARE_TOKENS = 30
"""Fewer to be expected behind a mean gradient, and it may rest on what did not come up: no interval knows that."""
CHOSEN_BY_PREFIX, CHOSEN_BY_TOKEN = ("entropy", "position", "random"), ("surprisal", "logit-norm")
"""Rules that buckets go by (`bucket_by`): those of the first kind don't look at the token that was drawn."""
OF_WEIGHTS = ("weights_sha256", "revision", "adapter", "code_sha256")
"""What of `model_identity` says which function of token ids the model is; its tokenizer is no part of that."""


@dataclass(frozen=True)
class OnPolicy:
    """The mean of log π(y) + H over tokens, and whether it is that of tokens drawn from π.

    Attributes:
        mean: nats per token; None without tokens.
        z: in standard errors; None with fewer than 2 prompts.
        verdict: "off-policy" where |z| > 4, else "on-policy" where that is claimed, else None.
    """

    mean: float | None
    z: float | None
    verdict: str | None


def on_policy(prompt: np.ndarray, excess: np.ndarray, is_claimed: bool, variance: np.ndarray | None = None) -> OnPolicy:
    """Test tokens' log π(y) + H.

    The standard error is the larger of two: the spread between prompts, which holds whatever tokens of a prompt have in
    common; and the one that π itself implies, which counts rare tokens that did not come up. Where π is almost certain
    nearly every token has log π + H slightly above 0, and a rare one far below: a spread between prompts that lack the
    rare ones would make any model look off-policy.

    Args:
        prompt: [n] number of each token's prompt, from 0.
        excess: [n] log π(y) + H, nats.
        is_claimed: whether the tokens are said to be drawn from π.
        variance: [n] of `excess` under π, or less; None where it is not known.
    """
    if len(excess) == 0:
        return OnPolicy(None, None, None)
    counts = np.bincount(prompt)
    n_tokens, sums = counts[counts > 0], np.bincount(prompt, excess)[counts > 0]
    mean, n = float(sums.sum() / n_tokens.sum()), len(sums)
    deviations = sums - mean * n_tokens
    between = n / (n - 1) * np.sum(deviations**2) if n > 1 else 0.0
    error = float(np.sqrt(max(between, 0.0 if variance is None else variance.sum()))) if n > 1 else 0.0
    if not error > 0:
        return OnPolicy(mean, None, None)
    z = float(sums.sum() / error)
    return OnPolicy(mean, z, OFF_POLICY if abs(z) > LARGEST_Z else ON_POLICY if is_claimed else None)


@dataclass(frozen=True)
class Tokens:
    """All response tokens of some rollouts, n in all.

    Attributes:
        prompt: [n] number of each one's prompt, the same of equal ids.
        excess: [n] log π(y) + H, nats.
        entropy: [n] H, nats.
        tail_mass: [n] 1 - max π; None where it is not known.
        score: [n] what buckets go by: the entropy, unless told otherwise.
    """

    prompt: np.ndarray
    excess: np.ndarray
    entropy: np.ndarray
    tail_mass: np.ndarray | None
    score: np.ndarray

    @property
    def variance(self) -> np.ndarray | None:
        """[n] of log π(y) under π, nats², as far as H and ε = 1 - max π tell: between the likeliest word and the rest.

        ε (1 - ε) (a - b)², a = log(1 - ε) of the likeliest word and b = (-H - (1 - ε) a) / ε the others' mean. Where
        a softmax is nearly certain that is nearly all of it. None where ε is not known.
        """
        if self.tail_mass is None:
            return None
        tail, a = self.tail_mass, np.log1p(-self.tail_mass)
        b = np.divide(-self.entropy - (1 - tail) * a, tail, out=np.zeros(len(tail)), where=tail > 0)
        return tail * (1 - tail) * (a - b) ** 2

    @staticmethod
    def of(rollouts: Iterable[Rollout]) -> "Tokens":
        """Those of these rollouts, one behind the other."""
        code_of: dict[tuple[int, ...], int] = {}
        parts: list[tuple[np.ndarray, ...]] = []
        is_known = True
        for r in rollouts:
            code = code_of.setdefault(tuple(r.prompt_ids), len(code_of))  # however often it stands in a data set
            is_known &= len(r.tail_mass) == len(r.response_ids)
            entropies = np.asarray(r.entropies)
            score = np.asarray(r.bucket_scores) if r.bucket_scores else entropies
            tail = np.asarray(r.tail_mass) if r.tail_mass else np.zeros(len(entropies))
            parts.append((np.full(len(entropies), code), np.asarray(r.logprobs) + entropies, entropies, tail, score))
        empty = (np.zeros(0, int), *(np.zeros(0) for _ in range(4)))
        prompt, excess, entropy, tail, score = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
        return Tokens(prompt, excess, entropy, tail if is_known else None, score)

    def test(self, is_claimed: bool) -> OnPolicy:
        """`on_policy` of all of them."""
        return on_policy(self.prompt, self.excess, is_claimed, self.variance)

    def test_by_bucket(self, edges: np.ndarray, is_claimed: bool) -> list[OnPolicy]:
        """`on_policy` of the tokens of each bucket. `edges`: [bins + 1]."""
        bucket, variance = bucket_of(self.score, edges), self.variance
        found = []
        for index in range(len(edges) - 1):
            own = bucket == index
            of_own = None if variance is None else variance[own]
            found.append(on_policy(self.prompt[own], self.excess[own], is_claimed, of_own))
        return found


def claims_on_policy(manifest: Mapping[str, Any]) -> bool:
    """Whether a dump's rollouts are said to be the probed model's own, at temperature 1 from its full softmax."""
    sampling, origin = manifest.get("sampling") or {}, manifest.get("rollouts_from")
    is_plain = sampling.get("distribution") == "full softmax" and sampling.get("temperature") == 1.0
    return is_plain and (origin is None or are_same_weights(origin.get("identity"), manifest.get("model_identity")))


def warning_of(found: OnPolicy, manifest: Mapping[str, Any]) -> str | None:
    """What to say where tokens are off-policy though nothing known of them says that they should be; else None."""
    sampling, origin = manifest.get("sampling") or {}, manifest.get("rollouts_from")
    identity = manifest.get("model_identity")
    is_of_another = bool(origin and origin.get("identity")) and not are_same_weights(origin["identity"], identity)
    if found.verdict != OFF_POLICY or is_of_another or sampling.get("temperature", 1.0) != 1.0:
        return None
    return (
        f"log π + H is {found.mean:+.3f} nats a token, {found.z:+.1f} standard errors from the 0 of tokens that this "
        "model itself sampled at temperature 1: another temperature or top-p, another checkpoint, another prompt than "
        "the model saw, or responses without a part of them (docs/methods.md, the on-policy test)"
    )


def are_same_weights(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two manifests' `model_identity` are of the same weights, whatever their tokenizers."""
    return bool(one and other) and all(one.get(key) == other.get(key) for key in OF_WEIGHTS)


def is_chosen_by_prefix(manifest: Mapping[str, Any]) -> bool | None:
    """Whether a token's bucket is fixed before it is drawn, so that its score has mean zero; None of scores unknown."""
    rule = manifest.get("bucket_by", "entropy")
    return True if rule in CHOSEN_BY_PREFIX else False if rule in CHOSEN_BY_TOKEN else None
