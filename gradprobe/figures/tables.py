"""The report's tables, from the summaries, the manifests and the rollouts."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis.text import (
    MISSING_TYPESET,
    typeset_estimate,
    typeset_interval,
    typeset_number,
    typeset_sentence,
    typeset_share,
)
from ..exp2.summary import reasons_by_bucket
from .answers import model_name, rho_with_interval
from .look import shortened
from .rollouts import Commonest

SMALLEST_SHARE = 0.005


@dataclass(frozen=True)
class Table:
    """Rows of ready cells; `text` where the cells are words; `notes`, sentences below."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TokenTable:
    """Of each bucket ready cells and its commonest tokens, each with its share of the bucket."""

    caption: str
    header: Sequence[str]
    rows: Sequence[tuple[Sequence[str], Sequence[tuple[str, str]]]]


def direction_tables(tag: str, numbers: Mapping[str, Any]) -> list[Table]:
    """Exp 2 of one tag: ρ with its verdict, and what it is made of, each narrow enough for a page."""
    verdicts, parts = [], []
    for bucket, found in numbers["by_bucket"].items():
        alignment, cancellation = found["alignment"], found["cancellation"]
        verdicts.append(
            [
                bucket,
                str(alignment["n_prompts"]),
                rho_with_interval(alignment),
                typeset_number(found.get("reference"), 0),
                alignment["verdict"],
                typeset_number(alignment["p_value"], 4),
                typeset_number(found.get("n_rare"), 1),
                _excess(found.get("on_policy")),
            ]
        )
        parts.append(
            [
                bucket,
                str(found["n_prompts_usable"]),
                typeset_number(found["correct_vs_incorrect"]["mean"]),
                typeset_number(found["control_within_group"]["mean"]),
                typeset_number(found["control_within_group_by_rollout"]["mean"]),
                typeset_number(cancellation["ratio"]),
                _with_interval(cancellation["null_mean"], cancellation["null_ci95"]),
                typeset_number(cancellation["p_value"], 4),
            ]
        )
    of_verdicts = ["bucket", "prompts", "ρ [95%]", "theory", "verdict", "p", "rare tokens", "log π + H (z)"]
    of_parts = ["bucket", "prompts", "mean cos", "control: tokens", "control: rollouts", "C"]
    of_parts += ["C under the null [95%]", "p of C"]
    why = [typeset_sentence(line) for line in reasons_by_bucket(numbers["by_bucket"])]
    return [
        Table(f"{tag}: every bucket, with the noise removed", of_verdicts, verdicts, notes=why),
        Table(f"{tag}: every bucket, cosines and what is left of the update", of_parts, parts),
    ]


def compression_table(tag: str, numbers: Mapping[str, Any]) -> Table:
    """Exp 1 of one tag."""
    rows = [
        [
            bucket,
            f"{found['n']:,}",
            _with_interval(found["participation_ratio"], found["participation_ratio_ci95"]),
            _with_interval(found["participation_ratio_unit_norm"], found.get("participation_ratio_unit_norm_ci95")),
            typeset_number(found["ess"], 1),
            typeset_number(found["participation_ratio_isotropic"], 1),
            typeset_number(found["rank95"]),
            typeset_number(found["effective_rank"], 1),
            typeset_number(numbers["cross_bucket_ceiling"][int(bucket)]),
        ]
        for bucket, found in numbers["per_bucket"].items()
    ]
    header = ["bucket", "n", "PR [95%]", "unit-norm PR [95%]", "ESS", "PR if isotropic", "rank95", "effective rank"]
    return Table(f"{tag}: every bucket", [*header, "leading direction repeats, |cos|"], rows)


def signal_tables(tag: str, numbers: Mapping[str, Any]) -> list[Table]:
    """Exp 3 of one tag: what keeping 20% of the tokens does, and every bucket."""
    header = ["bucket", "tokens", "rare tokens", "signal [95%]", "within prompts [95%]", "noise", "noise scale"]
    buckets = [
        [
            bucket,
            typeset_share(found["share_of_tokens"]),
            typeset_number(found["n_rare"], 1),
            _share(found["signal_share"]),
            _share(found["signal_share_within_prompts"]),
            typeset_share(found["noise_share"]),
            typeset_number(found["noise_scale_prompts"], 0),
            typeset_estimate(found["cosine_with_update"]),
            typeset_number(found["score_mean"]["z"], 1),
        ]
        for bucket, found in numbers["per_bucket"].items()
    ]
    kept = [
        [
            which,
            typeset_estimate(found["cosine"]),
            _share(found["signal_share"]),
            typeset_share(found["noise_share"]),
            typeset_estimate(found["noise_scale_ratio"]),
        ]
        for which, found in numbers["at_20_percent"].items()
    ]
    of_kept = ["20% of the tokens kept", "cosine [95%]", "signal [95%]", "noise", "noise scale ratio [95%]"]
    name = f"{tag}, {numbers['objective']}, buckets by {numbers['bucket_by']}"
    return [Table(name, of_kept, kept), Table(f"{name}: every bucket", [*header, "cosine [95%]", "score z"], buckets)]


