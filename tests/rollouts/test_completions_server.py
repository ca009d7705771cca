"""The server sampler against llama.cpp's own server, started on loopback with the demo model."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import urllib3
from safetensors.torch import load_file
from scipy.stats import chisquare

import probe_grad_vectors
from gradprobe.common.errors import InputError
from gradprobe.model.checkpoint import Checkpoint, load_checkpoint
from gradprobe.rollouts import server as completions
from gradprobe.rollouts.sample import Sampling, StopText
from gradprobe.rollouts.score import score_responses
from gradprobe.rollouts.server import (
    CompletionsServer,
    ServerResponse,
    connect,
    faults_of_answer,
    mean_logprob_gap,
    request_seed,
    sample_completions,
)

DEMO = Path(__file__).parents[2] / "demo"
N_NEW = 48
SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], 0
params.model_alias = {"demo"}
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 1024, 2, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the tests close it
"""


def as_gguf(checkpoint: Path, file: Path) -> Path:
    """A Qwen2 checkpoint in llama.cpp's format, float32: what its converter writes, for this one architecture."""
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    words = {**{i: word for word, i in tokenizer["model"]["vocab"].items()}, **special}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([words[i] for i in range(config["vocab_size"])])
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(config["vocab_size"])]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama.cpp's server with the demo's base model, on a free port of 127.0.0.1."""
    directory = tmp_path_factory.mktemp("server")
    model = as_gguf(DEMO / "base", directory / "demo.gguf")
    command = [sys.executable, "-c", SERVE, str(model)]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), (directory / "log").read_text()
        yield url
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(address: str) -> CompletionsServer:
    """The server as the sampler sees it."""
    return connect(address)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The demo's base model in float32."""
    return load_checkpoint(str(DEMO / "base"), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def prompts(checkpoint: Checkpoint) -> list[list[int]]:
    """Token ids of four problems, and of one that is no chat at all."""
    lines = (DEMO / "problems.jsonl").read_text().splitlines()[:4]
    texts = [*(json.loads(line)["prompt"] for line in lines), "We see 2*3"]
    return [checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def sampled(
    server: CompletionsServer, checkpoint: Checkpoint, prompts: list[list[int]], n: int = 2, seed: int = 0, **more
) -> list[list[ServerResponse]]:
    """`sample_completions` for the demo model."""
    sampling = Sampling(**{"n_samples": n, "max_new_tokens": N_NEW, "end_ids": checkpoint.end_ids, **more})
    return list(sample_completions(server, prompts, lambda p, s: request_seed(seed, p, s), sampling, vocab_size=350))


def scored(checkpoint: Checkpoint, prompts: list[list[int]], responses: list[list[int]]) -> list[np.ndarray]:
    """Our log-probs of each response's ids."""
    found: dict[int, np.ndarray] = {}
    for batch in score_responses(checkpoint.model, prompts, responses, 4096):
        found.update({i: logprobs for i, (_, logprobs, *_) in batch.items()})
    return [found[i] for i in range(len(responses))]


def test_responses_are_the_models_own_to_the_raw_prompt(server, checkpoint, prompts):
    """Each id's log-prob at the server is ours: same model, same prompt, nothing put before or around it."""
    found = sampled(server, checkpoint, prompts)
    assert [len(samples) for samples in found] == [2] * len(prompts)
    flat = [(prompt, r) for prompt, samples in zip(prompts, found, strict=True) for r in samples]
    assert all(r.ids[-1] in checkpoint.end_ids or len(r.ids) == N_NEW for _, r in flat)
    assert sum(r.ids[-1] in checkpoint.end_ids for _, r in flat) > len(flat) / 2
    ours = scored(checkpoint, [prompt for prompt, _ in flat], [r.ids for _, r in flat])
    for (_, response), logprobs in zip(flat, ours, strict=True):
        np.testing.assert_allclose(response.logprobs, logprobs, atol=1e-3)
    assert mean_logprob_gap([r.logprobs for _, r in flat], ours) < 1e-4


def test_another_model_shows_in_the_logprobs(server, checkpoint, prompts):
    trained = load_checkpoint(str(DEMO / "trained"), torch.device("cpu"), torch.float32)
    responses = [samples[0] for samples in sampled(server, checkpoint, prompts, 1)]
    theirs = scored(trained, prompts, [r.ids for r in responses])
    assert mean_logprob_gap([r.logprobs for r in responses], theirs) > 0.1
    assert mean_logprob_gap([[]], [[0.0]]) is None


def test_seeds_repeat_and_tell_samples_apart(server, checkpoint, prompts):
    first, again, other = (sampled(server, checkpoint, prompts[:2], seed=seed) for seed in (0, 0, 1))
    assert [[r.ids for r in samples] for samples in first] == [[r.ids for r in samples] for samples in again]
    assert [r.ids for r in first[0]] != [r.ids for r in other[0]]
    assert first[0][0].ids != first[0][1].ids
    assert request_seed(0, 1, 2) != request_seed(0, 2, 1)
    assert 0 <= request_seed(0, 1, 2) < 2**31


def p_value_of_first_tokens(server: CompletionsServer, checkpoint: Checkpoint, prompt: list[int]) -> float:
    """χ² of 400 first tokens at temperature 4 against the full softmax; bins of at least 10 expected tokens."""
    temperature, n = 4.0, 400
    responses = sampled(server, checkpoint, [prompt], n, temperature=temperature, max_new_tokens=1, end_ids=frozenset())
    with torch.inference_mode():
        logits = checkpoint.model(torch.tensor([prompt])).logits[0, -1].double()
    expected = n * torch.softmax(logits / temperature, -1).numpy()
    counts = np.bincount([r.ids[0] for r in responses[0]], minlength=len(expected))
    order = np.argsort(expected)
    bins = np.unique((np.cumsum(expected[order]) // 10).clip(max=n // 10 - 1), return_inverse=True)[1]
    return chisquare(np.bincount(bins, counts[order]), np.bincount(bins, expected[order])).pvalue


def test_tokens_come_from_the_full_softmax_at_the_stated_temperature(server, checkpoint, prompts, monkeypatch):
    assert p_value_of_first_tokens(server, checkpoint, prompts[0]) > 1e-3
    monkeypatch.setattr(completions, "FULL_SOFTMAX", {})  # the server's defaults: top-k 40, top-p 0.95, min-p 0.05
    assert p_value_of_first_tokens(server, checkpoint, prompts[0]) < 1e-9


def test_ids_of_parts_of_characters_are_there(server, checkpoint, prompts):
    """At temperature 8 most responses have bytes that are no character; llama.cpp's log-probs leave those out."""
    (found,) = sampled(server, checkpoint, prompts[:1], 16, temperature=8.0, max_new_tokens=12)
    assert any("\ufffd" in checkpoint.tokenizer.decode(r.ids) for r in found)
    assert any(not r.logprobs for r in found)
    assert all(len(r.ids) == 12 or r.ids[-1] in checkpoint.end_ids for r in found)


def test_responses_end_as_our_own_sampler_ends_them(server, checkpoint, prompts):
    full_stop = checkpoint.tokenizer(".")["input_ids"]
    (cut,) = sampled(server, checkpoint, prompts[:1], end_ids=frozenset(full_stop))
    assert all(r.ids.count(full_stop[0]) == 1 and r.ids[-1] == full_stop[0] for r in cut)
    assert all(len(r.ids) == len(r.logprobs) for r in cut)
    (short,) = sampled(server, checkpoint, prompts[:1], context=len(prompts[0]) + 5)
    assert [len(r.ids) for r in short] == [5, 5]


def test_answers_of_llama_cpp_without_ids_or_of_another_prompt_are_refused(server, prompts):
    request, sampling = {"prompt": prompts[0], "max_tokens": 4, "temperature": 1.0}, Sampling(1, 4)
    (fault,) = faults_of_answer(server.post(request), prompts[0], 350, sampling)
    assert "no token ids" in fault
    answer = server.post({**request, **completions.WITH_IDS})
    assert list(faults_of_answer(answer, prompts[0], 350, sampling)) == []
    (fault,) = faults_of_answer(answer, prompts[1] + prompts[0], 350, sampling)
    assert "usage.prompt_tokens is" in fault
    del answer["__verbose"]["tokens"][-1]
    (fault,) = faults_of_answer(answer, prompts[0], 350, sampling)
    assert "usage.completion_tokens is 4, but the ids are 3" in fault


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"token_ids": None}, "no token ids"),
        ({"token_ids": [1, 10]}, "not integers from 0 to 9: another model's"),
        ({"token_ids": [1, "2"]}, "not integers from 0 to 9"),
        ({"token_ids": []}, "no tokens, not even one that ends it"),
        ({"token_ids": [1] * 5}, r"5 tokens, more than the 4 asked for \(max_tokens\)"),
        ({"prompt_token_ids": [0, 3, 4]}, "another prompt than was sent"),
    ],
)
def test_an_answer_that_would_give_a_wrong_number_is_refused(playing, changes, says):
    """Ids of another model or of nothing, another prompt, more than was asked for."""
    choice = {"token_ids": [1, 2], "prompt_token_ids": [3, 4], "logprobs": {"token_logprobs": [-0.5, -0.25]}}
    playing.script = [(200, {}, json.dumps({"choices": [choice | changes]}).encode())]
    there = CompletionsServer(f"{url_of(playing)}/v1", "demo")
    answers = sample_completions(there, [[3, 4]], lambda p, s: s, Sampling(2, 4), vocab_size=10)
    if says is None:
        assert list(answers) == [[ServerResponse([1, 2], [-0.5, -0.25])] * 2]
        return
    with pytest.raises(InputError, match=f"^{url_of(playing)}/v1: .*{says}"):
        list(answers)


