"""Sampling is from the full softmax, whatever the checkpoint's generation config says; scores are the policy's."""

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import END_OF_TEXT, IM_END, VOCAB_SIZE, tiny_model

from gradprobe.common.errors import InputError
from gradprobe.model.checkpoint import load_checkpoint
from gradprobe.rollouts import sample as sampling_module
from gradprobe.rollouts.sample import Sampling, StopText, rollout_uniforms, sample_from, sample_responses
from gradprobe.rollouts.score import score_block, score_responses

CPU = torch.device("cpu")


def sample(model, prompts, n_samples, max_new_tokens, temperature=1.0, seed=0, max_rows=256, **ends):
    """All responses, [prompt][sample][token]."""
    sampling = Sampling(n_samples, max_new_tokens, temperature, **ends)
    uniforms = lambda p, s: rollout_uniforms(seed, p, s, max_new_tokens)  # noqa: E731
    batches = sample_responses(model, prompts, uniforms, sampling, max_rows)
    return [samples for batch in batches for samples in batch]


def chi_square_p(model, prompt: list[int], responses: list[list[int]], temperature: float) -> float:
    """p-value of the tokens of all responses against the teacher-forced softmax.

    At every step the vocabulary is split into ten groups by probability rank, the expected counts are the groups'
    probabilities summed over steps.
    """
    n = len(responses[0])
    ids = torch.tensor([prompt + response for response in responses])
    logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].double() / temperature
    probabilities = torch.softmax(logits, -1).reshape(-1, VOCAB_SIZE)
    ranks = probabilities.argsort(-1, descending=True).argsort(-1)
    groups = torch.searchsorted(torch.tensor([0, 1, 2, 3, 5, 8, 13, 25, 60, 120]), ranks, right=True) - 1
    expected = torch.zeros(len(groups), 10, dtype=torch.float64).scatter_add_(1, groups, probabilities).sum(0)
    drawn = groups.gather(1, torch.tensor(responses).reshape(len(responses) * n, 1))[:, 0]
    observed = torch.bincount(drawn, minlength=10)
    return stats.chisquare(observed.numpy(), expected.numpy()).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generation_config_does_not_leak_into_sampling(checkpoint_dir, temperature):
    model = load_checkpoint(str(checkpoint_dir), CPU, torch.float32).model
    assert model.generation_config.top_k == 1
    assert model.generation_config.repetition_penalty == 2.0
    prompt = [10, 20, 30]
    (responses,) = sample(model, [prompt], 800, 6, temperature, max_rows=800)
    assert chi_square_p(model, prompt, responses, temperature) > 0.001
    # The same test has the power to see another temperature, and what a top-k of 50 would cut off.
    assert chi_square_p(model, prompt, responses, temperature * 1.1) < 0.001
    (other,) = sample(model, [prompt], 800, 6, temperature * 1.1, max_rows=800)
    assert chi_square_p(model, prompt, other, temperature) < 0.001


def test_first_token_frequencies_match_every_token_s_probability():
    model = tiny_model(3)
    (responses,) = sample(model, [[1, 2]], 20_000, 1, max_rows=20_000)
    observed = np.bincount([response[0] for response in responses], minlength=VOCAB_SIZE)
    expected = 20_000 * torch.softmax(model(input_ids=torch.tensor([[1, 2]])).logits[0, -1].double(), -1).numpy()
    rare = expected < 5
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
    assert stats.chisquare(*pooled).pvalue > 0.001


