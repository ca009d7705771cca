"""Tiny random checkpoints, and the oracle: the slow, obviously right gradient."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

N_BYTES = 256
END_OF_TEXT, IM_END = N_BYTES, N_BYTES + 1
VOCAB_SIZE = 260  # two ids more than the tokenizer knows, as in real checkpoints
TINY = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


class Float64Throughout(TorchFunctionMode):
    """Inside, what a float64 model of transformers would round to float32 (norms, eager attention) stays float64.

    Else results differ by float32's rounding wherever batches of other shapes add up in another order.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        is_wide = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        is_cast = func in (torch.Tensor.to, torch.Tensor.type) and torch.float32 in args[1:]
        if is_wide and (func is torch.Tensor.float or is_cast):
            return args[0]
        if is_wide and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def tiny_model(seed: int, dtype: torch.dtype = torch.float32, **config) -> Qwen2ForCausalLM:
    """A frozen random Qwen2; wide weights in its head make the softmax uneven."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**{**TINY, **config}))
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_checkpoint(directory: Path, seed: int) -> Path:
    """Save a tiny model with a byte-level tokenizer of Qwen2's kind and a generation config that must not leak in."""
    model = tiny_model(seed)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, repetition_penalty=2.0, eos_token_id=[IM_END, END_OF_TEXT]
    )
    model.save_pretrained(directory)
    byte_words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(byte_words)} | {"<|endoftext|>": END_OF_TEXT},
        merges=[],
        additional_special_tokens=["<|im_end|>"],
        eos_token="<|im_end|>",
    )
    assert len(tokenizer) == IM_END + 1
    tokenizer.save_pretrained(directory)
    return directory


def plain_log_prob(logits: torch.Tensor, token: int) -> torch.Tensor:
    """log π of one word, [vocab] -> scalar; through the others, since float64 too rounds what is next to 1."""
    others = torch.cat([logits[:token], logits[token + 1 :]])
    return -torch.log1p(torch.exp(others - logits[token]).sum())


def oracle_gradient(model: torch.nn.Module, tokens: list[int], at: int, weight: str, row: int) -> torch.Tensor:
    """∇ of log π(tokens[at] | tokens before it) on one row of one weight, by the full weight's gradient.

    `weight` is stored (out, in); the row is picked afterwards.
    """
    parameter = dict(model.named_parameters())[weight]
    parameter.requires_grad_(True)
    logits = model(input_ids=torch.tensor([tokens])).logits[0, at - 1]
    gradient = torch.autograd.grad(plain_log_prob(logits, tokens[at]), parameter)[0][row]
    parameter.requires_grad_(False)
    return gradient


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; the expected vector must not vanish."""
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())
