"""One self-contained page that says what a study found: answers first, then what limits them, the rest folded below.

Every word about a result is picked by the numbers in the summaries. The page has no script and loads nothing; what
comes from models or files is escaped, and of paths only the last part is said.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..analysis.text import typeset_sentence
from ..dump.format import target_name
from .answers import (
    Statement,
    cancel_statements,
    directions_statements,
    limits_of,
    named_model,
    signal_statements,
)
from .rollouts import RolloutsSeen, RolloutText
from .tables import (
    Table,
    TokenTable,
    commonest_tables,
    compression_table,
    direction_tables,
    left_out_table,
    settings_table,
    signal_tables,
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
class Section:
    """A folded part of the page; one that is empty is left out."""

    heading: str
    question: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    notes: Sequence[tuple[str, str]] = ()
    token_tables: Sequence[TokenTable] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing under its heading."""
        return not (self.tables or self.token_tables or self.figures or self.notes)


def render_report(
    exp1: Mapping[str, Any],
    exp2: Mapping[str, Any],
    manifests: Mapping[str, Any],
    figures: Mapping[str, bytes],
    exp3: Mapping[str, Any] | None = None,
    rollouts: Mapping[str, RolloutsSeen | None] | None = None,
) -> str:
    """The page of a study.

    Args:
        exp1, exp2: the content of `exp1_summary.json` and `exp2_summary.json`, keyed by tag.
        manifests: each tag's manifest.
        figures: PNGs by file name; those of the experiments are told apart by their names.
        exp3: the content of `exp3_summary.json`; None where it was not measured.
        rollouts: of each tag, what was seen of its rollouts; None where there are none.

    Returns:
        HTML, complete in itself.
    """
    exp3, seen = exp3 or {}, {tag: one for tag, one in (rollouts or {}).items() if one is not None}
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
        facts={tag: list(map(typeset_sentence, one.facts)) for tag, one in seen.items()},
        texts=_texts(seen),
        sections=[s for s in _sections(exp1, exp2, exp3, manifests, others, seen) if not s.is_empty],
    )


def _texts(seen: Mapping[str, RolloutsSeen]) -> dict[str, Sequence[RolloutText]]:
    """Rollouts as text of the first and of the last tag: of many checkpoints no more could be read."""
    tags = [tag for tag, one in seen.items() if one.texts]
    return {tag: seen[tag].texts for tag in dict.fromkeys((*tags[:1], *tags[-1:]))}


def _sections(
    exp1: Mapping[str, Any],
    exp2: Mapping[str, Any],
    exp3: Mapping[str, Any],
    manifests: Mapping[str, Any],
    pictures: Sequence[Picture],
    seen: Mapping[str, RolloutsSeen],
) -> list[Section]:
    def named(*starts: str) -> list[Picture]:
        return [picture for picture in pictures if picture.name.startswith(starts)]

    of_tokens = [
        table
        for tag, one in seen.items()
        for table in commonest_tables(
            tag, one.commonest, manifests[tag]["entropy_edges"], one.commonest_of_signal, exp3.get(tag)
        )
    ]
    return [
        Section(
            "Tokens: the commonest of every bucket",
            "What single tokens read, and their share of the bucket's. Bucket 0 has the lowest entropy.",
            token_tables=of_tokens,
        ),
        Section(
            "Directions: every bucket",
            "Participation ratio of the gradients as they are, and scaled to unit norm, which a few huge gradients "
            "cannot move. Bucket 0 has the lowest entropy.",
            [compression_table(tag, numbers) for tag, numbers in exp1.items()],
            named("exp1_"),
        ),
        Section(
            "Cancelling: every bucket",
            "Alignment ρ of the mean gradients of correct and of incorrect rollouts of a prompt, noise removed: "
            "+1 would cancel under advantages of ±1, 0 is orthogonal, −1 adds up.",
            [table for tag, numbers in exp2.items() for table in direction_tables(tag, numbers)],
            named("exp2_"),
        ),
        Section(
            "Signal and noise: every bucket, and what keeping some tokens does",
            "Parts of the expected update and of its variance over prompts; each adds up to 100%, and a part can be "
            "below 0.",
            [table for tag, numbers in exp3.items() for table in signal_tables(tag, numbers)],
            named("exp3_"),
        ),
        Section("Over checkpoints", figures=named(TRAJECTORY)),
        Section("Other rows and layers", figures=named(REPLICATION)),
        Section("Settings", tables=[settings_table(manifests)]),
        Section("What was left out, and why", tables=[left_out_table(exp2, manifests)]),
        Section("What the words mean", notes=GLOSSARY),
    ]


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
