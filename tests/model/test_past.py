"""What is kept of earlier tokens: decoders whose cache is of another kind, and lengths that change what was kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from architectures import COMMON, LONGROPE, LONGROPE_LENGTH, VOCAB_SIZE, tiny_of_family

from gradprobe.common.errors import InputError
from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.targets import Target
from gradprobe.model.past import keeps_tokens_apart, length_limit
from gradprobe.rollouts.sample import Sampling, StopText, rollout_uniforms, sample_from, sample_responses
from gradprobe.rollouts.score import score_responses

PROMPT = list(range(3, 13))


def sampled(model, prompts, sampling, max_rows=256) -> list[list[list[int]]]:
    uniforms = lambda p, s: rollout_uniforms(1, p, s, sampling.max_new_tokens)  # noqa: E731
    return [samples for batch in sample_responses(model, prompts, uniforms, sampling, max_rows) for samples in batch]


def logprobs_of(model, prompts, responses) -> list[np.ndarray]:
    scores = dict(of for batch in score_responses(model, prompts, responses, 1000) for of in batch.items())
    return [scores[i].logprobs for i in range(len(prompts))]


@pytest.mark.parametrize("way", ["sampling", "scoring", "gradients"])
def test_longrope_is_refused_where_a_sequence_could_pass_its_threshold(way):
    model = tiny_of_family("phi3_longrope", torch.float32)
    short, longer = list(range(3, 3 + 6)), list(range(3, 3 + LONGROPE_LENGTH - len(PROMPT) + 1))
    # What it is refused for: beside a longer row the short one is another.
    beside, alone = (model(input_ids=torch.tensor([PROMPT + short + [0] * n])).logits[0, 10] for n in (11, 0))
    assert (beside - alone).abs().max() > 0.01
    run = {
        "sampling": lambda response: sampled(model, [PROMPT], Sampling(2, len(response))),
        "scoring": lambda response: logprobs_of(model, [PROMPT] * 2, [short, response]),
        "gradients": lambda response: list(
            GradientEngine(model, [Target(0, "mlp.down_proj.weight", 0)]).batches(
                [PROMPT] * 2, [short, [*response, 5]], [np.arange(3), np.array([len(response)])], 1000
            )
        ),
    }[way]
    run(longer[:-1])
    with pytest.raises(InputError, match=f"27 tokens with the prompt, .* {LONGROPE_LENGTH} .longrope") as refused:
        run(longer)
    assert len(refused.value.problems) == 1


def test_limits_of_rotary_embeddings_that_hang_on_length():
    def limit_of(**config):
        return length_limit(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, **config})))

    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert limit_of() is None
    assert limit_of(rope_parameters={**dynamic, "rope_type": "linear"}) is None
    assert limit_of(rope_parameters=dynamic)[0] == 64
    assert limit_of(rope_parameters=LONGROPE["rope_parameters"] | {"original_max_position_embeddings": 9})[0] == 9


@pytest.mark.parametrize("family", ["lfm2_hybrid", "mamba"])
def test_states_of_the_model_s_own_cache_sample_what_a_full_pass_draws(family):
    """In whatever company; with end ids, a stop text, and a bound of the context."""
    model = tiny_of_family(family, torch.float32)
    assert not keeps_tokens_apart(model)
    sampling = Sampling(5, 12, 0.9, frozenset(range(3, VOCAB_SIZE, 9)), context=14)
    prompts = [PROMPT[:3], PROMPT[4:9]]
    longest = max(sampled(model, prompts, sampling)[0], key=len)
    n = next(n for n in range(2, len(longest)) if longest[n - 1] not in longest[: n - 1])
    stop = StopText(f"<{longest[n - 1]}>", lambda ids: "".join(f"<{i}>" for i in ids))
    sampling = replace(sampling, stop=stop)
    found = sampled(model, prompts, sampling)
    assert found == sampled(model, prompts, sampling, max_rows=2)
    n_whole = 0
    for p, samples in enumerate(found):
        for s, response in enumerate(samples):
            logits = model(input_ids=torch.tensor([prompts[p] + response])).logits[0, len(prompts[p]) - 1 : -1]
            u = torch.from_numpy(rollout_uniforms(1, p, s, 12)[: len(response)])
            assert sample_from(logits, u, 0.9)[0].tolist() == response
            room = sampling.room_after(prompts[p])
            assert len(response) == sampling.n_until_over(response)
            assert len(response) == room or sampling.ends(response, len(response))
            n_whole += len(response) == room
    assert 0 < n_whole < 10
    assert longest[:n] in found[0]


REFUSED = {
    "Rwkv": {"attention_hidden_size": 16, "context_length": 64},
    "RecurrentGemma": {"lru_width": 16, "head_dim": 4, "attention_window_size": 8},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_decoder_without_a_cache_is_refused_before_a_token_is_drawn_and_scored_all_the_same(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **REFUSED[kind]})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    n_drawn = []
    draws = lambda p, s: n_drawn.append(p) or np.zeros(4)  # noqa: E731
    with pytest.raises(InputError, match="hands on no cache.*`rollouts`, or .*`sampler` openai"):
        list(sample_responses(model, [PROMPT], draws, Sampling(2, 4)))
    responses = [[5, 6, 7], [9], [4, 8, 3, 11]]
    for response, found in zip(responses, logprobs_of(model, [PROMPT] * 3, responses), strict=True):
        logits = model(input_ids=torch.tensor([PROMPT + response])).logits[0, len(PROMPT) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
