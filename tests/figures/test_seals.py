"""The report shows what was drawn from these summaries of these dumps, and hostile files end in one line."""

import itertools
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planted
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import analyze_exp1_compression
import analyze_exp2_direction
import analyze_exp3_signal
import plot_exp12_intuitive
from gradprobe.analysis.differences import other_study, study_of
from gradprobe.analysis.summaries import read_summary, seal_of, sealed

SCRIPTS = {1: analyze_exp1_compression, 2: analyze_exp2_direction, 3: analyze_exp3_signal}
N_PROMPTS, N_ROLLOUTS = 6, 4
Spoil = Callable[[Path], object]


def write_tokens(path: Path, seed: int, **manifest) -> Path:
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((N_PROMPTS, N_ROLLOUTS, 2, 2)))
    grads = np.random.default_rng(seed).standard_normal((len(prompt), 8))
    told = {"model_identity": "planted", "seed": seed, "bins": 2, "model_path": f"models/{path.name}"} | manifest
    return planted.write_dump(path, grads, bucket, prompt=prompt, sample=sample, correct=sample < 2, **told)


def write_sums(path: Path, seed: int, **manifest) -> Path:
    size = {"n_prompts": N_PROMPTS, "n_rollouts": N_ROLLOUTS, "dim": 8}
    return planted.write_planted_signal(path, np.zeros(2), seed=seed, **(size | manifest))


def tagged(root: Path, *tags: str) -> list[str]:
    return [f"{tag}={root / tag}" for tag in tags]


def analyse(figures: Path, number: int, dumps: list[str]) -> None:
    assert SCRIPTS[number].main(["--output-dir", str(figures), *dumps]) == 0


