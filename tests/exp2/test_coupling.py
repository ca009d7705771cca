"""Coupling by token against plain loops, planted coupling, and ids that mean nothing."""

from itertools import combinations

import numpy as np
import planted
import pytest

from gradprobe.analysis.bucket import rollout_codes
from gradprobe.analysis.jackknife import interval_of, ratio_of, stack_of_means
from gradprobe.exp2.coupling import KINDS, SAME_UNCERTAIN, Meetings, Tokens, meetings_of
from gradprobe.exp2.direction import cancellations, rollout_grams

N_BUCKETS, VOCABULARY = 2, 6


def plant(seed: int, coupling: float = 0.0, n_prompts: int = 20, n_rollouts: int = 5, dim: int = 60) -> dict:
    """Rows in random order: ids that go by prompt, rollout and certainty, norms and directions that go by these, too.

    `coupling` is the length of what tokens of one id share that the model is uncertain of, beside noise of length 1.
    """
    rng = np.random.default_rng([7, seed])
    prompt, sample, _ = (axis.ravel() for axis in np.indices((n_prompts, n_rollouts, 6)))
    kept = rng.permutation(np.flatnonzero(rng.random(len(prompt)) < 0.9))
    prompt, sample, n = prompt[kept], sample[kept], len(kept)
    right = rng.random((n_prompts, n_rollouts)) < rng.random((n_prompts, 1))
    correct, bucket, is_uncertain = right[prompt, sample], rng.integers(N_BUCKETS, size=n), rng.random(n) < 0.6
    liked = rng.dirichlet(np.ones(VOCABULARY), (2, n_prompts, n_rollouts)) + rng.dirichlet(
        np.full(VOCABULARY, 0.5), (1, n_prompts, 1)
    )
    chances = liked[is_uncertain.astype(int), prompt, sample] / 2
    token = (chances.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    shared = rng.standard_normal((n_prompts, 2, dim))[prompt, correct.astype(int)] / np.sqrt(dim)
    of_token = np.linalg.qr(rng.standard_normal((dim, VOCABULARY)))[0].T
    grads = rng.standard_normal((n, dim)) / np.sqrt(dim) + 0.3 * shared
    grads += coupling * is_uncertain[:, None] * of_token[token]
    grads *= np.exp(0.5 * rng.standard_normal(n) + is_uncertain + 0.5 * rng.standard_normal(n_prompts)[prompt])[:, None]
    tokens = Tokens(rollout_codes(prompt, sample), bucket, token, is_uncertain, correct)
    return {"grads": grads, "prompt": prompt, "tokens": tokens}


def measured(data: dict, n_draws: int = 199) -> Meetings:
    bucket = planted.bucket_of(data["grads"], prompt=data["prompt"], rollout=data["tokens"].rollout)
    return meetings_of(bucket, data["tokens"], N_BUCKETS, np.random.default_rng(0), n_draws)


def plain_pairs(data: dict, bucket: int | None) -> dict:
    """Prompt -> [(kind, whether outcomes differ, id of both or None, |product|, cosine, part of C)], by loops."""
    found, tokens, grads = {}, data["tokens"], data["grads"]
    for code in sorted(set(data["prompt"].tolist())):
        rows = [i for i in np.flatnonzero(data["prompt"] == code) if bucket in (None, tokens.bucket[i])]
        of_rollout = {r: [i for i in rows if tokens.rollout[i] == r] for r in set(tokens.rollout[rows].tolist())}
        energy = sum(np.sum(grads[own].mean(axis=0) ** 2) for own in of_rollout.values())
        is_mixed = len(set(tokens.correct[rows].tolist())) == 2
        pairs = found[code] = []
        for i, j in combinations(rows, 2):
            if tokens.rollout[i] != tokens.rollout[j]:
                is_same, differ = tokens.token[i] == tokens.token[j], tokens.correct[i] != tokens.correct[j]
                kind = KINDS[2 * (not is_same) + (not (tokens.is_uncertain[i] and tokens.is_uncertain[j]))]
                product = float(grads[i] @ grads[j])
                sizes = len(of_rollout[tokens.rollout[i]]) * len(of_rollout[tokens.rollout[j]])
                part = (-2 if differ else 2) * product / sizes / energy if is_mixed else None
                cosine = product / np.linalg.norm(grads[i]) / np.linalg.norm(grads[j])
                shared = int(tokens.token[i]) if is_same else None
                pairs.append((kind, bool(differ), shared, abs(product), cosine, part))
    return {code: pairs for code, pairs in found.items() if pairs}


@pytest.mark.parametrize("bucket", [0, 1, None])
def test_kinds_of_pairs_are_those_of_plain_loops(bucket: int | None):
    data = plant(0, 0.5)
    meetings, plain = measured(data), plain_pairs(data, bucket)
    found = meetings.all_tokens if bucket is None else meetings.by_bucket[bucket]
    everything = [pair for pairs in plain.values() for pair in pairs]
    total = np.array([sum(pair[3] for pair in pairs) for pairs in plain.values()])
    for kind, by_outcome in found.items():
        for outcome, one in by_outcome.items():
            asked = {"any_outcome": (False, True), "same_outcome": (False,), "different_outcome": (True,)}[outcome]
            own = [[pair for pair in pairs if pair[0] == kind and pair[1] in asked] for pairs in plain.values()]
            n, coupling, cosine = (np.array([sum(f(p) for p in pairs) for pairs in own]) for f in (
                lambda p: 1, lambda p: p[3], lambda p: p[4]
            ))  # fmt: skip
            assert one.n_pairs == n.sum() > 0
            assert one.share_of_pairs == pytest.approx(n.sum() / len(everything))
            share = ratio_of(stack_of_means(coupling), stack_of_means(total))
            assert one.share_of_coupling.value == pytest.approx(share.value)
            assert one.share_of_coupling.ci95 == pytest.approx(share.ci95)
            mean = ratio_of(stack_of_means(cosine), stack_of_means(n))
            assert (one.mean_cosine, one.mean_cosine_ci95) == (pytest.approx(mean.value), pytest.approx(mean.ci95))
            mixed = [code for code, pairs in plain.items() if pairs[0][5] is not None]
            parts = np.array([sum(p[5] for p in one) for code, one in zip(plain, own, strict=True) if code in mixed])
            assert one.part_of_c.value == pytest.approx(parts.mean())
            assert one.part_of_c.ci95 == pytest.approx(interval_of(stack_of_means(parts)))
            assert (one.null is None) == (kind != SAME_UNCERTAIN)


@pytest.mark.parametrize("bucket", [0, 1, None])
def test_the_parts_and_1_add_up_to_c(bucket: int | None):
    data = plant(3, 0.5)
    meetings, rows = measured(data), np.arange(len(data["prompt"]))
    found = meetings.all_tokens if bucket is None else meetings.by_bucket[bucket]
    rows = rows if bucket is None else np.flatnonzero(data["tokens"].bucket == bucket)
    grams = rollout_grams(
        planted.bucket_of(data["grads"], rows, data["prompt"], data["tokens"].rollout), data["tokens"].correct[rows]
    )
    c = cancellations(grams, np.random.default_rng(0), n_permutations=1)[0]
    assert 1 + sum(one["any_outcome"].part_of_c.value for one in found.values()) == pytest.approx(c.ratio, abs=1e-12)
    for one in found.values():
        parts = [one[outcome].part_of_c.value for outcome in ("same_outcome", "different_outcome")]
        assert one["any_outcome"].part_of_c.value == pytest.approx(sum(parts), abs=1e-12)


def test_dealing_ids_anew_keeps_every_rollout_s_ids_in_their_bucket():
    """Then a pair's expected coupling is the mean over the two rollouts' uncertain tokens of those buckets."""
    data = plant(1, 1.0, n_prompts=6)
    tokens, grads, expected, total = data["tokens"], data["grads"], 0.0, 0.0
    stratum = tokens.rollout * N_BUCKETS + tokens.bucket
    for i, j in combinations(range(len(grads)), 2):
        if data["prompt"][i] == data["prompt"][j] and tokens.rollout[i] != tokens.rollout[j]:
            total += abs(grads[i] @ grads[j])
            if tokens.token[i] == tokens.token[j] and tokens.is_uncertain[[i, j]].all():
                first, second = (
                    grads[tokens.is_uncertain & (stratum == stratum[k])] for k in (i, j)
                )
                expected += np.abs(first @ second.T).mean()
    null = measured(data, 9999).all_tokens[SAME_UNCERTAIN]["any_outcome"].null
    assert null.mean == pytest.approx(expected / total, rel=0.01)
    assert null.ci95[0] < null.mean < null.ci95[1]


def test_tokens_on_which_outcomes_meet_are_those_of_plain_loops():
    data = plant(2, 1.0)
    plain = plain_pairs(data, N_BUCKETS - 1)
    pairs = [pair for pairs in plain.values() for pair in pairs if pair[1]]
    sums = {token: sum(pair[3] for pair in pairs if pair[2] == token) for token in range(VOCABULARY)}
    found = measured(data).shared_tokens
    assert list(found) == sorted(sums, key=sums.get, reverse=True)
    n_mixed = len({code for code, pairs in plain.items() if pairs[0][5] is not None})
    for token, one in found.items():
        own = [pair for pair in pairs if pair[2] == token]
        assert (one.n_pairs, one.mean_cosine) == (len(own), pytest.approx(np.mean([pair[4] for pair in own])))
        assert one.share_of_coupling.value == pytest.approx(sums[token] / sum(pair[3] for pair in pairs))
        assert one.part_of_c.value == pytest.approx(sum(pair[5] for pair in own) / n_mixed)


def test_the_order_of_rows_and_their_scale_leave_what_is_no_draw():
    data = plant(4, 0.5)
    order = np.random.default_rng(0).permutation(len(data["prompt"]))
    moved = {key: data[key][order] for key in ("grads", "prompt")} | {"tokens": data["tokens"].only(order)}
    moved["grads"] *= 1e-12
    one, other = (measured(each).by_bucket[1][SAME_UNCERTAIN]["same_outcome"] for each in (data, moved))
    assert one.share_of_coupling.ci95 == pytest.approx(other.share_of_coupling.ci95)
    assert one.mean_cosine == pytest.approx(other.mean_cosine)


def test_planted_coupling_is_found_and_lies_in_its_interval():
    of_many = measured(plant(1000, 1.0, n_prompts=1500), 0).by_bucket[1][SAME_UNCERTAIN]["any_outcome"]
    truth, held = of_many.share_of_coupling.value, 0
    for seed in range(20):
        found = measured(plant(seed, 1.0, n_prompts=40)).by_bucket[1][SAME_UNCERTAIN]["any_outcome"]
        low, high = found.share_of_coupling.ci95
        held += low < truth < high
        assert found.null.p_value == 2 / 200
    assert held >= 17


def test_ids_that_mean_nothing_give_no_small_p():
    found = [measured(plant(seed), 99).all_tokens[SAME_UNCERTAIN]["any_outcome"].null.p_value for seed in range(60)]
    assert 0.0 < np.mean(np.array(found) < 0.2) < 0.35
    assert np.mean(np.array(found) < 0.05) <= 0.1
