"""Killed at random moments and started again: what is on disk in the end is what a run without kills writes.

GRADPROBE_KILLS says how many kills (default 20).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

from gradprobe.common.files import locked
from gradprobe.dump.consistency import problems_of

ROOT = Path(__file__).parents[2]
N_KILLS = int(os.environ.get("GRADPROBE_KILLS", "20"))
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]
MANIFEST_HASH = re.compile(rb'"manifest_sha256": \[[^]]*\]|"content_sha256": "\w*"')
DUMP_FILES = ("grads.npy", "meta.jsonl", "rollouts.jsonl")
# Many small batches, so that there is much to be killed between.
SMALL = "--num-prompts 8 --num-samples 3 --max-new-tokens 16 --device cpu --bins 3 --pos-per-bin-per-rollout 2"
BATCHES = "--batch-tokens 100 --sample-rows 6"


class Zygote:
    """See zygote.py."""

    def __init__(self, log: Path):
        self.log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(
        self,
        step: "Step",
        kill_after: float | None = None,
        kill_at: tuple[str, int] | None = None,
        by: int = signal.SIGKILL,
    ) -> dict[str, float]:
        order = {"script": step.script, "argv": step.argv, "log": str(self.log), "signal": by}
        order |= {"kill_after": kill_after, "kill_at": kill_at}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@dataclass(frozen=True)
class Step:
    """One script's call, the files that must come out the same, and what must be gone before it begins anew."""

    name: str
    script: str
    argv: list[str]
    files: list[Path]
    output: Path

    def content(self) -> dict[str, bytes]:
        """Of each file; a summary without its seal and the hash of its dump's manifest, which has times in it."""
        return {str(file): MANIFEST_HASH.sub(b"", file.read_bytes()) for file in self.files}


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    zygote = Zygote(tmp_path_factory.mktemp("zygote") / "log")
    yield zygote
    zygote.process.stdin.close()
    zygote.process.wait()
    print(zygote.log.read_text())


@pytest.fixture(scope="module")
def steps(tmp_path_factory, problems_file) -> list[Step]:
    root = tmp_path_factory.mktemp("study")
    model = tiny_checkpoint(root / "model", seed=3)
    sampling = ["--model-path", str(model), "--dataset", str(problems_file), *SMALL.split(), *BATCHES.split()]

    def probe(name: str, *arguments: str, targets: tuple[str, ...] = ("",)) -> Step:
        output = root / name
        files = [output / t / file for t in targets for file in DUMP_FILES[:2]] + [output / "rollouts.jsonl"]
        return Step(name, "probe_grad_vectors", ["--output-dir", str(output), *sampling, *arguments], files, output)

    shards = [probe(f"s{i}", "--shard-index", str(i), "--num-shards", "2") for i in range(2)]
    several = probe("several", "--layer", "0,2", targets=("L0.mlp.down_proj.weight.r0", "L2.mlp.down_proj.weight.r0"))
    merged, results = root / "merged", root / "results"
    merge = Step(
        "merge",
        "merge_grad_vector_shards",
        [str(merged), *(str(shard.output) for shard in shards)],
        [merged / file for file in DUMP_FILES],
        merged,
    )
    analyses = [
        Step(
            name,
            script,
            ["--output-dir", str(results / name), f"base={merged}"],
            [results / name / f"{name}_summary.json"],
            results / name,
        )
        for name, script in (("exp1", "analyze_exp1_compression"), ("exp2", "analyze_exp2_direction"))
    ]
    return [*shards, several, merge, *analyses]


@pytest.fixture(scope="module")
def undisturbed(steps, zygote) -> dict[str, tuple[dict[str, bytes], float]]:
    """Of each step what it writes, and the seconds it takes, when nobody kills it."""
    expected = {}
    for step in steps:
        result = zygote.run(step)
        assert result["status"] == 0, zygote.log.read_text()
        expected[step.name] = (step.content(), result["seconds"])
    return expected


@pytest.mark.slow
def test_killed_and_continued_is_as_never_killed(steps, undisturbed, zygote):
    rng = np.random.default_rng(20251122)
    weights = np.array([3, 2, 3, 1, 1, 1])
    n_kills = n_late = 0
    while n_kills < N_KILLS:
        step = steps[rng.choice(len(steps), p=weights / weights.sum())]
        expected, seconds = undisturbed[step.name]
        shutil.rmtree(step.output)
        by = SIGNALS[rng.integers(len(SIGNALS))]
        moment = float(rng.uniform(0, seconds))
        killed = zygote.run(step, kill_after=moment, by=by)["status"]
        assert killed in (0, -by, 128 + by), zygote.log.read_text()
        if killed != 0 and step.script == "probe_grad_vectors" and rng.random() < 0.3:
            tear(step.output, rng)
        n_kills, n_late = n_kills + (killed != 0), n_late + (killed == 0)
        assert zygote.run(step)["status"] == 0, zygote.log.read_text()
        assert step.content() == expected, f"{step.name} killed by {by} after {moment:.3f} s"
        if step.script in ("probe_grad_vectors", "merge_grad_vector_shards"):
            assert problems_of(step.output)[0] == []
            assert not list(step.output.rglob("*.partial"))
    print(f"{n_kills} kills, {n_kills + n_late} results as without ({n_late} signals came too late)")


def tear(output: Path, rng: np.random.Generator) -> None:
    """What a power cut may leave: a file that is short, has a torn end, or a changed byte."""
    files = [file for file in output.rglob("*") if file.is_file() and file.suffix in (".partial", ".npy", ".jsonl")]
    for file in files:
        content = bytearray(file.read_bytes())
        if not content or rng.random() < 0.5:
            continue
        kind = rng.integers(3)
        at = int(rng.integers(len(content)))
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content[at] ^= 1 << int(rng.integers(8))
        else:
            content += b'{"kind": "gra'
        file.write_bytes(content)


def written(output: Path) -> list[dict]:
    record = output / "progress.jsonl"
    return [json.loads(line)["entry"] for line in record.read_text().splitlines()] if record.exists() else []


@pytest.mark.parametrize("n_batches", [1, 2, 4])
def test_what_was_written_is_not_done_again(steps, undisturbed, zygote, n_batches):
    step = steps[0]
    n_rows = len(np.load(step.output / "grads.npy"))
    shutil.rmtree(step.output)
    assert zygote.run(step, kill_at=(str(step.output / "progress.jsonl"), n_batches))["status"] == -signal.SIGKILL
    there = written(step.output)
    kinds = [entry["kind"] for entry in there]
    assert len(there) >= n_batches
    zygote.log.write_text("")
    assert zygote.run(step)["status"] == 0
    assert step.content() == undisturbed[step.name][0]
    said = zygote.log.read_text()
    assert f"continuing: {kinds.count('rollouts')} of 2 batches of rollouts are there" in said
    found = re.findall(r"continuing: (\d+) of (\d+) gradient rows are there", said)
    assert bool(found) == ("gradients" in kinds)
    if found:
        n_items = sum(len(entry["items"]) for entry in there if entry["kind"] == "gradients")
        assert n_items <= int(found[0][0]) <= int(found[0][1]) == n_rows


def test_a_second_probe_on_the_same_directory_is_refused(steps, zygote):
    step = steps[0]
    shutil.rmtree(step.output)
    step.output.mkdir()
    with locked(step.output):
        zygote.log.write_text("")
        assert zygote.run(step)["status"] == 2
        assert "in use by another process" in zygote.log.read_text()
        assert [file.name for file in step.output.iterdir()] == [".lock"]
    assert zygote.run(step)["status"] == 0
