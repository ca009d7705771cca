"""Plots draw what the analyses left, of one checkpoint or of many, and say when they compute it anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import planted
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text

import analyze_exp1_compression
import analyze_exp2_direction
import plot_exp12_intuitive
from gradprobe.analysis.inputs import fingerprint, open_dumps
from gradprobe.exp1.compression import Ratio
from gradprobe.exp1.measure import Exp1Settings, measure_dumps
from gradprobe.exp2.measure import bucket_directions
from gradprobe.figures import exp1 as figures_compression
from gradprobe.figures import exp2 as figures_direction
from gradprobe.figures.exp1 import draw_compression_headline
from gradprobe.figures.headlines import draw_headlines
from gradprobe.figures.inputs import (
    EXP1_ARRAYS,
    EXP2_ARRAYS,
    Headlines,
    NotTheseDumps,
    compression_of,
    read_compression,
    read_directions,
)
from gradprobe.figures.look import subjects_of
from gradprobe.figures.trajectory import draw_trajectory

HEADLINES = ("exp1_headline.png", "exp1_bin4_energy.png", "exp2_headline.png")


def write_checkpoints(root: Path, tags: list[str], **manifest) -> dict[str, Path]:
    names = {tag: f"models/Qwen2.5-1.5B-Instruct-DAPO-{tag}" for tag in tags}
    return {
        tag: planted.write_heavy_tailed_dump(
            root / tag, seed=seed, n_prompts=6, dim=24, model_path=name, **{**manifest, "num_correct_rollouts": 0}
        )
        for seed, (tag, name) in enumerate(names.items())
    }


def correct_rollouts(dump: Path) -> None:
    """Put the true number of correct rollouts in a manifest."""
    lines = [json.loads(line) for line in (dump / "meta.jsonl").read_text().splitlines()]
    manifest = json.loads((dump / "manifest.json").read_text())
    manifest["num_correct_rollouts"] = len({(x["prompt_idx"], x["sample_idx"]) for x in lines if x["correct"]})
    (dump / "manifest.json").write_text(json.dumps(manifest))


def tagged(dumps: dict[str, Path]) -> list[str]:
    return [f"{tag}={path}" for tag, path in dumps.items()]


def analyse(dumps: dict[str, Path], figures: Path) -> None:
    for script in (analyze_exp1_compression, analyze_exp2_direction):
        assert script.main(["--output-dir", str(figures), *tagged(dumps)]) == 0


def plot(dumps: dict[str, Path], figures: Path) -> None:
    assert plot_exp12_intuitive.main(["--output-dir", str(figures), *tagged(dumps)]) == 0


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    root = tmp_path_factory.mktemp("three")
    dumps = write_checkpoints(root, ["base", "step100", "step500"])
    for dump in dumps.values():
        correct_rollouts(dump)
    analyse(dumps, root / "figures")
    return dumps, root / "figures"


@pytest.fixture
def study(analysed, tmp_path: Path) -> tuple[dict[str, Path], Path]:
    """A copy that a test may spoil."""
    dumps, figures = analysed
    shutil.copytree(figures, tmp_path / "figures")
    for tag, path in dumps.items():
        shutil.copytree(path, tmp_path / tag)
    return {tag: tmp_path / tag for tag in dumps}, tmp_path / "figures"


def test_figures_come_from_the_analyses_alone_and_are_those_computed_anew(study, tmp_path: Path, capsys):
    dumps, figures = study
    plot(dumps, tmp_path / "anew")
    error = capsys.readouterr().err
    assert (
        "computing anew what the analyses did not leave about these dumps: Exp 1 (there is no exp1_arrays.npz), "
        in error
    )
    assert "run both analyses with base=... step100=... step500=... first" in error
    for path in dumps.values():
        (path / "grads.npy").unlink()
        (path / "meta.jsonl").unlink()
    plot(dumps, figures)
    captured = capsys.readouterr()
    assert captured.err == ""
    for name in (*HEADLINES, "exp12_trajectory.png"):
        assert (figures / name).read_bytes() == (tmp_path / "anew" / name).read_bytes(), name
        assert f"wrote {figures / name}" in captured.out
    page = (figures / "report.html").read_text()
    assert "Over checkpoints" in page
    assert "<figcaption>exp12_trajectory.png</figcaption>" in page


SPOILED = {
    "another dump": lambda dumps, figures: correct_rollouts_twice(dumps["step100"]),
    "another order": lambda dumps, figures: dumps.update(base=dumps.pop("base")),
    "fewer": lambda dumps, figures: dumps.pop("step500"),
    "an array file cut short": lambda dumps, figures: cut_short(figures / EXP1_ARRAYS),
    "no summary": lambda dumps, figures: (figures / "exp1_summary.json").unlink(),
}


def correct_rollouts_twice(dump: Path) -> None:
    manifest = json.loads((dump / "manifest.json").read_text())
    (dump / "manifest.json").write_text(json.dumps(manifest | {"seed": 1}))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_about_other_dumps_is_not_drawn(study, case: str, capsys):
    dumps, figures = study
    SPOILED[case](dumps, figures)
    plot(dumps, figures)
    captured = capsys.readouterr()
    assert captured.err.count("computing anew") == 1
    assert "Exp 1 (" in captured.err
    assert ("Exp 2 (" in captured.err) == (case not in ("an array file cut short", "no summary"))
    assert ("report.html is not written" in captured.err) == (case != "an array file cut short")
    assert "exp1_headline.png" in captured.out


def test_numbers_survive_the_files(analysed):
    paths, figures = analysed
    dumps = {tag: found[0] for tag, found in open_dumps(paths).items()}
    fingerprints = {tag: [fingerprint(path)] for tag, path in paths.items()}
    exp1, exp2 = (json.loads((figures / f"exp{i}_summary.json").read_text()) for i in (1, 2))
    found, compared = read_compression(figures / EXP1_ARRAYS, exp1, fingerprints)
    results, expected = measure_dumps(dumps, Exp1Settings(ceiling=0, null=0))
    assert compared == expected
    for tag, result in results.items():
        assert found[tag].buckets == result.buckets
        for energies, spectrum in zip(found[tag].energies, result.spectra, strict=True):
            np.testing.assert_array_equal(energies, spectrum.energies)
        fresh = compression_of(dumps[tag], result)
        np.testing.assert_array_equal(found[tag].projection.coordinates, fresh.projection.coordinates)
        np.testing.assert_array_equal(found[tag].point_buckets, fresh.point_buckets)
    directions = read_directions(figures / EXP2_ARRAYS, exp2, fingerprints)
    for tag, dump in dumps.items():
        fresh = bucket_directions(dump, dump.bins - 1)
        stored = directions[tag]
        np.testing.assert_array_equal(stored.directions.cosines, fresh.directions.cosines)
        assert stored.directions.control == fresh.directions.control
        assert stored.control_by_rollout == fresh.control_by_rollout
        assert (stored.alignment, stored.cancellation) == (fresh.alignment, fresh.cancellation)


def test_pickles_are_refused(analysed, tmp_path: Path):
    fingerprints = {tag: [fingerprint(path)] for tag, path in analysed[0].items()}
    np.savez(tmp_path / EXP1_ARRAYS, about=np.array({"layout": 1}, dtype=object))
    with pytest.raises(NotTheseDumps, match="can't be read"):
        read_compression(tmp_path / EXP1_ARRAYS, {}, fingerprints)


def test_one_checkpoint_is_drawn_too(tmp_path: Path, capsys):
    dumps = write_checkpoints(tmp_path, ["only"])
    correct_rollouts(dumps["only"])
    analyse(dumps, tmp_path / "figures")
    plot(dumps, tmp_path / "figures")
    assert "computing anew" not in capsys.readouterr().err
    assert not (tmp_path / "figures" / "exp12_trajectory.png").exists()
    assert (tmp_path / "figures" / "report.html").exists()


BAD_COMMANDS = {
    "both ways": (["--base", "x", "--trained", "y", "a=z"], "--base and --trained and 'a=z' are given"),
    "half of one": (["--base", "x"], "--trained is missing"),
    "neither": ([], "--base is missing"),
    "no such dumps": (["a=nowhere", "b=neither"], "neither/manifest.json: not a finished dump"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_are_status_2_in_one_line(case: str, tmp_path: Path, capsys):
    arguments, message = BAD_COMMANDS[case]
    assert plot_exp12_intuitive.main(["--output-dir", str(tmp_path / "figures"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 8])
def test_no_text_is_cut_off_with_many_checkpoints(count: int, tmp_path: Path):
    tags = ["base", *(f"step{100 * i}-of-a-run" for i in range(1, count))]
    dumps = {tag: found[0] for tag, found in open_dumps(write_checkpoints_with_counts(tmp_path, tags)).items()}
    results, compared = measure_dumps(dumps, Exp1Settings(ceiling=1, null=1))
    found = {tag: compression_of(dump, results[tag]) for tag, dump in dumps.items()}
    buckets = [[bucket_directions(dump, b) for b in range(dump.bins)] for dump in dumps.values()]
    directions = dict(zip(dumps, (of_dump[-1] for of_dump in buckets), strict=True))
    drawn = draw_headlines(dumps, Headlines(found, compared, directions))
    assert "exp12_trajectory.png" in drawn
    drawn |= figures_compression.draw_analysis(dumps, results) | figures_direction.draw_analysis(dumps, buckets)
    for name, figure in drawn.items():
        figure.canvas.draw()
        page = figure.bbox.padded(1)
        axes = figure.findobj(Axes)
        ticks = {tick for ax in axes for tick in (*ax.get_xticklabels(), *ax.get_yticklabels())}
        for text in set(figure.findobj(Text)) - ticks:
            if text.get_text():
                box = text.get_window_extent()
                assert page.x0 <= box.x0 <= box.x1 <= page.x1, f"{name}: {text.get_text()!r} is cut off"
                assert page.y0 <= box.y0 <= box.y1 <= page.y1, f"{name}: {text.get_text()!r} is cut off"
        titles = [ax._left_title for ax in axes if ax._left_title.get_text()]
        boxes = [title.get_window_extent() for title in titles]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), name


def write_checkpoints_with_counts(root: Path, tags: list[str]) -> dict[str, Path]:
    dumps = write_checkpoints(root, tags)
    for dump in dumps.values():
        correct_rollouts(dump)
    return dumps


def test_trajectory_shows_what_there_is_and_says_what_there_is_not(analysed):
    paths, _ = analysed
    dumps = {tag: found[0] for tag, found in open_dumps(paths).items()}
    results, _ = measure_dumps(dumps, Exp1Settings(ceiling=0, null=0))
    alignments = [bucket_directions(dump, dump.bins - 1).alignment for dump in dumps.values()]
    buckets = [result.buckets for result in results.values()]
    figure = draw_trajectory(subjects_of(dumps), buckets, alignments, [0.25, None, 0.5])
    ratios, rhos, shares = figure.axes
    lines = [line for line in ratios.lines if len(line.get_xdata()) == 3]
    assert len(lines) == dumps["base"].bins
    expected = [[of_dump[index].participation_ratio_unit_norm for of_dump in buckets] for index in range(len(lines))]
    np.testing.assert_allclose([line.get_ydata() for line in lines], expected)
    texts = [text.get_text() for text in rhos.texts]
    for result in alignments:
        assert f"{result.verdict}, n = {result.n_prompts}" in texts
    assert [text.get_text() for text in shares.texts] == ["25%", "50%"]
    assert [label.get_text() for label in shares.get_xticklabels()] == list(dumps)
    unknown = draw_trajectory(subjects_of(dumps), buckets, alignments, [None] * 3)
    assert "the manifests don't say" in [text.get_text() for text in unknown.axes[2].texts]


def test_marks_above_the_bars_are_the_verdicts_on_further_checkpoints(analysed):
    paths, _ = analysed
    dumps = {tag: found[0] for tag, found in open_dumps(paths).items()}
    results, _ = measure_dumps(dumps, Exp1Settings(ceiling=0, null=0))
    found = [compression_of(dump, results[tag]) for tag, dump in dumps.items()]
    verdicts = [["smaller", "can't tell", "larger", "smaller", None], ["larger"] * 5]
    compared = [[None if v is None else Ratio(1.0, None, 9, 6, v) for v in of_tag] for of_tag in verdicts]
    figure = draw_compression_headline(subjects_of(dumps), found, compared)
    drawn = [line.get_marker() for ax in figure.findobj(Axes) for line in ax.lines if line.get_marker() in "v^"]
    assert (drawn.count("v"), drawn.count("^")) == (2, 6)