def plot(figures: Path, dumps: list[str]) -> int:
    return plot_exp12_intuitive.main(["--output-dir", str(figures), *dumps])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Study a, analysed and plotted; study b, other dumps under the same tags; the sums of a."""
    root = tmp_path_factory.mktemp("seals")
    for seed, (study, tag) in enumerate(itertools.product("ab", ("base", "trained"))):
        write_tokens(root / study / tag, seed)
    for seed, tag in enumerate(("base", "trained", "third")):
        write_sums(root / "sums" / tag, seed)
    for number in (1, 2):
        analyse(root / "figures", number, tagged(root / "a", "base", "trained"))
    analyse(root / "figures", 3, tagged(root / "sums", "base", "trained"))
    assert plot(root / "figures", tagged(root / "a", "base", "trained")) == 0
    return root


@pytest.fixture
def figures(root: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(root / "figures", tmp_path / "figures"))


def embedded(figures: Path) -> set[str]:
    return set(re.findall(r"<figcaption>(.*?)</figcaption>", (figures / "report.html").read_text()))


def contents(figures: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in figures.iterdir() if file.is_file()}


def test_everything_of_one_run_is_shown(root: Path, figures: Path, capsys):
    assert plot(figures, tagged(root / "a", "base", "trained")) == 0
    assert capsys.readouterr().err == ""
    assert {"exp1_norms.png", "exp2_alignment.png", "exp3_headline.png", "exp1_headline.png"} <= embedded(figures)
    assert embedded(figures) == {file.name for file in figures.glob("*.png")}


def test_every_figure_says_what_it_was_drawn_from(root: Path):
    for file in (root / "figures").glob("*.png"):
        with Image.open(file) as picture:
            about = json.loads(picture.info["gradprobe"])
        assert set(about) in ({"summary", "content_sha256"}, {"manifest_sha256"}), file.name
        if "summary" in about:
            summary = json.loads((root / "figures" / about["summary"]).read_text())
            assert about["content_sha256"] == {tag: seal_of(numbers) for tag, numbers in summary.items()}


def test_pdf_and_svg_carry_the_seal_beside_the_png_and_are_the_same_again(root: Path, figures: Path, capsys):
    arguments = ["--output-dir", str(figures), "--figure-format", "pdf,svg", *tagged(root / "sums", "base", "trained")]
    drawn = []
    for _ in range(2):
        assert analyze_exp3_signal.main(arguments) == 0
        drawn.append(
            {file: file.read_bytes() for suffix in ("pdf", "svg", "png") for file in figures.glob(f"*.{suffix}")}
        )
    assert drawn[0] == drawn[1]
    summary, said = json.loads((figures / "exp3_summary.json").read_text()), capsys.readouterr().out
    for suffix in ("png", "pdf", "svg"):
        file = figures / f"exp3_headline.{suffix}"
        assert seal_of(summary["base"]).encode() in drawn[0][file]
        assert f"wrote {file}" in said


def test_a_format_that_there_is_not_is_refused(root: Path, figures: Path, capsys):
    with pytest.raises(SystemExit) as end:
        analyse(figures, 3, ["--figure-format", "png,eps", *tagged(root / "sums", "base")])
    assert end.value.code == 2
    assert "'eps' is none of png, pdf, svg" in capsys.readouterr().err


def test_a_report_is_not_made_of_one_study_s_exp1_and_another_s_exp2(root: Path, figures: Path, capsys):
    before = (figures / "report.html").read_bytes()
    analyse(figures, 1, tagged(root / "b", "base", "trained"))
    capsys.readouterr()
    assert plot(figures, tagged(root / "b", "base", "trained")) == 0
    said = capsys.readouterr().err
    assert "report.html is not written" in said
    assert "The report.html that lies there is of an earlier run" in said
    assert (figures / "report.html").read_bytes() == before


def test_figures_of_an_earlier_analysis_are_named_and_left_out(root: Path, figures: Path, capsys):
    """Study b analysed into a's directory, its figures lost: a's lie there under the same names."""
    stale = {name: (figures / name).read_bytes() for name in ("exp1_norms.png", "exp2_alignment.png")}
    for number in (1, 2):
        analyse(figures, number, tagged(root / "b", "base", "trained"))
    for name, content in stale.items():
        (figures / name).write_bytes(content)
    capsys.readouterr()
    assert plot(figures, tagged(root / "b", "base", "trained")) == 0
    said = capsys.readouterr().err
    assert "warning: exp1_norms.png is left out of report.html: it is of another run than exp1_summary.json" in said
    assert "warning: exp2_alignment.png is left out of report.html: it is of another run than exp2_summary.json" in said
    assert not embedded(figures) & set(stale)
    assert "exp1_cumulative_energy.png" in embedded(figures)


def test_a_figure_that_only_the_earlier_analysis_drew_is_left_out(root: Path, figures: Path, capsys):
    for tags in (("base", "trained", "third"), ("base", "trained")):
        analyse(figures, 3, tagged(root / "sums", *tags))
    assert (figures / "exp3_trajectory.png").exists()
    assert plot(figures, tagged(root / "a", "base", "trained")) == 0
    assert "exp3_trajectory.png is left out" in capsys.readouterr().err
    assert "exp3_trajectory.png" not in embedded(figures)
    assert "exp3_headline.png" in embedded(figures)


def test_another_objective_makes_figures_another_run_s(root: Path, figures: Path, capsys):
    before = (figures / "exp3_headline.png").read_bytes()
    dumps = tagged(root / "sums", "base", "trained")
    assert analyze_exp3_signal.main(["--objective", "grpo", "--output-dir", str(figures), *dumps]) == 0
    (figures / "exp3_headline.png").write_bytes(before)
    assert plot(figures, tagged(root / "a", "base", "trained")) == 0
    assert "exp3_headline.png is left out" in capsys.readouterr().err
    assert "exp3_headline.png" not in embedded(figures)


KNOWN = {
    "model_identity": {"weights_sha256": "a"},
    "prompt_hashes": ["0" * 16, "1" * 16],
    "dataset": {"sha256": "a"},
    "sampling": {"seed": 0},
    "num_rollouts": 24,
    "num_response_tokens": 100,
    "temperature": 1.0,
}
OTHER_SUMS = {
    "all the same": ({}, []),
    "in another order": ({"prompt_hashes": ["1" * 16, "0" * 16]}, []),
    "a silent manifest": ({"prompt_hashes": None, "dataset": None, "sampling": None, "temperature": None}, []),
    "another model": ({"model_identity": {"weights_sha256": "b"}}, ["model_identity"]),
    "an unknown model": ({"model_identity": None}, ["model_identity, which one of them doesn't tell"]),
    "other prompts": ({"prompt_hashes": ["0" * 16, "2" * 16]}, ["prompts"]),
    "another data set": ({"dataset": {"sha256": "b"}}, ["data set"]),
    "another seed": ({"sampling": {"seed": 1}}, ["seed of sampling"]),
    "other rollouts": ({"num_rollouts": 23, "num_response_tokens": 99}, ["num_rollouts", "num_response_tokens"]),
    "another temperature": ({"temperature": 0.5}, ["temperature"]),
}


@pytest.mark.parametrize("case", OTHER_SUMS)
def test_pooled_dumps_are_of_the_same_rollouts_or_it_is_said_why_not(case: str):
    changed, reasons = OTHER_SUMS[case]
    assert other_study(study_of(KNOWN), study_of(KNOWN | changed)) == reasons


def test_exp3_left_over_from_before_a_study_without_it_is_left_out(root: Path, figures: Path, tmp_path: Path, capsys):
    """EXP3=0, and the study's rollouts are others than those of the old exp3_summary.json."""
    dumps = [f"{tag}={write_tokens(tmp_path / tag, 9, temperature=0.5)}" for tag in ("base", "trained")]
    for number in (1, 2):
        analyse(figures, number, dumps)
    assert plot(figures, dumps) == 0
    assert "base has another temperature; trained has another temperature" in capsys.readouterr().err
    assert "Not measured" in (figures / "report.html").read_text()


