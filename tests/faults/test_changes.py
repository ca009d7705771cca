"""What may change between a kill and the next start, or between two shards: the same bytes, or a refusal by name.

Every setting of the probe, every file that it reads, and what it runs on has an answer here, and one without an answer
fails the test. A kill is an exception out of the record of what is written; test_kills.py sends real signals.
"""

import json
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradprobe.probe.run
import merge_grad_vector_shards
import probe_grad_vectors
from gradprobe.dump.consistency import problems_of
from gradprobe.probe.output import Progress
from gradprobe.probe.settings import ProbeSettings

DUMP_FILES = ("grads.npy", "meta.jsonl", "rollouts.jsonl")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
VERIFIER = "from my_rules import is_even\n\ndef judge(response, truth):\n    return is_even(response)\n"
RULES = "def is_even(text):\n    return len(text) % 2 == 0\n"

OWN = "--num-prompts 8 --num-samples 2 --max-new-tokens 8 --pos-per-bin-per-rollout 2 --dataset problems.jsonl"
SCENARIOS = {
    "own": OWN,
    "shard": f"{OWN} --shard-index 0 --num-shards 2",
    "chat": f"{OWN} --prompt-template template.txt --chat-template --system-prompt brief --verifier my_verifier:judge",
    "adapted": f"{OWN} --adapter adapter",
    "edges": f"{OWN} --entropy-edges other",
    "pooled": "--rollouts own_whole --pool bucket",
    "given": "--rollouts given.jsonl --correct-from correct --pos-per-bin-per-rollout 2",
    "served": f"{OWN} --sampler openai --base-url URL --server-model tiny",
}
COMMON = "--model-path model --device cpu --dtype float32 --bins 2 --sample-rows 4 --batch-tokens 64".split()
SAME = "same bytes"


class Killed(BaseException):
    """Stands for a signal that ends the probe."""


@dataclass(frozen=True)
class Change:
    """One thing that changes.

    Attributes:
        what: the setting, or the file, or what else.
        resumed: `SAME`, or what the refusal says when a killed probe is started again.
        merged: `SAME`, or what the refusal says when a shard made before is merged with one made after; None where the
            change makes no shard at all.
        flags: given beside the scenario's; the last of a flag counts.
        act: changes files, or what the probe runs on.
        scenario: of what.
        warns: what a merge says that is none the less done.
    """

    what: str
    resumed: str
    merged: str | None
    flags: str = ""
    act: Callable[[pytest.MonkeyPatch], None] = lambda patch: None
    scenario: str = "own"
    warns: str = ""


def rewritten(file: str, before: str, after: str) -> Callable[[pytest.MonkeyPatch], None]:
    def act(patch: pytest.MonkeyPatch) -> None:
        text = Path(file).read_text()
        assert before in text
        Path(file).write_text(text.replace(before, after))

    return act


def other_weights(directory: str) -> Callable[[pytest.MonkeyPatch], None]:
    def act(patch: pytest.MonkeyPatch) -> None:
        (file,) = Path(directory).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)

    return act


def patched(owner: object, name: str, value: object) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, value)