def test_inverse_cdf_never_draws_what_has_no_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    u = torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert sample_from(logits, u, 1.0)[0].tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("vocab_size", [3, 256, 1000])
def test_inverse_cdf_by_blocks_draws_what_a_float64_table_draws(vocab_size):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2000, vocab_size, generator=generator)
    u = torch.rand(2000, generator=generator, dtype=torch.float64)
    table = torch.softmax(logits / 0.7, -1).double().cumsum(-1)
    table /= table[:, -1:].clone()
    drawn, _ = sample_from(logits, u, 0.7)
    above = table.gather(1, drawn[:, None])[:, 0]
    below = torch.where(drawn > 0, table.gather(1, (drawn - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert ((below - 1e-6 <= u) & (u < above + 1e-6)).all()
    exact = torch.searchsorted(table, u[:, None], right=True)[:, 0]
    assert (drawn != exact).sum() <= 1


def test_logits_that_are_no_distribution_are_an_error_not_a_token(monkeypatch):
    model = tiny_model(3)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    for keeps_apart in (True, False):
        monkeypatch.setattr(sampling_module, "keeps_tokens_apart", lambda model, found=keeps_apart: found)
        with pytest.raises(InputError, match="not finite"):
            sample(model, [[1, 2]], 2, 3)


def test_a_rollout_does_not_depend_on_the_batch_around_it():
    model = tiny_model(3)
    prompts = [[1, 2], [3], [4, 5, 6, 7, 8], [9, 10, 11]]
    ends = frozenset(range(0, VOCAB_SIZE, 9))
    together = sample(model, prompts, 6, 20, end_ids=ends, max_rows=100)
    assert together == sample(model, prompts, 6, 20, end_ids=ends, max_rows=6)
    assert len({len(response) for samples in together for response in samples}) > 3
    assert together != sample(model, prompts, 6, 20, end_ids=ends, max_rows=100, seed=1)


@pytest.mark.parametrize("unseen", [1, 5])
@pytest.mark.parametrize("stop", [None, StopText("ab", lambda ids: "".join("abcde"[i % 5] for i in ids))])
def test_a_rollout_among_others_that_end_is_as_it_would_be_alone(unseen, stop, monkeypatch):
    model, ends = tiny_model(3), frozenset(range(0, VOCAB_SIZE, 9))
    prompts = [[1, 2], [3], [4, 5, 6, 7, 8, 9, 10, 11], [9, 10, 11], [1]]
    alone = sample(model, prompts, 6, 30, end_ids=ends, max_rows=1, stop=stop, context=36)
    monkeypatch.setitem(sampling_module.STEPS_UNSEEN, "cpu", unseen)
    # What the cache was not yet given may hold anything.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, torch.nan))
    assert sample(model, prompts, 6, 30, end_ids=ends, stop=stop, context=36) == alone


def test_responses_end_with_the_first_end_of_sequence_id(checkpoint_dir):
    checkpoint = load_checkpoint(str(checkpoint_dir), CPU, torch.float32)
    assert checkpoint.end_ids == {END_OF_TEXT, IM_END}
    ends = frozenset(range(0, VOCAB_SIZE, 9))
    responses = [r for samples in sample(checkpoint.model, [[1], [2, 3]], 50, 12, end_ids=ends) for r in samples]
    for response in responses:
        assert not ends & set(response[:-1])
        assert response[-1] in ends or len(response) == 12
    assert {len(response) < 12 for response in responses} == {True, False}


def test_a_stop_text_ends_a_response_and_changes_no_token_before():
    def decode(ids):
        return "".join("abcde"[i % 5] for i in ids)

    model, prompts = tiny_model(3), [[1], [2, 3]]
    whole, stopped = (
        [response for of_prompt in sample(model, prompts, 50, 12, stop=stop) for response in of_prompt]
        for stop in (None, StopText("ab", decode))
    )
    for before, after in zip(whole, stopped, strict=True):
        at = decode(before).find("ab")
        assert after == (before if at < 0 else before[: at + 2])
    assert {len(response) < 12 for response in stopped} == {True, False}


def test_responses_end_where_the_context_is_full():
    prompts = [[1, 2], [1, 2, 3, 4, 5]]
    short, long = sample(tiny_model(3), prompts, 2, 12, context=10)
    assert {len(response) for response in short} == {8}
    assert {len(response) for response in long} == {5}
    unbounded = sample(tiny_model(3), prompts, 2, 12)
    assert [response[:8] for response in unbounded[0]] == short


def test_scores_are_those_of_the_full_softmax_at_temperature_1():
    model = tiny_model(6)
    prompts = [[1, 2, 3], [4], [5, 6]]
    responses = [[7, 8], [9, 10, 11, 12, 13], []]
    scores = {}
    for batch in score_responses(model, prompts, responses, batch_tokens=12):
        scores.update(batch)
    assert sorted(scores) == [0, 1, 2]
    exact = tiny_model(6, torch.float64)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        entropies, logprobs, tail_mass, logit_norms, sum_p2 = scores[i]
        assert len(entropies) == len(logprobs) == len(response)
        logits = exact(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits[: len(response)], -1)
        np.testing.assert_allclose(entropies, -(expected.exp() * expected).sum(-1), rtol=1e-4)
        picked = expected[torch.arange(len(response)), torch.tensor(response, dtype=torch.long)]
        np.testing.assert_allclose(logprobs, picked, rtol=1e-4)
        np.testing.assert_allclose(tail_mass, 1 - expected.exp().max(-1).values, rtol=1e-4)
        np.testing.assert_allclose(sum_p2, (expected.exp() ** 2).sum(-1), rtol=1e-4)
        onehot = torch.nn.functional.one_hot(torch.tensor(response, dtype=torch.long), expected.shape[-1])
        np.testing.assert_allclose(logit_norms, (onehot - expected.exp()).norm(dim=-1), rtol=1e-4)


def test_tiny_tails_are_exact_where_the_softmax_rounds_to_1():
    logits = torch.zeros(3, 50)
    logits[:, 7] = torch.tensor([25.0, 40.0, 80.0])
    _, _, tail_mass, logit_norms, _ = score_block(logits, torch.tensor([7, 7, 7]))
    exact = 49 * np.exp(-logits[:, 7].double().numpy())
    np.testing.assert_allclose(tail_mass, exact / (1 + exact), rtol=1e-6)
    np.testing.assert_allclose(logit_norms, exact * np.sqrt(1 + 1 / 49), rtol=1e-4, atol=1e-30)
