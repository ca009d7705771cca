"""Bad input: every case exits 2 with one line that names what and where, and touches no file."""

import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import REPOSITORY, write_dump
from safetensors.torch import load_file, save_file

import analyze_exp1_compression
import analyze_exp2_direction
import merge_grad_vector_shards
import plot_exp12_intuitive
import probe_grad_vectors
from gradprobe import check
from gradprobe.dump.consistency import checksums_of, load_dump, read_content

ODD_NAME = "a b'c\"d$(touch pwned)\ne\x1b[31mf"
ESCAPED_ODD_NAME = "\\ne\\x1b[31mf"
SMALL = ["--num-prompts", "4", "--num-samples", "2", "--max-new-tokens", "6", "--device", "cpu", "--bins", "2"]
SMALL += ["--pos-per-bin-per-rollout", "1"]
N_ROWS, DIM = 40, 6


@dataclass(frozen=True)
class Outcome:
    """How a script ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ") or ": error: " in line]


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys) -> Run:
    """Call a script's `main`; an exception that escapes it fails the test."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        outcome = Outcome(status, *capsys.readouterr())
        assert "Traceback" not in outcome.err
        raw = {c for c in outcome.out + outcome.err if not c.isprintable() and c != "\n"}
        assert not raw, f"control characters reach a terminal: {outcome}"
        return outcome

    return run


def snapshot(directory: Path) -> dict[str, str]:
    """Every file's hash, locks apart."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def refuses(run, tmp_path) -> Callable[..., str]:
    """Assert that a script refuses its arguments and changes nothing; the error line."""

    def refuses(main: Callable[[list[str]], int], arguments: list[object], *says: str, may_add: bool = False) -> str:
        before = snapshot(tmp_path)
        outcome = run(main, *arguments)
        after = snapshot(tmp_path)
        assert outcome.status == 2, outcome
        assert outcome.out == ""
        if main is check.main:
            assert outcome.errors, outcome
        else:
            assert len(outcome.errors) == 1, outcome
        text = "\n".join(outcome.errors)
        for phrase in says:
            assert phrase.replace("TMP", str(tmp_path)) in text, text
        if may_add:
            after = {name: content for name, content in after.items() if name in before}
        assert after == before
        return text

    return refuses


def placed(arguments: list[str], tmp_path: Path) -> list[str]:
    return [argument.replace("TMP", str(tmp_path)) for argument in arguments]


def cases(table: dict[str, tuple]) -> pytest.MarkDecorator:
    """One test for each entry: its key is the test's name, its values the parameter `case`."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in table.items()])


# The probe's flags

PROBE_FLAGS = {
    "no such model": ("--model-path TMP/nowhere", "--model-path TMP/nowhere", "no such directory"),
    "a model that is a file": ("--model-path TMP/file", "--model-path TMP/file", "no config.json in it"),
    "no such tokenizer": ("--tokenizer TMP/nowhere", "--tokenizer TMP/nowhere", "no such directory"),
    "a tokenizer that is a file": ("--tokenizer TMP/file", "--tokenizer TMP/file", "no tokenizer in it"),
    "no such adapter": ("--adapter TMP/nowhere", "--adapter TMP/nowhere", "no such directory"),
    "no such verifier": ("--verifier nothing", "--verifier nothing"),
    "a server without its address": ("--sampler openai", "--sampler openai and --base-url need each other"),
    "a server that is not there": ("--sampler openai --base-url http://127.0.0.1:9", "can't be reached"),
    "a score without a file": ("--pool bucket --bucket-by score:nix", "name it by --rollouts"),
    "a message to go on with": ("--continue-final-message", "--continue-final-message", "--chat-template"),
    "no such data set": ("--dataset TMP/nowhere.jsonl", "TMP/nowhere.jsonl", "No such file"),
    "no such layer": ("--layer 3", "--layer", "3"),
    "no prompts": ("--num-prompts 0", "--num-prompts 0", "at least 1"),
    "more prompts than problems": ("--num-prompts 13", "--num-prompts 13", "12 problems"),
    "more shards than prompts": ("--num-shards 5", "--num-shards 5", "4 prompts"),
    "a shard behind the last": ("--num-shards 2 --shard-index 2", "--shard-index 2", "below --num-shards 2"),
    "one bin": ("--bins 1", "--bins 1", "at least 2"),
    "temperature 0": ("--temperature 0", "--temperature 0", "above 0"),
    "temperature NaN": ("--temperature nan", "--temperature nan", "above 0"),
    "no such device": ("--device tpu", "--device tpu", "cpu"),
    "no such GPU": ("--device cuda:99", "--device cuda:99", "GPU"),
    "output is a file": ("--output-dir TMP/file", "TMP/file", "File exists"),
    "output that can't be made": ("--output-dir /proc/nowhere/out", "/proc/nowhere: No such file"),
    "no such edges": ("--entropy-edges TMP/nowhere.json", "TMP/nowhere.json", "no such file"),
    "rollouts and sampling": ("--rollouts TMP/file", "--num-prompts can't go with --rollouts", "--num-samples"),
    "two faults at once": ("--bins 1 --temperature 0", "--bins 1", "--temperature 0"),
}


@pytest.fixture
def sampling(tmp_path, checkpoint_dir, problems_file) -> list[object]:
    """The arguments of a small probe that would work."""
    (tmp_path / "file").write_text("in the way")
    return ["--model-path", checkpoint_dir, "--dataset", problems_file, *SMALL, "--output-dir", tmp_path / "out"]


@cases(PROBE_FLAGS)
def test_flags_of_the_probe(refuses, sampling, tmp_path, case):
    flags, *says = case
    refuses(probe_grad_vectors.main, [*sampling, *placed(flags.split(), tmp_path)], *says)


def test_a_probe_lacking_what_it_must_have(refuses):
    refuses(probe_grad_vectors.main, ["--output-dir", "out"], "--model-path")
    refuses(probe_grad_vectors.main, ["--model-path", "model"], "--output-dir")


