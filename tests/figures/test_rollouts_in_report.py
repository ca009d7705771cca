"""What a report shows of rollouts: two of one prompt, commonest tokens, facts; of large files a part."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gradprobe.dump.records import Rollout, write_records
from gradprobe.figures.rollouts import MAX_TOKENS_SHOWN, first_rollouts, see_rollouts
from gradprobe.figures.tables import commonest_tables

EDGES = [0.0, 1.0, 2.0]
MANIFEST = {"entropy_edges": EDGES, "num_rollouts": 4, "end_ids": [9]}
LONG = MAX_TOKENS_SHOWN + 50


def rollout(prompt: int, sample: int, n_tokens: int, correct: bool, **changed) -> Rollout:
    """Tokens `sure` and `fork` in turn, of entropy 0.5 and 1.5; the last one ends it."""
    kept = {
        "response_ids": [1, 2] * (n_tokens // 2 - 1) + [1, 9],
        "entropies": [0.5, 1.5] * (n_tokens // 2),
        "logprobs": [-0.5] * n_tokens,
        "token_texts": [" sure", "\x1b<b>"] * (n_tokens // 2),
    }
    told = {"problem_id": f"p{prompt}", "prompt_ids": [5 + prompt], "response": "\\boxed{7}", "ground_truth": "7"}
    return Rollout(prompt_idx=prompt, sample_idx=sample, correct=correct, **(told | kept | changed))


ROLLOUTS = [
    rollout(0, 0, 8, True),
    rollout(0, 1, 8, True),
    rollout(3, 0, LONG, True),
    rollout(3, 1, 6, False, response="no answer", response_ids=[1] * 6),
]


def write(path: Path, rollouts: list[Rollout]) -> Path:
    path.mkdir()
    write_records(path / "rollouts.jsonl", rollouts)
    lines = [
        {"row": 0, "prompt_idx": 3, "sample_idx": 1, "pos": 2},
        {"row": 1, "prompt_idx": 0, "sample_idx": 0, "pos": 1},
    ]
    (path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_correct_and_an_incorrect_rollout_of_one_prompt_are_seen_with_what_was_picked(tmp_path):
    right, wrong = see_rollouts(write(tmp_path / "dump", ROLLOUTS), MANIFEST).texts
    assert right.head.startswith("prompt 3 sample 0 ('p3'): correct")
    assert wrong.head.startswith("prompt 3 sample 1 ('p3'): incorrect")
    assert (len(right.tokens), right.n_more) == (MAX_TOKENS_SHOWN, LONG - MAX_TOKENS_SHOWN)
    assert (len(wrong.tokens), wrong.n_more) == (6, 0)
    assert [place for place, token in enumerate(wrong.tokens) if token.is_picked] == [2]
    assert not any(token.is_picked for token in right.tokens)
    assert [token.shade for token in wrong.tokens[:2]] == [0.25, 0.75]
    assert {token.text for token in wrong.tokens} == {" sure", "\\x1b<b>"}


def test_facts_are_those_of_the_early_word_and_tokens_those_of_their_bucket(tmp_path):
    seen = see_rollouts(write(tmp_path / "dump", ROLLOUTS), MANIFEST, [0.0, 0.7, 1.2, 2.0])
    said = "\n".join(seen.facts)
    assert "3 of 4 (75%) correct, 3 of 4 (75%) with a \\boxed{} answer" in said
    assert "1 of 2 (50%) with correct and incorrect rollouts" in said
    assert "1 of 4 (25%) cut off" in said
    assert seen.commonest == [[(" sure", 1.0)], [("\\x1b<b>", 1.0)]]
    assert seen.commonest_of_signal == [[(" sure", 1.0)], [], [("\\x1b<b>", 1.0)]]
    signal = {
        "objective": "dapo",
        "per_bucket": {
            str(bucket): {"share_of_tokens": 0.5, "signal_share": {"value": value, "ci95": interval}}
            for bucket, (value, interval) in enumerate([(0.1, [0.0, 0.2]), (0.2, None), (0.9, [0.8, 1.0])])
        },
    }
    own, of_signal = commonest_tables("base", seen.commonest, EDGES, seen.commonest_of_signal, signal)
    assert own.rows[1] == (["1", "1 to 2"], [("\\x1b<b>", "100%")])
    assert of_signal.rows[0] == (["2", "50%", "90% [80, 100]"], [("\\x1b<b>", "100%")])
    assert [cells[2] for cells, _ in of_signal.rows] == ["90% [80, 100]", "–", "10% [0, 20]"]


@pytest.mark.parametrize(
    ("rollouts", "n_texts", "fact"),
    [
        ([replace(r, token_texts=[]) for r in ROLLOUTS], 0, "keeps no texts of tokens"),
        (ROLLOUTS[:2], 2, "of 4 rollouts, the first 2 in the file"),  # no prompt with both kinds
        (ROLLOUTS[:1], 1, "1 of 1 (100%) correct"),
    ],
)
def test_what_there_is_not_is_said(rollouts, n_texts, fact, tmp_path):
    seen = see_rollouts(write(tmp_path / "dump", rollouts), MANIFEST)
    assert len(seen.texts) == n_texts
    assert fact in "\n".join(seen.facts)


def test_a_dump_without_rollouts_shows_none_and_one_without_meta_no_picks(tmp_path):
    dump = write(tmp_path / "dump", ROLLOUTS)
    (dump / "meta.jsonl").unlink()
    assert not any(token.is_picked for text in see_rollouts(dump, MANIFEST).texts for token in text.tokens)
    (dump / "rollouts.jsonl").unlink()
    assert see_rollouts(dump, MANIFEST) is None


def test_without_end_ids_nobody_says_what_was_cut_off(tmp_path):
    manifest = {"entropy_edges": EDGES, "num_rollouts": 4}
    assert see_rollouts(write(tmp_path / "dump", ROLLOUTS), manifest).facts == []


def test_of_a_large_file_only_the_first_part_is_read():
    def endless() -> Iterator[Rollout]:
        yield from ROLLOUTS[:2]
        raise AssertionError("read on")

    assert first_rollouts(endless(), most_tokens=16) == ROLLOUTS[:2]
    nothing = rollout(0, 0, 2, True, response_ids=[], entropies=[], logprobs=[], token_texts=[])
    assert first_rollouts([nothing, ROLLOUTS[0]]) == [ROLLOUTS[0]]
