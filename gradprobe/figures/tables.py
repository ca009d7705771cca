"""The report's tables beside the experiments' own: settings, commonest tokens, what was left out."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.summaries import Summary
from ..analysis.text import MISSING, Table, share, share_estimate
from ..dump.format import model_name
from .look import shortened
from .rollouts import Commonest

SMALLEST_SHARE = 0.005
TOKENS = "commonest tokens, and their share of the bucket"
SETTINGS = (
    "model_path",
    "adapter_path",
    "tokenizer_path",
    "target",
    "row_idx",
    "num_prompts",
    "num_samples_per_prompt",
    "num_rollouts",
    "num_correct_rollouts",
    "num_response_tokens",
    "num_positions",
    "pos_per_bin_per_rollout",
    "bins",
    "entropy_edges",
    "entropy_edges_over",
    "bucket_by",
    "on_policy",
    "temperature",
    "max_new_tokens",
    "seed",
    "dtype",
    "device",
    "dataset",
    "model_identity",
    "versions",
)


def settings_table(manifests: Summary) -> Table:
    """What each tag was made with."""
    keys = [key for key in SETTINGS if any(key in manifest for manifest in manifests.values())]
    rows = [[key, *(_setting_named(key, manifest.get(key)) for manifest in manifests.values())] for key in keys]
    of_rollouts = {"verifier": _verifier, "prompts": _prompts, "sampler": _sampler, "log-prob gap": _gap}
    rows += [[name, *map(read, manifests.values())] for name, read in of_rollouts.items()]
    return Table("from the manifests", ["", *manifests], rows, is_words=True)


def _origin(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """What it says of a file that rollouts came from."""
    origin = manifest.get("rollouts_from")
    return origin if isinstance(origin, dict) else {}


def _sampling(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    return manifest.get("sampling") or {}


def _verifier(manifest: Mapping[str, Any]) -> str:
    """What judged the answers: by its name, or a file's own verdicts."""
    origin = _origin(manifest)
    told = [origin.get("verifier"), origin.get("correct_from"), _sampling(manifest).get("verifier")]
    return _setting(next((one for one in told if one), None))


def _prompts(manifest: Mapping[str, Any]) -> str:
    """How problems became prompts."""
    if "prompts" not in manifest and (_origin(manifest) or not manifest.get("dataset")):
        return MISSING
    return _setting(manifest.get("prompts") or "as the data set gives them")


def _sampler(manifest: Mapping[str, Any]) -> str:
    """What drew the tokens, or the kind of file they came from."""
    kind = _origin(manifest).get("format")
    sampling = [_sampling(manifest).get(key) for key in ("distribution", "method", "server")]
    named = [_setting(one) for one in (kind and f"a file ({kind})", *sampling) if one]
    return "; ".join(named) or MISSING


def _gap(manifest: Mapping[str, Any]) -> str:
    """Between a server's log-probs and the probe's own."""
    gap = manifest.get("server_logprob_gap")
    return MISSING if gap is None else f"{gap:.2g} nats a token, mean of |the server's − the probe's|"


def commonest_tables(
    tag: str, commonest: Commonest, edges: Sequence[float], of_signal: Commonest, signal: Mapping[str, Any] | None
) -> list[Table]:
    """The commonest tokens of the dump's own buckets, and of those of Exp 3 with their share of the signal.

    Args:
        tag: whose.
        commonest, edges: of the dump's own buckets.
        of_signal: of the buckets of Exp 3; empty where they are not of the entropy.
        signal: the tag's part of `exp3_summary.json`.
    """
    tables = []
    if commonest:
        ranges = [f"{low:.2g} to {high:.2g}" for low, high in itertools.pairwise(edges)]
        rows = [[str(i), ranges[i], _with_shares(found)] for i, found in enumerate(commonest)]
        tables.append(Table(f"{tag}: by bucket of entropy", ["bucket", "nats", TOKENS], rows, is_words=True))
    if of_signal and signal is not None and "per_bucket" in signal:
        rows = [
            [bucket, share(found["share_of_tokens"]), share_estimate(found["signal_share"]), _with_shares(tokens)]
            for (bucket, found), tokens in zip(signal["per_bucket"].items(), of_signal, strict=True)
        ]
        header = ["bucket", "of all tokens", "of the signal [95%]", TOKENS]
        tables.append(Table(f"{tag}: which carry the signal ({signal['objective']})", header, rows, is_words=True))
    return [Table(one.caption, one.header, one.rows[::-1], is_words=True) for one in tables]  # the highest first


def _with_shares(found: Sequence[tuple[str, float]]) -> str:
    """`“ =” 5%   “2” 3%`, in quotes, as blanks tell tokens apart."""
    said = (f"“{shortened(text)}”\N{NO-BREAK SPACE}{_of_bucket(part)}" for text, part in found)
    return "   ".join(said)


def _of_bucket(part: float) -> str:
    return share(part) if part >= SMALLEST_SHARE else "<1%"


def left_out_table(exp2: Summary, manifests: Summary) -> Table:
    """How much each number is not about."""
    rows = [
        [
            "prompts without 2 top-bucket tokens of each kind (no cosine)",
            *(f"{n['n_prompts'] - n['n_prompts_usable']} of {n['n_prompts']}" for n in exp2.values()),
        ],
        [
            "prompts without 2 rollouts of each kind there (no part in ρ)",
            *(f"{n['n_prompts'] - n['alignment']['n_prompts']} of {n['n_prompts']}" for n in exp2.values()),
        ],
        ["prompts whose mean gradient is zero", *(str(n["n_prompts_zero_mean"]) for n in exp2.values())],
        ["gradient rows that are all zero", *(_setting(m.get("num_zero_rows")) for m in manifests.values())],
    ]
    return Table("counts", ["", *exp2], rows, is_words=True)


def _setting_named(key: str, value: Any) -> str:
    return model_name(value) if key.endswith("_path") else _setting(value)


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_setting(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_setting(part) for part in value)
    if isinstance(value, str) and os.path.isabs(value):
        return model_name(value)
    return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
