"""Whatever a completions server sends, one line says soon what is wrong with it: no traceback, hang or wrong id."""

import gzip
import json
import socketserver
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import probe_grad_vectors
from gradprobe.common.console import printable
from gradprobe.common.errors import InputError
from gradprobe.rollouts import fetch
from gradprobe.rollouts.sample import Sampling
from gradprobe.rollouts.server import CompletionsServer, ServerResponse, connect, sample_completions

DEMO = Path(__file__).parents[2] / "demo"
VOCAB_SIZE, PROMPT, N_NEW = 10, [3, 4], 4
SECONDS, SECONDS_OF_THE_SLOW = 30.0, 0.5
MOST_BYTES = 1 << 20
HONEST = {
    "choices": [
        {"text": "ab", "token_ids": [1, 2], "prompt_token_ids": PROMPT, "logprobs": {"token_logprobs": [-0.5, -0.25]}}
    ],
    "usage": {"prompt_tokens": 2, "completion_tokens": 2},
}

Sent = bytes | Callable[[Any], None]
"""What goes over the wire: bytes, or what sends them to a socket."""


def http(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """An HTTP answer whose Content-Length is right unless `length` says otherwise."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def json_http(content: Any) -> bytes:
    """An answer of this JSON, NaN and infinity as Python writes them."""
    return http(json.dumps(content).encode())


def with_choice(**changes: Any) -> bytes:
    """The honest answer but for these fields of its choice."""
    return json_http({**HONEST, "choices": [{**HONEST["choices"][0], **changes}]})


def with_entries(*entries: Any) -> bytes:
    """An answer in llama.cpp's shape, with these objects beside its tokens 1 and 2."""
    choice = {"text": "ab", "logprobs": {"content": list(entries)}}
    return json_http({"choices": [choice], "__verbose": {"tokens": [1, 2]}})


def chunked(*parts: bytes) -> bytes:
    """An answer in chunks, each as it stands."""
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(parts)


def dripping(beginning: bytes, part: bytes, seconds: float = 0.1) -> Callable[[Any], None]:
    """`beginning`, then `part` again and again until the other side has gone, at most 100 times."""

    def send(connection: Any) -> None:
        connection.sendall(beginning)
        for _ in range(100):
            connection.sendall(part)
            time.sleep(seconds)

    return send


def without_end(beginning: bytes) -> Callable[[Any], None]:
    """`beginning`, then megabyte after megabyte, 400 at most."""

    def send(connection: Any) -> None:
        connection.sendall(beginning)
        for _ in range(400):
            connection.sendall(b" " * (1 << 20))

    return send


BOMB = gzip.compress(b" " * (200 << 20))
GOOD = json.dumps(HONEST).encode()
SLOW, NO_COMPLETION, NOT_IDS, LOGPROBS = (
    "within 0.5 seconds",
    "one completion was asked for",
    "token ids are not integers",
    "log-probs",
)

ANSWERS: dict[str, tuple[Sent, str]] = {
    # No HTTP, or less or more of it than was promised.
    "nothing": (b"", "can't be reached"),
    "no HTTP": (b"hello, who is there?\r\n\r\n", "can't be reached"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", "can't be reached"),
    "zeros": (b"\0" * 5000, "can't be reached"),
    "status no number": (b"HTTP/1.1 abc OK\r\n\r\n", "can't be reached"),
    "status beyond numbers": (b"HTTP/1.1 99999999 OK\r\n\r\n", "can't be reached|HTTP"),
    "a status line without end": (b"HTTP/1.1 200 " + b"O" * 100_000, "can't be reached"),
    "a header too long": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "can't be reached"),
    "headers too many": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n", "can't be reached"),
    "headers cut": (b"HTTP/1.1 200 OK\r\nContent-Le", "can't be reached|not JSON"),
    "a body cut": (http(GOOD, length=len(GOOD) + 50), "can't be reached"),
    "a body cut by its length": (http(GOOD, length=20), "not JSON"),
    "a length below zero": (http(GOOD[:-1], length=-5), "not JSON|can't be reached"),
    "a length of words": (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + GOOD[:-1], "not JSON|can't be reached"),
    "two lengths": (http(GOOD, "Content-Length: 7"), "can't be reached"),
    "chunks that are none": (chunked(b"zzz\r\n", GOOD), "can't be reached"),
    "a chunk below zero": (chunked(b"-5\r\n", GOOD, b"\r\n0\r\n\r\n"), "can't be reached"),
    "a chunk of all there is": (without_end(chunked(b"-1\r\n")), "below zero"),
    "a chunk cut": (chunked(b"ffff\r\n", GOOD), "can't be reached"),
    "a chunk of exabytes": (chunked(b"ffffffffffffffff\r\n", GOOD), "can't be reached"),
    "gzip that is none": (http(GOOD, "Content-Encoding: gzip"), "can't be reached"),
    "gzip cut": (http(gzip.compress(GOOD)[:-20], "Content-Encoding: gzip"), "can't be reached|not JSON"),
    "deflate that is none": (http(zlib.compress(GOOD)[5:], "Content-Encoding: deflate"), "can't be reached"),
    # More, or slower, than anybody waits for.
    "a gzip bomb": (http(BOMB, "Content-Encoding: gzip"), "more than 1,048,576 bytes"),
    "a gzip bomb in gzip": (http(gzip.compress(BOMB), "Content-Encoding: gzip, gzip"), "more than 1,048,576 bytes"),
    "a body without end": (without_end(b"HTTP/1.1 200 OK\r\n\r\n"), "more than 1,048,576 bytes"),
    "an error without end": (without_end(b"HTTP/1.1 404 No\r\n\r\n"), "more than 1,048,576 bytes"),
    "busy without end": (without_end(b"HTTP/1.1 503 Busy\r\n\r\n"), "more than 1,048,576 bytes"),
    "a status that drips": (dripping(b"HTTP/1.1 200 ", b"O"), SLOW),
    "headers that drip": (dripping(b"HTTP/1.1 200 OK\r\n", b"X"), SLOW),
    "go on, go on": (dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), SLOW),
    "a body that drips": (dripping(http(b"", length=1000), b" "), SLOW),
    "chunks that drip": (dripping(chunked(), b"1\r\n \r\n"), SLOW),
    "busy and dripping": (dripping(http(b"", status="503 Busy", length=1000), b" "), SLOW),
    "slow down, dripping": (dripping(http(b"", status="429 Slow", length=1000), b" "), SLOW),
    "gzip that drips": (dripping(http(BOMB[:10], "Content-Encoding: gzip", length=9999), b"\0"), SLOW),
    "silence": (lambda connection: time.sleep(3), SLOW),
    # HTTP without JSON in it.
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "HTTP 204"),
    "an empty body": (http(b""), "not JSON"),
    "to another host": (http(b"", "Location: http://192.0.2.1/v1/completions", status="302 Found"), "HTTP 302"),
    "to another host with the body": (http(b"", "Location: http://192.0.2.1/", status="307 Go"), "HTTP 307"),
    "busy, and elsewhere": (http(b"", "Location: http://192.0.2.1/", status="503 Busy"), "HTTP 503"),
    "an error with escapes": (http(b"\x1b[31mno `such`\nmodel", status="500 \x1b[31mOops"), "HTTP 500"),
    "HTML": (http(b"<html><body>502 Bad Gateway</body></html>"), "not JSON"),
    "UTF-16": (http(GOOD.decode().encode("utf-16")), "not UTF-8"),
    "Latin-1": (http('{"é": 1}'.encode("latin-1")), "not UTF-8"),
    "a stream of events": (http(b"data: " + GOOD + b"\n\ndata: [DONE]\n\n"), "not JSON"),
    "two objects": (http(GOOD + GOOD), "not JSON"),
    "deep lists": (http(b"[" * 200_000), "not JSON"),
    "deep objects": (http(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "not JSON"),
    "a deep choice": (http(b'{"choices":[' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"]}"), "not JSON|no token ids"),
    "a number of 5,000 digits": (http(b'{"choices": ' + b"9" * 5000 + b"}"), "not JSON"),
    "a list": (json_http([HONEST]), "not a JSON object"),
    "a word": (json_http("ok"), "not a JSON object"),
    "null": (json_http(None), "not a JSON object"),
    "half a surrogate pair": (http(b'{"choices": [{"text": "\\ud800", "token_ids": [1]}]}'), "surrogate"),
    "a key twice": (http(b'{"choices": [{"token_ids": [1, 2], "token_ids": [5]}]}'), "'token_ids' stands twice"),
    # JSON of another shape.
    "no choices": (json_http({}), NO_COMPLETION),
    "an error as JSON": (json_http({"error": {"message": "out of memory"}}), NO_COMPLETION),
    "null choices": (json_http({"choices": None}), NO_COMPLETION),
    "an object of choices": (json_http({"choices": {"0": HONEST["choices"][0]}}), NO_COMPLETION),
    "a null choice": (json_http({"choices": [None]}), NO_COMPLETION),
    "two choices": (json_http({"choices": HONEST["choices"] * 2}), NO_COMPLETION),
    "no ids": (json_http({"choices": [{"text": "ab"}]}), "no token ids"),
    "ids as text": (with_choice(token_ids="12"), NOT_IDS),
    "an object of ids": (with_choice(token_ids={"0": 1}), NOT_IDS),
    "true as an id": (with_choice(token_ids=[1, True]), NOT_IDS),
    "a float as an id": (with_choice(token_ids=[1, 2.0]), NOT_IDS),
    "an id as text": (with_choice(token_ids=[1, "2"]), NOT_IDS),
    "a null id": (with_choice(token_ids=[1, None]), NOT_IDS),
    "an id below zero": (with_choice(token_ids=[1, -1]), NOT_IDS),
    "an id past the vocabulary": (with_choice(token_ids=[1, VOCAB_SIZE]), NOT_IDS),
    "an id past 64 bits": (with_choice(token_ids=[1, 10**400]), NOT_IDS),
    "a list as an id": (with_choice(token_ids=[[1], [2]]), NOT_IDS),
    "empty ids": (with_choice(token_ids=[], logprobs=None), "no token"),
    "more ids than asked for": (
        json_http({"choices": [{"token_ids": [1] * (N_NEW + 1)}]}),
        r"5 tokens, more than the 4 asked for \(max_tokens\)",
    ),
    "another prompt": (with_choice(prompt_token_ids=[3, 4, 5]), "another prompt"),
    "a prompt of text": (with_choice(prompt_token_ids="34"), "prompt_token_ids"),
    "verbose that is no object": (json_http({"choices": [{"text": "a"}], "__verbose": [1]}), "no token ids"),
    "verbose ids of text": (json_http({"choices": [{"text": "a"}], "__verbose": {"tokens": "12"}}), NOT_IDS),
    "usage that is no object": (json_http({**HONEST, "usage": [2, 2]}), "usage"),
    "usage of other counts": (json_http({**HONEST, "usage": {"completion_tokens": 3}}), "usage.completion_tokens is 3"),
    "usage of text": (json_http({**HONEST, "usage": {"prompt_tokens": "\x1b[2J2\n"}}), "usage.prompt_tokens"),
    "usage of megabytes": (json_http({**HONEST, "usage": {"prompt_tokens": "2" * 500_000}}), "usage.prompt_tokens"),
    # Log-probs that are none.
    "log-probs of text": (with_choice(logprobs={"token_logprobs": ["-0.5", "-0.25"]}), LOGPROBS),
    "a log-prob NaN": (with_choice(logprobs={"token_logprobs": [-0.5, float("nan")]}), "not JSON"),
    "a log-prob -infinity": (with_choice(logprobs={"token_logprobs": [-0.5, float("-inf")]}), "not JSON"),
    "a log-prob -1e999": (http(GOOD.replace(b"-0.25", b"-1e999")), "not JSON"),
    "a log-prob past all floats": (with_choice(logprobs={"token_logprobs": [-0.5, -(10**400)]}), LOGPROBS),
    "a log-prob null": (with_choice(logprobs={"token_logprobs": [None, -0.25]}), LOGPROBS),
    "a log-prob true": (with_choice(logprobs={"token_logprobs": [True, -0.25]}), LOGPROBS),
    "a log-prob above 0": (with_choice(logprobs={"token_logprobs": [0.5, -0.25]}), LOGPROBS),
    "log-probs fewer than ids": (with_choice(logprobs={"token_logprobs": [-0.5]}), LOGPROBS),
    "log-probs more than ids": (with_choice(logprobs={"token_logprobs": [-0.5] * 3}), LOGPROBS),
    "log-probs an object": (with_choice(logprobs={"token_logprobs": {"0": -0.5}}), LOGPROBS),
    "logprobs a list": (with_choice(logprobs=[-0.5, -0.25]), LOGPROBS),
    "logprobs a text": (with_choice(logprobs="-0.5"), LOGPROBS),
    "entries that are no objects": (with_entries(-0.5, -0.25), LOGPROBS),
    "entries of text": (with_entries({"id": 1, "logprob": "-0.5"}, {"id": 2, "logprob": "-1"}), LOGPROBS),
    "entries of other ids": (with_entries({"id": 1, "logprob": -0.5}, {"id": 7, "logprob": -1.0}), LOGPROBS),
    "entries more than ids": (with_entries(*[{"id": 1, "logprob": -0.5}] * 3), LOGPROBS),
}  # fmt: skip

