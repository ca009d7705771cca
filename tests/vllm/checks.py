"""What `run.sh` checks: the probe's server path and its file path, both fed by a real vLLM.

The demo's base model is served from a checkpoint whose generation_config.json asks for top-k 1, top-p 0.1 and a
repetition penalty, which vLLM takes as its defaults. Plain requests obey that; the probe's must not.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import urllib3
from scipy.stats import chisquare

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import probe_grad_vectors  # noqa: E402
from gradprobe.model.checkpoint import load_checkpoint  # noqa: E402
from gradprobe.rollouts.sample import Sampling  # noqa: E402
from gradprobe.rollouts.server import connect, request_seed, sample_completions  # noqa: E402

DATA = ROOT / "tests" / "data" / "rollouts"
N_PROMPTS, N_SAMPLES, N_NEW = 32, 8, 64
HOSTILE = {"do_sample": True, "top_k": 1, "top_p": 0.1, "repetition_penalty": 1.5}
MEMORY = ("--gpu-memory-utilization", "0.3")
"""On a CPU too: by default nine tenths of the machine's memory must be free."""
START_SECONDS = 300
# As docs/rollouts.md has it, with the demo for the model.
OFFLINE = """
import json, sys
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

{write_rollouts}
model, problems_file, file, n_prompts, n_samples, n_new, config = sys.argv[1:]
problems = [json.loads(line) for line in open(problems_file)][: int(n_prompts)]
tokenizer = AutoTokenizer.from_pretrained(model)
prompts = [{{"prompt_token_ids": tokenizer(p["prompt"], add_special_tokens=False)["input_ids"]}} for p in problems]
full_softmax = SamplingParams(
    n=int(n_samples), max_tokens=int(n_new), temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0
)
if __name__ == "__main__":
    llm = LLM(
        model, dtype="float32", generation_config=config, gpu_memory_utilization=0.3, max_num_batched_tokens=16384
    )
    write_rollouts(file, problems, llm.generate(prompts, full_softmax))
"""


def main() -> None:
    """All checks, a line each; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vllm_python", help="interpreter that has vLLM")
    parser.add_argument("--record", action="store_true", help="write what it answers into the tests' data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = work / "model"
        shutil.copytree(ROOT / "demo" / "base", model)
        config = json.loads((model / "generation_config.json").read_text())
        (model / "generation_config.json").write_text(json.dumps(config | HOSTILE))
        with served(args.vllm_python, model, work / "server.log") as url:
            check_server(url, model, work)
            if args.record:
                record_answers(url)
        check_offline(args.vllm_python, model, work)
    print("all of it held")


def check(holds: bool, said: str) -> None:
    """Say it; end with status 1 where it does not hold."""
    print(f"{'ok' if holds else 'FAILED'}: {said}", flush=True)
    if not holds:
        sys.exit(1)


@contextmanager
def served(python: str, model: Path, log: Path) -> Iterator[str]:
    """The address of vLLM's server for this checkpoint, with vLLM's own defaults."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "demo"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", *MEMORY]
    begun = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            while not is_up(port):
                if process.poll() is not None or time.monotonic() - begun > START_SECONDS:
                    sys.exit(f"vLLM did not start; the end of what it said:\n{log.read_text()[-4000:]}")
                time.sleep(1)
            print(f"vLLM serves after {time.monotonic() - begun:.0f} s", flush=True)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, which outlive it where it fails
            process.wait()


def is_up(port: int) -> bool:
    """Whether it answers."""
    try:
        return urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=False, timeout=2).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def ask(url: str, **request: Any) -> dict[str, Any]:
    """Its answer to a completions request."""
    return urllib3.request("POST", f"{url}/v1/completions", json={"model": "demo"} | request, timeout=60).json()


def check_server(url: str, model: Path, work: Path) -> None:
    """Plain requests are truncated; the probe's are the full softmax, and its log-probs vLLM's."""
    prompt = json.loads((ROOT / "demo" / "problems.jsonl").read_text().partition("\n")[0])["prompt"]
    plain = [ask(url, prompt=prompt, max_tokens=N_NEW, seed=s)["choices"][0]["text"] for s in range(4)]
    check(len(set(plain)) == 1, "four plain requests with four seeds get one answer: the checkpoint's defaults rule")
    manifest = probed(work / "server", model, "--sampler", "openai", "--base-url", url)
    gap = manifest["server_logprob_gap"]
    check(gap < 1e-5, f"log-probs of {N_PROMPTS * N_SAMPLES} rollouts there and here differ by {gap:.1e} nats a token")
    p = p_value_of_first_tokens(url, model, prompt)
    check(p > 1e-3, f"400 first tokens at temperature 2 against the full softmax: p {p:.2g}")