def test_exp3_of_other_tags_is_left_out(root: Path, figures: Path, capsys):
    analyse(figures, 3, tagged(root / "sums", "base", "third"))
    assert plot(figures, tagged(root / "a", "base", "trained")) == 0
    assert "third is none of the dumps given" in capsys.readouterr().err


def test_summaries_of_before_seals_are_left_out_with_a_line(root: Path, figures: Path, capsys):
    summary = json.loads((figures / "exp3_summary.json").read_text())
    for numbers in summary.values():
        numbers.pop("content_sha256")
    (figures / "exp3_summary.json").write_text(json.dumps(summary))
    assert plot(figures, tagged(root / "a", "base", "trained")) == 0
    assert "exp3_summary.json: is of an earlier version of gradprobe and is left out" in capsys.readouterr().err
    assert "Not measured" in (figures / "report.html").read_text()


@pytest.mark.parametrize(
    "content",
    [{"run_dir": "s0", "model": "m"}, sealed({"": {"run_dir": "s0"}})[""], {}],
    ids=["old", "sealed", "empty"],
)
def test_a_summary_of_one_untagged_dump_is_of_no_tags(content, tmp_path: Path):
    (tmp_path / "exp2_summary.json").write_text(json.dumps(content))
    assert read_summary(tmp_path / "exp2_summary.json") == {}


def test_swapped_tags_are_other_dumps(root: Path, figures: Path, capsys):
    summary = json.loads((figures / "exp1_summary.json").read_text())
    summary = {"base": summary["trained"], "trained": summary["base"]}
    (figures / "exp1_summary.json").write_text(json.dumps(sealed(summary)))
    assert plot(figures, tagged(root / "a", "base", "trained")) == 0
    assert "report.html is not written" in capsys.readouterr().err


def edit(number: int, change: Callable[[dict], object]) -> Spoil:
    """Change a summary and leave its seals."""

    def spoil(figures: Path) -> None:
        file = figures / f"exp{number}_summary.json"
        summary = json.loads(file.read_text())
        change(summary)
        file.write_text(json.dumps(summary))

    return spoil


def text(number: int, change: Callable[[str], str | bytes]) -> Spoil:
    def spoil(figures: Path) -> None:
        file = figures / f"exp{number}_summary.json"
        content = change(file.read_text())
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def number_as(digits: str) -> Callable[[str], str]:
    """Puts `digits` in the place of the first number with a fraction."""
    return lambda content: re.sub(r"-?\d+\.\d+(e-?\d+)?", digits, content, count=1)


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(figures: Path) -> None:
        (figures / name).unlink()
        make(figures / name)

    return spoil


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda figures: (figures / name).write_bytes(change((figures / name).read_bytes()))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def of_60000_pixels(content: bytes) -> bytes:
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