def test_more_bins_than_tokens(refuses, sampling):
    """Known only when all rollouts are sampled: what was there stays, the rollouts are new."""
    refuses(probe_grad_vectors.main, [*sampling, "--bins", "1000"], "--bins 1000", "tokens in all", may_add=True)


@pytest.mark.parametrize("edges", [[0, 1], [0, 1, 2, 3], [0, 1, 1], [0, math.nan, 1], ["a", "b", "c"], "0,1,2", None])
def test_edges_of_the_wrong_number_or_kind(refuses, sampling, tmp_path, edges):
    (tmp_path / "edges.json").write_text(json.dumps({"entropy_edges": edges, "bins": 2}))
    refuses(probe_grad_vectors.main, [*sampling, "--entropy-edges", tmp_path / "edges.json"], "TMP/edges.json")


def test_output_of_other_settings_in_use_or_of_somebody_else(refuses, run, sampling, probed, tmp_path):
    out = Path(shutil.copytree(probed[0], tmp_path / "out"))
    (out / ".lock").unlink(missing_ok=True)
    refuses(probe_grad_vectors.main, [*sampling, "--seed", 1], "TMP/out", "seed: 0, now 1", "--overwrite")
    with (out / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refuses(probe_grad_vectors.main, [*sampling, "--num-shards", 2], "TMP/out", "in use by another process")
    (out / "settings.json").unlink()
    refuses(probe_grad_vectors.main, sampling, "TMP/out", "did not make")
    (out / "settings.json").write_text("{")
    refuses(probe_grad_vectors.main, sampling, "TMP/out/settings.json", "not JSON")


# Data sets

GOOD = '{"id": "a", "prompt": "1+2", "ground_truth": "3"}\n'
ESCAPES = GOOD.replace('"a"', '"\\u001b[31m"')
DATA_SETS = {  # what else can be wrong with one: tests/problems/test_problems.py
    "empty": (b"", "--dataset TMP/problems.jsonl", "no problems"),
    "UTF-16": (GOOD.encode("utf-16"), "TMP/problems.jsonl", "not UTF-8"),
    "escapes in an id": ((ESCAPES + ESCAPES.replace("1+2", "2+2")).encode(), ":2", "\\x1b[31m"),
    "two broken lines": ((GOOD + "x\ny\n").encode(), "TMP/problems.jsonl:2", "1 more like it"),
}


@cases(DATA_SETS)
def test_data_sets(refuses, sampling, tmp_path, case):
    content, *says = case
    (tmp_path / "problems.jsonl").write_bytes(content)
    flags = ["--dataset", tmp_path / "problems.jsonl", "--num-prompts", 1]
    refuses(probe_grad_vectors.main, [*sampling, *flags], *says)


@pytest.mark.parametrize(("prompt", "says"), [("7" * 64, "the model's context 64"), ("", "at least 1")])
def test_prompts_that_the_model_can_not_take(refuses, sampling, tmp_path, prompt, says):
    (tmp_path / "problems.jsonl").write_text(json.dumps({"id": "far", "prompt": prompt, "ground_truth": "3"}))
    flags = ["--dataset", tmp_path / "problems.jsonl", "--num-prompts", 1, "--check-only"]
    refuses(probe_grad_vectors.main, [*sampling, *flags], "problem 'far'", says)


# Checkpoints


def edit_json(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def of_down_proj(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def spoil(checkpoint: Path) -> None:
        weights = load_file(checkpoint / "model.safetensors")
        changed = change(weights.pop("model.layers.1.mlp.down_proj.weight"))
        weights |= {} if changed is None else {"model.layers.1.mlp.down_proj.weight": changed}
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return spoil


def adapter_alone(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "Org/Base"}')


def pickled_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(MakesFile(checkpoint.parent / "pwned")))


class MakesFile:
    """Unpickling one creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


def own_code(checkpoint: Path, model_type: str = "unheard_of") -> None:
    (checkpoint / "modeling_own.py").write_text(f"import os\nos.mkdir({str(checkpoint.parent / 'pwned')!r})\n")
    auto_map = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_json(checkpoint / "config.json", model_type=model_type, auto_map=auto_map)


def without_end(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / "config.json", eos_token_id=None)
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": None}))


CHECKPOINTS = {
    "no config": (lambda path: (path / "config.json").unlink(), "TMP/model", "no config.json"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "TMP/model", "no model.safetensors"),
    "pickled weights only": (pickled_weights, "TMP/model", "no model.safetensors", "hold code"),
    "config not JSON": (lambda path: (path / "config.json").write_text("{"), "TMP/model", "not a valid JSON"),
    "unheard-of model": (
        lambda path: edit_json(path / "config.json", model_type="unheard_of"), "TMP/model", "unheard_of",
    ),
    "code of its own": (own_code, "TMP/model", "custom code"),
    "size is a word": (lambda path: edit_json(path / "config.json", hidden_size="big"), "TMP/model", "hidden_size"),
    "a weight missing": (of_down_proj(lambda weight: None), "TMP/model", "lacks weights", "layers.1.mlp.down_proj"),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("token*")], "TMP/model", "--tokenizer"),
    "tokenizer without vocabulary": (
        lambda path: (path / "tokenizer.json").unlink(), "TMP/model", "no vocabulary",
    ),
    "an adapter": (adapter_alone, "--model-path", "is an adapter; give it as --adapter", "its base, Org/Base"),
    "tokenizer not JSON": (lambda path: (path / "tokenizer.json").write_text("{"), "TMP/model", "can't be loaded"),
    "generation config not JSON": (
        lambda path: (path / "generation_config.json").write_text("{"), "TMP/model/generation_config.json", "not JSON",
    ),
    "no end of sequence": (without_end, "--model-path", "end-of-sequence"),
    "NaN in a weight": (of_down_proj(lambda weight: weight * math.nan), "not finite", "checkpoint"),
}  # fmt: skip


@cases(CHECKPOINTS)
def test_checkpoints(refuses, sampling, checkpoint_dir, tmp_path, monkeypatch, case):
    spoil, *says = case
    spoil(Path(shutil.copytree(checkpoint_dir, tmp_path / "model")))
    monkeypatch.setattr("sys.stdin", None)  # transformers would ask whether to run a checkpoint's code
    refuses(probe_grad_vectors.main, [*sampling, "--model-path", tmp_path / "model"], *says, may_add=True)
    assert not (tmp_path / "pwned").exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(run, sampling, checkpoint_dir, tmp_path):
    own_code(Path(shutil.copytree(checkpoint_dir, tmp_path / "model")), model_type="qwen2")
    assert run(probe_grad_vectors.main, *sampling, "--model-path", tmp_path / "model").status == 0
    assert not (tmp_path / "pwned").exists()


# Dumps


@pytest.fixture(scope="module")
def probed(tmp_path_factory, checkpoint_dir, problems_file) -> list[Path]:
    """Both shards of a study."""
    directory = tmp_path_factory.mktemp("probed")
    shards = [directory / "s0", directory / "s1"]
    for index, shard in enumerate(shards):
        sampling = ["--model-path", checkpoint_dir, "--dataset", problems_file, *SMALL, "--num-shards", 2]
        arguments = [*sampling, "--shard-index", index, "--output-dir", shard]
        assert probe_grad_vectors.main(list(map(str, arguments))) == 0
        (shard / ".lock").unlink()
    return shards


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A dump in the format of the original, 4 prompts of 2 rollouts and 5 buckets."""
    return plant(tmp_path_factory.mktemp("planted") / "dump")


def plant(path: Path, grads: np.ndarray | None = None, correct: np.ndarray | None = None, **manifest: object) -> Path:
    row = np.arange(N_ROWS)
    grads = np.random.default_rng(0).standard_normal((N_ROWS, DIM)) if grads is None else grads
    sample = row // 10 % 2
    correct = sample == 0 if correct is None else correct
    return write_dump(path, grads, row % 5, prompt=row // 20, sample=sample, correct=correct, **manifest)


def edit_meta(number: int, **changes: object) -> Callable[[Path], None]:
    """Change the meta line of that number, from 1."""

    def edit(dump: Path) -> None:
        lines = (dump / "meta.jsonl").read_text().splitlines(keepends=True)
        lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes}) + "\n"
        (dump / "meta.jsonl").write_text("".join(lines))

    return edit


def edit_manifest(**changes: object) -> Callable[[Path], None]:
    return lambda dump: edit_json(dump / "manifest.json", **changes)


def save_grads(make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def save(dump: Path) -> None:
        np.save(dump / "grads.npy", make(np.load(dump / "grads.npy")), allow_pickle=True)

    return save


def patch(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(dump: Path) -> None:
        content = (dump / name).read_bytes()
        assert content.count(old) >= 1
        (dump / name).write_bytes(content.replace(old, new, 1))

    return edit


def append(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda dump: (dump / name).write_bytes((dump / name).read_bytes() + content)


META, GRADS, MANIFEST = "dump/meta.jsonl", "dump/grads.npy", "dump/manifest.json"
DUMPS = {
    "no directory": (shutil.rmtree, MANIFEST, "not a finished dump"),
    "a file": (lambda dump: (shutil.rmtree(dump), dump.write_text("x")), MANIFEST, "Not a directory"),
    "no manifest": (lambda dump: (dump / "manifest.json").unlink(), MANIFEST, "not a finished dump"),
    "no gradients": (lambda dump: (dump / "grads.npy").unlink(), GRADS, "No such file"),
    "no meta": (lambda dump: (dump / "meta.jsonl").unlink(), META, "No such file"),
    "gradients are a directory": (
        lambda dump: ((dump / "grads.npy").unlink(), (dump / "grads.npy").mkdir()), GRADS, "Is a directory",
    ),
    "gradients empty": (lambda dump: os.truncate(dump / "grads.npy", 0), GRADS, "not a readable .npy"),
    "gradients cut in the header": (lambda dump: os.truncate(dump / "grads.npy", 30), GRADS, "header"),
    "gradients cut short": (lambda dump: os.truncate(dump / "grads.npy", 900), GRADS, "cut short"),
    "gradients cut by a byte": (lambda dump: os.truncate(dump / "grads.npy", 128 + 959), GRADS, "cut short"),
    "gradients of float64": (save_grads(lambda g: g.astype("f8")), GRADS, "float32", "<f8"),
    "gradients of integers": (save_grads(lambda g: g.astype("i4")), GRADS, "float32", "<i4"),
    "gradients big-endian": (save_grads(lambda g: g.astype(">f4")), GRADS, "little-endian", ">f4"),
    "gradients 1-D": (save_grads(np.ravel), GRADS, "two dimensions", "(240,)"),
    "gradients in Fortran order": (save_grads(np.asfortranarray), GRADS, "Fortran order"),
    "gradients of objects": (save_grads(lambda g: np.array([{}] * 40, dtype=object)), GRADS, "array of numbers"),
    "gradients are a pickle": (
        lambda dump: (dump / "grads.npy").write_bytes(pickle.dumps(np.zeros((40, 6), "f4"))), GRADS, "not a readable",
    ),
    "fewer rows": (save_grads(lambda g: g[:39]), MANIFEST, "num_positions is 40", "has 39"),
    "another dimension": (save_grads(lambda g: g[:, :5].copy()), MANIFEST, "row_dim is 6", "has 5"),
    "meta shorter": (
        lambda dump: (dump / "meta.jsonl").write_bytes((dump / "meta.jsonl").read_bytes().split(b"\n", 1)[1]),
        META, "39 lines for the 40 rows",
    ),
    "meta longer": (append("meta.jsonl", b'{"row": 40}\n'), META + ":41", "41 lines for the 40 rows"),
    "meta empty": (lambda dump: os.truncate(dump / "meta.jsonl", 0), META, "0 lines for the 40 rows"),
    "meta torn": (lambda dump: os.truncate(dump / "meta.jsonl", 1000), META + ":", "not JSON"),
    "meta with a blank line": (append("meta.jsonl", b"\n"), META + ":41", "not JSON"),
    "a row twice": (edit_meta(2, row=39), META + ":2", "row 39 stands twice"),
    "a row outside": (edit_meta(3, row=40), META + ":3", "row 40 is outside 0..39"),
    "a row that is true": (edit_meta(39, row=True), META + ":39", "'row'"),
    "entropy NaN": (edit_meta(3, entropy=math.nan), META + ":3", "'entropy' is not a finite number"),
    "entropy a text": (edit_meta(3, entropy="0.5"), META + ":3", "'entropy'"),
    "entropy null": (edit_meta(3, entropy=None), META + ":3", "'entropy'"),
    "logprob a text": (edit_meta(3, logprob="-1"), META + ":3", "'logprob'"),
    "bin outside": (edit_meta(3, bin=5), META + ":3", "bin 5 is outside 0..4"),
    "bin not the edges'": (edit_meta(3, entropy=0.05), META, "1 rows are not in the bin of their", "rows 37"),
    "correct is 1": (edit_meta(3, correct=1), META + ":3", "'correct'"),
    "prompt a text": (edit_meta(3, prompt_idx="7"), META + ":3", "prompt_idx"),
    "sample missing": (patch("meta.jsonl", b"sample_idx", b"sample"), META + ":1", "'sample_idx'"),
    "meta not UTF-8": (patch("meta.jsonl", b'"row"', b'"r\xffw"'), META + ":1", "not UTF-8"),
    "manifest empty": (lambda dump: os.truncate(dump / "manifest.json", 0), MANIFEST, "not JSON"),
    "manifest a list": (lambda dump: (dump / "manifest.json").write_text("[]"), MANIFEST, "not a JSON object"),
    "manifest not UTF-8": (patch("manifest.json", b"planted", b"plant\xff\xff"), MANIFEST, "not UTF-8"),
    "manifest without edges": (edit_manifest(entropy_edges=None), MANIFEST, "'entropy_edges' is missing"),
    "manifest without two keys": (edit_manifest(bins=None, target=None), MANIFEST, "'target' is", "'bins' is missing"),
    "bins a text": (edit_manifest(bins="5"), MANIFEST, "'bins' is not an integer"),
    "row index negative": (edit_manifest(row_idx=-1), MANIFEST, "'row_idx' is not an integer from 0"),
    "target a number": (edit_manifest(target=7), MANIFEST, "'target' is not a text"),
    "positions miscounted": (edit_manifest(num_positions=41), MANIFEST, "num_positions is 41", "has 40"),
    "prompts miscounted": (edit_manifest(num_prompts=1), MANIFEST, "num_prompts is 1", "2"),
    "rollouts miscounted": (edit_manifest(num_rollouts=3), MANIFEST, "num_rollouts is 3", "4"),
    "edges for fewer bins": (edit_manifest(bins=4), MANIFEST, "6 entropy_edges for 4 bins"),
    "edges falling": (edit_manifest(entropy_edges=[0, 1, 0.5, 2, 3, 4]), MANIFEST, "not increasing"),
    "edges of texts": (edit_manifest(entropy_edges=list("abcdef")), MANIFEST, "not increasing"),
    "a bit flipped in the gradients": (
        lambda dump: (with_checksums(dump), flip_bit(dump / "grads.npy", -5)), GRADS, "has changed since",
    ),
    "a line changed in the meta": (
        lambda dump: (with_checksums(dump), edit_meta(3, pos=99)(dump)), META, "has changed since",
    ),
    "checksums that are no hashes": (edit_manifest(checksums={"grads.npy": 7}), GRADS, "has changed since"),
    "rollouts of the checksums missing": (
        edit_manifest(checksums={"rollouts.jsonl": "0" * 64}), "rollouts.jsonl", "no such file",
    ),
    "targets of which one is missing": (
        lambda dump: (
            shutil.copytree(dump, dump / "a"),
            [file.unlink() for file in dump.glob("*.*")],
            (dump / "settings.json").write_text('{"targets": ["a", "b"]}'),
        ),
        "dump/b", "not a finished dump",
    ),
}  # fmt: skip
READERS = {
    "check": (check.main, lambda dump, other: [dump]),
    "merge": (merge_grad_vector_shards.main, lambda dump, other: [dump.parent / "merged", other, dump]),
    "exp1": (analyze_exp1_compression.main, lambda dump, other: [f"good={other}", f"bad={dump}"]),
    "exp2": (analyze_exp2_direction.main, lambda dump, other: [dump]),
    "plots": (
        plot_exp12_intuitive.main,
        lambda dump, other: ["--base", other, "--trained", dump, "--output-dir", dump.parent / "figures"],
    ),
}


def with_checksums(dump: Path) -> None:
    edit_json(dump / "manifest.json", checksums=checksums_of(dump, read_content(dump)))


def flip_bit(file: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(bytes(content))


OF_EVERY_READER = ("no manifest", "gradients cut short", "meta torn", "a row twice", "bin not the edges'")
OF_EVERY_READER += ("a bit flipped in the gradients", "a line changed in the meta")
CASES = [
    pytest.param(reader, name, id=f"{name}-{reader}")
    for name in DUMPS
    for reader in READERS
    if reader == "check" or name in OF_EVERY_READER
]


@pytest.mark.parametrize(("reader", "name"), CASES)
def test_dumps(refuses, planted, tmp_path, reader, name):
    spoil, *says = DUMPS[name]
    dump = Path(shutil.copytree(planted, tmp_path / "dump"))
    spoil(dump)
    main, arguments = READERS[reader]
    refuses(main, arguments(dump, planted), *says)


def test_all_problems_of_all_dumps_are_named_at_once(refuses, planted, tmp_path):
    dumps = [Path(shutil.copytree(planted, tmp_path / name)) for name in ("a", "b")]
    edit_meta(3, bin=7, row=5)(dumps[0])
    edit_meta(9, entropy=None)(dumps[0])
    edit_manifest(bins="5", target=None)(dumps[1])
    says = ["TMP/a/meta.jsonl:3", "TMP/a/meta.jsonl:9", "TMP/b/manifest.json: 'target'", "'bins'"]
    refuses(check.main, dumps, *says)
    refuses(analyze_exp1_compression.main, [f"a={dumps[0]}", f"b={dumps[1]}"], *says)


def test_no_pickle_is_loaded(refuses, planted, tmp_path):
    dump, marker = Path(shutil.copytree(planted, tmp_path / "dump")), tmp_path / "pwned"
    np.save(dump / "grads.npy", np.array([[MakesFile(marker)] * DIM] * N_ROWS, dtype=object), allow_pickle=True)
    for main, arguments in READERS.values():
        refuses(main, arguments(dump, planted), "grads.npy", "not a readable .npy array of numbers")
    assert not marker.exists()
    np.load(dump / "grads.npy", allow_pickle=True)
    assert marker.exists(), "the trap must work"


def first_token_twice(dump: Path) -> None:
    first = json.loads((dump / "meta.jsonl").read_text().splitlines()[0])
    edit_meta(2, **{**first, "row": 1})(dump)


def shift_entropy(dump: Path) -> None:
    first = json.loads((dump / "meta.jsonl").read_text().splitlines()[0])
    edit_meta(1, entropy=np.nextafter(first["entropy"], 0))(dump)


def edit_rollout(**changes: object) -> Callable[[Path], None]:
    """Change the second rollout."""

    def edit(file: Path) -> None:
        lines = file.read_text().splitlines(keepends=True)
        record = {**json.loads(lines[1]), **changes}
        lines[1] = json.dumps({key: value for key, value in record.items() if value is not None}) + "\n"
        file.write_text("".join(lines))

    return edit


def of_rollouts(**changes: object) -> Callable[[Path], None]:
    return lambda dump: edit_rollout(**changes)(dump / "rollouts.jsonl")


PROBED = {
    "rollouts changed": (patch("rollouts.jsonl", b'"correct": false', b'"correct": true '), "has changed since"),
}
UNSIGNED = {
    "a token twice": (first_token_twice, "dump/meta.jsonl", "token stands in two rows"),
    "entropy not the rollout's": (shift_entropy, "row 0", "entropy is"),
    "rollouts torn": (lambda dump: os.truncate(dump / "rollouts.jsonl", 500), "dump/rollouts.jsonl:", "not JSON"),
    "a rollout less": (
        lambda dump: (dump / "rollouts.jsonl").write_bytes((dump / "rollouts.jsonl").read_bytes().split(b"\n", 1)[1]),
        "num_rollouts is 4, but", "has 3", "is not in",
    ),
    "a rollout twice": (
        lambda dump: append("rollouts.jsonl", (dump / "rollouts.jsonl").read_bytes().split(b"\n")[0] + b"\n")(dump),
        "dump/rollouts.jsonl: prompt", "stands twice",
    ),
    "verdict not the rollout's": (
        patch("rollouts.jsonl", b'"correct": false', b'"correct": true'), "row 0", "correct is",
    ),
    "log-prob not the rollout's": (edit_meta(1, logprob=-9.5), "row 0", "logprob is -9.5"),
    "place behind the response": (edit_meta(1, pos=50), "dump/meta.jsonl: prompt", "row 0 is of pos 50"),
    "fewer entropies than tokens": (of_rollouts(entropies=[]), "dump/rollouts.jsonl:2", "differ in length"),
    "more log-probs than tokens": (of_rollouts(logprobs=[-1.0] * 50), "dump/rollouts.jsonl:2", "differ in length"),
    "entropies of text": (of_rollouts(entropies=["0.1"]), "dump/rollouts.jsonl:2", "not a list of finite numbers"),
    "correct rollouts miscounted": (edit_manifest(num_correct_rollouts=3), "num_correct_rollouts is 3, but"),
    "tokens miscounted": (edit_manifest(num_response_tokens=3), "num_response_tokens is 3, but"),
}  # fmt: skip


@cases(PROBED | UNSIGNED)
def test_dumps_of_ours_are_held_against_their_rollouts(refuses, probed, tmp_path, case):
    spoil, *says = case
    dump = Path(shutil.copytree(probed[0], tmp_path / "dump"))
    spoil(dump)
    if case in UNSIGNED.values():
        edit_json(dump / "manifest.json", checksums=None)
    refuses(check.main, [dump], *says)


# Rows that no analysis can use


def test_check_names_rows_that_are_not_finite(refuses, run, tmp_path):
    grads = np.ones((N_ROWS, DIM))
    grads[7, 2], grads[9] = np.inf, np.nan
    plant(tmp_path / "unnamed", grads)
    refuses(check.main, [tmp_path / "unnamed"], "TMP/unnamed/grads.npy", "in 2 rows (7, 9)")
    plant(tmp_path / "half", grads, nonfinite_rows=[7])
    refuses(check.main, [tmp_path / "half"], "TMP/half/grads.npy", "in 1 rows (9)")
    grads[11] = 0
    plant(tmp_path / "named", grads, nonfinite_rows=[7, 9], zero_rows=[11])
    outcome = run(check.main, tmp_path / "named")
    assert outcome.status == 0
    assert outcome.out == f"{tmp_path / 'named'}: sound\n"
    assert "2 rows are not finite, as its manifest says (7, 9)" in outcome.err
    assert "1 rows are zero throughout (11)" in outcome.err


def without_nan(name: str) -> float:
    raise AssertionError(f"{name} in a JSON file")


def without_hashes(content: dict) -> dict:
    """Without SHA-256 sums, which are other ones for other files."""
    hashes = [key for key, value in content.items() if re.search(r"\b[0-9a-f]{64}\b", json.dumps(value)[:80])]
    return {key: value for key, value in content.items() if key not in hashes}


def summary_of(directory: Path) -> dict:
    (file,) = directory.glob("*_summary.json")
    return json.loads(file.read_text(), parse_constant=without_nan, object_hook=without_hashes)


@pytest.mark.parametrize("main", [analyze_exp1_compression.main, analyze_exp2_direction.main])
def test_faulty_rows_change_no_number(run, tmp_path, main):
    clean = load_dump(plant(tmp_path / "clean" / "dump"))
    faulty_rows = np.array([3, 17, 18, 40])
    all_rows = np.insert(clean.grads, faulty_rows - np.arange(4), 0.0, axis=0)
    all_rows[3, 1], all_rows[17], all_rows[40, 0] = np.nan, np.inf, -np.inf

    def spread(column: np.ndarray) -> np.ndarray:
        return np.insert(column, faulty_rows - np.arange(4), column[-1])

    columns = {"prompt": spread(clean.prompt), "sample": spread(clean.sample_idx), "correct": spread(clean.correct)}
    write_dump(tmp_path / "faulty" / "dump", all_rows, spread(clean.bin), **columns)
    for name in ("clean", "faulty"):
        outcome = run(main, f"tag={tmp_path / name / 'dump'}", "--output-dir", tmp_path / name / "out")
        assert outcome.status == 0
    assert "3 rows with NaN or infinity are left out (3, 17, 40)" in outcome.err
    assert "1 rows that are zero throughout are left out (18)" in outcome.err
    assert summary_of(tmp_path / "faulty" / "out") == summary_of(tmp_path / "clean" / "out")


def one_position(path: Path) -> Path:
    return write_dump(path, np.ones((1, DIM)), np.array([4]))


def no_positions(path: Path) -> Path:
    return write_dump(path, np.ones((0, DIM)), np.zeros(0, int))


FEW = {
    "one position": one_position,
    "no positions": no_positions,
    "all correct": lambda path: plant(path, correct=np.ones(N_ROWS, bool)),
    "none correct": lambda path: plant(path, correct=np.zeros(N_ROWS, bool)),
    "all rows faulty": lambda path: plant(path, np.full((N_ROWS, DIM), np.nan), nonfinite_rows=list(range(N_ROWS))),
    "all rows alike": lambda path: plant(path, np.ones((N_ROWS, DIM))),
    "enormous rows": lambda path: plant(path, np.full((N_ROWS, DIM), 3e38)),
    "tiny rows": lambda path: plant(path, np.full((N_ROWS, DIM), 1e-45)),
}


WITHOUT_PAIRS = ("one position", "no positions", "all correct", "none correct")


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        *(("check", name) for name in FEW),
        *(("exp1", name) for name in FEW if "correct" not in name),  # Exp 1 asks for no verdicts
        *(("exp2", name) for name in FEW),
    ],
)
def test_what_can_not_be_had_is_null(run, tmp_path, reader, name):
    dump = FEW[name](tmp_path / "dump")
    main, arguments = READERS[reader]
    outcome = run(main, *arguments(dump, dump))
    assert outcome.status == 0, outcome.err
    if reader.startswith("exp"):
        summary = summary_of(tmp_path / "exp12_figures")
        if reader == "exp2" and name in WITHOUT_PAIRS:
            assert summary["n_prompts_usable"] == 0
            assert summary["correct_vs_incorrect"]["mean"] is None


@pytest.mark.parametrize("name", ["no positions", "none correct", "enormous rows"])
def test_figures_are_drawn_of_what_there_is(run, tmp_path, name):
    dump = FEW[name](tmp_path / "dump")
    main, arguments = READERS["plots"]
    assert run(main, *arguments(dump, dump)).status == 0
    assert list((tmp_path / "figures").glob("*.png"))


# Command lines of the analyses, the plots and the check

COMMANDS = {
    "exp1 of nothing": (analyze_exp1_compression.main, "", "required"),
    "exp2 of nothing": (analyze_exp2_direction.main, "", "required"),
    "check of nothing": (check.main, "", "required"),
    "merge of nothing": (merge_grad_vector_shards.main, "TMP/merged", "required"),
    "exp1 without a tag": (analyze_exp1_compression.main, "DUMP", "is not TAG=DUMP"),
    "exp1 with an empty tag": (analyze_exp1_compression.main, "=DUMP", "is not TAG=DUMP"),
    "exp1 with an empty path": (analyze_exp1_compression.main, "base=", "is not TAG=DUMP"),
    "exp1 with a tag twice": (analyze_exp1_compression.main, "a=DUMP a=DUMP", "tag 'a' is given twice"),
    "exp2 with a tag twice": (analyze_exp2_direction.main, "a=DUMP a=DUMP", "tag 'a' is given twice"),
    "exp2 with two untagged": (analyze_exp2_direction.main, "DUMP DUMP", "is not TAG=DUMP"),
    "exp2 with an empty tag": (analyze_exp2_direction.main, "=DUMP a=DUMP", "is not TAG=DUMP"),
    "plots without --base": (plot_exp12_intuitive.main, "--trained DUMP --output-dir TMP/o", "--base"),
    "plots without --trained": (plot_exp12_intuitive.main, "--base DUMP --output-dir TMP/o", "--trained"),
    "plots without --output-dir": (plot_exp12_intuitive.main, "--base DUMP --trained DUMP", "--output-dir"),
    "exp1 into a file": (analyze_exp1_compression.main, "a=DUMP --output-dir TMP/file", "TMP/file: File exists"),
    "exp2 into a file": (analyze_exp2_direction.main, "DUMP --output-dir TMP/file", "TMP/file: File exists"),
    "exp1 below a file": (analyze_exp1_compression.main, "a=DUMP --output-dir TMP/file/o", "Not a directory"),
    "exp2 below a file": (analyze_exp2_direction.main, "DUMP --output-dir TMP/file/o", "Not a directory"),
    "exp1 into /proc": (analyze_exp1_compression.main, "a=DUMP --output-dir /proc/nowhere", "/proc/nowhere"),
    "plots into a file": (
        plot_exp12_intuitive.main, "--base DUMP --trained DUMP --output-dir TMP/file", "TMP/file: File exists",
    ),
    "merge into a file": (merge_grad_vector_shards.main, "TMP/file DUMP", "TMP/file: File exists"),
    "merge below a file": (merge_grad_vector_shards.main, "TMP/file/merged DUMP", "Not a directory"),
    "merge into /proc": (merge_grad_vector_shards.main, "/proc/nowhere DUMP", "/proc/nowhere"),
}  # fmt: skip


@cases(COMMANDS)
def test_command_lines(refuses, planted, tmp_path, case):
    main, arguments, *says = case
    (tmp_path / "file").write_text("in the way")
    refuses(main, [part.replace("DUMP", str(planted)) for part in placed(arguments.split(), tmp_path)], *says)


def test_a_rollout_that_is_both_correct_and_incorrect(refuses, planted, tmp_path):
    dump = Path(shutil.copytree(planted, tmp_path / "dump"))
    edit_meta(1, correct=not load_dump(dump).correct[-1].item())(dump)
    for reader in ("check", "exp2"):
        main, arguments = READERS[reader]
        refuses(main, arguments(dump, planted), "TMP/dump/meta.jsonl", "both correct and incorrect")


# Merging


def shards_at(paths: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(path, tmp_path / path.name)) for path in paths]


SHARDS = {
    "one missing": (lambda s: ["merged", "s0"], "shard 1 of 2 is missing"),
    "one given twice": (lambda s: ["merged", "s0", "s1", "s0"], "a shard is given twice"),
    "one given twice, under two names": (lambda s: ["merged", "s0", "s1", "../" + s[0].parent.name + "/s0"], "twice"),
    "one copied": (lambda s: [shutil.copytree(s[0], s[0].parent / "c") and "merged", "s0", "s1", "c"], "again in"),
    "of another count": (
        lambda s: [edit_json(s[1] / "manifest.json", shard={"index": 1, "num_shards": 3}) or "merged", "s0", "s1"],
        "s1: is shard 1 of 3",
    ),
    "of another model": (
        lambda s: [edit_json(s[1] / "manifest.json", model_identity={"revision": "x"}) or "merged", "s0", "s1"],
        "model_identity is",
    ),
    "of another seed": (lambda s: [edit_json(s[1] / "manifest.json", seed=9) or "merged", "s0", "s1"], "seed is 0 in"),
    "of another temperature": (
        lambda s: [edit_json(s[1] / "manifest.json", temperature=0.5) or "merged", "s0", "s1"],
        "temperature is 1.0 in", "0.5 in TMP/s1",
    ),
    "of another row": (lambda s: [edit_json(s[1] / "manifest.json", row_idx=1) or "merged", "s0", "s1"], "row_idx is"),
    "unfinished": (lambda s: [(s[1] / "manifest.json").unlink() or "merged", "s0", "s1"], "s1/manifest.json", "not a"),
    "changed": (lambda s: [flip_bit(s[1] / "grads.npy", -1) or "merged", "s0", "s1"], "s1/grads.npy", "has changed"),
    "rollouts changed": (
        lambda s: [flip_bit(s[1] / "rollouts.jsonl", 20, 1) or "merged", "s0", "s1"], "s1/rollouts.jsonl", "changed",
    ),
    "the output": (lambda s: ["s0", "s0", "s1"], "TMP/s0: is, or holds, or is in the shard"),
    "inside the output": (lambda s: [".", "s0", "s1"], "holds, or is in the shard TMP/s0"),
    "around the output": (lambda s: ["s0/merged", "s0", "s1"], "s0/merged: is, or holds, or is in the shard"),
    "the output forgotten": (
        lambda s: [edit_json(s[1] / "manifest.json", shard={"index": 0, "num_shards": 1}) or "s0", "s1"],
        "TMP/s0/manifest.json: is of a dump that is no merged one",
    ),
    "none such": (lambda s: ["merged", "s0", "s7"], "TMP/s7/manifest.json", "not a finished dump"),
}  # fmt: skip


@cases(SHARDS)
def test_shards(refuses, probed, tmp_path, case):
    arrange, *says = case
    names = arrange(shards_at(probed, tmp_path))
    refuses(merge_grad_vector_shards.main, [f"{tmp_path}/{name}" for name in names], *says)


def test_other_merged_dumps_are_left_alone(refuses, run, probed, tmp_path):
    merged = tmp_path / "study" / "base"
    assert run(merge_grad_vector_shards.main, merged, *probed).status == 0
    (merged / ".lock").unlink()
    refuses(merge_grad_vector_shards.main, [tmp_path / "study", *probed], "TMP/study: holds other dumps (base)")
    assert run(merge_grad_vector_shards.main, merged, *probed).status == 0, "a merged dump is made anew"


# Rollouts brought along


FILE = "TMP/rollouts.jsonl:2"
UNSCORED = {"tail_mass": None, "token_texts": None, "sum_p2": None}
"""As files of older versions were."""
ROLLOUTS = {
    "missing": (Path.unlink, "TMP/rollouts.jsonl", "No such file"),
    "torn": (lambda file: os.truncate(file, file.stat().st_size - 30), "rollouts.jsonl:4", "JSON"),
    "a key missing": (edit_rollout(response_ids=None), FILE),
    "ids of text": (edit_rollout(response_ids=["1"], entropies=[0.1], logprobs=[-1]), FILE, "response"),
    "ids outside the vocabulary": (edit_rollout(response_ids=[260], entropies=[0.1], logprobs=[-1], **UNSCORED), "260"),
    "no prompt": (edit_rollout(prompt_ids=[]), FILE, "prompt"),
    "prompt negative": (edit_rollout(prompt_idx=-1), FILE, "prompt_idx"),
    "a sample twice": (lambda file: file.write_text(file.read_text() * 2), "rollouts.jsonl", "twice"),
}  # fmt: skip


@pytest.fixture
def probing_rollouts(checkpoint_dir, probed, tmp_path) -> list[object]:
    shutil.copy(probed[0] / "rollouts.jsonl", tmp_path)
    flags = ["--device", "cpu", "--bins", "2", "--output-dir", tmp_path / "out"]
    return ["--model-path", checkpoint_dir, "--rollouts", tmp_path / "rollouts.jsonl", *flags]


@cases(ROLLOUTS)
def test_rollouts(refuses, probing_rollouts, tmp_path, case):
    spoil, *says = case
    spoil(tmp_path / "rollouts.jsonl")
    refuses(probe_grad_vectors.main, probing_rollouts, *says, may_add=True)


def test_rollouts_longer_than_the_context_are_left_out_and_counted(run, probing_rollouts, tmp_path):
    spoil = edit_rollout(response_ids=[1] * 64, entropies=[0.1] * 64, logprobs=[-1.0] * 64, **UNSCORED)
    spoil(tmp_path / "rollouts.jsonl")
    outcome = run(probe_grad_vectors.main, *probing_rollouts)
    assert outcome.status == 0
    assert "longer than the model's context" in outcome.err
    assert len((tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()) == 3


def test_rollouts_of_no_manifest_and_empty_responses_are_probed(run, probing_rollouts, tmp_path):
    edit_rollout(response_ids=[], entropies=[], logprobs=[], response="", **UNSCORED)(tmp_path / "rollouts.jsonl")
    outcome = run(probe_grad_vectors.main, *probing_rollouts)
    assert outcome.status == 0, outcome.err
    assert run(check.main, tmp_path / "out").status == 0
    main, arguments = READERS["exp2"]
    assert run(main, *arguments(tmp_path / "out", tmp_path / "out")).status == 0
    alone = (tmp_path / "rollouts.jsonl").read_text().splitlines(keepends=True)[1]
    (tmp_path / "rollouts.jsonl").write_text(alone)
    outcome = run(probe_grad_vectors.main, *probing_rollouts[:-1], tmp_path / "empty")
    assert outcome.status == 2
    assert len(outcome.errors) == 1


# Names and texts that are awkward


def test_awkward_names_work_and_never_reach_a_terminal_raw(run, sampling, problems_file, checkpoint_dir, tmp_path):
    odd = tmp_path / ODD_NAME
    odd.mkdir()
    model, data = shutil.copytree(checkpoint_dir, odd / "model"), shutil.copy(problems_file, odd)
    shard, merged, figures = odd / "s0", odd / ODD_NAME, odd / "figures"
    commands = [
        (probe_grad_vectors.main, [*sampling, "--model-path", model, "--dataset", data, "--output-dir", shard]),
        (merge_grad_vector_shards.main, [merged, shard]),
        (check.main, [merged, shard]),
        (analyze_exp1_compression.main, [f"b={shard}", f"t={merged}", "--output-dir", figures]),
        (analyze_exp2_direction.main, [shard]),
        (plot_exp12_intuitive.main, ["--base", shard, "--trained", merged, "--output-dir", figures]),
    ]
    for main, arguments in commands:
        outcome = run(main, *arguments)
        assert outcome.status == 0, outcome.err
        assert ESCAPED_ODD_NAME in outcome.out + outcome.err
    assert not (Path.cwd() / "pwned").exists()


@pytest.mark.parametrize("reader", READERS)
def test_awkward_names_are_escaped_on_one_line(refuses, planted, tmp_path, reader):
    dump = tmp_path / ODD_NAME / "dump"
    dump.parent.mkdir()
    main, arguments = READERS[reader]
    assert ESCAPED_ODD_NAME in refuses(main, arguments(dump, planted), "not a finished dump")


def test_texts_of_a_dump_never_reach_a_terminal_raw(run, tmp_path):
    texts = {"model_path": "models/\x1b]0;title\x07\nx", "target": "layers.0\x9b31m.weight"}
    dump = plant(tmp_path / "dump", **texts)
    for main, arguments in READERS.values():
        assert run(main, *arguments(dump, dump)[-1:] if main is check.main else arguments(dump, dump)).status in (0, 2)


# The same from a shell


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["probe_grad_vectors.py", "--model-path", "TMP/no", "--output-dir", "TMP/o"], "--model-path TMP/no"),
        (["merge_grad_vector_shards.py", "TMP/o", "TMP/no"], "TMP/no/manifest.json: not a finished dump"),
        (["analyze_exp2_direction.py", "TMP/a\nb"], "a\\nb/manifest.json: not a finished dump"),
        (["-m", "gradprobe.check", "TMP/no", "TMP/also\x1b"], "TMP/no/manifest.json: not a finished dump"),
    ],
)
def test_from_a_shell(tmp_path, command, says):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}
    result = subprocess.run(
        [sys.executable, *placed(command, tmp_path)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert says.replace("TMP", str(tmp_path)) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(run, planted, tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "grads.npy.partial")

    monkeypatch.setattr("os.posix_fallocate", full)
    outcome = run(merge_grad_vector_shards.main, tmp_path / "merged", planted)
    assert outcome.status == 2
    (error,) = outcome.errors
    assert error.startswith("error: grads.npy.partial: No space left on device; make room")
