"""The report: complete in itself, every word from the numbers, nothing from a model gets through as markup."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from planted import write_dump, write_heavy_tailed_dump

import analyze_exp1_compression
import analyze_exp2_direction
import plot_exp12_intuitive

HOSTILE = 'models/<img src=x onerror="alert(1)"><script>alert(2)</script>'


def study(base: Path, trained: Path, figures: Path, analyses: bool = True) -> str | None:
    """Run analyses and plots; the report, or None if there is none."""
    tagged = ["--output-dir", str(figures), f"base={base}", f"trained={trained}"]
    if analyses:
        assert analyze_exp1_compression.main(tagged) == 0
        assert analyze_exp2_direction.main(tagged) == 0
    arguments = ["--base", str(base), "--trained", str(trained), "--output-dir", str(figures)]
    assert plot_exp12_intuitive.main(arguments) == 0
    report = figures / "report.html"
    return report.read_text(encoding="utf-8") if report.exists() else None


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("report")
    base = write_heavy_tailed_dump(root / "base", seed=1, model_path=HOSTILE)
    trained = write_heavy_tailed_dump(root / "trained", seed=2)
    return study(base, trained, root / "figures"), root / "figures"


def test_the_page_is_complete_in_itself(results):
    page, figures = results
    assert "<script" not in page
    assert "http" not in re.sub(r'base64,[^"]*', "", page)
    names = {file.name for file in figures.glob("*.png")}
    assert len(names) >= 8
    assert set(re.findall(r"<figcaption>(.*?)</figcaption>", page)) == names
    assert page.count("data:image/png;base64,") == len(names)


def test_what_comes_from_a_model_is_escaped(results):
    page, _ = results
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=" in page


def test_verdicts_are_those_of_the_summaries(results):
    page, figures = results
    exp1, exp2 = (json.loads((figures / f"exp{i}_summary.json").read_text()) for i in (1, 2))
    for tag in ("base", "trained"):
        assert f'<span class="soft">{tag}</span><b>{exp2[tag]["alignment"]["verdict"]}</b>' in page
    verdict = exp1["trained"]["compared_with"]["base"]["4"]["verdict"].replace("'", "&#39;")
    assert f"unit-norm PR of trained against base, bucket 4</span><b>{verdict}</b>" in page


def test_a_study_without_any_number_still_has_a_report(tmp_path):
    one = write_dump(tmp_path / "one", np.ones((1, 3)), np.array([4]))
    page = study(one, one, tmp_path / "figures")
    assert "underpowered" in page
    assert not re.search(r"\bnan\b", re.sub(r'base64,[^"]*', "", page).lower())


def test_a_figure_of_an_earlier_run_is_not_taken_for_this_one_s(tmp_path):
    dump = write_heavy_tailed_dump(tmp_path / "dump", seed=1)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "exp12_replication.png").write_bytes(b"of several targets, probed before")
    assert "exp12_replication.png" not in study(dump, dump, tmp_path / "figures")


def test_without_the_summaries_there_is_none_and_the_plot_says_so(tmp_path, capsys):
    dump = write_heavy_tailed_dump(tmp_path / "dump", seed=1)
    assert study(dump, dump, tmp_path / "figures", analyses=False) is None
    assert "report.html is not written" in capsys.readouterr().err