NORMS = "exp1_norms.png"
S1, S2, S3 = (f"exp{number}_summary.json" for number in SCRIPTS)
HOSTILE = {  # what is done, and the file that the one line names
    "cut short": (text(1, lambda content: content[: len(content) // 2]), S1),
    "cut short after a brace": (text(3, lambda content: content.rstrip()[:-1]), S3),
    "empty": (text(2, lambda content: ""), S2),
    "NUL bytes": (text(1, lambda content: bytes(100)), S1),
    "NaN": (text(1, number_as("NaN")), S1),
    "infinity": (text(3, number_as("-Infinity")), S3),
    "a number beyond a double": (text(2, number_as("1e999")), S2),
    "a huge number": (text(1, number_as("1e300")), S1),
    "an integer of 5,000 digits": (text(1, number_as("9" * 5000)), S1),
    "an integer of 4,000 digits": (text(3, number_as("9" * 4000)), S3),
    "a number as a text": (text(3, number_as('"0.5"')), S3),
    "a list": (text(3, lambda content: f"[{content}]"), S3),
    "a number alone": (text(2, lambda content: "7"), S2),
    "not UTF-8": (text(1, lambda content: content.replace("models", "m\xff").encode("latin-1")), S1),
    "half a surrogate pair": (text(2, lambda content: content.replace("models", "\\ud800", 1)), S2),
    "900 levels": (text(2, lambda content: f'{{"base": {{"content_sha256": {900 * "["}1{900 * "]"}}}}}'), S2),
    "a tag's part is a list": (edit(1, lambda s: s.update(base=[1])), S1),
    "a tag's part is null": (edit(3, lambda s: s.update(base=None)), S3),
    "a tag's part is a text": (edit(2, lambda s: s.update(trained="good")), S2),
    "a tag of escapes": (edit(1, lambda s: s.update({"\x1b[2J\u202e": 7})), S1),
    "buckets in a list": (edit(1, lambda s: s["base"].update(per_bucket=[])), S1),
    "no buckets": (edit(1, lambda s: s["base"].update(per_bucket={})), S1),
    "a verdict of another's": (edit(2, lambda s: s["base"]["alignment"].update(verdict="great")), S2),
    "a key less": (edit(2, lambda s: s["base"].pop("alignment")), S2),
    "an interval of three": (edit(1, lambda s: s["base"]["per_bucket"]["0"].update(ess_ci95=[1, 2, 3])), S1),
    "draws that are no numbers": (edit(2, lambda s: s["base"].update(draws={"bootstrap": "x"})), S2),
    "fingerprints in a text": (edit(1, lambda s: s["base"].update(manifest_sha256="a" * 64)), S1),
    "another part's seal": (edit(3, lambda s: s["base"].update(content_sha256=s["trained"]["content_sha256"])), S3),
    "a seal less": (edit(2, lambda s: s["base"].pop("content_sha256")), S2),
    "an untagged summary, edited": (edit(2, lambda s: s.update(s.pop("base")) or s.update(n_prompts=9)), S2),
    "a seal that is a list": (edit(1, lambda s: s["base"].update(content_sha256=[])), S1),
    "a summary that is a directory": (instead(S1, Path.mkdir), S1),
    "a summary that is a link to nothing": (instead(S3, lambda file: file.symlink_to("nowhere")), S3),
    "a figure that is text": (bytes_of("exp1_norms.png", lambda content: b"<script>alert(1)</script>"), NORMS),
    "an empty figure": (bytes_of("exp2_alignment.png", lambda content: b""), "exp2_alignment.png"),
    "half a figure": (bytes_of("exp1_norms.png", lambda content: content[: len(content) // 2]), "exp1_norms.png"),
    "a figure with a bit flipped": (bytes_of("exp3_headline.png", flipped), "exp3_headline.png"),
    "a figure of 3.6 billion pixels": (bytes_of("exp1_norms.png", of_60000_pixels), "exp1_norms.png"),
    "a GIF": (
        instead("exp1_norms.png", lambda file: Image.new("L", (9, 9)).save(file, format="GIF")), "exp1_norms.png"
    ),
    "a figure that is a directory": (instead("exp2_alignment.png", Path.mkdir), "exp2_alignment.png"),
    "a figure that is a link to nothing": (
        instead("exp1_norms.png", lambda file: file.symlink_to("nowhere")), "exp1_norms.png"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_line_and_nothing_is_written(case: str, root: Path, figures: Path, capsys):
    spoil, name = HOSTILE[case]
    spoil(figures)
    before = contents(figures)
    assert plot(figures, tagged(root / "a", "base", "trained")) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {figures / name}: ")
    assert said.err.count("\n") == 1
    assert said.err[:-1].isprintable()
    assert len(said.err) < 600
    assert said.out == ""
    assert contents(figures) == before


def with_text(about: str | None) -> Callable[[Path], object]:
    """A sound PNG that says this of itself."""
    info = PngInfo()
    if about is not None:
        info.add_text("gradprobe", about)
    return lambda file: Image.new("L", (9, 9)).save(file, format="PNG", pnginfo=info)


@pytest.mark.parametrize(
    "about",
    [None, "", "no JSON", "[" * 100_000, "7", '{"summary": "exp1_summary.json"}', '{"content_sha256": {"base": NaN}}'],
    ids=["nothing", "empty", "no JSON", "deep", "a number", "no seals", "NaN"],
)
def test_a_picture_that_does_not_say_it_is_of_this_run_is_left_out(about, figures: Path, caplog):
    instead(NORMS, with_text(about))(figures)
    summaries = {name: json.loads((figures / name).read_text()) for name in (S1, S2, S3)}
    found = plot_exp12_intuitive.pictures_of(figures, summaries)
    assert "exp1_norms.png is left out of report.html" in caplog.text
    assert NORMS not in found
    assert "exp1_cumulative_energy.png" in found
