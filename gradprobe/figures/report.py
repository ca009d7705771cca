"""One self-contained page that says what a study found: verdicts with their numbers, figures, settings.

Every word about a result is picked by the numbers in the summaries. The page has no script and loads nothing; what
comes from models or files is escaped.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from ..analysis.text import MISSING_TYPESET, typeset_interval, typeset_number

TEMPLATE = Path(__file__).with_name("report.html.j2")
REPLICATION = "exp12_replication.png"
TRAJECTORY = "exp12_trajectory.png"


@dataclass(frozen=True)
class Answer:
    """A verdict: whose it is, the word, the numbers it rests on."""

    of: str
    verdict: str
    numbers: str


@dataclass(frozen=True)
class Table:
    """Rows of ready cells; `text` where the cells are words."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG to embed."""

    name: str
    base64: str


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out."""

    heading: str
    question: str = ""
    answers: Sequence[Answer] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    notes: Sequence[tuple[str, str]] = field(default=())


def render_report(
    exp1: Mapping[str, Any], exp2: Mapping[str, Any], manifests: Mapping[str, Any], figures: Mapping[str, bytes]
) -> str:
    """The page of a study.

    Args:
        exp1, exp2: the content of `exp1_summary.json` and `exp2_summary.json`, keyed by tag.
        manifests: each tag's manifest.
        figures: PNGs by file name; those of Exp 1 and 2 are told apart by their names.

    Returns:
        HTML, complete in itself.
    """
    pictures = [Picture(name, base64.b64encode(content).decode()) for name, content in figures.items()]
    first = next(iter(exp1.values()))
    sections = [
        Section(
            "Do high-entropy tokens of correct and incorrect rollouts push the same way?",
            "Alignment ρ of the mean gradients of correct and of incorrect rollouts of a prompt, noise removed: "
            "+1 would cancel under advantages of ±1, 0 is orthogonal, −1 adds up. Bucket of highest entropy.",
            [_alignment_answer(tag, numbers) for tag, numbers in exp2.items()],
            [_direction_table(tag, numbers) for tag, numbers in exp2.items()],
            [picture for picture in pictures if picture.name.startswith("exp2")],
        ),
        Section(
            "How many directions do the gradients of a bucket span?",
            "Participation ratio of the gradients as they are, and scaled to unit norm, which a few huge gradients "
            "cannot move. Bucket 0 has the lowest entropy.",
            [answer for tag, numbers in exp1.items() for answer in _comparison_answers(tag, numbers)],
            [_compression_table(tag, numbers) for tag, numbers in exp1.items()],
            [picture for picture in pictures if picture.name.startswith("exp1_")],
        ),
        Section("Over checkpoints", figures=[picture for picture in pictures if picture.name == TRAJECTORY]),
        Section("Other rows and layers", figures=[picture for picture in pictures if picture.name == REPLICATION]),
        Section("Settings", tables=[_settings_table(manifests)]),
        Section("What was left out, and why", tables=[_left_out_table(exp2, manifests)]),
        Section("What the words mean", notes=GLOSSARY),
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title="What the gradients of high-entropy tokens look like",
        subtitle=f"{first['target']}[{first['row_idx']}], {first['row_dim']:,} numbers a gradient: "
        + "; ".join(f"{tag} = {numbers['model']}" for tag, numbers in exp1.items()),
        sections=[s for s in sections if s.answers or s.tables or s.figures or s.notes],
    )


def _alignment_answer(tag: str, numbers: Mapping[str, Any]) -> Answer:
    found = numbers["alignment"]
    words = [
        f"ρ = {typeset_number(found['rho'])} {typeset_interval(found['ci95'])}",
        f"p = {typeset_number(found['p_value'], 4)} ({found['n_prompts']} prompts)",
        f"detectable |ρ| {typeset_number(found['min_detectable'])}",
    ]
    return Answer(tag, found["verdict"], ", ".join(words))


def _comparison_answers(tag: str, numbers: Mapping[str, Any]) -> list[Answer]:
    answers = []
    for other, buckets in numbers.get("compared_with", {}).items():
        if not buckets:  # the numbers of buckets differ
            continue
        top = str(max(map(int, buckets)))
        found = buckets[top]
        if found is not None:
            ratio = f"ratio {typeset_number(found['ratio'])} {typeset_interval(found['ci95'])}"
            answers.append(Answer(f"unit-norm PR of {tag} against {other}, bucket {top}", found["verdict"], ratio))
    return answers


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
                f"{typeset_number(alignment['rho'])} {typeset_interval(alignment['ci95'])}",
                typeset_number(alignment["p_value"], 4),
                alignment["verdict"],
                typeset_number(cancellation["ratio"]),
                f"{typeset_number(cancellation['null_mean'])} {typeset_interval(cancellation['null_ci95'])}",
                typeset_number(cancellation["p_value"], 4),
            ]
        )
    header = ["bucket", "prompts", "mean cos", "control: tokens", "control: rollouts", "ρ [95%]", "p", "verdict"]
    return Table(f"{tag}: every bucket", [*header, "C", "C under the null [95%]", "p of C"], rows)


def _compression_table(tag: str, numbers: Mapping[str, Any]) -> Table:
    rows = [
        [
            bucket,
            f"{found['n']:,}",
            f"{typeset_number(found['participation_ratio'], 2)} {typeset_interval(found['participation_ratio_ci95'])}",
            f"{typeset_number(found['participation_ratio_unit_norm'], 2)} "
            + typeset_interval(found.get("participation_ratio_unit_norm_ci95")),
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
    rows = [[key, *(_setting(manifest.get(key)) for manifest in manifests.values())] for key in keys]
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


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_setting(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_setting(part) for part in value)
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
     "underpowered: none of these, or no signal to align."),
    ("p", "labels permuted over the rollouts of a prompt. Its null is that rollouts are exchangeable, which perfectly "
     "aligned ones are: a large p does not mean ρ = 0."),
    ("C", "‖Σ A g‖² / Σ ‖A g‖² per prompt with advantages ±1: 1 for orthogonal rollouts; below the null, correct and "
     "incorrect updates cancel; above it, they add."),
)  # fmt: skip
