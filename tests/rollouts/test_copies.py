"""Repeats that chance explains pass, copies don't: not one in a file, not a file written twice, not a fixed seed."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import probe_grad_vectors
from gradprobe.dump.records import Rollout
from gradprobe.rollouts.copies import problem_of_copies

DATA = Path(__file__).parents[1] / "data" / "rollouts"
DEMO = Path(__file__).parents[2] / "demo"
UNEVEN = np.array([0.6, 0.2, 0.1, 0.05, 0.03, 0.02])
CERTAIN = np.array([1 - 1e-6, 1e-6])


def drawn(
    rng: np.random.Generator, policy: np.ndarray, shape: Sequence[int], temperature: float = 1.0
) -> list[Rollout]:
    """Rollouts of independent tokens: `shape` is (prompts, samples, tokens), `policy` [vocab] at temperature 1."""
    weights = policy ** (1 / temperature)
    ids = rng.choice(len(policy), shape, p=weights / weights.sum())
    return [rollout_of(policy, p, s, ids[p, s]) for p in range(shape[0]) for s in range(shape[1])]


def rollout_of(policy: np.ndarray, prompt_idx: int, sample_idx: int, ids: np.ndarray) -> Rollout:
    """A rollout as it is once scored."""
    entropy = -float((policy * np.log(policy)).sum())
    n = len(ids)
    return Rollout(
        prompt_idx,
        sample_idx,
        problem_id=str(prompt_idx),
        prompt_ids=[100 + prompt_idx],
        response_ids=ids.tolist(),
        entropies=[entropy] * n,
        logprobs=np.log(policy)[ids].tolist(),
        response="",
        ground_truth="",
        correct=True,
        tail_mass=[1 - float(policy.max())] * n,
    )


@pytest.mark.parametrize(
    ("policy", "temperature", "sampled_at"),
    [(UNEVEN, 1.0, 1.0), (UNEVEN, 1.0, None), (UNEVEN, 0.6, None), (UNEVEN, 0.6, 0.6), (UNEVEN, 0.3, None),
     (UNEVEN, 1.5, 1.5), (CERTAIN, 1.0, 1.0), (CERTAIN, 1.0, None)],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 2, 12), (3, 8, 1), (20, 8, 3), (40, 16, 12)])
def test_chance_repeats_pass(policy, temperature, sampled_at, shape):
    for seed in range(20):
        rollouts = drawn(np.random.default_rng(seed), policy, shape, temperature)
        assert problem_of_copies(rollouts, sampled_at, False) is None, seed


def test_most_of_those_have_repeats():
    counts = [
        len({tuple(r.response_ids) for r in drawn(np.random.default_rng(seed), UNEVEN, (1, 8, 3), 0.6)})
        for seed in range(20)
    ]
    assert max(counts) < 8


LONG, SHORT = (16, 8, 200), (64, 8, 30)


@pytest.mark.parametrize("sampled_at", [1.0, None])
@pytest.mark.parametrize(
    ("shape", "n_copied", "times"),
    [(LONG, 1, 1), (SHORT, 512, 1), (SHORT, 128, 1), (SHORT, 512, 3), (LONG, 8, 1), ((1, 2, 200), 1, 1)],
)
def test_copies_are_refused(sampled_at, shape, n_copied, times):
    rollouts = drawn(np.random.default_rng(0), UNEVEN, shape)
    copied = rollouts + times * rollouts[:n_copied]
    problem = problem_of_copies(copied, sampled_at, False)
    assert problem is not None
    assert "not independent" in problem
    assert problem_of_copies(rollouts, sampled_at, False) is None


def test_a_copy_under_another_problem_is_one():
    rollouts = drawn(np.random.default_rng(0), UNEVEN, LONG)
    renamed = [Rollout(**{**vars(r), "prompt_idx": 50 + r.prompt_idx}) for r in rollouts]
    assert problem_of_copies(rollouts + renamed, 1.0, False) is not None


@pytest.mark.parametrize("sampled_at", [1.0, 0.7, None])
def test_one_response_for_all_samples_is_refused(sampled_at):
    """A server that ignores seeds, or a sampler at temperature 0."""
    rollouts = drawn(np.random.default_rng(0), UNEVEN, (8, 1, 40))
    assert problem_of_copies(rollouts * 4, sampled_at, False) is not None
    greedy = [rollout_of(UNEVEN, p, s, np.zeros(40, int)) for p in range(8) for s in range(4)]
    assert ("temperature 0" in problem_of_copies(greedy, sampled_at, False)) == (sampled_at != 1)


def test_of_other_policies_only_whole_copies_are_told():
    """What this model thinks unlikely another may say again and again."""
    of_another = drawn(np.random.default_rng(0), UNEVEN[::-1], (8, 8, 3))
    swapped = [rollout_of(UNEVEN, r.prompt_idx, r.sample_idx, np.array(r.response_ids)) for r in of_another]
    assert problem_of_copies(swapped, None, False) is not None
    assert problem_of_copies(swapped, None, True) is None
    assert problem_of_copies(swapped * 2, None, True) is not None


def probe(*arguments: object) -> int:
    flags = ["--model-path", DEMO / "base", "--device", "cpu", "--bins", 2, "--pos-per-bin-per-rollout", 1]
    return probe_grad_vectors.main([*map(str, flags), *map(str, arguments)])


def test_a_file_written_twice_is_refused_by_the_probe(tmp_path, capsys):
    text = (DATA / "vllm.jsonl").read_text()
    lines = [{k: v for k, v in json.loads(line).items() if k != "request_id"} for line in text.splitlines()]
    file = tmp_path / "vllm.jsonl"
    for times, status in ((1, 0), (2, 2)):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines * times))
        assert probe("--rollouts", file, "--output-dir", tmp_path / str(times)) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"--rollouts {file}: " in errors[0]
    assert re.search(r"prompt \d samples (0 and 2|1 and 3), ", errors[0])
    assert not (tmp_path / "2" / "manifest.json").exists()