def test_log_probs_that_are_none_count_as_not_given(playing):
    choice = {"token_ids": [1, 2], "prompt_token_ids": [3, 4], "logprobs": {"token_logprobs": [-0.5, float("nan")]}}
    playing.script = [(200, {}, json.dumps({"choices": [choice]}).encode())]
    there = CompletionsServer(f"{url_of(playing)}/v1", "demo")
    (answers,) = sample_completions(there, [[3, 4]], lambda p, s: s, Sampling(1, 4), vocab_size=10)
    assert answers == [ServerResponse([1, 2], [])]


def test_what_the_server_refuses_is_said(server, checkpoint):
    with pytest.raises(InputError, match=r"/v1/completions: HTTP 400 .*invalid tokens"):
        sampled(server, checkpoint, [[999]])


def test_connecting_finds_the_model_or_says_why_not(address):
    assert connect(f"{address}/v1/") == connect(address) == connect(address, "demo")
    with pytest.raises(InputError, match=r"does not serve 'Qwen' but demo"):
        connect(address, "Qwen")
    with pytest.raises(InputError, match="can't be reached"):
        connect("http://127.0.0.1:9")
    with pytest.raises(InputError, match="must start with http"):
        connect("localhost:8000")
    with pytest.raises(InputError, match="HTTP 404"):
        connect(f"{address}/nowhere")


