"""Rollouts from a completions server (vLLM, SGLang, llama.cpp): raw prompt ids in, response ids out.

Every request says in full how to sample, so that the server's own defaults and the checkpoint's generation config play
no part. A server that keeps the token ids to itself is refused, since text does not determine them.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.errors import InputError, first_of, one_line, raise_if_any, reason_of
from ..common.extras import library
from ..common.fields import is_finite
from ..common.files import json_object

if TYPE_CHECKING:
    from .sample import Sampling

RETRIES: dict[str, Any] = {
    **{"total": 6, "connect": 2, "read": 0, "redirect": 0, "status_forcelist": (429, 502, 503, 504)},
    **{"allowed_methods": None, "raise_on_status": False, "backoff_factor": 1.0, "backoff_max": 30.0},
    "retry_after_max": 60,
}
"""How a busy server is asked again: after 0, 2, 4, 8, 16 and 30 seconds, or when it says. A request that it may be
working on is not sent twice."""
SECONDS_TO_CONNECT = 30.0

FULL_SOFTMAX = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,  # vLLM's and SGLang's name
    "repeat_penalty": 1.0,  # llama.cpp's
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
}
"""Every truncation and penalty that one of the three servers knows, switched off; each ignores what it lacks."""

WITH_IDS = {"return_token_ids": True, "return_tokens": True, "verbose": True, "logprobs": 1}
"""How to ask for token ids: vLLM and SGLang by the first key, llama.cpp by the two after it."""

Seeds = Callable[[int, int], int]
"""(prompt number, sample number) -> seed of that request."""


@dataclass(frozen=True)
class ServerResponse:
    """One sampled response. `logprobs` (nats) are the server's own, one per id, or empty where it has not all."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class CompletionsServer:
    """A server and the model asked of it; `url` ends in `/v1`. The key is sent, and shown nowhere."""

    url: str
    model: str
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)

    def post(self, request: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to one completions request."""
        return json_at(f"{self.url}/completions", self.timeout, {"model": self.model, **request}, self.api_key)


def json_at(url: str, seconds: float, body: dict[str, Any] | None = None, api_key: str | None = None) -> dict[str, Any]:
    """The JSON object at `url`, waited for `seconds` and asked for again where the server is busy; a `body` is posted.

    `api_key` is sent as a bearer token; an error that repeats it is shown without.
    """
    urllib3 = library("urllib3", "server", f"`base_url` {url}")
    # Each request has its connection: a server may close an idle one just when it is used again.
    headers = {"Content-Type": "application/json", "Connection": "close"}
    headers |= {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        response = urllib3.request(
            "GET" if body is None else "POST",
            url,
            body=None if body is None else json.dumps(body),
            headers=headers,
            retries=urllib3.Retry(**RETRIES),
            timeout=urllib3.Timeout(connect=min(seconds, SECONDS_TO_CONNECT), read=seconds),
        )
    except urllib3.exceptions.HTTPError as error:
        raise InputError(f"{url}: can't be reached ({reason_of(getattr(error, 'reason', None) or error)})") from error
    if response.status != 200:
        said = f"{response.reason or ''}: {response.data.decode('utf-8', 'replace')}"
        said = said if api_key is None else said.replace(api_key, "(the key)")
        hint = "; `api_key_env` names the variable that holds its key" if response.status in (401, 403) else ""
        raise InputError(f"{url}: HTTP {response.status} {one_line(said)}{hint}")
    return json_object(response.data, url)


def key_in(variable: str | None) -> str | None:
    """The key that an environment variable holds; None where no variable is named.

    Neither is shown in an error: who gives the key itself for the variable's name would find it in a log.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise InputError("`api_key_env`: no environment variable of that name holds a key; not the key is asked for")
    return key


def connect(
    base_url: str, model: str | None = None, timeout: float = 600.0, api_key: str | None = None
) -> CompletionsServer:
    """The server at `base_url` (with or without `/v1`), and the `model` that it lists, None for the only one."""
    url = base_url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"`base_url` {base_url}: must start with http:// or https://")
    url = url if url.endswith("/v1") else f"{url}/v1"
    listed = json_at(f"{url}/models", timeout, api_key=api_key)
    try:
        names = [str(entry["id"]) for entry in listed["data"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{url}/models: the answer has no list 'data' of models, each with its 'id'") from error
    serves = one_line(first_of(names)) or "no model"
    if model is None and len(names) != 1:
        raise InputError(f"`base_url` {base_url}: serves {serves}; name one of them")
    if model is not None and model not in names:
        raise InputError(f"`base_url` {base_url}: does not serve '{model}' but {serves}")
    return CompletionsServer(url, model or names[0], timeout, api_key)


def request_seed(seed: int, prompt_idx: int, sample_idx: int) -> int:
    """A seed of 31 bits, a pure function of the study's seed, the prompt and the sample."""
    return int(np.random.SeedSequence([seed, prompt_idx, sample_idx]).generate_state(1)[0] >> 1)


def sample_completions(
    server: CompletionsServer,
    prompts: Sequence[list[int]],
    seeds: Seeds,
    sampling: "Sampling",
    vocab_size: int,
    n_parallel: int = 16,
) -> Iterator[list[ServerResponse]]:
    """Yield the responses to each prompt from the model's full softmax; one request each, `n_parallel` at once.

    Responses end as with our own sampler: what a server says beyond that is cut off. It is not told of a stop text,
    since servers differ in whether the token that completes one is among their ids. Seeds make a server's answers
    repeatable only as far as its own arithmetic does; batching servers round differently from run to run.
    """

    def ask(numbers: tuple[int, int]) -> ServerResponse:
        prompt = prompts[numbers[0]]
        request = {
            "prompt": prompt,
            "max_tokens": sampling.room_after(prompt),
            "temperature": sampling.temperature,
            "seed": seeds(*numbers),
            **FULL_SOFTMAX,
            **WITH_IDS,
        }
        answer = server.post(request)
        raise_if_any(f"{server.url}: {fault}" for fault in faults_of_answer(answer, prompt, vocab_size, sampling))
        choice = answer["choices"][0]
        ids, logprobs = token_ids_of(answer, choice), _logprobs_of(choice)
        n_kept = sampling.n_until_over(ids)
        has_all = len(logprobs) == len(ids) and all(map(is_finite, logprobs))
        return ServerResponse(ids[:n_kept], logprobs[:n_kept] if has_all else [])

    # Leaving it, also by a signal, waits for no request that is under way.
    with ThreadPool(n_parallel) as pool:
        answers = pool.imap(ask, [(p, s) for p in range(len(prompts)) for s in range(sampling.n_samples)])
        for _ in prompts:
            yield [next(answers) for _ in range(sampling.n_samples)]


def faults_of_answer(answer: dict[str, Any], prompt: list[int], vocab_size: int, sampling: "Sampling") -> Iterator[str]:
    """What is wrong with the answer to a request for one completion of `prompt` with token ids."""
    if not isinstance(answer.get("choices"), list) or len(answer["choices"]) != 1:
        yield "one completion was asked for, the answer has no list 'choices' with one object"
        return
    choice = answer["choices"][0]
    ids, most = token_ids_of(answer, choice), sampling.room_after(prompt)
    if ids is None:
        yield "the answer has no token ids (token_ids or __verbose.tokens), which vLLM, SGLang and llama.cpp give"
        return
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        yield f"the answer's token ids are not integers from 0 to {vocab_size - 1}: another model's?"
        return
    if not ids:
        yield "the answer has no tokens, not even one that ends it"
    if len(ids) > most:
        yield f"the answer has {len(ids)} tokens, more than the {most} asked for (max_tokens)"
    if (choice.get("prompt_token_ids") or prompt) != prompt:
        yield "the model saw another prompt than was sent"
    for key, n_tokens in (("prompt_tokens", len(prompt)), ("completion_tokens", len(ids))):
        found = object_at(answer, "usage").get(key, n_tokens)
        if found != n_tokens:
            yield f"usage.{key} is {found}, but the ids are {n_tokens}"


def token_ids_of(answer: dict[str, Any], choice: dict[str, Any]) -> list[int] | None:
    """The response ids of an OpenAI-shaped choice, or None where the answer has none.

    They stand in vLLM's and SGLang's `token_ids`, in llama.cpp's `__verbose.tokens` (of answers with one choice),
    or beside its log-probs, where it leaves out tokens that end inside a character: hold them against `usage`.
    """
    if choice.get("token_ids") is not None:
        return choice["token_ids"]
    if len(answer["choices"]) == 1 and "__verbose" in answer:
        return object_at(answer, "__verbose").get("tokens")
    entries = logprob_entries(choice)
    return [entry["id"] for entry in entries] if entries and all("id" in entry for entry in entries) else None


def logprob_entries(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects, one per token, in which llama.cpp gives log-probs; empty where there are none."""
    content = object_at(choice, "logprobs").get("content")
    return content if isinstance(content, list) and all(isinstance(entry, dict) for entry in content) else []


def object_at(record: dict[str, Any], key: str) -> dict[str, Any]:
    """The JSON object under `key`; an empty one where something else or nothing stands."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def mean_logprob_gap(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> float | None:
    """Mean |difference|, in nats per token, between the server's log-probs and those of our own pass.

    None where it gave none (`theirs` are empty). Rounding gives thousandths in float32 and hundredths in bfloat16; a
    quantised or another model gives more. llama.cpp and vLLM report log-probs at temperature 1 whatever they sample at.
    """
    gaps = [np.abs(np.asarray(a) - np.asarray(b)) for a, b in zip(theirs, ours, strict=True) if len(a)]
    return float(np.concatenate(gaps).mean()) if gaps else None


def _logprobs_of(choice: dict[str, Any]) -> list[float]:
    entries = logprob_entries(choice)
    if entries:
        return [entry["logprob"] for entry in entries if "logprob" in entry]
    return object_at(choice, "logprobs").get("token_logprobs") or []
