#!/usr/bin/env python3
"""Every causal decoder that transformers knows, tiny and random: is it right, refused before sampling, or wrong?

    python benchmarks/sweep_decoders.py > table.md
    python benchmarks/sweep_decoders.py --only qwen2,phi3,mamba

Each is built from its own config with the common fields made small, in a process of its own with a time limit. Then
    sampling    each sampled token against what its uniform number draws from the model's own full pass
    scores      log π in padded batches, and behind shared prompts, against each rollout alone
    gradients   every linear map's, through random signs, against plain autograd
Refused is what the self-check after loading, or the functions themselves, stop before a token is drawn.
"""

import argparse
import inspect
import multiprocessing
import re
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gradprobe.common.errors import InputError, first_of, one_line, reason_of  # noqa: E402
from gradprobe.gradients.engine import GradientEngine  # noqa: E402
from gradprobe.gradients.targets import (  # noqa: E402
    ProjectedTarget,
    Projection,
    Weight,
    full_name,
    linears_of,
    signs,
)
from gradprobe.model.decoder import layer_list, linear_weights  # noqa: E402
from gradprobe.model.past import keeps_tokens_apart  # noqa: E402
from gradprobe.probe.self_check import refuse_unfit  # noqa: E402
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_from, sample_responses  # noqa: E402
from gradprobe.rollouts.score import score_responses  # noqa: E402

