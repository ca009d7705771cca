"""Rollouts on a terminal: every token once, shaded, picked ones marked, and nothing of a model's raw."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gradprobe import show
from gradprobe.common.console import printable
from gradprobe.dump.buckets import bucket_of
from gradprobe.dump.consistency import load_dump
from gradprobe.dump.records import iter_rollouts, write_records
from gradprobe.figures.tokens import Token, commonest_tokens, tokens_of, two_of_one_prompt, visible
from gradprobe.show import coloured, marked


@pytest.fixture(scope="module")
def dump(tmp_path_factory, checkpoint_dir, problems_file):
    import probe_grad_vectors

    path = tmp_path_factory.mktemp("show") / "dump"
    arguments = "--num-prompts 3 --num-samples 2 --max-new-tokens 12 --device cpu --bins 3 --pos-per-bin-per-rollout 1"
    paths = ["--model-path", checkpoint_dir, "--dataset", problems_file, "--output-dir", path]
    assert probe_grad_vectors.main([*map(str, paths), *arguments.split()]) == 0
    return path


def test_tokens_are_the_rollouts_and_marks_the_dumps(dump):
    opened, rollouts = load_dump(dump), list(iter_rollouts(dump / "rollouts.jsonl"))
    n_picked = 0
    for rollout in rollouts:
        tokens = list(tokens_of(rollout, opened))
        assert [t.entropy for t in tokens] == rollout.entropies
        assert [t.text for t in tokens] == list(map(visible, rollout.token_texts))
        assert all(t.is_high == (t.entropy >= opened.manifest["entropy_edges"][-2]) for t in tokens)
        n_picked += sum(t.is_picked for t in tokens)
    assert n_picked == len(opened.grads) > 0


def test_no_escape_of_a_model_reaches_the_terminal(dump, tmp_path, capsys):
    hostile = "\x1b]0;title\x07\x1b[2J\r‮<b>"
    rollouts = [replace(r, token_texts=[hostile] * len(r.token_texts)) for r in iter_rollouts(dump / "rollouts.jsonl")]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("grads.npy", "meta.jsonl", "manifest.json"):
        (copy / name).write_bytes((dump / name).read_bytes())
    write_records(copy / "rollouts.jsonl", rollouts)
    assert show.main([str(copy), "--num", "2"]) == 0
    assert not {c for c in capsys.readouterr().out if not c.isprintable() and c != "\n"}
    token = Token(visible(hostile), 3.0, 1.0, True, True)
    assert coloured(token).count("\x1b") == 3
    assert marked(token) == f"[‹{visible(hostile)}›]"


def test_one_rollout_by_its_place(dump, capsys):
    prompt = load_dump(dump).prompt_keys[1]
    assert show.main([str(dump), "--prompt", str(prompt), "--sample", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"prompt {prompt} sample 1 ")
    assert said.count("mean entropy") == 1
    assert show.main([str(dump), "--prompt", "99"]) == 2
    assert "no such rollout" in capsys.readouterr().err


def test_dumps_without_texts_say_so(dump, tmp_path, capsys):
    for name in ("grads.npy", "meta.jsonl", "manifest.json"):
        (tmp_path / name).write_bytes((dump / name).read_bytes())
    assert show.main([str(tmp_path)]) == 2
    assert "no rollouts.jsonl" in capsys.readouterr().err
    lines = [json.loads(line) for line in (dump / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:
        del line["token_texts"]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert show.main([str(tmp_path)]) == 2
    assert "no token_texts" in capsys.readouterr().err


def test_the_commonest_tokens_of_a_bucket_are_counted_there(dump):
    rollouts, edges = list(iter_rollouts(dump / "rollouts.jsonl")), np.array(load_dump(dump).manifest["entropy_edges"])
    found = commonest_tokens(rollouts, edges, n=1000)
    texts = [[] for _ in found]
    for r in rollouts:
        for text, bucket in zip(r.token_texts, bucket_of(np.array(r.entropies), edges), strict=True):
            texts[bucket].append(printable(text))
    for pairs, expected in zip(found, texts, strict=True):
        assert {text: share * len(expected) for text, share in pairs} == pytest.approx(Counter(expected))
        assert [share for _, share in pairs] == sorted((share for _, share in pairs), reverse=True)


def test_two_rollouts_of_one_prompt_one_correct_one_not(dump):
    rollouts = list(iter_rollouts(dump / "rollouts.jsonl"))
    assert two_of_one_prompt([replace(r, correct=False) for r in rollouts]) == []
    right, wrong = two_of_one_prompt([replace(r, correct=r.sample_idx == 1) for r in rollouts])
    assert right.prompt_idx == wrong.prompt_idx
    assert (right.correct, wrong.correct) == (True, False)


def test_the_two_are_of_typical_length(dump):
    (one, *_) = iter_rollouts(dump / "rollouts.jsonl")
    lengths = {True: [1, 20, 21], False: [2, 30, 31, 90]}
    rollouts = [
        replace(one, correct=kind, sample_idx=100 * kind + n, response_ids=[1] * n)
        for kind, of_kind in lengths.items()
        for n in of_kind
    ]
    assert [len(r.response_ids) for r in two_of_one_prompt(rollouts)] == [20, 30]
