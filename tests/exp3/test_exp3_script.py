"""Exp 3 through its script: keys of the contract, nulls, planted shares recovered, tables, figures, bad input."""

import json
import re
from pathlib import Path

import numpy as np
import planted
import pytest

import analyze_exp3_signal
from gradprobe.analysis.inputs import open_dumps, pooled_of
from gradprobe.common.errors import InputError

FIGURES = {"exp3_headline.png", "exp3_keep_top.png"}
KEYS = {"n_prompts", "n_prompts_mixed", "n_rollouts", "bins", "objective", "outcome", "target", "on_policy", "signal"}
KEYS |= {"noise_scale_prompts", "per_bucket", "keep_top", "keep_bottom", "keep_random", "at_20_percent", "bucket_by"}
KEYS |= {"model", "manifest_sha256", "row_idx", "projection", "is_chosen_by_prefix", "edges"}
KEYS |= {"differences", "study", "layout", "files", "by_weight"}
ESTIMATE, TEST = {"value", "ci95"}, {"mean", "z", "verdict"}
OF_BUCKET = {"share_of_tokens": None, "n_rare": None, "signal_share": ESTIMATE, "signal_share_within_prompts": ESTIMATE}
OF_BUCKET |= {"noise_share": None, "noise_scale_prompts": None, "cosine_with_update": ESTIMATE, "on_policy": TEST}
OF_BUCKET |= {"score_mean": {"share_of_energy", "z"}}
OF_KEPT = {"share_of_tokens": None, "cosine": ESTIMATE, "signal_share": ESTIMATE, "noise_share": None}
OF_KEPT |= {"noise_scale_ratio": ESTIMATE}
STRONG = np.array([0.0, 0.0, 0.6, 0.3, 0.0])


