"""What headline figures need of both experiments, kept beside the summaries so that nothing is computed twice.

The analyses write `exp1_arrays.npz` and `exp2_arrays.npz`; together with the summaries these make up `Compression` and
`BucketDirections` again. Arrays are named `<place of the tag>.<name>`; the entry `about` is a line of JSON
with the fingerprints of the dumps, so that a reader knows whose numbers they are.
"""

import dataclasses
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.bucket import bucket_of
from ..analysis.inputs import first_targets, open_dumps, warn
from ..analysis.jackknife import Estimate
from ..analysis.prompts import Pairs
from ..analysis.summaries import seals_of
from ..common.files import bytes_aside
from ..dump.format import Dump
from ..dump.on_policy import OnPolicy
from ..exp1.compression import DrawnNumber, Interval, MatchedN, Ratio
from ..exp1.measure import BucketNumbers, Comparison, Exp1, Exp1Settings, measure_dumps, refusal, sample_rollouts
from ..exp1.plane import Projection, project_to_plane
from ..exp1.spectrum import Spectrum
from ..exp2.direction import Alignment, Cancellation, Directions, PromptDirection, Signal
from ..exp2.measure import BucketDirections, Exp2Settings, bucket_directions, reference_of

log = logging.getLogger(__name__)

EXP1_ARRAYS = "exp1_arrays.npz"
EXP2_ARRAYS = "exp2_arrays.npz"
LAYOUT = 2
"""Of the arrays' names and meanings: files of another layout are not read."""

Fingerprints = Mapping[str, Sequence[str]]
"""Of each tag's dumps, one for each target."""


@dataclass(frozen=True)
class Compression:
    """What headline figures show of Exp 1 of one dump.

    Attributes:
        buckets: the numbers of each bucket.
        energies: of each bucket, squared singular values, descending.
        projection: of all gradients, as `plane.project_to_plane` gives it.
        point_buckets: [m] the bucket of each point of the projection.
    """

    buckets: list[BucketNumbers]
    energies: list[np.ndarray]
    projection: Projection
    point_buckets: np.ndarray

    def spectrum(self, bucket: int) -> Spectrum:
        """A bucket's spectrum."""
        return Spectrum(self.buckets[bucket].n, self.energies[bucket])


class NotTheseDumps(Exception):  # noqa: N818, it is no error: what is missing is computed
    """There are no numbers of these dumps in a file; says why, as the end of a sentence."""


def compression_of(dump: Dump, result: Exp1, device: str = "cpu") -> Compression:
    """What headline figures need of one dump."""
    projection = project_to_plane(bucket_of(dump, device=device))
    energies = [spectrum.energies for spectrum in result.spectra]
    return Compression(result.buckets, energies, projection, dump.bin[projection.rows])


@dataclass(frozen=True)
class Headlines:
    """What headline figures and their tables show.

    Attributes:
        compression: of each tag.
        compared: of each tag but the first, how it compares with the first.
        directions: of each tag, its bucket of highest entropy.
    """

    compression: dict[str, Compression]
    compared: dict[str, Comparison]
    directions: dict[str, BucketDirections]


def headlines_of(
    output_dir: Path, paths: Mapping[str, Path], summaries: Sequence[Mapping[str, Any]], fingerprints: Fingerprints
) -> Headlines:
    """Both experiments of every tag, from the analyses' files where these are about these dumps, else computed.

    Args:
        output_dir: where the analyses left their arrays.
        paths: each tag's dump.
        summaries: of Exp 1 and Exp 2.
        fingerprints: of the dumps.
    """
    exp1 = directions = None
    missing = []
    try:
        exp1 = read_compression(output_dir / EXP1_ARRAYS, summaries[0], fingerprints)
    except NotTheseDumps as reason:
        missing.append(f"Exp 1 ({reason})")
    try:
        directions = read_directions(output_dir / EXP2_ARRAYS, summaries[1], fingerprints)
    except NotTheseDumps as reason:
        missing.append(f"Exp 2 ({reason})")
    if missing:
        log.info(f"computing anew what the analyses did not leave about these dumps: {', '.join(missing)}")
        opened = open_dumps(paths, refusal) if exp1 is None else open_dumps(paths)
        warn(opened)
        dumps = first_targets(opened)
    if exp1 is None:  # without what headlines don't show: no ceilings, no nulls
        of_rollouts = {tag: sample_rollouts(dump) for tag, dump in dumps.items()}
        results, compared = measure_dumps(of_rollouts, Exp1Settings(ceiling=0, null=0))
        exp1 = {tag: compression_of(dump, results[tag]) for tag, dump in of_rollouts.items()}, compared
    if directions is None:
        directions = {
            tag: dataclasses.replace(bucket_directions(dump, dump.bins - 1), reference=reference_of(dump))
            for tag, dump in dumps.items()
        }
    return Headlines(*exp1, directions)


