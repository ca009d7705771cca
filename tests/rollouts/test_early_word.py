"""After the sampling and before any gradient: what the rollouts are like, and whether they can answer anything."""

import json
from pathlib import Path

import pytest

import probe_grad_vectors
from gradprobe.common.errors import InputError
from gradprobe.dump.on_policy import OnPolicy
from gradprobe.dump.records import Rollout
from gradprobe.rollouts.early_word import early_word, refuse_too_few_mixed, share

SMALL = "--num-samples 2 --max-new-tokens 6 --device cpu --bins 2 --pos-per-bin-per-rollout 1".split()
VERIFIERS = (
    "def never(response, truth):\n    return False\n\ndef even(response, truth):\n    return len(response) % 2 == 0\n"
)


def rollout(prompt: int, correct: bool, n_tokens: int = 3, end: int = 7, text: str = "") -> Rollout:
    ids, zeros = [*[1] * (n_tokens - 1), end], [0.5] * n_tokens
    return Rollout(prompt, 0, "p", [1 + prompt], ids, zeros, zeros, text, "", correct)


def test_counts_are_of_rollouts_and_prompts():
    mixed_for_rho = [rollout(0, kind) for kind in (True, True, False, False)]
    mixed = [rollout(1, True, end=9, text="so \\boxed{3}"), rollout(1, False, n_tokens=7)]
    rollouts = [*mixed_for_rho, *mixed, rollout(2, False), rollout(3, True)]
    assert list(early_word(rollouts, frozenset({7}), OnPolicy(-0.01, 1.26, None))) == [
        "rollouts: 4 of 8 (50%) correct, 1 of 8 (12%) with a \\boxed{} answer",
        "prompts: 2 of 4 (50%) with correct and incorrect rollouts; "
        "Exp 3 rests on these, Exp 2's ρ on the 1 with at least 2 of each",
        "tokens: 4 a rollout, 1 of 8 (12%) cut off; entropy 0.500 nats, log π + H -0.0100 nats (+1.3 standard errors)",
    ]


@pytest.mark.parametrize(
    ("count", "total", "said"), [(12, 64, "19%"), (1023, 1024, ">99%"), (1, 1024, "<1%"), (5, 5, "100%"), (0, 5, "0%")]
)
def test_all_and_none_are_said_of_all_and_none(count, total, said):
    assert share(count, total) == f"{count} of {total} ({said})"


def test_few_prompts_or_single_rollouts_are_not_stopped():
    of_one_kind = [rollout(0, True), rollout(1, True)]
    for given, rows in ((None, [2] * 15), (None, [1] * 64), (0, [2] * 64)):
        refuse_too_few_mixed(of_one_kind, given, rows)
    with pytest.raises(InputError, match=r"`min_mixed_prompts` 1: 0 of 2 \(0%\) prompts"):
        refuse_too_few_mixed(of_one_kind, None, [2] * 16)


@pytest.fixture
def probe(tmp_path: Path, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [{"id": f"p{i}", "prompt": f"{i}+2", "ground_truth": "3", "meta": {}} for i in range(16)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "my_verifiers_of_words.py").write_text(VERIFIERS)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model-path", str(checkpoint_dir), "--dataset", "problems.jsonl", "--num-prompts", "16", *SMALL]
    return lambda *flags: probe_grad_vectors.main([*arguments, *flags])


def test_a_study_that_can_answer_nothing_stops_before_the_gradients_and_goes_on_where_asked(probe, capsys):
    never = ("--output-dir", "out", "--verifier", "my_verifiers_of_words:never")
    assert probe(*never) == 2
    said = capsys.readouterr().err
    assert "rollouts: 0 of 32 (0%) correct" in said
    assert "--min-mixed-prompts 1: 0 of 16 (0%) prompts have correct and incorrect rollouts" in said
    assert not Path("out/grads.npy").exists()
    rollouts = Path("out/rollouts.jsonl").read_bytes()
    assert probe(*never, "--min-mixed-prompts", "0") == 0
    assert Path("out/rollouts.jsonl").read_bytes() == rollouts
    assert Path("out/manifest.json").exists()


def test_rollouts_alone_then_gradients_are_the_dump_made_at_once(probe):
    even = ("--verifier", "my_verifiers_of_words:even")
    assert probe("--output-dir", "at_once", *even) == 0
    assert probe("--output-dir", "in_two", *even, "--sample-only") == 0
    assert not Path("in_two/manifest.json").exists()
    assert Path("in_two/rollouts.jsonl").read_bytes() == Path("at_once/rollouts.jsonl").read_bytes()
    assert probe("--output-dir", "in_two", *even) == 0
    for name in ("grads.npy", "meta.jsonl", "rollouts.jsonl"):
        assert Path("in_two", name).read_bytes() == Path("at_once", name).read_bytes()
