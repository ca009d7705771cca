"""Proxies of the gradient norm against plain loops and known truths, and what a dump of an older time can't tell."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from looking import assert_nothing_is_cut_off, texts_of
from scipy.stats import multivariate_normal, norm, spearmanr

from gradprobe.analysis.inputs import about_study, open_dumps
from gradprobe.analysis.jackknife import interval_of
from gradprobe.analysis.tokens import logit_norm
from gradprobe.exp1.measure import Exp1Settings, measure_dumps
from gradprobe.exp1.proxies import ENTROPY, LOGIT_NORM, SURPRISAL, agreement
from gradprobe.exp1.summary import tables_of
from gradprobe.figures.exp1 import draw_exp1
from gradprobe.model.softmax import Softmax

FEW = Exp1Settings(halves=20, matched=2, ceiling=2, null=2)


def clustered(
    rng, n_prompts: int = 20, of_prompt: int = 25, r: float = 0.8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, score and prompt of rows of standard normal distribution, correlated by r within and between prompts."""
    of_prompts, own = rng.standard_normal((2, n_prompts, 1)), rng.standard_normal((2, n_prompts, of_prompt))
    first, second = np.sqrt(0.2) * of_prompts + np.sqrt(0.8) * own
    score = r * first + np.sqrt(1 - r * r) * second
    return first.ravel(), score.ravel(), np.repeat(np.arange(n_prompts), of_prompt)


def test_rank_correlations_and_overlaps_are_those_of_plain_loops():
    truth, score, prompt = clustered(np.random.default_rng(0))
    prompt = np.minimum(prompt, 17)  # of another size than others
    tied = np.round(score)
    found, of_ties = (agreement(truth, values, 7 * prompt) for values in (score, tied))
    for one, values in ((found, score), (of_ties, tied)):
        without = [spearmanr(truth[prompt != p], values[prompt != p]).statistic for p in range(18)]
        stack = np.array([spearmanr(truth, values).statistic, *without])
        assert one.rank_correlation.value == pytest.approx(stack[0], abs=1e-12)
        assert np.ptp(one.rank_correlation.ci95) == pytest.approx(np.ptp(interval_of(stack)), rel=0.06)
    highest = [set(np.argsort(values)[-100:].tolist()) for values in (truth, score)]
    assert found.top_overlap.value == pytest.approx(len(highest[0] & highest[1]) / 100)
    places = 100 - np.sum(tied > 1)  # left for those that are 1, of whom each gets as much of one as another
    at_edge = np.isin(np.arange(500), list(highest[0])) & (tied == 1)
    expected = np.sum(np.isin(np.flatnonzero(tied > 1), list(highest[0]))) + at_edge.sum() * places / np.sum(tied == 1)
    assert 0 < places < np.sum(tied == 1)
    assert of_ties.top_overlap.value == pytest.approx(expected / 100)


def test_intervals_hold_the_truth_as_often_as_said_and_0_of_what_is_permuted():
    cut = norm.ppf(0.2)
    both = multivariate_normal.cdf([cut, cut], cov=[[1, 0.8], [0.8, 1]])
    truths = {"rank_correlation": 6 / np.pi * np.arcsin(0.4), "top_overlap": both / 0.2}
    inside = dict.fromkeys((*truths, "permuted"), 0)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth, score, prompt = clustered(rng)
        scores = score, truth**3, rng.permutation(score)
        found, itself, permuted = (agreement(truth, one, prompt) for one in scores)
        for name, value in truths.items():
            low, high = getattr(found, name).ci95
            inside[name] += low < value < high
        low, high = permuted.rank_correlation.ci95
        inside["permuted"] += low < 0 < high
        for one in asdict(itself).values():
            assert [one["value"], *one["ci95"]] == pytest.approx([1.0] * 3, abs=0.01)
    assert all(180 <= count <= 196 for count in inside.values()), inside


