"""The headline figures of both experiments and the numbers they show, checkpoints beside each other."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ..analysis.text import format_number, format_p_value, format_table, format_with_interval
from ..exp1.measure import BucketNumbers
from ..exp1.summary import comparison_report
from ..exp2.direction import summarise
from ..exp2.measure import BucketDirections
from .exp1 import draw_compression_headline, draw_top_bucket_energy
from .exp2 import draw_direction_headline
from .inputs import Headlines
from .look import subjects_of
from .report import TRAJECTORY
from .trajectory import draw_trajectory

EXP1_HEADLINE = "exp1_headline.png"
TOP_BUCKET_ENERGY = "exp1_bin4_energy.png"
EXP2_HEADLINE = "exp2_headline.png"
COMPRESSION_COLUMNS = ("n", "PR [95%]", "unit-norm PR [95%]", "rank95 at equal n")
MIN_OF_TRAJECTORY = 3


def draw_headlines(sources: Mapping[str, Any], found: Headlines) -> dict[str, Figure]:
    """The headline figures by file name, and the trajectory's where there are enough checkpoints.

    Args:
        sources: each tag's dump, or what has its `manifest` and `bins`.
        found: their numbers.
    """
    subjects, of_subjects = subjects_of(sources), list(found.compression.values())
    drawn = {
        EXP1_HEADLINE: draw_compression_headline(
            subjects, of_subjects, [one.ratios or [] for one in found.compared.values()]
        ),
        TOP_BUCKET_ENERGY: draw_top_bucket_energy(subjects, [one.spectrum(-1) for one in of_subjects]),
        EXP2_HEADLINE: draw_direction_headline(subjects, list(found.directions.values())),
    }
    if len(subjects) >= MIN_OF_TRAJECTORY:
        drawn[TRAJECTORY] = draw_trajectory(
            subjects,
            [one.buckets for one in of_subjects],
            [result.alignment for result in found.directions.values()],
            [correct_share(source.manifest) for source in sources.values()],
            [result.reference for result in found.directions.values()],
        )
    return drawn


def correct_share(manifest: dict[str, Any]) -> float | None:
    """The share of correct rollouts; None where there are none, or the manifest does not count them."""
    n_correct, n_rollouts = manifest.get("num_correct_rollouts"), manifest["num_rollouts"]
    return None if n_correct is None or n_rollouts == 0 else n_correct / n_rollouts


def headline_tables(found: Headlines) -> str:
    """The numbers drawn, as tables for people."""
    bucket_table = format_table(
        ["bucket", "tag", *COMPRESSION_COLUMNS],
        [
            [str(index), tag, *_compression_cells(numbers)]
            for index, of_all in enumerate(zip(*(one.buckets for one in found.compression.values()), strict=True))
            for tag, numbers in zip(found.compression, of_all, strict=True)
        ],
    )
    columns = ["prompts", "mean cos", "control n", "control mean", "rollout control n", "rollout control mean"]
    direction_table = format_table(
        ["highest-entropy bucket", *columns, "rho [95%]", "p (n)", "verdict"],
        [[tag, *_direction_cells(result)] for tag, result in found.directions.items()],
    )
    first = next(iter(found.compression))
    comparisons = [comparison_report(first, tag, one) for tag, one in found.compared.items()]
    return "\n\n".join([bucket_table, *comparisons, direction_table])


def _compression_cells(numbers: BucketNumbers) -> list[str]:
    """What `COMPRESSION_COLUMNS` names."""
    rank = numbers.matched_n.rank95
    return [
        str(numbers.n),
        format_with_interval(numbers.participation_ratio, numbers.participation_ratio_ci95),
        format_with_interval(numbers.participation_ratio_unit_norm, numbers.participation_ratio_unit_norm_ci95),
        format_number(None if rank is None else rank.mean, 1),
    ]


def _direction_cells(result: BucketDirections) -> list[str]:
    group = summarise(result.directions.cosines)
    controls = [summarise(v) for v in (result.directions.control_cosines, result.control_by_rollout_cosines)]
    found = result.alignment
    return [
        str(group.n),
        format_number(group.mean),
        *(cell for control in controls for cell in (str(control.n), format_number(control.mean))),
        format_with_interval(None if found.ci95 is None else found.rho, found.ci95),
        format_p_value(found.p_value, found.n_prompts),
        found.verdict,
    ]