def write_compression(
    file: Path, found: Mapping[str, Compression], fingerprints: Fingerprints, seals: Mapping[str, str]
) -> None:
    """Write `exp1_arrays.npz`, whole or not at all. `seals`: of the summary that it stands beside."""
    arrays: dict[str, np.ndarray] = {}
    for place, one in enumerate(found.values()):
        arrays |= {f"{place}.energies.{bucket}": energies for bucket, energies in enumerate(one.energies)}
        arrays[f"{place}.points"] = one.projection.coordinates
        arrays[f"{place}.point_rows"] = one.projection.rows
        arrays[f"{place}.point_buckets"] = one.point_buckets
        arrays[f"{place}.n_rows"] = np.array(one.projection.n_rows)
        if one.projection.explained is not None:
            arrays[f"{place}.explained"] = one.projection.explained
    _write(file, arrays, fingerprints, seals)


def read_compression(
    file: Path, summary: Mapping[str, Any], fingerprints: Fingerprints
) -> tuple[dict[str, Compression], dict[str, Comparison]]:
    """What `write_compression` wrote and `exp1_summary.json` says: every tag's numbers, and further tags' ratios.

    Raises:
        NotTheseDumps: the file or the summary is missing or about others.
    """
    arrays = _read(file, summary, fingerprints)
    found = {}
    for place, tag in enumerate(fingerprints):
        buckets = [_bucket_numbers(numbers) for numbers in summary[tag]["per_bucket"].values()]
        projection = Projection(
            arrays[f"{place}.point_rows"],
            arrays[f"{place}.points"],
            arrays.get(f"{place}.explained"),
            int(arrays[f"{place}.n_rows"]),
        )
        energies = [arrays[f"{place}.energies.{bucket}"] for bucket in range(len(buckets))]
        found[tag] = Compression(buckets, energies, projection, arrays[f"{place}.point_buckets"])
    first, *others = fingerprints
    return found, {tag: _comparison(summary[tag], first) for tag in others}


def write_directions(
    file: Path, found: Mapping[str, BucketDirections], fingerprints: Fingerprints, seals: Mapping[str, str]
) -> None:
    """Write `exp2_arrays.npz` of each tag's bucket of highest entropy, whole or not at all. `seals`: as above."""
    arrays = {}
    for place, one in enumerate(found.values()):
        arrays[f"{place}.control"] = _with_nan(one.directions.control)
        arrays[f"{place}.control_by_rollout"] = _with_nan(one.control_by_rollout)
    _write(file, arrays, fingerprints, seals)


def read_directions(file: Path, summary: Mapping[str, Any], fingerprints: Fingerprints) -> dict[str, BucketDirections]:
    """What `write_directions` wrote and `exp2_summary.json` says.

    Raises:
        NotTheseDumps: the file or the summary is missing or about others.
    """
    arrays = _read(file, summary, fingerprints)
    found = {}
    for place, tag in enumerate(fingerprints):
        numbers = summary[tag]
        per_prompt = [
            PromptDirection(code, one["n_correct_tokens"], one["n_incorrect_tokens"], one["cos_correct_vs_incorrect"])
            for code, one in enumerate(numbers["per_prompt"])
        ]
        control = _with_none(arrays[f"{place}.control"])
        found[tag] = BucketDirections(
            directions=Directions(numbers["n_prompts"], tuple(per_prompt), control),
            control_by_rollout=_with_none(arrays[f"{place}.control_by_rollout"]),
            alignment=_alignment(numbers["alignment"]),
            cancellation=_made_of(Cancellation, numbers["cancellation"]),
            cancellation_group_normalised=_made_of(Cancellation, numbers["cancellation"]["group_normalised"]),
            n_rare=numbers["n_rare"],
            settings=Exp2Settings(**numbers["draws"]),
            on_policy=numbers["on_policy"] and OnPolicy(**numbers["on_policy"]),
            rho_over_sums=numbers["rho_over_sums"] and _made_of(Estimate, numbers["rho_over_sums"]),
            reference=numbers["reference"],
        )
    return found


