"""One self-contained page that says what a study found: answers first, then what limits them, the rest folded below.

Every word about a result is picked by the numbers in the summaries. The page has no script and loads nothing; what
comes from models or files is escaped, and of paths only the last part is said.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..analysis.text import MISSING_TYPESET, typeset_estimate, typeset_interval, typeset_number, typeset_share
from ..dump.format import target_name
from .answers import (
    Statement,
    cancel_statements,
    directions_statements,
    limits_of,
    model_name,
    named_model,
    rho_with_interval,
    signal_statements,
)

TEMPLATE = Path(__file__).with_name("report.html.j2")
REPLICATION = "exp12_replication.png"
TRAJECTORY = "exp12_trajectory.png"
FIGURES_OF_ANSWERS = ("exp1_headline.png", "exp2_alignment.png", "exp3_headline.png")
NO_EXP3 = "Not measured: no exp3_summary.json lies beside the other summaries."


@dataclass(frozen=True)
class Picture:
    """A PNG to embed."""

    name: str
    base64: str


@dataclass(frozen=True)
class Answer:
    """A question of the study: what each tag's numbers say, and the one figure that shows it."""

    question: str
    statements: Sequence[Statement]
    figure: Picture | None
    absent: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of ready cells; `text` where the cells are words."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False


@dataclass(frozen=True)
class Section:
    """A folded part of the page; one that is empty is left out."""

    heading: str
    question: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    notes: Sequence[tuple[str, str]] = ()


def render_report(
    exp1: Mapping[str, Any],
    exp2: Mapping[str, Any],
    manifests: Mapping[str, Any],
    figures: Mapping[str, bytes],
    exp3: Mapping[str, Any] | None = None,
) -> str:
    """The page of a study.

    Args:
        exp1, exp2: the content of `exp1_summary.json` and `exp2_summary.json`, keyed by tag.
        manifests: each tag's manifest.
        figures: PNGs by file name; those of the experiments are told apart by their names.
        exp3: the content of `exp3_summary.json`; None where it was not measured.

    Returns:
        HTML, complete in itself.
    """
    exp3 = exp3 or {}
    pictures = {name: Picture(name, base64.b64encode(content).decode()) for name, content in figures.items()}
    others = [picture for name, picture in pictures.items() if name not in FIGURES_OF_ANSWERS]
    of_answers = [pictures.get(name) for name in FIGURES_OF_ANSWERS]
    first = next(iter(exp1.values()))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title="How many directions, do they cancel, where does the signal sit?",
        subtitle=f"{target_name(first)}, {first['row_dim']:,} numbers a gradient: "
        + "; ".join(named_model(tag, numbers["model"]) for tag, numbers in exp1.items()),
        answers=[
            Answer(
                "How many directions do the gradients of high-entropy tokens span?",
                directions_statements(exp1),
                of_answers[0],
            ),
            Answer(
                "Would the updates of correct and incorrect rollouts cancel?", cancel_statements(exp2), of_answers[1]
            ),
            Answer(
                "Which tokens carry the signal of the update?", signal_statements(exp3), of_answers[2], absent=NO_EXP3
            ),
        ],
        limits=limits_of(exp1, exp2, exp3, manifests),
        sections=[s for s in _sections(exp1, exp2, exp3, manifests, others) if s.tables or s.figures or s.notes],
    )


def _sections(
    exp1: Mapping[str, Any],
    exp2: Mapping[str, Any],
    exp3: Mapping[str, Any],
    manifests: Mapping[str, Any],
    pictures: Sequence[Picture],
) -> list[Section]:
    def named(*starts: str) -> list[Picture]:
        return [picture for picture in pictures if picture.name.startswith(starts)]

    return [
        Section(
            "Directions: every bucket",
            "Participation ratio of the gradients as they are, and scaled to unit norm, which a few huge gradients "
            "cannot move. Bucket 0 has the lowest entropy.",
            [_compression_table(tag, numbers) for tag, numbers in exp1.items()],
            named("exp1_"),
        ),
        Section(
            "Cancelling: every bucket",
            "Alignment ρ of the mean gradients of correct and of incorrect rollouts of a prompt, noise removed: "
            "+1 would cancel under advantages of ±1, 0 is orthogonal, −1 adds up.",
            [_direction_table(tag, numbers) for tag, numbers in exp2.items()],
            named("exp2_"),
        ),
        Section(
            "Signal and noise: every bucket, and what keeping some tokens does",
            "Parts of the expected update and of its variance over prompts; each adds up to 100%, and a part can be "
            "below 0.",
            [table for tag, numbers in exp3.items() for table in _signal_tables(tag, numbers)],
            named("exp3_"),
        ),
        Section("Over checkpoints", figures=named(TRAJECTORY)),
        Section("Other rows and layers", figures=named(REPLICATION)),
        Section("Settings", tables=[_settings_table(manifests)]),
        Section("What was left out, and why", tables=[_left_out_table(exp2, manifests)]),
        Section("What the words mean", notes=GLOSSARY),
    ]


