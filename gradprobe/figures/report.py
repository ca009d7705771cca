"""One self-contained page that says what a study found: in a sentence, in three answers, then all the rest, folded.

Every word about a result is picked by the numbers in the summaries. The page has no script and loads nothing; what
comes from models or files is escaped, and of paths only the last part is said.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..analysis.summaries import Summary
from ..analysis.text import Table
from ..dump.format import target_name
from ..exp1.summary import tables_of as exp1_tables
from ..exp2.summary import tables_of as exp2_tables
from ..exp3.summary import tables_of as exp3_tables
from .answers import Answer, limits_of, named_model, summed_up
from .checkpoints import EXP12_TRAJECTORY
from .replication import REPLICATION
from .rollouts import RolloutsSeen, RolloutText
from .step import STEP
from .step_weights import WEIGHTS
from .tables import commonest_tables, left_out_table, settings_table

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
FIGURES_OF_ANSWERS = (("exp1_headline.png",), ("exp2_headline.png",), (STEP, "exp3_headline.png"))
"""Of each answer the first that there is."""


@dataclass(frozen=True)
class Picture:
    """A PNG to embed."""

    name: str
    base64: str


@dataclass(frozen=True)
class Section:
    """A folded part of the page; one that is empty is left out."""

    heading: str
    question: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    notes: Sequence[tuple[str, str]] = ()


def render_report(
    answers: Sequence[Answer],
    exp1: Summary,
    exp2: Summary,
    exp3: Summary,
    manifests: Summary,
    figures: Mapping[str, bytes],
    rollouts: Mapping[str, RolloutsSeen | None],
) -> str:
    """The page of a study.

    Args:
        answers: `answers.answers_of` the summaries.
        exp1, exp2, exp3: the summaries; the third is empty where it was not measured.
        manifests: each tag's manifest.
        figures: PNGs by file name; those of the experiments are told apart by their names.
        rollouts: of each tag, what was seen of its rollouts; None where there are none.

    Returns:
        HTML, complete in itself.
    """
    seen = {tag: one for tag, one in rollouts.items() if one is not None}
    pictures = {name: Picture(name, base64.b64encode(content).decode()) for name, content in figures.items()}
    shown = [next((name for name in names if name in pictures), None) for names in FIGURES_OF_ANSWERS]
    others = [picture for name, picture in pictures.items() if name not in shown]
    first = next(iter(exp1.values()))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=summed_up(answers),
        subtitle=f"{target_name(first)}, {first['row_dim']:,} numbers a gradient: "
        + "; ".join(named_model(tag, numbers["model"]) for tag, numbers in exp1.items()),
        answers=[(answer, pictures.get(name or "")) for answer, name in zip(answers, shown, strict=True)],
        limits=limits_of(exp1, exp2, exp3, manifests),
        facts={tag: one.facts for tag, one in seen.items()},
        texts=_texts(seen),
        has_step=any(token.push for one in seen.values() for text in one.texts for token in text.tokens),
        sections=[
            section
            for section in _sections(exp1, exp2, exp3, manifests, others, seen)
            if section.tables or section.figures or section.notes
        ],
    )


def _texts(seen: Mapping[str, RolloutsSeen]) -> dict[str, Sequence[RolloutText]]:
    """Rollouts as text of the first and of the last tag: of many checkpoints no more could be read."""
    tags = [tag for tag, one in seen.items() if one.texts]
    return {tag: seen[tag].texts for tag in dict.fromkeys((*tags[:1], *tags[-1:]))}


def _sections(
    exp1: Summary,
    exp2: Summary,
    exp3: Summary,
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
    tables = [
        [table for tag, numbers in summary.items() for table in tables_of(tag, numbers)]
        for summary, tables_of in ((exp1, exp1_tables), (exp2, exp2_tables), (exp3, exp3_tables))
    ]
    return [
        Section("Tokens: the commonest of every bucket", tables=of_tokens),
        Section("Directions: every bucket", "Bucket 0 has the lowest entropy.", tables[0], named("exp1_")),
        Section("Cancelling: every bucket", "", tables[1], named("exp2_")),
        Section(
            "Signal and noise: every bucket, and what keeping some tokens does",
            "Parts of the expected update and of its variance over prompts; each adds up to 100%, and a part can be "
            "below 0.",
            tables[2],
            named("exp3_"),
        ),
        Section("What the step itself is like", figures=named(WEIGHTS)),
        Section("Over checkpoints", figures=named(EXP12_TRAJECTORY)),
        Section("Other rows and layers", figures=named(REPLICATION)),
        Section("Settings", tables=[settings_table(manifests)]),
        Section("What was left out, and why", tables=[left_out_table(exp2, manifests)]),
        Section("What the words mean", notes=MEANINGS),
    ]


MEANINGS = (
    ("participation ratio (PR)", "(Σσ²)² / Σσ⁴ of a bucket's gradients: k if k directions share the energy equally."),
    ("unit-norm PR", "the same after scaling every gradient to length 1: about directions alone."),
    ("ESS", "(Σa)²/Σa² with a the squared norms: PR cannot exceed it; near 1, one gradient holds all energy."),
    ("PR if isotropic", "the PR that random directions with the same norms would have."),
    ("rank95", "the fewest directions that hold 95% of the energy."),
    ("rank correlation of proxies", "Spearman's, with ‖∇ log π‖: 1 the same order, −1 the reverse; inside a bucket of "
     "tokens that entropy has chosen already. 1 − π and −log π rank alike; ‖onehot − π‖: the length in the logits."),
    ("leading direction repeats", "|cos| between the first singular vectors of two halves of one bucket's prompts: "
     "what does not repeat within a bucket cannot be called orthogonal to another's."),
    ("C", "‖Σ A g‖² / Σ ‖A g‖² per prompt with advantages ±1: 1 for orthogonal rollouts. Above what the same "
     "advantages give when dealt out at random (the null), correct and incorrect updates add up; below, they cancel."),
    ("coupling", "Σ |⟨g, g'⟩| over pairs of tokens of different rollouts of a prompt; uncertain: π < ½. Ids are dealt "
     "anew among the uncertain tokens of a rollout in a bucket: as many pairs as before are of the same token."),
    ("ρ", "the cosine between correct and incorrect mean gradients with noise removed, from products of different "
     "rollouts only; aligned: its interval lies above 0; opposed: below; orthogonal: holds 0 and lies inside ±0.25; "
     "underpowered: none of these, or no signal to align; unsampled: fewer than 30 rare tokens were to be expected "
     "behind a mean, so that what did not come up may decide it."),
    ("theory", "on-policy the score ∇ log π has mean zero, so what correct rollouts push for is exactly what incorrect "
     "ones push against: ρ is −1 wherever there is signal."),
    ("rare tokens", "Σ (1 − max π): how many tokens other than the likeliest were to be expected."),
    ("control", "the cosine between two halves of one prompt's tokens (or rollouts) of one kind: its noise floor."),
    ("log π + H (z)", "nats a token; 0 in the mean where tokens are drawn from the model itself; z: standard errors."),
    ("p", "labels permuted over the rollouts of a prompt. Its null is that rollouts are exchangeable, which perfectly "
     "aligned ones are: a large p does not mean ρ = 0."),
    ("the step, its gain", "Δ, from the first checkpoint's weights to the last's; d = ⟨∇ log π, Δ⟩ of every token, "
     "over all parameters; the gain is what the objective's update would win along Δ, to first order; t: in standard "
     "errors over prompts. No share of it is given where |t| is below 2."),
    ("signal", "the squared length of the expected update, from products of different prompts only, so without noise; "
     "seen where it is above 0 at the 95% level."),
    ("noise scale", "the prompts at which the update's signal equals its noise: smaller batches are mostly noise."),
    ("within prompts", "the same shares of each prompt's own Cov(outcome, gradient)."),
    ("[..]", "95% intervals; prompts are the unit of chance."),
)  # fmt: skip
