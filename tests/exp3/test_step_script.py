"""Exp 3's script on dumps along a step: keys of the contract, planted shares, the measured gain, with pooled rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import planted
import pytest

import analyze_exp3_signal
from gradprobe.exp3 import step

STRENGTH = np.array([0.0, 0.0, 0.1, 0.3, 0.6])
RULES = {"entropy", "surprisal", "|Δ log π|", "position", "random"}
KEYS = {"n_prompts", "n_rollouts", "objective", "gain", "reward_gain", "measured_gain", "linearity", "noise"}
KEYS |= {"per_bucket", "keep_top", "tokens", "from", "to", "at", "by_weight"}
OF_PART = {"share_of_tokens", "share", "noise_share"}


@pytest.fixture(scope="module", autouse=True)
def few_permutations():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step, "PERMUTATIONS", 400)
        yield


def run(output_dir: Path, *arguments: object) -> dict:
    assert analyze_exp3_signal.main(["--output-dir", str(output_dir), *map(str, arguments)]) == 0
    return json.loads((output_dir / "exp3_summary.json").read_text(), parse_constant=pytest.fail)


def mean_correct(dump: Path) -> float:
    lines = (dump / "rollouts.jsonl").read_text().splitlines()
    return float(np.mean([json.loads(line)["correct"] for line in lines]))


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, Path]:
    """Token dumps of the step's start, where it gains, and of its end, where it doesn't."""
    root = tmp_path_factory.mktemp("step")
    return {
        "base": planted.write_dump_along_step(root / "base", STRENGTH),
        "trained": planted.write_dump_along_step(root / "trained", 0 * STRENGTH, seed=2, at="to"),
    }


def tagged(dumps: dict[str, Path]) -> list[str]:
    return [f"{tag}={path}" for tag, path in dumps.items()]


def test_dumps_of_tokens_along_a_step_have_the_contract_s_keys_and_no_pooled_ones(ends, tmp_path, capsys):
    summary = run(tmp_path / "out", *tagged(ends))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"exp3_summary.json", "exp3_step.png"}
    for numbers in summary.values():
        assert {"signal", "keep_top", "per_bucket", "at_20_percent"}.isdisjoint(numbers)
        found = numbers["step"]
        assert set(found) == KEYS
        assert set(found["gain"]) == {"value", "ci95", "t", "p_value", "reason"}
        assert set(found["linearity"]) == {"correlation", "slope"}
        assert {"between", "within", "prompts_for_half_width"} < set(found["noise"])
        assert list(found["per_bucket"]) == list("01234")
        assert all(set(part) == {*OF_PART, "n_rare", "score_mean"} for part in found["per_bucket"].values())
        assert set(found["keep_top"]) == RULES
        for curve in found["keep_top"].values():
            assert all(set(part) == OF_PART for part in curve)
            np.testing.assert_allclose([part["share_of_tokens"] for part in curve], np.arange(1, 21) / 20, atol=1e-3)
    base, trained = (summary[tag]["step"] for tag in ("base", "trained"))
    assert (base["at"], base["from"], base["to"], trained["at"]) == ("from", "models/base", "models/trained", "to")
    shares = {index: part["share"] for index, part in base["per_bucket"].items()}
    for share, expected in zip(shares.values(), STRENGTH / STRENGTH.sum(), strict=True):
        assert share["ci95"][0] - 0.03 < expected < share["ci95"][1] + 0.03
    assert base["gain"]["reason"] is None
    assert base["tokens"][0]["text"] == " word4"
    for one in (base, trained):  # shift = d / 2, whichever end its log-probs are of
        assert one["linearity"]["slope"] == pytest.approx(0.5, abs=0.02)
    assert trained["gain"]["reason"].startswith("gain not told from 0 (t ")
    assert {part["share"]["value"] for part in trained["keep_top"]["entropy"]} == {None}
    assert trained["tokens"] == []
    printed = capsys.readouterr().out
    assert "base: along the step from models/base to models/trained, dapo; the highest kept" in printed
    assert f"no share of the gain can be told: {trained['gain']['reason']}" in printed


def test_the_measured_gain_is_the_end_s_mean_less_the_start_s_where_both_are_there(ends, tmp_path):
    means = {tag: mean_correct(dump) for tag, dump in ends.items()}
    both = run(tmp_path / "both", *tagged(ends))
    for numbers in both.values():
        assert numbers["step"]["measured_gain"] == pytest.approx(means["trained"] - means["base"])
    assert means["trained"] != means["base"]
    alone = run(tmp_path / "alone", f"base={ends['base']}")
    assert alone["base"]["step"]["measured_gain"] is None
    assert alone["base"]["step"] | {"measured_gain": 0} == both["base"]["step"] | {"measured_gain": 0}


def test_a_dump_with_both_says_both(tmp_path, capsys):
    pooled = planted.write_planted_signal(tmp_path / "pooled", np.array([0.0, 0.0, 0.0, 0.3, 0.6]))
    without = run(tmp_path / "without", f"a={pooled}")["a"]
    along = run(tmp_path / "along", f"a={planted.plant_step(pooled, STRENGTH)}")["a"]
    assert {file.name for file in (tmp_path / "along").iterdir()} >= {"exp3_step.png", "exp3_headline.png"}
    assert along["step"]["gain"]["t"] > 5
    for key in ("signal", "per_bucket", "keep_top", "at_20_percent"):
        assert along[key] == without[key], "what pooled gradients say is as without a step"
    printed = capsys.readouterr().out
    assert "; 20% of the tokens kept" in printed
    assert "words that carry most" in printed


def test_a_manifest_with_a_step_whose_rollouts_are_gone_is_bad_input(ends, tmp_path, capsys):
    dump = Path(shutil.copytree(ends["base"], tmp_path / "a"))
    (dump / "rollouts.jsonl").unlink()
    assert analyze_exp3_signal.main(["--output-dir", str(tmp_path / "out"), f"a={dump}"]) == 2
    error = capsys.readouterr().err
    assert f"{dump}: its rollouts.jsonl, which tells of the step, is not there" in error
    assert error.count("\n") == 1