def run(output_dir: Path, *dumps: object) -> dict:
    assert analyze_exp3_signal.main(["--output-dir", str(output_dir), *map(str, dumps)]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads((output_dir / "exp3_summary.json").read_text(), parse_constant=refuse)


def assert_keys(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for key, inner in expected.items():
        assert inner is None or set(found[key]) == inner, key


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("exp3")
    dumps = [f"{tag}={planted.write_planted_signal(root / tag, STRONG, seed=i)}" for i, tag in enumerate("ab")]
    return root, run(root / "out", *dumps)


def test_the_summary_has_the_keys_of_the_contract(studied):
    root, summary = studied
    assert list(summary) == ["a", "b"]
    assert {file.name for file in (root / "out").iterdir()} == FIGURES | {"exp3_summary.json"}
    for numbers in summary.values():
        assert set(numbers) == KEYS
        assert numbers["objective"] == "dapo"
        assert set(numbers["signal"]) == {"value", "ci95", "z", "verdict", "reason"}
        assert list(numbers["per_bucket"]) == list("01234")
        for bucket in numbers["per_bucket"].values():
            assert_keys(bucket, OF_BUCKET)
        for curve in ("keep_top", "keep_bottom", "keep_random"):
            assert len(numbers[curve]) == 5
            for kept in numbers[curve]:
                assert_keys(kept, OF_KEPT)
        assert set(numbers["at_20_percent"]) == {"top", "bottom", "random"}
        assert len(numbers["manifest_sha256"]) == 1


def test_planted_shares_lie_in_their_intervals(studied):
    squares = STRONG.sum() * STRONG  # all in one direction: ⟨U_b, U⟩ = s_b Σ s
    for numbers in studied[1].values():
        assert numbers["signal"]["verdict"] == "seen"
        shares = [bucket["signal_share"] for bucket in numbers["per_bucket"].values()]
        assert sum(share["value"] for share in shares) == pytest.approx(1)
        for share, planted_share in zip(shares, squares / squares.sum(), strict=True):
            low, high = share["ci95"]
            assert low - 0.03 < planted_share < high + 0.03
        assert numbers["keep_top"][-1]["cosine"]["value"] == pytest.approx(1)
        assert sum(bucket["noise_share"] for bucket in numbers["per_bucket"].values()) == pytest.approx(1)
        assert numbers["on_policy"]["verdict"] == "on-policy"
        tokens = [bucket["share_of_tokens"] for bucket in numbers["per_bucket"].values()]
        rare = [bucket["n_rare"] for bucket in numbers["per_bucket"].values()]
        np.testing.assert_allclose(np.array(rare) / np.sum(rare), tokens)


def test_no_signal_gives_nulls_and_says_underpowered(tmp_path, capsys):
    summary = run(tmp_path / "out", f"a={planted.write_planted_signal(tmp_path / 'a', np.zeros(4), seed=3)}")
    numbers = summary["a"]
    assert numbers["signal"]["verdict"] == "underpowered"
    none = {"value": None, "ci95": None}
    assert numbers["noise_scale_prompts"] == none
    assert [bucket["signal_share"] for bucket in numbers["per_bucket"].values()] == 4 * [none]
    printed = capsys.readouterr().out
    assert "no share across prompts can be told: signal not above 0" in printed
    assert not re.search(r"\bnan\b", printed.lower())
    assert "cosine" not in printed


def test_tables_say_what_the_summary_has(tmp_path, capsys):
    dump = planted.write_planted_signal(tmp_path / "a", np.linspace(0, 0.6, 20))
    numbers = run(tmp_path / "out", f"a={dump}")["a"]
    lines = capsys.readouterr().out.splitlines()
    share = numbers["per_bucket"]["19"]["signal_share"]
    expected = "{:.0f}% [{:.0f}, {:.0f}]".format(*(100 * x for x in (share["value"], *share["ci95"])))
    assert expected in next(line for line in lines if line.startswith("19 "))
    start = next(i for i, line in enumerate(lines) if line.endswith("; the highest kept"))
    kept = lines[start + 2 : lines.index("", start)]
    assert len(kept) == 10
    assert kept[-1].startswith("100%")
    top = numbers["at_20_percent"]["top"]["cosine"]
    assert f"{top['value']:.2f} [{top['ci95'][0]:.2f}, {top['ci95'][1]:.2f}]" in lines[2]


def test_objectives_and_rewards_make_the_update(tmp_path):
    flags = {"seed": 5, "n_prompts": 20}
    rewards = np.random.default_rng(0).random((20, 8))
    plain = planted.write_planted_signal(tmp_path / "plain", STRONG, **flags)
    rewarded = planted.write_planted_signal(tmp_path / "rewarded", STRONG, reward=rewards, **flags)
    found = {}
    for objective in ("dapo", "dr-grpo"):
        found[objective] = run(tmp_path / objective, "--objective", objective, f"a={plain}", f"b={rewarded}")
    assert found["dapo"]["a"]["signal"] != found["dr-grpo"]["a"]["signal"]
    assert found["dapo"]["a"]["signal"] != found["dapo"]["b"]["signal"]
    assert found["dr-grpo"]["a"]["objective"] == "dr-grpo"
    assert [found["dapo"][tag]["outcome"] for tag in "ab"] == ["verdict", "reward"]
    pooled = pooled_of(open_dumps({"b": rewarded})["b"][0])
    np.testing.assert_allclose(np.sort(pooled.outcome), np.sort(rewards.ravel()))
    assert set(pooled_of(open_dumps({"a": plain})["a"][0]).outcome) == {0.0, 1.0}


def test_rollouts_without_rows_count(tmp_path):
    shape = (6, 4, 3)
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(0, 3, shape)
    n_tokens[2, 1], n_tokens[3] = 0, 0  # a rollout, and a prompt, of which no row tells
    sums, correct = rng.standard_normal((*shape, 8)), rng.random(shape[:2]) < 0.5
    dump = planted.write_pooled_dump(tmp_path / "a", sums, correct, n_tokens)
    numbers = run(tmp_path / "out", f"a={dump}")["a"]
    assert (numbers["n_prompts"], numbers["n_rollouts"]) == (6, 24)
    old = planted.write_pooled_dump(tmp_path / "old", sums, correct, n_tokens, with_rollouts=False)
    numbers = run(tmp_path / "out", f"a={old}")["a"]
    assert numbers["n_prompts"] == 5
    assert numbers["on_policy"] == {"mean": None, "z": None, "verdict": None}


def test_rows_of_a_rollout_that_is_not_there_are_bad_input(tmp_path, capsys):
    dump = planted.write_planted_signal(tmp_path / "a", STRONG, n_prompts=4)
    lines = (dump / "rollouts.jsonl").read_text().splitlines()
    (dump / "rollouts.jsonl").write_text("\n".join(lines[1:]))
    assert analyze_exp3_signal.main(["--output-dir", str(tmp_path / "out"), f"a={dump}"]) == 2
    assert "1 rollouts are not in" in capsys.readouterr().err
    (dump / "rollouts.jsonl").write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(InputError, match="stands twice"):
        pooled_of(open_dumps({"a": dump})["a"][0])


def test_a_dump_of_single_tokens_without_a_step_is_refused(tmp_path, capsys):
    dump = planted.write_dump(tmp_path / "tokens", np.eye(5), np.arange(5))
    assert analyze_exp3_signal.main(["--output-dir", str(tmp_path / "out"), f"a={dump}"]) == 2
    error = capsys.readouterr().err
    assert f"{dump}: neither pooled (--pool bucket) nor along a step (--step-to, --step-from)" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_off_policy_rollouts_are_said_to_be(tmp_path, capsys):
    dump = planted.write_planted_signal(tmp_path / "a", STRONG, excess=0.2)
    assert run(tmp_path / "out", f"a={dump}")["a"]["on_policy"]["verdict"] == "off-policy"
    assert "; off-policy (log π + H " in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["surprisal", "score:mine"])
def test_rules_that_look_at_the_token_are_not_tested_by_bucket(tmp_path, rule):
    numbers = run(tmp_path / "out", f"a={planted.write_planted_signal(tmp_path / 'a', STRONG, bucket_by=rule)}")["a"]
    assert numbers["is_chosen_by_prefix"] == {"surprisal": False, "score:mine": None}[rule]
    assert {bucket["on_policy"]["verdict"] for bucket in numbers["per_bucket"].values()} == {None}
    assert numbers["on_policy"]["verdict"] == "on-policy"


def test_several_targets_add_their_replication(tmp_path):
    names = [f"L{n}.mlp.down_proj.weight.p4x8" for n in (0, 1)]
    for seed, name in enumerate(names):
        planted.write_planted_signal(tmp_path / "dump" / name, STRONG, seed=seed)
    numbers = run(tmp_path / "out", f"a={tmp_path / 'dump'}")["a"]
    assert numbers["replication"]["targets"] == names
    assert numbers["replication"]["signal_z"]["n"] == 2
    assert numbers["replication"]["signal_z"]["values"][0] == numbers["signal"]["z"]
    assert numbers["replication"]["by_target"][0]["at_20_percent"] == numbers["at_20_percent"]
    assert len(numbers["manifest_sha256"]) == 2