class Playing(BaseHTTPRequestHandler):
    """A server that plays what `server.script` says: (status, headers, body), the last one for ever."""

    def do_GET(self) -> None:
        script = self.server.script
        status, headers, body = script.pop(0) if len(script) > 1 else script[0]
        self.server.n_asked += 1
        self.server.keys.add(self.headers.get("Authorization"))
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def playing(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """One on a free port of 127.0.0.1, asked without waiting between."""
    monkeypatch.setitem(completions.RETRIES, "backoff_factor", 0.01)
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 64)  # or a busy machine resets some of the 16
    found = ThreadingHTTPServer(("127.0.0.1", 0), Playing)
    found.n_asked, found.keys = 0, set()
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


MODELS = (200, {}, b'{"data": [{"id": "demo"}]}')
BUSY = (503, {}, b"loading the model")


def url_of(playing: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{playing.server_port}"


@pytest.mark.parametrize("busy", [BUSY, (429, {"Retry-After": "1"}, b"slow down"), (502, {}, b""), (504, {}, b"")])
def test_a_server_that_is_busy_is_asked_again(playing, busy):
    playing.script = [busy, busy, MODELS]
    assert connect(url_of(playing)).model == "demo"
    assert playing.n_asked == 3
    playing.script = [busy, (200, {}, b'{"choices": []}')]
    there = CompletionsServer(f"{url_of(playing)}/v1", "demo")
    assert there.post({"prompt": [1]}) == {"choices": []}
    playing.script, playing.n_asked = [BUSY], 0
    with pytest.raises(InputError, match="/v1/completions: HTTP 503 Service Unavailable: loading the model"):
        there.post({"prompt": [1]})
    assert playing.n_asked == 7


def completion(checkpoint: Checkpoint, text: str) -> tuple[int, dict, bytes]:
    """An answer of this text, with ids and log-probs."""
    ids = checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]
    logprobs = {"token_logprobs": [-0.5] * len(ids)}
    return 200, {}, json.dumps({"choices": [{"text": text, "token_ids": ids, "logprobs": logprobs}]}).encode()


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (None, "We see 2*3=6. So \\boxed{6}.\n\nQ: 1"),
        ("\n\nQ:", "We see 2*3=6. So \\boxed{6}.\n\nQ:"),
        ("=6. S", "We see 2*3=6. So"),  # complete within a token, which stays whole
        ("nowhere", "We see 2*3=6. So \\boxed{6}.\n\nQ: 1"),
    ],
)
def test_a_stop_text_ends_a_servers_response_as_it_ends_our_own(playing, checkpoint, prompts, stop, kept):
    playing.script = [completion(checkpoint, "We see 2*3=6. So \\boxed{6}.\n\nQ: 1")]
    stop_text = None if stop is None else StopText(stop, checkpoint.tokenizer.decode)
    there = CompletionsServer(f"{url_of(playing)}/v1", "demo")
    ((response,),) = sampled(there, checkpoint, prompts[:1], 1, stop=stop_text)
    assert checkpoint.tokenizer.decode(response.ids) == kept
    assert len(response.logprobs) == len(response.ids)