def check_offline(python: str, model: Path, work: Path) -> None:
    """What docs/rollouts.md says gives the full softmax does, and without its sampling settings it would not."""
    text = (ROOT / "docs" / "rollouts.md").read_text()
    code = text[text.index("def write_rollouts") :].partition("```")[0]
    (work / "offline.py").write_text(OFFLINE.format(write_rollouts=code))
    file, problems = work / "vllm.jsonl", ROOT / "demo" / "problems.jsonl"
    numbers = map(str, (N_PROMPTS, N_SAMPLES, N_NEW))
    with (work / "offline.log").open("w") as stream:
        command = [python, work / "offline.py", model, problems, file, *numbers, "vllm"]
        if subprocess.run(command, stdout=stream, stderr=stream).returncode:
            sys.exit(f"vLLM's generate failed:\n{(work / 'offline.log').read_text()[-4000:]}")
    probed(work / "offline", model, "--rollouts", str(file))


def probed(output: Path, model: Path, *where_from: str) -> dict[str, Any]:
    """The manifest of a probe of vLLM's rollouts, in which these are the model's own."""
    arguments = ["--model-path", str(model), "--output-dir", str(output), "--device", "cpu", "--quiet"]
    arguments += ["--bins", "2", "--pos-per-bin-per-rollout", "1", *where_from]
    if "--sampler" in where_from:
        arguments += ["--num-prompts", str(N_PROMPTS), "--num-samples", str(N_SAMPLES)]
        arguments += ["--max-new-tokens", str(N_NEW)]
    check(probe_grad_vectors.main(arguments) == 0, f"a probe with {where_from[0]} {where_from[1]}")
    manifest = json.loads((output / "manifest.json").read_text())
    on_policy = manifest["on_policy"]
    check(
        on_policy["verdict"] != "off-policy" and abs(on_policy["z"]) < 4,
        f"rollouts are the model's own: log π + H {on_policy['mean']:+.4f} nats, z {on_policy['z']:+.1f}",
    )
    lines = [json.loads(line) for line in (output / "rollouts.jsonl").open()]
    n_distinct = len({(r["prompt_idx"], tuple(r["response_ids"])) for r in lines})
    check(n_distinct > 0.8 * len(lines), f"{n_distinct} of {len(lines)} rollouts differ")
    return manifest


def p_value_of_first_tokens(url: str, model: Path, prompt: str, temperature: float = 2.0, n: int = 400) -> float:
    """χ² against the full softmax, in bins of at least 10 expected tokens; vLLM takes temperatures up to 2."""
    checkpoint = load_checkpoint(str(model), torch.device("cpu"), torch.float32)
    ids = checkpoint.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = checkpoint.model(torch.tensor([ids])).logits[0, -1].double()
    expected = n * torch.softmax(logits / temperature, -1).numpy()
    sampling = Sampling(n, 1, temperature)
    server = connect(url)
    (found,) = sample_completions(server, [ids], lambda p, s: request_seed(0, p, s), sampling, len(expected))
    counts = np.bincount([r.ids[0] for r in found], minlength=len(expected))
    order = np.argsort(expected)
    bins = np.unique((np.cumsum(expected[order]) // 10).clip(max=n // 10 - 1), return_inverse=True)[1]
    return float(chisquare(np.bincount(bins, counts[order]), np.bincount(bins, expected[order])).pvalue)


def record_answers(url: str) -> None:
    """Three requests for two rollouts each, as a file for `--rollouts`."""
    full = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    lines = [json.loads(line) for line in (ROOT / "demo" / "problems.jsonl").read_text().splitlines()[:3]]
    with (DATA / "vllm_server.jsonl").open("w", encoding="utf-8") as stream:
        for number, problem in enumerate(lines):
            request = {"prompt": problem["prompt"], "n": 2, "max_tokens": N_NEW, "seed": number} | full
            request |= {"return_token_ids": True, "add_special_tokens": False}
            line = {"problem_id": problem["id"], "ground_truth": problem["ground_truth"], "request": request}
            stream.write(json.dumps(line | {"response": ask(url, **request)}) + "\n")


if __name__ == "__main__":
    main()