def test_the_length_in_the_logits_is_that_of_the_softmax_down_to_certain_tokens():
    logits = torch.randn(400, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += torch.linspace(0, 40, 400)
    softmax, ids = Softmax(logits), torch.zeros(400, dtype=torch.int64)
    ids[::7] = 3
    found = logit_norm(softmax.log_prob(ids).numpy(), softmax.sum_p2.numpy())
    expected = softmax.logit_norm(ids).numpy()
    told = softmax.not_drawn(ids).numpy() > 1e-5
    np.testing.assert_allclose(found[told], expected[told], rtol=1e-5)
    assert np.all(np.abs(np.log(found / expected)) < np.log(2) / 2 + 1e-9)
    assert told.sum() > 100 < (~told).sum()


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Two targets of a probe of 8 prompts, 3 rollouts each, that tell Σ π²; and the proxies of their 480 rows."""
    rng, names = np.random.default_rng(0), ["L1.mlp.down_proj.weight.r0", "L2.mlp.down_proj.weight.r0"]
    prompt, sample, bucket, _ = (axis.ravel() for axis in np.indices((8, 3, 5, 4)))
    surprisal, entropy, off = rng.exponential(size=480), (bucket + rng.random(480)) / 5, rng.random(480)
    pi = np.exp(-surprisal)
    sum_p2 = pi**2 + off * (1 - pi) ** 2
    root = tmp_path / "study"
    for target in names:
        grads = rng.standard_normal((480, 12)) * np.exp(rng.standard_normal((480, 1)))
        path = planted.write_dump(root / target, grads, bucket, prompt=prompt, sample=sample)
        lines = [json.loads(line) for line in (path / "meta.jsonl").read_text().splitlines()]
        for line in lines:
            row = line["row"]
            line |= {"pos": row % 20, "entropy": entropy[row], "logprob": -surprisal[row]}
        (path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rollouts = []
    for first in range(0, 480, 20):
        own, texts = slice(first, first + 20), dict.fromkeys(("problem_id", "response", "ground_truth"), "")
        numbers = {"entropies": entropy[own], "logprobs": -surprisal[own], "sum_p2": sum_p2[own]}
        ids = {"prompt_idx": first // 60, "sample_idx": first // 20 % 3}
        ids |= {"prompt_ids": [first // 60], "response_ids": [1] * 20}
        rollouts.append(ids | texts | {key: values.tolist() for key, values in numbers.items()} | {"correct": True})
    (root / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rollouts))
    (root / "settings.json").write_text(json.dumps({"targets": names}))
    return root, {SURPRISAL: 1 - pi, LOGIT_NORM: np.sqrt((1 + off) * (1 - pi) ** 2), ENTROPY: entropy}


def test_of_targets_the_first_is_audited_and_all_are_spread(study):
    dumps = open_dumps({"base": study[0]})
    found = measure_dumps(dumps, FEW)
    numbers, bucket = found.numbers["base"], dumps["base"][0].bin
    norms = [np.linalg.norm(dump.grads[np.arange(480)], axis=1) for dump in dumps["base"]]
    for group, kept in {"all": bucket >= 0, "4": bucket == 4, "0": bucket == 0}.items():
        for name, values in study[1].items():
            rhos = [spearmanr(values[kept], of_target[kept]).statistic for of_target in norms]
            assert numbers["proxies"][name][group]["rank_correlation"]["value"] == pytest.approx(rhos[0])
            if group != "0":
                assert numbers["replication"]["proxies"][name][group]["values"] == pytest.approx(rhos)
    summary = about_study(found.numbers, dumps, {"base": []})
    assert f"rank correlation of {ENTROPY}, bucket 4" in tables_of("base", summary["base"])[-1].text()
    figure = draw_exp1(summary, found.arrays)["exp1_norms.png"]
    assert_nothing_is_cut_off(figure)
    low, high = numbers["proxies"][SURPRISAL]["4"]["rank_correlation"]["ci95"]
    assert f"[{low:.3f}, {high:.3f}]".replace("-", "−") in texts_of(figure)


@pytest.mark.parametrize(("lacks", "missing"), [("sum_p2", [LOGIT_NORM]), ("logprob", [SURPRISAL, LOGIT_NORM])])
def test_what_an_older_dump_lacks_is_said_in_a_line_and_entropy_is_audited_all_the_same(study, lacks, missing):
    file = study[0] / "rollouts.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"sum_p2": []}) + "\n" for line in lines))
    dump = open_dumps({"old": study[0]})["old"][0]
    dumps = {"old": [replace(dump, logprob=None) if lacks == "logprob" else dump]}
    found = measure_dumps(dumps, FEW)
    proxies = found.numbers["old"]["proxies"]
    assert [name for name, groups in proxies.items() if groups is None] == missing
    assert proxies[ENTROPY]["all"]["rank_correlation"]["ci95"] is not None
    summary = about_study(found.numbers, dumps, {"old": []})
    assert f"{'; '.join(missing)}: can't tell, needs `logprob`" in tables_of("old", summary["old"])[-1].text()
    assert_nothing_is_cut_off(draw_exp1(summary, found.arrays)["exp1_norms.png"])