def moved(source: str, target: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: shutil.move(source, target)


def swap_digits(patch: pytest.MonkeyPatch) -> None:
    file = Path("model/tokenizer.json")
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    file.write_text(json.dumps(content))


SETTINGS = [
    Change("model_path", SAME, SAME, "--model-path moved", act=moved("model", "moved")),
    Change("model_path", "model.weights_sha256", "model_identity", "--model-path another"),
    Change("output_dir", SAME, SAME, "--output-dir out/../out"),
    Change("revision", "--revision main: only names on the Hub", None, "--revision main"),
    Change("adapter", "model.adapter", "model_identity", "--adapter adapter"),
    Change("adapter", SAME, SAME, "--adapter moved", act=moved("adapter", "moved"), scenario="adapted"),
    Change("trust_remote_code", SAME, SAME, "--trust-remote-code"),
    Change("tokenizer", SAME, SAME, "--tokenizer model"),
    Change("tokenizer", "model.tokenizer_sha256", "model_identity", "--tokenizer other_tokenizer"),
    Change("dataset", "dataset.sha256", "dataset is", "--dataset more.jsonl"),
    Change("dataset", SAME, SAME, "--dataset moved.jsonl", act=moved("problems.jsonl", "moved.jsonl")),
    Change("problem_key", "dataset.columns", "dataset is", "--problem-key meta.text"),
    Change("problem_key", SAME, SAME, "--problem-key prompt"),
    Change("answer_key", "dataset.columns", "dataset is", "--answer-key meta.text"),
    Change("id_key", "dataset.columns", "dataset is", "--id-key none"),
    Change("prompt_template", "prompts", "prompts is", "--prompt-template {problem}="),
    Change(
        "prompt_template", SAME, SAME, "--prompt-template moved", act=moved("template.txt", "moved"), scenario="chat"
    ),
    Change("chat_template", "prompts", "prompts is", "--chat-template"),
    Change("system_prompt", "prompts", "prompts is", "--system-prompt long", scenario="chat"),
    Change(
        "continue_final_message",
        "--continue-final-message: no prompt of",
        None,
        "--continue-final-message",
        scenario="chat",
    ),
    Change("num_prompts", "sampling.num_prompts_of_study", "sampling is", "--num-prompts 6"),
    Change("skip_prompts", "shard.skip_prompts", "begins behind the study's first", "--skip-prompts 1"),
    Change("step_to", "step", "step is", "--step-to another"),
    Change("step_from", "step", "step is", "--step-from another"),
    Change("step_to_adapter", "step", "step is", "--step-to-adapter adapter"),
    Change("step_from_adapter", "step", "step is", "--step-from-adapter adapter"),
    Change("step_by_weight", "step", "step is", "--step-to another --step-by-weight"),
    Change("num_samples", "num_samples_per_prompt", "num_samples_per_prompt is", "--num-samples 3"),
    Change("max_new_tokens", "max_new_tokens", "max_new_tokens is", "--max-new-tokens 9"),
    Change("temperature", "temperature", "temperature is", "--temperature 0.9"),
    Change("stop", "sampling.stop", "sampling is", "--stop 7"),
    Change("sampler", "sampling.method", "sampling is", "--sampler openai --base-url URL --server-model tiny"),
    Change("base_url", SAME, SAME, "--base-url OTHER", scenario="served"),
    Change("server_model", "sampling.server_model", "sampling is", "--server-model small", scenario="served"),
    Change("server_requests", SAME, SAME, "--server-requests 1", scenario="served"),
    Change(
        "api_key_env",
        SAME,
        SAME,
        "--api-key-env A_KEY",
        act=lambda patch: patch.setenv("A_KEY", "sesame"),
        scenario="served",
    ),
    Change("rollouts", "rollouts_from.sha256", "rollouts_from is", "--rollouts again.jsonl", scenario="given"),
    Change("rollouts", SAME, SAME, "--rollouts moved.jsonl", act=moved("given.jsonl", "moved.jsonl"), scenario="given"),
    Change("rollouts", "rollouts_from", "rollouts_from is", "--rollouts given.jsonl again.jsonl", scenario="given"),
    Change("rollouts_format", SAME, SAME, "--rollouts-format vllm", scenario="given"),
    Change("correct_from", "rollouts_from.correct_from", "rollouts_from is", "--correct-from right", scenario="given"),
    Change(
        "correct_above",
        "rollouts_from.correct_from",
        "rollouts_from is",
        "--correct-from reward --correct-above 0.5",
        scenario="given",
    ),
    Change("verifier", "sampling.verifier", "sampling is", "--verifier my_verifier:judge"),
    Change("verifier_seconds", SAME, SAME, "--verifier-seconds 5"),
    Change("verifier_seconds", "verifier.seconds", "sampling is", "--verifier-seconds 5", scenario="chat"),
    Change("shard_index", "shard.index", None, "--shard-index 1", scenario="shard"),
    Change("num_shards", "shard.num_shards", "is shard", "--num-shards 3"),
    Change("layer", "targets", "target is", "--layer 0"),
    Change("param_suffix", "targets", "target is", "--param-suffix self_attn.o_proj.weight"),
    Change("row_idx", "targets", "row_idx is", "--row-idx 1"),
    Change("project", "targets", "row_idx is", "--project 2x2"),
    Change("pool", "pooling", "pooling is", "--pool bucket --pos-per-bin-per-rollout 4"),
    Change("bucket_by", "bucket_by", "bucket_by is", "--bucket-by surprisal", scenario="pooled"),
    Change("bins", "bins", "bins is", "--bins 3"),
    Change(
        "pos_per_bin_per_rollout", "pos_per_bin_per_rollout", "pos_per_bin_per_rollout", "--pos-per-bin-per-rollout 1"
    ),
    Change("entropy_edges", "entropy_edges", "--entropy-edges", "--entropy-edges other"),
    Change("entropy_edges", SAME, SAME, "--entropy-edges moved", act=moved("other", "moved"), scenario="edges"),
    Change("seed", "seed", "seed is", "--seed 1"),
    Change("device", "sees 0 GPUs", None, "--device cuda"),
    Change("device_map", SAME, SAME, "--device auto --device-map auto"),
    Change("max_memory", SAME, SAME, "--device auto --device-map auto --max-memory cpu=1GiB"),
    Change("offload_dir", SAME, SAME, "--device auto --device-map auto --offload-dir weights"),
    Change("dtype", "dtype", "dtype is", "--dtype bfloat16"),
    Change("attention", "attention", "attention is", "--attention eager"),
    Change("batch_tokens", SAME, SAME, "--batch-tokens 33", warns="batch_tokens"),
    Change("sample_rows", SAME, SAME, "--sample-rows 8", warns="sample_rows"),
    Change("sample_rows", SAME, SAME, "--sample-rows 2", warns="sample_rows"),
    Change("min_mixed_prompts", SAME, SAME, "--min-mixed-prompts 0"),
    Change("sample_only", SAME, None, "--sample-only"),
    Change("check_only", SAME, None, "--check-only"),
    Change("overwrite", SAME, SAME, "--overwrite"),
]
FILES = [
    Change(
        "model/config.json", "model.weights_sha256", "model_identity", act=rewritten("model/config.json", "{", "{ ")
    ),
    Change("model/model.safetensors", "model.weights_sha256", "model_identity", act=other_weights("model")),
    Change("model/tokenizer.json", "model.tokenizer_sha256", "model_identity", act=swap_digits),
    Change(
        "model/tokenizer_config.json",
        "model.tokenizer_sha256",
        "model_identity",
        act=rewritten("model/tokenizer_config.json", "<|im_end|>", "<|endoftext|>"),
    ),
    Change(
        "model/chat_template.jinja",
        "prompts",
        "prompts is",
        act=rewritten("model/chat_template.jinja", "<answer>", "<a>"),
        scenario="chat",
    ),
    Change(
        "model/generation_config.json",
        "end_ids",
        "end_ids is",
        act=rewritten("model/generation_config.json", '"eos_token_id": [', '"eos_token_id": [7, '),
    ),
    Change(
        "adapter/adapter_config.json",
        "model.adapter",
        "model_identity",
        act=rewritten("adapter/adapter_config.json", "{", "{ "),
        scenario="adapted",
    ),
    Change(
        "adapter/adapter_model.safetensors",
        "model.adapter",
        "model_identity",
        act=other_weights("adapter"),
        scenario="adapted",
    ),
    Change("problems.jsonl", "dataset.sha256", "dataset is", act=rewritten("problems.jsonl", "1+2", "1+3")),
    Change("template.txt", "prompts", "prompts is", act=rewritten("template.txt", "Q", "P"), scenario="chat"),
    Change("my_verifier.py", "verifier", "sampling is", act=rewritten("my_verifier.py", "truth", "t"), scenario="chat"),
    Change("my_rules.py", "verifier", "sampling is", act=rewritten("my_rules.py", "== 0", "== 1"), scenario="chat"),
    Change("other/manifest.json", "entropy_edges", "--entropy-edges", act=lambda patch: edges(1.5), scenario="edges"),
    Change(
        "given.jsonl",
        "rollouts_from",
        "rollouts_from is",
        act=rewritten("given.jsonl", "true", "false"),
        scenario="given",
    ),
]
AROUND = [
    Change("a README in the checkpoint", SAME, SAME, act=lambda patch: Path("model/README.md").write_text("new")),
    Change("times of files", SAME, SAME, act=lambda patch: Path("model/config.json").touch()),
    Change("threads", SAME, SAME, act=lambda patch: torch.set_num_threads(2), warns="threads"),
    Change("torch", "versions.torch", SAME, act=patched(torch, "__version__", "2.99.0"), warns="versions"),
    Change(
        "transformers", "versions.transformers", SAME, act=patched(transformers, "__version__", "9"), warns="versions"
    ),
    Change("numpy", "versions.numpy", SAME, act=patched(np, "__version__", "9"), warns="versions"),
    Change(
        "the processor",
        "device",
        SAME,
        act=patched(torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        warns="device",
    ),
    Change("the environment's language", SAME, SAME, act=lambda patch: patch.setenv("LC_ALL", "C")),
    Change("the user's directory", SAME, SAME, act=lambda patch: patch.setenv("HOME", "/nonexistent")),
]
CHANGES = [*SETTINGS, *FILES, *AROUND]


def edges(upper: float) -> None:
    Path("other").mkdir(exist_ok=True)
    Path("other/manifest.json").write_text(json.dumps({"entropy_edges": [0.0, upper, 6.0]}))


class Server(BaseHTTPRequestHandler):
    """Serves two models; a response hangs on the prompt and the request's seed alone."""

    def do_GET(self) -> None:
        self._say({"data": [{"id": "tiny"}, {"id": "small"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = np.random.default_rng([request["seed"], *request["prompt"]]).integers(0, 256, 6).tolist()
        self._say({"choices": [{"text": "", "token_ids": ids}]})

    def _say(self, answer: dict) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def probe(urls: list[str]) -> Callable[..., int]:
    """Runs the probe on a scenario of the current directory's files."""

    def probe(scenario: str, output: str, flags: str = "", *, kill_after: int | None = None) -> int:
        given = f"{SCENARIOS[scenario]} --output-dir {output} {flags}".replace("URL", urls[0]).replace("OTHER", urls[1])
        add, n_written = Progress.add, 0

        def add_or_die(progress: Progress, entry: dict) -> None:
            nonlocal n_written
            add(progress, entry)
            n_written += 1
            if n_written == kill_after:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Progress, "add", add_or_die)
            return probe_grad_vectors.main([*COMMON, *given.split()])

    return probe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, probe: Callable[..., int]) -> Path:
    """All files that the scenarios read; of each scenario a whole dump, one killed in mid-sampling, and two shards."""
    root = tmp_path_factory.mktemp("world")
    for name, seed in (("model", 3), ("another", 4)):
        tiny_checkpoint(root / name, seed)
        tokenizer = AutoTokenizer.from_pretrained(root / name)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(root / name)
    tokenizer.chat_template = CHAT + "!"
    tokenizer.save_pretrained(root / "other_tokenizer")
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(root / "model"), lora).save_pretrained(root / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for file, n in (("problems.jsonl", 12), ("more.jsonl", 13)):
            lines = [
                {"id": f"p{i}", "prompt": "1+2" * (i % 4 + 1) + str(i), "ground_truth": "3", "meta": {"text": f"t{i}"}}
                for i in range(n)
            ]
            Path(file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        Path("template.txt").write_text("Q: {problem}")
        Path("my_verifier.py").write_text(VERIFIER)
        Path("my_rules.py").write_text(RULES)
        edges(2.0)
        rng = np.random.default_rng(0)
        for file in ("given.jsonl", "again.jsonl"):
            Path(file).write_text("".join(json.dumps(vllm_line(i, rng)) + "\n" for i in range(8)))
        for scenario in SCENARIOS:
            assert probe(scenario, f"{scenario}_whole") == 0
            with pytest.raises(Killed):
                probe(scenario, f"{scenario}_killed", kill_after=2)
            assert probe(scenario, f"{scenario}_s0", "--shard-index 0 --num-shards 2") == 0
            assert probe(scenario, f"{scenario}_s1", "--shard-index 1 --num-shards 2") == 0
            assert merge(scenario) == 0
    return root


def vllm_line(number: int, rng: np.random.Generator) -> dict:
    samples = [
        {"token_ids": rng.integers(0, 256, 7).tolist(), "correct": s == 0, "right": s == 1, "reward": float(s)}
        for s in range(2)
    ]
    return {"prompt_token_ids": [49, 43, 50 + number], "outputs": samples}


def merge(scenario: str) -> int:
    return merge_grad_vector_shards.main([f"{scenario}_merged", f"{scenario}_s0", f"{scenario}_s1"])


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copy of the world as the current directory; threads are set back."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    yield
    torch.set_num_threads(1)


def content(dump: str) -> dict[str, bytes]:
    return {name: Path(dump, name).read_bytes() for name in DUMP_FILES}


def flag_of(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def names(changes: list[Change]) -> list[str]:
    return [f"{c.what}-{c.scenario}-{c.flags or 'changed'}" for c in changes]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("change", CHANGES, ids=names(CHANGES))
def test_between_kill_and_resume(change, probe, capsys, monkeypatch):
    killed, before = f"{change.scenario}_killed", content(f"{change.scenario}_whole")
    there = {file.name: file.read_bytes() for file in Path(killed).iterdir()}
    change.act(monkeypatch)
    capsys.readouterr()
    status = probe(change.scenario, killed, change.flags.replace("--output-dir out/../out", f"--output-dir ./{killed}"))
    said = capsys.readouterr().err
    if change.resumed != SAME:
        assert status == 2
        assert change.resumed in said
        assert {file.name: file.read_bytes() for file in Path(killed).iterdir()} == there
        return
    assert status == 0, said
    if change.flags in ("--check-only", "--sample-only"):
        assert probe(change.scenario, killed) == 0
    assert content(killed) == before
    assert problems_of(Path(killed)) == ([], [])


BETWEEN_SHARDS = [change for change in CHANGES if change.merged is not None]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("change", BETWEEN_SHARDS, ids=names(BETWEEN_SHARDS))
def test_between_shards(change, probe, capsys, monkeypatch):
    change.act(monkeypatch)
    second, before = f"{change.scenario}_s1", content(f"{change.scenario}_merged")
    shutil.rmtree(second)
    flags = f"--shard-index 1 --num-shards 2 {change.flags}".replace("--output-dir out/../out", "")
    assert probe(change.scenario, second, flags) == 0
    capsys.readouterr()
    status, said = merge(change.scenario), capsys.readouterr().err
    if change.merged != SAME:
        assert status == 2
        assert change.merged in said
        assert content(f"{change.scenario}_merged") == before
        return
    assert status == 0, said
    assert change.warns in said
    assert bool(change.warns) == ("round differently" in said)
    if not change.warns:
        assert content(f"{change.scenario}_merged") == before


def test_every_setting_and_every_file_has_an_answer(world):
    assert {change.what for change in SETTINGS} == {field.name for field in fields(ProbeSettings)}
    files = {f"{name}/{file.name}" for name in ("model", "adapter") for file in (world / name).iterdir()}
    assert files - {change.what for change in FILES} <= {"adapter/README.md"}
    print(f"{len(CHANGES)} changes between kill and resume, {len(BETWEEN_SHARDS)} between shards")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("rows", [2, 8, 100])
@pytest.mark.parametrize("n_written", [1, 3, 5])
def test_prompts_are_neither_lost_nor_doubled(probe, rows, n_written):
    """Chunks were once skipped by count: with other `--sample-rows` prompts were lost, or stood twice."""
    with pytest.raises(Killed):
        probe("own", "out", kill_after=n_written)
    assert probe("own", "out", f"--sample-rows {rows}") == 0
    assert content("out") == content("own_whole")


@pytest.mark.usefixtures("here")
def test_a_resume_takes_the_threads_of_now_and_says_so(probe, capsys):
    """It forced the number that the dump was begun with: 1 of 32 cores, or 32 threads on 2."""
    torch.set_num_threads(2)
    assert probe("own", "own_killed") == 0
    assert torch.get_num_threads() == 2
    assert "threads 2, but it was begun with 1: what is left may round differently" in capsys.readouterr().err
    assert json.loads(Path("own_killed/manifest.json").read_text())["threads"] == 2


@pytest.mark.usefixtures("here")
def test_a_dump_that_was_begun_before_is_continued(probe, capsys):
    """Its record named the faulty rows of each batch, which are read from the gradients now, and its items in order."""
    with pytest.raises(Killed):
        probe("own", "out", kill_after=6)
    record = Path("out/progress.jsonl")
    entries = [json.loads(line)["entry"] for line in record.read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["rollouts"] * 4 + ["gradients"] * 2
    lines = []
    for entry in entries:
        if entry["kind"] == "gradients":
            faulty = [{"nonfinite_rows": [], "zero_rows": []}]
            entry = {**entry, "items": sorted(entry["items"]), "faulty": faulty}
        crc32 = zlib.crc32((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        lines.append(json.dumps({"crc32": crc32, "entry": entry}, ensure_ascii=False) + "\n")
    record.write_text("".join(lines))
    n_rows = sum(len(entry["items"]) for entry in entries if entry["kind"] == "gradients")
    capsys.readouterr()
    assert probe("own", "out") == 0
    said = capsys.readouterr().err
    assert "4 of 4 batches of rollouts are there" in said
    assert n_rows > 0
    assert "gradient rows are there" in said
    assert content("out") == content("own_whole")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("dump", ["own_s0", "own_whole", "own_merged", "given_s1"])
def test_a_dump_without_all_that_was_due_is_not_sound(dump):
    file = Path(dump, "manifest.json")
    manifest = json.loads(file.read_text())
    assert problems_of(Path(dump)) == ([], [])
    file.write_text(json.dumps(manifest | {"num_rollouts_due": manifest["num_rollouts_due"] + 2}))
    assert "rollouts were due" in problems_of(Path(dump))[0][0]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("moment", ["before loading", "at the end"])
def test_weights_are_those_that_were_hashed(probe, capsys, monkeypatch, moment):
    """A directory `latest` that a trainer writes over while the probe starts."""
    owner, name = {"before loading": (gradprobe.probe.run, "run_probe"), "at the end": (Progress, "close")}[moment]
    original = getattr(owner, name)

    def overwrite_first(*arguments: object) -> object:
        shutil.copytree("another", "model", dirs_exist_ok=True)
        return original(*arguments)

    monkeypatch.setattr(owner, name, overwrite_first)
    assert probe("own", "out") == 2
    assert "--model-path model: its files have changed while they were read" in capsys.readouterr().err
    assert not Path("out", "manifest.json").exists()
