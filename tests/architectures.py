"""A tiny random model of each decoder family that the engine claims to serve."""

import torch
import transformers

from gradprobe.model.decoder import decoder_of

VOCAB_SIZE = 60
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 5}
LONGROPE_LENGTH = 26  # what the tests' rollouts reach at most
LONGROPE = {
    "original_max_position_embeddings": LONGROPE_LENGTH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [3.0, 9.0],
    },
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

# Family: config class, model class, what its config needs besides, and linear weights that can be targets.
FAMILIES = {
    "qwen2": ("Qwen2", {}, ["mlp.down_proj.weight", "self_attn.q_proj.weight"]),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}, ["mlp.down_proj.weight"]),
    "qwen2_sliding": (
        "Qwen2",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
        ["mlp.down_proj.weight", "self_attn.q_proj.weight"],
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}, ["mlp.down_proj.weight", "self_attn.k_proj.weight"]),
    "llama": ("Llama", {}, ["mlp.down_proj.weight", "self_attn.o_proj.weight"]),
    "mistral_sliding": ("Mistral", WINDOW, ["mlp.down_proj.weight", "self_attn.v_proj.weight"]),
    "gemma2_softcap": (
        "Gemma2",
        {**WINDOW, "head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
        ["mlp.down_proj.weight", "mlp.gate_proj.weight"],
    ),
    "gemma3": (
        "Gemma3Text:Gemma3ForCausalLM",
        {**WINDOW, "head_dim": 8},
        ["mlp.down_proj.weight", "self_attn.q_proj.weight"],
    ),
    "olmo2": ("Olmo2", {}, ["mlp.down_proj.weight", "self_attn.q_proj.weight"]),
    "phi3_fused": ("Phi3", {}, ["mlp.gate_up_proj.weight", "self_attn.qkv_proj.weight", "mlp.down_proj.weight"]),
    "opt": (
        "OPT",
        {"ffn_dim": 24, "word_embed_proj_dim": 16},
        ["fc2.weight", "self_attn.q_proj.weight"],
    ),
    "llama4_text": (
        "Llama4Text:Llama4ForCausalLM",
        {"head_dim": 8, "intermediate_size_mlp": 24, "moe_layers": []},
        ["feed_forward.down_proj.weight", "self_attn.q_proj.weight"],
    ),
    "gpt_neox": ("GPTNeoX", {}, ["mlp.dense_4h_to_h.weight", "attention.query_key_value.weight"]),
    "gpt2_conv1d": ("GPT2:GPT2LMHeadModel", {"n_inner": 24}, ["mlp.c_proj.weight", "attn.c_attn.weight"]),
    "falcon": (
        "Falcon",
        {"ffn_hidden_size": 24},
        ["mlp.dense_4h_to_h.weight", "self_attention.query_key_value.weight"],
    ),
    "starcoder2": ("Starcoder2", WINDOW, ["mlp.c_proj.weight", "self_attn.k_proj.weight"]),
    "ministral3_late_scale": (
        "Ministral3",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 9,  # behind the first few that blocks by hand are tried on
                "llama_4_scaling_beta": 0.5,
            },
        },
        ["mlp.down_proj.weight", "self_attn.q_proj.weight"],
    ),
    "gemma3n_runs_maps_twice": (
        "Gemma3nText:Gemma3nForCausalLM",
        {
            **WINDOW,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
            "altup_num_inputs": 4,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        ["mlp.down_proj.weight", "altup.modality_router.weight", "per_layer_projection.weight"],
    ),
    "phi3_longrope": ("Phi3", LONGROPE, ["mlp.down_proj.weight", "self_attn.qkv_proj.weight"]),
    "lfm2_hybrid": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        ["feed_forward.w2.weight"],
    ),
    "qwen3_next_hybrid": (
        "Qwen3Next",
        {
            **MIXTURE,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_expert_intermediate_size": 8,
            **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
        },
        ["mlp.shared_expert.down_proj.weight"],
    ),
    "mamba": ("Mamba", {"state_size": 4}, ["mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.out_proj.weight"]),
    "qwen2_moe": (
        "Qwen2Moe",
        {**MIXTURE, "shared_expert_intermediate_size": 8},
        ["mlp.shared_expert.down_proj.weight", "self_attn.q_proj.weight"],
    ),
    "deepseek_v3_latent": (
        "DeepseekV3",
        {
            **{"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "first_k_dense_replace": 1},
            **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "moe_intermediate_size": 8},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        },
        ["self_attn.kv_b_proj.weight", "self_attn.q_b_proj.weight"],
    ),
}


FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm", "final_layernorm")


def tiny_of_family(family: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A frozen random model of `family`."""
    classes, options, _ = FAMILIES[family]
    config_name, _, model_name = classes.partition(":")
    config = getattr(transformers, f"{config_name}Config")(**{**COMMON, **options})
    config._experts_implementation = "eager"  # the others of a mixture know no float64
    torch.manual_seed(0)
    model = getattr(transformers, model_name or f"{config_name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero and norms at one, which would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


SPREAD_OF_LOGITS = 45.0


def certain_of_family(family: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The same with a factor behind its final norm: it is as good as certain of most of its words."""
    model = tiny_of_family(family, torch.float64)
    if getattr(model.config, "final_logit_softcapping", None):
        model.config.final_logit_softcapping = 200.0  # else no word can be certain
    spread = model(input_ids=torch.arange(3, VOCAB_SIZE)[None]).logits.std()
    norm = next(m for name in FINAL_NORMS if (m := getattr(decoder_of(model), name, None)) is not None)
    norm.register_forward_hook(lambda module, args, output: output * (SPREAD_OF_LOGITS / float(spread)))
    return model.to(dtype)
