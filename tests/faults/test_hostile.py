"""Checkpoints that lie: each ends the probe with one line and exit status 2, in bounded time and memory, or is fine."""

import json
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_kills import Step, Zygote
from tiny import tiny_checkpoint, tiny_model

SMALL = "--num-prompts 3 --num-samples 2 --max-new-tokens 4 --device cpu --bins 2 --pos-per-bin-per-rollout 1 --layer 1"
SECONDS = 60.0
BYTES = 6 << 30
FINE = "exit status 0"
Spoil = Callable[[Path], object]

# What config.json and its companions say


def config(**changes: object) -> Spoil:
    """Change keys of config.json; None takes one away."""

    def spoil(checkpoint: Path) -> None:
        file = checkpoint / "config.json"
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


def in_file(name: str, **changes: object) -> Spoil:
    def spoil(checkpoint: Path) -> None:
        file = checkpoint / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def text_of_config(text: str) -> Spoil:
    return lambda checkpoint: (checkpoint / "config.json").write_text(text)


def twice(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    file.write_text(file.read_text().replace('"hidden_size": 16', '"hidden_size": 16, "hidden_size": 32', 1))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS: dict[str, tuple] = {
    "vocabulary above the embedding's": (config(vocab_size=300), "other shapes"),
    "vocabulary below the embedding's": (config(vocab_size=200), "--model-path"),
    "vocabulary below the tokenizer's, and the weights'": (
        lambda path: (
            tiny_model(0, vocab_size=16).save_pretrained(path),
            in_file("generation_config.json", eos_token_id=[3])(path),
        ),
        "vocabulary",
    ),
    "vocabulary 0": (config(vocab_size=0), "vocab_size"),
    "vocabulary negative": (config(vocab_size=-5), "vocab_size"),
    "vocabulary of 10^18": (config(vocab_size=10**18), "--model-path"),
    "heads that don't divide the key heads": (config(num_attention_heads=3), "--model-path"),
    "key heads 0": (config(num_key_value_heads=0), "num_key_value_heads"),
    "key heads negative": (config(num_key_value_heads=-2), "num_key_value_heads"),
    "heads of 10^9": (config(num_attention_heads=10**9), "--model-path"),
    "layers 0": (config(num_hidden_layers=0), "num_hidden_layers"),
    "layers negative": (config(num_hidden_layers=-3), "num_hidden_layers"),
    "layers of 10^9": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "layers of 10^9, nested": (config(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers"),
    "more layers than the file": (config(num_hidden_layers=5, layer_types=None), "lacks weights", "layers.3"),
    "fewer layers than the file": (config(num_hidden_layers=2, layer_types=None), "layers.2"),
    "hidden size of 2^20": (config(hidden_size=2**20), "hidden_size"),
    "hidden size 0": (config(hidden_size=0), "hidden_size"),
    "hidden size that is another": (config(hidden_size=32), "other shapes"),
    "head size lies": (config(head_dim=8), "other shapes"),
    "intermediate size lies": (config(intermediate_size=48), "other shapes", "mlp"),
    "intermediate size of 2^40": (config(intermediate_size=2**40), "--model-path"),
    "epsilon NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "epsilon infinite": (config(rms_norm_eps=float("inf")), "rms_norm_eps"),
    "epsilon negative": (config(rms_norm_eps=-1.0), "rms_norm_eps"),
    "epsilon a text": (config(rms_norm_eps="1e-6"), "rms_norm_eps"),
    "rope scaling is junk": (
        config(rope_scaling={"type": "spiral", "factor": "big"}, rope_parameters=None), "--model-path",
    ),
    "rope parameters are a number": (config(rope_parameters=7), "--model-path"),
    "rope theta NaN": (config(rope_parameters={**ROPE, "rope_theta": float("nan")}), "not finite"),
    "rope theta 0": (config(rope_parameters={**ROPE, "rope_theta": 0.0}), "not finite"),
    "tied to a head that is another": (config(tie_word_embeddings=True), FINE),
    "of another model's type": (config(model_type="gpt2"), "can't be a target"),
    "of an encoder's type": (config(model_type="vit"), "--model-path"),
    "model type is a list": (config(model_type=["qwen2"]), "--model-path"),
    "architectures of another model": (config(architectures=["BertForMaskedLM"]), FINE),
    "architectures a number": (config(architectures=7), FINE),
    "activation unheard of": (config(hidden_act="os.system"), "--model-path"),
    "end of sequence beyond the vocabulary": (in_file("generation_config.json", eos_token_id=10**6), "eos_token_id"),
    "end of sequence negative": (in_file("generation_config.json", eos_token_id=-1), "eos_token_id"),
    "end of sequence true": (in_file("generation_config.json", eos_token_id=True), "eos_token_id"),
    "padding negative": (config(pad_token_id=-1), FINE),
    "padding beyond the vocabulary": (config(pad_token_id=10**6), "--model-path"),
    "context 0": (config(max_position_embeddings=0), "max_position_embeddings"),
    "context negative": (config(max_position_embeddings=-1), "max_position_embeddings"),
    "layers a text": (config(num_hidden_layers="3"), "num_hidden_layers"),
    "layers a fraction": (config(num_hidden_layers=2.5), "num_hidden_layers"),
    "labels of 10^9": (config(num_labels=10**9), "num_labels"),
    "layer types of another number": (config(layer_types=["full_attention"] * 7), "--model-path"),
    "layer types unheard of": (config(layer_types=["no_attention"] * 3), "--model-path"),
    "deep": (text_of_config('{"a":' * 100_000), "--model-path"),
    "deep and whole": (
        text_of_config('{"model_type": "qwen2", "a":' + "[" * 90_000 + "]" * 90_000 + "}"), "--model-path",
    ),
    "an endless number": (text_of_config('{"model_type": "qwen2", "vocab_size": ' + "7" * 9000 + "}"), "--model-path"),
    "a key twice": (twice, "other shapes"),
    "a list": (text_of_config("[1]"), "--model-path"),
    "empty": (text_of_config(""), "--model-path"),
    "dtype is junk": (config(dtype="float99"), "--model-path"),
    "dtype is code": (config(dtype="__class__"), "--model-path"),
    "code of its own": (config(model_type="own", auto_map={"AutoConfig": "../../x.Config"}), "--model-path"),
    "quantised by nothing known": (config(quantization_config={"quant_method": "magic"}), FINE),
    "sliding window 0": (
        config(use_sliding_window=True, sliding_window=0, max_window_layers=0, layer_types=None), "sliding_window",
    ),
    "dropout of 7": (config(attention_dropout=7.0), FINE),
    "initialised NaN": (config(initializer_range=float("nan")), FINE),
    "escapes in its type": (config(model_type="\x1b[31mred\n"), "--model-path"),
}  # fmt: skip

# What the safetensors files say

DOWN = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"


def raw(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(checkpoint: Path) -> None:
        file = checkpoint / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return spoil


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def header(change: Callable[[dict], object]) -> Spoil:
    """Change the header in place, or put another for it."""

    def changed(content: bytes) -> bytes:
        (n,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + n])
        other = change(found)
        return framed(json.dumps(found if other is None else other).encode(), content[8 + n :])

    return raw(changed)


def tensor(**changes: object) -> Spoil:
    return header(lambda found: found[DOWN].update(changes))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(checkpoint: Path) -> None:
        found = load_file(checkpoint / "model.safetensors")
        change(found)
        save_file(found, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return spoil


def cast(dtype: torch.dtype) -> Spoil:
    return weights(lambda found: found.update({name: weight.to(dtype) for name, weight in found.items()}))


def index(content: object, name: str = "model-00001-of-00001.safetensors") -> Spoil:
    """The weights under a shard's name, and an index of that content."""

    def spoil(checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / name)
        (checkpoint / "model.safetensors.index.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )

    return spoil


def index_to(file: str) -> Spoil:
    def spoil(checkpoint: Path) -> None:
        names = load_file(checkpoint / "model.safetensors")
        index({"metadata": {}, "weight_map": dict.fromkeys(names, file)})(checkpoint)

    return spoil


def doubled_name(content: bytes) -> bytes:
    (n,) = struct.unpack("<Q", content[:8])
    found = content[8 : 8 + n]
    once = f'"{HEAD}":{json.dumps(json.loads(found)[HEAD])}'.encode()
    return framed(b"{" + once + b"," + found.strip()[1:], content[8 + n :])


def in_place_of_weights(make: Callable[[Path], object]) -> Spoil:
    return lambda checkpoint: ((checkpoint / "model.safetensors").unlink(), make(checkpoint / "model.safetensors"))


def more(*names: str, like: str = DOWN) -> Spoil:
    return weights(lambda found: found.update({name: found[like].clone() for name in names}))


HEADERS: dict[str, tuple] = {
    "length 2^63": (raw(lambda content: struct.pack("<Q", 1 << 63) + content[8:]), "header"),
    "length 2^64 - 1": (raw(lambda content: b"\xff" * 8 + content[8:]), "header"),
    "length 0": (raw(lambda content: b"\0" * 8 + content[8:]), "header"),
    "length beyond the file": (raw(lambda content: struct.pack("<Q", len(content)) + content[8:]), "header"),
    "empty file": (raw(lambda content: b""), "header"),
    "seven bytes": (raw(lambda content: content[:7]), "header"),
    "not JSON": (raw(lambda content: framed(b"{" * 64, content[-64:])), "header"),
    "not UTF-8": (raw(lambda content: framed(b'{"\xff\xfe": 1}')), "header"),
    "deep": (raw(lambda content: framed(b'{"a":' * 100_000)), "header"),
    "a list": (header(lambda found: [1, 2]), "header"),
    "no tensors": (raw(lambda content: framed(b"{}")), "--model-path"),
    "a tensor without its shape": (header(lambda found: found[DOWN].pop("shape") and None), "header"),
    "offsets that overlap": (
        header(lambda found: found[DOWN].update(data_offsets=found[HEAD]["data_offsets"])), "header",
    ),
    "offsets beyond the file": (tensor(data_offsets=[10**9, 10**9 + 1536]), "header"),
    "offsets reversed": (header(lambda found: found[DOWN]["data_offsets"].reverse()), "header"),
    "offsets negative": (tensor(data_offsets=[-1536, 0]), "header"),
    "offsets of 2^64": (tensor(data_offsets=[2**64 - 1536, 2**64]), "header"),
    "offsets are texts": (tensor(data_offsets=["0", "1536"]), "header"),
    "a hole": (header(lambda found: found.pop(DOWN) and None), "header"),
    "bytes behind the last": (raw(lambda content: content + b"\0" * 9), "header"),
    "dtype unheard of": (tensor(dtype="F31"), "header"),
    "dtype of another width": (tensor(dtype="F64"), "header"),
    "shape whose product overflows": (tensor(shape=[2**40, 2**40]), "header"),
    "shape with a 0 that hides it": (tensor(shape=[2**63, 0]), "header"),
    "shape of 10^9 ones": (tensor(shape=[1] * 100_000), "header"),
    "shape negative": (tensor(shape=[-16, -24]), "header"),
    "shape turned": (tensor(shape=[24, 16]), "other shapes", DOWN),
    "shape flat": (tensor(shape=[384]), "other shapes", DOWN),
    "a name twice": (raw(doubled_name), FINE),
    "metadata of numbers": (header(lambda found: found.update(__metadata__={"format": 7})), "header"),
    "metadata of another library": (header(lambda found: found.update(__metadata__={"format": "tf"})), FINE),
    "no metadata": (header(lambda found: found.pop("__metadata__") and None), FINE),
    "NaN in the head": (weights(lambda found: found[HEAD].fill_(torch.nan)), "not finite"),
    "infinity in the embedding": (
        weights(lambda found: found["model.embed_tokens.weight"].fill_(torch.inf)), "not finite",
    ),
    "infinity in a norm": (weights(lambda found: found["model.norm.weight"].fill_(-torch.inf)), "not finite"),
    "float64": (cast(torch.float64), FINE),
    "bfloat16": (cast(torch.bfloat16), FINE),
    "int8": (cast(torch.int8), "integers"),
    "one of bool": (weights(lambda found: found.update({DOWN: found[DOWN] > 0})), "integers", DOWN),
    "index to a file that is missing": (index_to("model-00002-of-00002.safetensors"), "index.json"),
    "index to a file outside": (index_to("../outside.safetensors"), "outside"),
    "index to /etc/passwd": (index_to("/etc/passwd"), "outside"),
    "index to a directory": (index_to("."), "index.json"),
    "index to a pickle": (index_to("pytorch_model.bin"), "index.json"),
    "index not JSON": (index("{"), "index.json"),
    "index without a map": (index({"metadata": {}}), "index.json"),
    "index with a list": (index({"metadata": {}, "weight_map": [1]}), "index.json"),
    "index of numbers": (index({"metadata": {}, "weight_map": {DOWN: 7}}), "index.json"),
    "index of nothing": (index({"metadata": {}, "weight_map": {}}), "index.json"),
    "a link to nothing": (in_place_of_weights(lambda file: file.symlink_to("nowhere")), "--model-path"),
    "layers of another depth": (more("model.layers.3.mlp.down_proj.weight"), "layers.3.mlp.down_proj"),
    "a bias that the config lacks": (more("model.layers.1.mlp.down_proj.bias"), "layers.1.mlp.down_proj.bias"),
    "norms that the config lacks": (more("model.layers.1.self_attn.q_norm.weight"), "self_attn.q_norm"),
    "a head's bias": (more("lm_head.bias"), "lm_head.bias"),
    "a value head": (more("v_head.summary.weight", "score.weight"), FINE, "v_head.summary.weight"),
    "rotary frequencies": (more("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"), FINE),
}  # fmt: skip


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    zygote = Zygote(tmp_path_factory.mktemp("zygote") / "log")
    if sys.platform == "linux":
        resource.prlimit(zygote.process.pid, resource.RLIMIT_DATA, (BYTES, BYTES))
    yield zygote
    zygote.process.stdin.close()
    zygote.process.wait()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sound") / "model", seed=0)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{what}: {name}")
     for what, table in (("config", CONFIGS), ("weights", HEADERS)) for name, case in table.items()],
)  # fmt: skip
def test_a_checkpoint_that_lies(zygote, sound, problems_file, tmp_path, case):
    spoil, *says = case
    spoil(Path(shutil.copytree(sound, tmp_path / "model")))
    zygote.log.unlink(missing_ok=True)
    paths = ["--model-path", tmp_path / "model", "--dataset", problems_file, "--output-dir", tmp_path / "out"]
    result = zygote.run(
        Step("", "probe_grad_vectors", [*map(str, paths), *SMALL.split()], [], tmp_path), kill_after=SECONDS
    )
    log = zygote.log.read_text()
    assert result["status"] == (0 if FINE in says else 2), (result, log[-3000:])
    assert "Traceback" not in log
    assert {c for c in log if not c.isprintable() and c != "\n"} == set(), "control characters reach a terminal"
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == (0 if FINE in says else 1), log
    for phrase in set(says) - {FINE}:
        assert phrase in log
    assert not (tmp_path / "out" / "manifest.json").exists() or FINE in says