REFUSED = (401, {}, b'{"error": "no such key: sesame"}')


def test_the_key_is_sent_and_shown_nowhere(playing, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("A_KEY", "sesame\n")
    monkeypatch.setenv("OPENAI_API_KEY", "of another server")
    playing.script = [MODELS, completion(checkpoint, "3"), completion(checkpoint, "So \\boxed{4}.")]
    command = ["--model-path", str(DEMO / "base"), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--sampler", "openai", "--base-url", url_of(playing), "--num-prompts", "2", "--num-samples", "1"]
    assert probe_grad_vectors.main([*command, "--bins", "2", "--api-key-env", "A_KEY"]) == 0
    assert playing.keys == {"Bearer sesame"}
    playing.script = [REFUSED]
    assert probe_grad_vectors.main([*command, "--bins", "2", "--api-key-env", "A_KEY", "--overwrite"]) == 2
    said = capsys.readouterr()
    assert 'HTTP 401 Unauthorized: {"error": "no such key: (the key)"}; --api-key-env names' in said.err
    files = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert "manifest.json" in {file.name for file in (tmp_path / "out").iterdir()}
    assert not any(b"sesame" in content for content in (*files, said.out.encode(), said.err.encode()))
    playing.keys.clear()
    assert probe_grad_vectors.main([*command, "--overwrite"]) == 2
    assert playing.keys == {None}, "no key goes to a server for which none was named"


@pytest.mark.parametrize(
    ("held", "flags", "says"),
    [
        (None, "--sampler openai --base-url http://127.0.0.1:9", "--api-key-env: no environment variable of that name"),
        ("a\r\nX: b", "--sampler openai --base-url http://127.0.0.1:9", "--api-key-env: no environment variable of"),
        ("sesame", "", "--api-key-env says something of --base-url only"),
        ("sesame", f"--rollouts {DEMO}", "--api-key-env can't go with --rollouts"),
    ],
)
def test_a_key_that_is_none_is_refused_without_showing_it(tmp_path, capsys, monkeypatch, held, flags, says):
    if held is not None:
        monkeypatch.setenv("sk-1", held)
    command = ["--model-path", str(DEMO / "base"), "--output-dir", str(tmp_path / "out"), "--api-key-env", "sk-1"]
    assert probe_grad_vectors.main([*command, *flags.split()]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in said
    assert not any(secret in said for secret in ("sk-1", "sesame", "X: b"))


def test_waiting_for_a_busy_server_is_bounded():
    retry = urllib3.Retry(**completions.RETRIES)
    waits = []
    while not retry.is_exhausted():
        waits.append(retry.get_backoff_time())
        try:
            retry = retry.increment("POST", "/", urllib3.HTTPResponse(status=503))
        except urllib3.exceptions.MaxRetryError:
            break
    assert waits == [0, 0, 2, 4, 8, 16, 30]
    assert retry.parse_retry_after("999999") <= 60


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((307, {"Location": "http://example.com/"}, b""), "too many redirects"),
        ((200, {}, b"[1]"), "not a JSON object"),
        ((200, {}, b"{"), "not JSON"),
        ((200, {}, b"<html>502 Bad Gateway</html>"), "not JSON"),
        ((200, {"Content-Length": "99"}, b'{"data": []'), "can't be reached"),
        ((404, {}, b"no `such` \x1b[31mmodel"), "HTTP 404 Not Found: no 'such'"),
    ],
)
def test_odd_answers_are_one_line(playing, answer, says):
    playing.script = [answer]
    with pytest.raises(InputError, match=says):
        connect(url_of(playing))


def test_a_server_that_is_silent_does_not_hold_the_probe():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(InputError, match="can't be reached .*timed out"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
        assert time.monotonic() - start < 10


def test_without_urllib3_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(InputError, match=r"pip install 'gradprobe\[server\]'"):
        connect("http://127.0.0.1:9")


def test_the_probe_through_a_server(address, tmp_path, capsys):
    flags = "--num-prompts 3 --num-samples 2 --max-new-tokens 64 --device cpu --bins 2".split()
    command = ["--output-dir", str(tmp_path / "out"), "--sampler", "openai", "--base-url", address, *flags]
    assert probe_grad_vectors.main([*command, "--model-path", str(DEMO / "base")]) == 0
    assert "another model's" not in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_rollouts"] == 6
    assert manifest["sampling"]["method"] == "completions server"
    assert manifest["server_logprob_gap"] < 1e-3
    command[1] = str(tmp_path / "other")
    assert probe_grad_vectors.main([*command, "--model-path", str(DEMO / "trained")]) == 0
    assert "another model's" in capsys.readouterr().err


def test_a_server_that_ignores_seeds_ends_the_probe_with_one_line(playing, checkpoint, tmp_path, capsys):
    playing.script = [MODELS, completion(checkpoint, "We see 8*3 makes 24. Thus 15*7 makes 105. It is \\boxed{129}.")]
    command = ["--model-path", str(DEMO / "base"), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--sampler", "openai", "--base-url", url_of(playing), "--num-prompts", "4", "--num-samples", "4"]
    assert probe_grad_vectors.main(command) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: --base-url {url_of(playing)}: 12 of 16 responses repeat another one of")
    assert said.endswith("does the server ignore a request's seed?")


def test_a_signal_waits_for_no_request_under_way(tmp_path):
    """A request may take the server ten minutes; who ends a probe, or Slurm, does not wait so long."""
    is_asked, may_answer = threading.Event(), threading.Event()

    class Slow(Playing):
        def do_POST(self) -> None:
            is_asked.set()
            may_answer.wait(60)

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.script, server.n_asked, server.keys = [MODELS], 0, set()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        command = [sys.executable, str(DEMO.parent / "probe_grad_vectors.py"), "--model-path", str(DEMO / "base")]
        command += ["--sampler", "openai", "--base-url", url_of(server), "--num-prompts", "2", "--num-samples", "2"]
        probe = subprocess.Popen([*command, "--output-dir", str(tmp_path / "out"), "--device", "cpu"])
        try:
            assert is_asked.wait(120)
            start = time.monotonic()
            probe.terminate()
            assert probe.wait(30) == 143
            assert time.monotonic() - start < 15
        finally:
            may_answer.set()
            probe.kill()
            server.shutdown()
            thread.join()