def _share(found: Mapping[str, Any]) -> str:
    """A share with its interval; one without is not said."""
    return MISSING_TYPESET if found["ci95"] is None else typeset_share(found["value"], found["ci95"])


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return MISSING_TYPESET if value is None else f"{typeset_number(value, 2)} {typeset_interval(interval)}"


def _excess(found: Mapping[str, Any] | None) -> str:
    if not found or found["mean"] is None:
        return MISSING_TYPESET
    return f"{typeset_number(found['mean'])} ({typeset_number(found['z'], 1)})"


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


def settings_table(manifests: Mapping[str, Any]) -> Table:
    """What each tag was made with."""
    keys = [key for key in SETTINGS if any(key in manifest for manifest in manifests.values())]
    rows = [[key, *(_setting_named(key, manifest.get(key)) for manifest in manifests.values())] for key in keys]
    of_rollouts = {"verifier": _verifier, "prompts": _prompts, "sampler": _sampler, "log-prob gap": _gap}
    rows += [[name, *map(read, manifests.values())] for name, read in of_rollouts.items()]
    return Table("from the manifests", ["", *manifests], rows, text=True)


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
        return MISSING_TYPESET
    return _setting(manifest.get("prompts") or "as the data set gives them")


def _sampler(manifest: Mapping[str, Any]) -> str:
    """What drew the tokens, or the kind of file they came from."""
    kind = _origin(manifest).get("format")
    sampling = [_sampling(manifest).get(key) for key in ("distribution", "method", "server")]
    named = [_setting(one) for one in (kind and f"a file ({kind})", *sampling) if one]
    return "; ".join(named) or MISSING_TYPESET


def _gap(manifest: Mapping[str, Any]) -> str:
    """Between a server's log-probs and the probe's own."""
    gap = manifest.get("server_logprob_gap")
    return MISSING_TYPESET if gap is None else f"{gap:.2g} nats a token, mean of |the server's − the probe's|"


def commonest_tables(
    tag: str, commonest: Commonest, edges: Sequence[float], of_signal: Commonest, signal: Mapping[str, Any] | None
) -> list[TokenTable]:
    """The commonest tokens of the dump's own buckets, and of those of Exp 3 with their share of the signal.

    Args:
        tag: whose.
        commonest, edges: of the dump's own buckets.
        of_signal: of the buckets of Exp 3; empty where they are not of the entropy.
        signal: the tag's part of `exp3_summary.json`.
    """
    tables = []
    if commonest:
        ranges = [f"{_nats(low)} to {_nats(high)}" for low, high in itertools.pairwise(edges)]
        rows = [([str(i), ranges[i]], _with_shares(found)) for i, found in enumerate(commonest)]
        tables.append(TokenTable(f"{tag}: each bucket's commonest tokens", ["bucket", "entropy in nats"], rows))
    if of_signal and signal is not None:
        cells = [
            [bucket, typeset_share(found["share_of_tokens"]), _share(found["signal_share"])]
            for bucket, found in signal["per_bucket"].items()
        ]
        rows = [(of_bucket, _with_shares(found)) for of_bucket, found in zip(cells, of_signal, strict=True)]
        header = ["bucket", "tokens", "signal [95%]"]
        tables.append(TokenTable(f"{tag}: which tokens carry the signal ({signal['objective']})", header, rows[::-1]))
    return tables


def _with_shares(found: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    return [(shortened(text), typeset_share(share) if share >= SMALLEST_SHARE else "<1%") for text, share in found]


def _nats(edge: float) -> str:
    return f"{edge:.2g}"


def left_out_table(exp2: Mapping[str, Any], manifests: Mapping[str, Any]) -> Table:
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
    return Table("counts", ["", *exp2], rows, text=True)


def _setting_named(key: str, value: Any) -> str:
    return model_name(value) if key.endswith("_path") else _setting(value)


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_setting(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_setting(part) for part in value)
    if isinstance(value, str) and os.path.isabs(value):
        return model_name(value)
    return MISSING_TYPESET if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