LISTS: dict[str, tuple[Sent, str]] = {
    "no data": (json_http({}), "no list 'data'"),
    "null data": (json_http({"data": None}), "no list 'data'"),
    "a number as data": (json_http({"data": 7}), "no list 'data'"),
    "an object as data": (json_http({"data": {"id": "demo"}}), "no list 'data'"),
    "models that are no objects": (json_http({"data": ["demo", None]}), "no list 'data'"),
    "a number as a name": (json_http({"data": [{"id": 7}]}), "no list 'data'"),
    "a model without a name": (json_http({"data": [{}]}), "no list 'data'"),
    "no model": (json_http({"data": []}), "serves no model"),
    "two models": (json_http({"data": [{"id": "a"}, {"id": "b"}]}), "serves a, b; name one"),
    "ten thousand models": (json_http({"data": [{"id": "\x1b[31mm\n" * 9}] * 5000}), "name one"),
}


class Playing(socketserver.BaseRequestHandler):
    """Reads a request and sends what `server.sent` says."""

    def handle(self) -> None:
        request = self.request.makefile("rb")
        method, length = request.readline().split()[0], 0
        while (line := request.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        request.read(length)
        self.server.n_asked += 1
        sent = self.server.models if method == b"GET" and self.server.models else self.server.sent
        with suppress(OSError):  # the other side has had enough
            self.request.sendall(sent) if isinstance(sent, bytes) else sent(self.request)


class Server(socketserver.ThreadingTCPServer):
    """A server on a free port of 127.0.0.1 that says anything."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 50
    sent: Sent = b""
    models: Sent = b""
    n_asked = 0


@pytest.fixture(scope="module")
def lying() -> Iterator[Server]:
    """One for all."""
    with Server(("127.0.0.1", 0), Playing) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.05,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy server is asked again at once, twice; answers are a megabyte at most."""
    for name, value in {"backoff_factor": 0.01, "backoff_max": 0.01, "total": 2}.items():
        monkeypatch.setitem(fetch.RETRIES, name, value)
    monkeypatch.setattr(fetch, "MOST_BYTES", MOST_BYTES)


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def asked(server: Server, n_samples: int = 1, seconds: float = SECONDS) -> list[list[ServerResponse]]:
    """The responses to `PROMPT`."""
    sampling = Sampling(n_samples, N_NEW, end_ids=frozenset({2}))
    there = CompletionsServer(f"{url_of(server)}/v1", "demo", seconds)
    return list(sample_completions(there, [PROMPT], lambda p, s: s, sampling, VOCAB_SIZE))


def assert_one_line(error: InputError, url: str) -> None:
    said = printable(str(error))
    assert url in said
    assert "\n" not in said
    assert len(said) < 1000


def test_an_honest_answer_is_taken(lying):
    lying.sent = json_http(HONEST)
    assert asked(lying, 2) == [[ServerResponse([1, 2], [-0.5, -0.25])] * 2]
    lying.sent = with_entries({"id": 1, "logprob": -0.5})  # llama.cpp leaves out parts of characters
    assert asked(lying) == [[ServerResponse([1, 2], [])]]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_lying_answer_is_one_line_soon(lying, name):
    lying.sent, says = ANSWERS[name]
    start = time.monotonic()
    with pytest.raises(InputError, match=says) as caught:
        asked(lying, seconds=SECONDS_OF_THE_SLOW if says == SLOW else SECONDS)
    assert time.monotonic() - start < SECONDS, "it hangs"
    assert_one_line(caught.value, url_of(lying))


@pytest.mark.parametrize("name", LISTS)
def test_a_lying_list_of_models_is_one_line(lying, name):
    lying.sent, says = LISTS[name]
    with pytest.raises(InputError, match=says) as caught:
        connect(url_of(lying), timeout=SECONDS)
    assert_one_line(caught.value, url_of(lying))


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://a b", "http://" + "a" * 300, "http://127.0.0.1:99999"]
)
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(InputError, match="base_url|can't be reached") as caught:
        connect(url, timeout=SECONDS)
    assert_one_line(caught.value, url[:50])