def _direction_table(tag: str, numbers: Mapping[str, Any]) -> Table:
    rows = []
    for bucket, found in numbers["by_bucket"].items():
        alignment, cancellation = found["alignment"], found["cancellation"]
        rows.append(
            [
                bucket,
                str(found["n_prompts_usable"]),
                typeset_number(found["correct_vs_incorrect"]["mean"]),
                typeset_number(found["control_within_group"]["mean"]),
                typeset_number(found["control_within_group_by_rollout"]["mean"]),
                rho_with_interval(alignment),
                typeset_number(found.get("reference"), 0),
                typeset_number(found.get("n_rare"), 1),
                _excess(found.get("on_policy")),
                typeset_number(alignment["p_value"], 4),
                alignment["verdict"],
                typeset_number(cancellation["ratio"]),
                _with_interval(cancellation["null_mean"], cancellation["null_ci95"]),
                typeset_number(cancellation["p_value"], 4),
            ]
        )
    header = ["bucket", "prompts", "mean cos", "control: tokens", "control: rollouts", "ρ [95%]", "theory"]
    header += ["rare tokens", "log π + H (z)", "p", "verdict"]
    return Table(f"{tag}: every bucket", [*header, "C", "C under the null [95%]", "p of C"], rows)


def _compression_table(tag: str, numbers: Mapping[str, Any]) -> Table:
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


def _signal_tables(tag: str, numbers: Mapping[str, Any]) -> list[Table]:
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


def _settings_table(manifests: Mapping[str, Any]) -> Table:
    keys = [key for key in SETTINGS if any(key in manifest for manifest in manifests.values())]
    rows = [[key, *(_setting_named(key, manifest.get(key)) for manifest in manifests.values())] for key in keys]
    return Table("from the manifests", ["", *manifests], rows, text=True)


def _left_out_table(exp2: Mapping[str, Any], manifests: Mapping[str, Any]) -> Table:
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
    return model_name(value) if key == "model_path" else _setting(value)


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_setting(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_setting(part) for part in value)
    if isinstance(value, str) and os.path.isabs(value):
        return model_name(value)
    return MISSING_TYPESET if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


GLOSSARY = (
    ("participation ratio (PR)", "(Σσ²)² / Σσ⁴ of a bucket's gradients: k if k directions share the energy equally."),
    ("unit-norm PR", "the same after scaling every gradient to length 1: about directions alone."),
    ("ESS", "(Σa)²/Σa² with a the squared norms: PR cannot exceed it; near 1, one gradient holds all energy."),
    ("PR if isotropic", "the PR that random directions with the same norms would have."),
    ("leading direction repeats", "|cos| between the first singular vectors of two halves of one bucket's prompts: "
     "what does not repeat within a bucket cannot be called orthogonal to another's."),
    ("control", "the cosine between two halves of one prompt's tokens (or rollouts) of one kind: its noise floor."),
    ("ρ", "the cosine between correct and incorrect mean gradients with noise removed, from products of different "
     "rollouts only; aligned: its interval lies above 0; opposed: below; orthogonal: holds 0 and lies inside ±0.25; "
     "underpowered: none of these, or no signal to align; unsampled: fewer than 30 rare tokens were to be expected "
     "behind a mean, so that what did not come up may decide it."),
    ("theory", "on-policy the score ∇ log π has mean zero, so what correct rollouts push for is exactly what incorrect "
     "ones push against: ρ is −1 wherever there is signal."),
    ("rare tokens", "Σ (1 − max π): how many tokens other than the likeliest were to be expected."),
    ("log π + H (z)", "nats a token; 0 in the mean where tokens are drawn from the model itself; z: standard errors."),
    ("p", "labels permuted over the rollouts of a prompt. Its null is that rollouts are exchangeable, which perfectly "
     "aligned ones are: a large p does not mean ρ = 0."),
    ("signal", "the squared length of the expected update, from products of different prompts only, so without noise; "
     "seen where it is above 0 at the 95% level."),
    ("noise scale", "the prompts at which the update's signal equals its noise: smaller batches are mostly noise."),
    ("within prompts", "the same shares of each prompt's own Cov(outcome, gradient)."),
    ("C", "‖Σ A g‖² / Σ ‖A g‖² per prompt with advantages ±1: 1 for orthogonal rollouts; below the null, correct and "
     "incorrect updates cancel; above it, they add."),
)  # fmt: skip