VOCAB = 64
PROJECTION = Projection(4, 4, 0)
RIGHT, REFUSED, WRONG, NOT_BUILT = VERDICTS = ("right", "refused", "WRONG", "not built")
LARGEST_ERROR = 1e-3
"""Of a gradient and of a log-prob, in float32: rounding gives 1e-5, a fault whole per cents."""
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "mamba_n_groups", "n_groups"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("encoder_layers", "num_mtp_layers"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 6),
    **{"qk_rope_head_dim": 8, "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_d_ssm": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "is_decoder": True},
    **{"initializer_range": 0.2, "init_std": 0.2, "original_max_position_embeddings": 16},
}
ROPE = ("rope_parameters", "rope_scaling")
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
HYBRID = ["conv", "full_attention"] * 2
VARIANTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "bloom": {"n_layer": 4},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * 4,
        "laurel_rank": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": HYBRID, "num_dense_layers": 1},
    "llama (dynamic)": {
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "phi3 (longrope)": {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    "phi3 (longrope unreached)": {"original_max_position_embeddings": 26, "rope_parameters": LONGROPE},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * 4},
    "xlstm": {"hidden_size": 128, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single architectures need besides; in parentheses, another kind of the one before."""


def small_config(name: str) -> Any:
    """The architecture's default config with the common fields made small."""
    kind = CONFIG_MAPPING[name.partition(" ")[0]]

    def value_of(config: Any, key: str) -> Any:
        try:
            return getattr(config, key, None)
        except Exception:  # of a value that differs between layers
            return None

    def shrunk(config: Any) -> dict[str, Any]:
        fixed = {key for key, of in inspect.getmembers(type(config)) if isinstance(of, property) and of.fset is None}
        options = {key: value for key, value in SMALL.items() if key not in fixed and value_of(config, key) is not None}
        if {"qk_rope_head_dim", "num_attention_heads"} <= options.keys():  # latent attention: as many keys as queries
            options["num_key_value_heads"] = options["num_attention_heads"]
        for key in ROPE:
            rope = value_of(config, key)
            if isinstance(rope, dict) and "original_max_position_embeddings" in rope:
                options[key] = {**rope, "original_max_position_embeddings": 16}
        return options

    default = kind()
    options = shrunk(default)
    text = default.get_text_config()
    if text is not default:
        inner = next(key for key, value in vars(default).items() if value is text)
        options[inner] = {**shrunk(text), "model_type": text.model_type}
    return kind(**{**options, **VARIANTS.get(name, {})})


def small_model(name: str) -> torch.nn.Module:
    """A frozen random model; biases and norms are moved off 0 and 1, which would hide mistakes."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif not parameter.isfinite().all() or parameter.std() > 1 or parameter.std() < 0.02:
                parameter.normal_(0, 0.2)
    return model.float().eval().requires_grad_(False)


def rollouts_of(n_prompts: int, n_samples: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts, each several times, and of responses, none longer than 24 together."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, 3 + 3 * (p % 4)).tolist() for p in range(n_prompts) for _ in range(n_samples)]
    return prompts, [rng.integers(3, VOCAB, 1 + (5 * i) % 12).tolist() for i in range(len(prompts))]


def all_maps(model: torch.nn.Module) -> tuple[ProjectedTarget, list[str]]:
    """(all linear maps together that can be targets, names of those that are refused)."""
    prompts, responses = rollouts_of(2, 1)
    layers, refused = layer_list(model)[1], []

    def can_be(weights: tuple[Weight, ...]) -> bool:
        target = ProjectedTarget("maps", weights, PROJECTION)
        try:
            list(GradientEngine(model, [target]).batches(prompts, responses, [np.arange(1)] * 2, 60))
        except InputError:
            refused.extend(suffix for _, suffix in weights)
        return not refused

    weights = tuple((n, suffix) for n in range(len(layers)) for suffix in linear_weights(layers[n]))
    if not can_be(weights):
        refused.clear()
        for weight in weights:
            can_be((weight,))
        weights = tuple(weight for weight in weights if weight[1] not in refused)
    if not weights:
        raise InputError("no linear map of it can be a target")
    return ProjectedTarget("maps", weights, PROJECTION), sorted(set(refused))


def error_of(model: torch.nn.Module, targets: list[ProjectedTarget]) -> tuple[float, bool]:
    """(largest relative error against plain autograd, rollout by rollout and without padding, by hand?)."""
    prompts, responses = rollouts_of(4, 1)
    positions = [np.unique([0, len(r) // 2, len(r) - 1]) for r in responses]
    engine, found = GradientEngine(model, targets), {}
    places = [(i, k) for i, of_rollout in enumerate(positions) for k in range(len(of_rollout))]
    for _, rows, (of,) in engine.batches(prompts, responses, positions, 60):
        found |= {places[row]: gradient for row, gradient in zip(rows, of, strict=True)}
    linears = linears_of(model, targets)
    matrices = [signs(targets[0].projection, full_name(model, weight), of) for weight, of in linears.items()]
    weights, expected = [linear.weight.requires_grad_() for linear in linears.values()], {}
    for i, k in found:
        ids, token = prompts[i] + responses[i], len(prompts[i]) + int(positions[i][k])
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, token - 1], -1)
        wholes = torch.autograd.grad(log_probs[ids[token]], weights, materialize_grads=True, allow_unused=True)
        wholes = [w.T if isinstance(of, Conv1D) else w for w, of in zip(wholes, linears.values(), strict=True)]
        parts = [torch.from_numpy(p) @ w @ torch.from_numpy(q).T for w, (p, q) in zip(wholes, matrices, strict=True)]
        expected[i, k] = torch.stack(parts).flatten(1)  # [maps, 16]
    for weight in weights:
        weight.requires_grad_(False)
    truth = torch.stack([expected[key] for key in found])  # [gradients, maps, 16]
    errors = (torch.stack(list(found.values())).view_as(truth) - truth).norm(dim=-1)
    # A gradient that is all but zero (of a token that no expert saw) is held against the map's longest.
    lengths = truth.norm(dim=-1).maximum(1e-2 * truth.norm(dim=-1).amax(0)).clamp(min=1e-12)
    return float((errors / lengths).nan_to_num(nan=torch.inf).max()), engine._blocks is not None


def logits_alone(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[n_tokens, vocab] of one rollout, in one full pass without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def worst_score(model: torch.nn.Module) -> float:
    """The largest difference of a log-prob in batches, and behind shared prompts, from that alone, nats."""
    prompts, responses = rollouts_of(4, 4)
    worst = 0.0
    for batch in score_responses(model, prompts, responses, 150):
        for i, scores in batch.items():
            log_probs = torch.log_softmax(logits_alone(model, prompts[i], responses[i]), -1)
            picked = log_probs.gather(-1, torch.tensor(responses[i])[:, None])[:, 0].numpy()
            worst = max(worst, float(np.abs(picked - scores.logprobs).max()))
    return worst


def wrong_tokens(model: torch.nn.Module) -> tuple[int, int]:
    """(sampled tokens that u does not draw from a full pass, sampled tokens)."""
    n_steps, ends = 14, frozenset(range(3, VOCAB, 9))
    prompts, _ = rollouts_of(4, 1)
    uniforms = lambda p, s: rollout_uniforms(1, p, s, n_steps)  # noqa: E731
    batches = sample_responses(model, prompts, uniforms, Sampling(3, n_steps, 1.0, ends))
    wrong = total = 0
    for p, samples in enumerate(samples for batch in batches for samples in batch):
        for s, response in enumerate(samples):
            u = torch.from_numpy(uniforms(p, s)[: len(response)])
            drawn = sample_from(logits_alone(model, prompts[p], response), u, 1.0)[0].tolist()
            wrong += sum(a != b for a, b in zip(drawn, response, strict=True))
            total += len(response)
    return wrong, total


def judged(name: str) -> tuple[str, str]:
    """(verdict, what is to be said of it) of one architecture."""
    try:
        model = small_model(name)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
        if logits.shape[1:] != (3, VOCAB) or not logits.isfinite().all():
            return NOT_BUILT, f"logits of shape {tuple(logits.shape)}, or not finite"
    except Exception as error:  # whatever a config made small leads to
        return NOT_BUILT, reason_of(error, 100)
    try:
        sampler = "sampled side by side" if keeps_tokens_apart(model) else "sampled prompt by prompt"
        target, refused = all_maps(model)
        try:
            refuse_unfit(GradientEngine(model, [target]), name, is_sampled=True)
            wrong, total = wrong_tokens(model)
            if wrong:
                return WRONG, f"{wrong} of {total} sampled tokens"
        except InputError:
            sampler = "not sampled"
            refuse_unfit(GradientEngine(model, [target]), name, is_sampled=False)
        score = worst_score(model)
        if not score < LARGEST_ERROR:
            return WRONG, f"log π by {score:.1e} nats"
        error, by_hand = error_of(model, [target])
        if not error < LARGEST_ERROR:
            return WRONG, f"gradients by {error:.1e}"
    except InputError as refusal:
        return REFUSED, reason_alone(name, str(refusal))
    except Exception as error:  # a traceback is what is looked for
        return WRONG, reason_of(error, 100)
    note = f" (no targets: {first_of(refused)})" if refused else ""
    return RIGHT, f"{'by hand' if by_hand else 'by autograd'}, {sampler}{note}"


def reason_alone(name: str, refusal: str) -> str:
    """What many share of a refusal: without the architecture's names and figures."""
    without_names = re.sub(r"\b\w+(ForCausalLM|Decoder)\b", "it", refusal.replace(f"`model_path` {name}: ", ""))
    plain = re.sub(r"\b\d+ (?=layers|tokens)", "", one_line(without_names))
    return re.split(r": by |, in units| \(a quant|; keep", plain)[0].removeprefix("it: ")


def tell(pipe: Connection, name: str) -> None:
    """Judge one architecture in a process of its own."""
    pipe.send(judged(name))


def in_time(name: str, seconds: float) -> tuple[str, str]:
    """`judged`, or that it took too long."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(its, name))
    process.start()
    its.close()
    try:
        return mine.recv() if mine.poll(seconds) else (NOT_BUILT, f"not done within {seconds:.0f} s")
    except EOFError:
        return NOT_BUILT, "its process died"
    finally:
        process.kill()
        process.join()


def table(verdicts: dict[str, tuple[str, str]]) -> str:
    """Counts, and a row for each verdict and what is said of it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, verdict in verdicts.items():
        groups.setdefault(verdict, []).append(name)
    counts = [f"{sum(v == verdict for v, _ in verdicts.values())} {verdict}" for verdict in VERDICTS]
    lines = [", ".join(counts) + f" of {len(verdicts)}.", "", "| verdict | what of it | | architectures |"]
    lines.append("| --- | --- | --- | --- |")
    for verdict, said in sorted(groups, key=lambda g: (VERDICTS.index(g[0]), -len(groups[g]), g[1])):
        names = groups[verdict, said]
        lines.append(f"| {verdict} | {said.replace('|', '/')} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Judge them all; exit 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="these model types, separated by commas")
    parser.add_argument("--seconds", type=float, default=90, help="at most, for each")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    judged("qwen2")  # what is imported at first use is so before the forks
    names = args.only.split(",") if args.only else sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS})
    verdicts = {}
    for name in names:
        verdicts[name] = in_time(name, args.seconds)
        print(name, *verdicts[name], sep=": ", file=sys.stderr, flush=True)
    print(table(verdicts), end="")
    return int(any(verdict == WRONG for verdict, _ in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