def is_about(summary: Mapping[str, Any], fingerprints: Fingerprints) -> bool:
    """Whether a summary holds just these tags, in this order, of just these dumps."""
    return list(summary) == list(fingerprints) and all(
        isinstance(summary[tag], dict) and summary[tag].get("manifest_sha256") == list(expected)
        for tag, expected in fingerprints.items()
    )


def _about(fingerprints: Fingerprints, seals: Mapping[str, str]) -> dict[str, Any]:
    of_dumps = {tag: list(values) for tag, values in fingerprints.items()}
    return {"layout": LAYOUT, "manifest_sha256": of_dumps, "content_sha256": dict(seals)}


def _write(file: Path, arrays: dict[str, np.ndarray], fingerprints: Fingerprints, seals: Mapping[str, str]) -> None:
    about = _about(fingerprints, seals)
    with bytes_aside(file) as stream:
        np.savez(stream, about=np.array(json.dumps(about)), **arrays)


def _read(file: Path, summary: Mapping[str, Any], fingerprints: Fingerprints) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = dict(stored)
            about = json.loads(str(arrays.pop("about")))
    except FileNotFoundError as error:
        raise NotTheseDumps(f"there is no {file.name}") from error
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise NotTheseDumps(f"{file.name} can't be read ({error})") from error
    expected = _about(fingerprints, {})
    if not isinstance(about, dict) or {**about, "content_sha256": {}} != expected:
        raise NotTheseDumps(f"{file.name} is about others")
    if not is_about(summary, fingerprints):
        raise NotTheseDumps(f"the summary beside {file.name} is missing or about others")
    if about.get("content_sha256") != seals_of(summary):
        raise NotTheseDumps(f"{file.name} is of another run than the summary beside it")
    return arrays


def _made_of(kind: type, numbers: Mapping[str, Any]) -> Any:
    """A dataclass from its part of a summary: lists of two are intervals."""
    values = {field.name: numbers[field.name] for field in fields(kind)}
    return kind(**{name: _interval(value) if isinstance(value, list) else value for name, value in values.items()})


def _interval(bounds: Sequence[float] | None) -> Interval | None:
    return None if bounds is None else (bounds[0], bounds[1])


def _bucket_numbers(numbers: Mapping[str, Any]) -> BucketNumbers:
    matched = {
        name: _made_of(DrawnNumber, value) if isinstance(value, dict) else value
        for name, value in numbers["matched_n"].items()
    }
    return _made_of(BucketNumbers, {**numbers, "matched_n": MatchedN(**matched)})


def _comparison(numbers: Mapping[str, Any], first: str) -> Comparison:
    paired = dict(numbers["paired_with"][first])
    reason = paired.pop("reason")
    return Comparison(_ratios(numbers["compared_with"][first]), Pairs(**paired), reason)


def _ratios(buckets: Mapping[str, Any] | None) -> list[Ratio | None] | None:
    if buckets is None:
        return None
    return [None if one is None else _made_of(Ratio, one) for one in buckets.values()]


def _alignment(numbers: Mapping[str, Any]) -> Alignment:
    signals = {
        name: None if numbers[name] is None else _made_of(Signal, numbers[name])
        for name in ("signal_correct", "signal_incorrect")
    }
    return _made_of(Alignment, {**numbers, **signals})


def _with_nan(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _with_none(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(value) for value in values)