def test_a_busy_server_is_asked_again_without_reading_what_it_says(lying):
    """urllib3's own retries read the whole body first, however long."""
    lying.n_asked, lying.sent = 0, without_end(b"HTTP/1.1 503 Busy\r\n\r\n")
    with pytest.raises(InputError, match="more than"):
        asked(lying)
    assert lying.n_asked == 3


@pytest.mark.parametrize("temperature", ["1.0", "0.7"])
def test_a_server_that_ignores_seeds_ends_the_probe_with_one_line(lying, tmp_path, monkeypatch, capsys, temperature):
    text = "We see 8*3 makes 24. Thus 15*7 makes 105. Now 24+105 makes 139. It is \\boxed{139}."
    ids = AutoTokenizer.from_pretrained(DEMO / "base")(text)["input_ids"]
    monkeypatch.setattr(lying, "models", json_http({"data": [{"id": "demo"}]}))
    lying.sent = json_http({"choices": [{"token_ids": [*ids, 349]}]})
    command = ["--model-path", str(DEMO / "base"), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--sampler", "openai", "--base-url", url_of(lying), "--temperature", temperature]
    assert probe_grad_vectors.main([*command, "--num-prompts", "4", "--num-samples", "4"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: --base-url {url_of(lying)}: 12 of 16 responses repeat another one of their prompt")
    assert said.endswith("does the server ignore a request's seed?")
    assert not (tmp_path / "out" / "manifest.json").exists()
