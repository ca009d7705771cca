"""A dump judged anew is the dump that a probe with that verifier makes; its gradients are not touched."""

import json
import shutil
from pathlib import Path

import pytest

import analyze_exp2_direction
import merge_grad_vector_shards
import probe_grad_vectors
from gradprobe import check, verify
from gradprobe.analysis.inputs import open_dumps, pooled_of
from gradprobe.common import files
from gradprobe.dump import relabel
from gradprobe.dump.consistency import problems_of

SMALL = "--num-prompts 6 --num-samples 4 --max-new-tokens 10 --device cpu --bins 2".split()
EVEN, BOTH_FAIL = "judges_by_length:even", "judges_by_length:fails_on_some"
VERIFIERS = """
def even(response, truth):
    return len(response) % 2 == 0

def fails_on_some(response, truth):
    if len(response) % 2:
        raise RuntimeError("odd")
    return True
"""
KINDS = {"tokens": [], "pooled": ["--pool", "bucket"], "targets": ["--layer", "0,1"]}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory, checkpoint_dir, problems_file) -> Path:
    """Of each kind a dump judged by the box, and one by `even`."""
    root = tmp_path_factory.mktemp("verify")
    (root / "judges_by_length.py").write_text(VERIFIERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for kind, flags in KINDS.items():
            for name, verifier in (("boxed", "boxed"), ("even", EVEN)):
                assert probe(checkpoint_dir, problems_file, f"{kind}_{name}", "--verifier", verifier, *flags) == 0
    return root


def probe(checkpoint: Path, problems: Path, output: str, *flags: str) -> int:
    paths = ["--model-path", str(checkpoint), "--dataset", str(problems), "--output-dir", output]
    return probe_grad_vectors.main([*paths, *SMALL, *flags])


@pytest.fixture
def here(dumps, tmp_path, monkeypatch) -> None:
    shutil.copytree(dumps, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def content(path: str) -> dict[str, bytes]:
    names = ("grads.npy", "meta.jsonl", "rollouts.jsonl")
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(Path(path).rglob("*")) if f.name in names}


def manifests(path: str) -> list[dict]:
    """Without what tells when and how they were made."""
    found = [json.loads(file.read_text()) for file in sorted(Path(path).rglob("manifest.json"))]
    return [{k: v for k, v in manifest.items() if k not in ("seconds", "judged_before")} for manifest in found]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_a_new_probe(kind, capsys, checkpoint_dir, problems_file):
    assert content(f"{kind}_boxed") != content(f"{kind}_even")
    assert verify.main([f"{kind}_boxed", "--verifier", EVEN]) == 0
    assert "rollouts correct, before 0; " in capsys.readouterr().out
    assert content(f"{kind}_boxed") == content(f"{kind}_even")
    assert manifests(f"{kind}_boxed") == manifests(f"{kind}_even")
    assert problems_of(Path(f"{kind}_boxed")) == ([], [])
    (before, *_) = json.loads(next(Path(f"{kind}_boxed").rglob("manifest.json")).read_text())["judged_before"]
    assert before == {"verifier": "boxed", "num_correct_rollouts": 0}
    # The probe takes it for its own, and for no other's.
    assert probe(checkpoint_dir, problems_file, f"{kind}_boxed", "--verifier", EVEN, *KINDS[kind]) == 0
    assert "finished already" in capsys.readouterr().err
    assert probe(checkpoint_dir, problems_file, f"{kind}_boxed", *KINDS[kind]) == 2


@pytest.mark.usefixtures("here")
def test_analyses_give_the_same_numbers():
    verify.main(["tokens_boxed", "--verifier", EVEN])
    found = []
    for name in ("boxed", "even"):
        assert analyze_exp2_direction.main([f"tokens_{name}", "--output-dir", name]) == 0
        summary = json.loads(Path(name, "exp2_summary.json").read_text())
        found.append({key: summary[key] for key in ("n_prompts_usable", "by_bucket", "cancellation", "per_prompt")})
    assert found[0] == found[1]


@pytest.mark.usefixtures("here")
def test_where_the_verifier_fails_nothing_is_written(capsys):
    before = content("tokens_even")
    assert verify.main(["tokens_even", "--verifier", BOTH_FAIL]) == 2
    assert "raised RuntimeError: odd" in capsys.readouterr().err
    assert content("tokens_even") == before
    assert problems_of(Path("tokens_even")) == ([], [])


@pytest.mark.usefixtures("here")
def test_a_changed_file_or_one_target_alone_is_refused(capsys):
    assert verify.main(["targets_boxed/L0.mlp.down_proj.weight.r0"]) == 2
    assert "name the directory of all of them" in capsys.readouterr().err
    with Path("tokens_boxed/rollouts.jsonl").open("a") as stream:
        stream.write("{}\n")
    assert verify.main(["tokens_boxed"]) == 2
    assert "has changed since it was written" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("meta.jsonl", b'"token_id": ', b'"token_id": 1'), ("rollouts.jsonl", b'"prompt_ids": [', b'"prompt_ids": [1, ')],
)
def test_a_changed_line_is_not_blessed(name, old, new, capsys):
    """The lines get new checksums with their new verdicts: they were not looked at before."""
    target = Path("targets_boxed/L1.mlp.down_proj.weight.r0")
    file = (target if name == "meta.jsonl" else target.parent) / name
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    before = content("targets_boxed")
    assert verify.main(["targets_boxed", "--verifier", EVEN]) == 2
    assert f"{file}: has changed since it was written" in capsys.readouterr().err
    assert content("targets_boxed") == before


def test_a_directory_that_is_not_there_is_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert verify.main(["./nonexistent"]) == 2
    assert capsys.readouterr().err == "error: nonexistent: no such directory\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_a_target_is_checked_from_within(monkeypatch, capsys):
    monkeypatch.chdir("targets_boxed/L1.mlp.down_proj.weight.r0")
    assert check.main(["."]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == ".: sound\n"


@pytest.mark.usefixtures("here")
def test_rewards_of_who_judged_before_are_not_used(checkpoint_dir, capsys):
    lines = list(map(json.loads, Path("pooled_boxed/rollouts.jsonl").read_text().splitlines()))
    given = [line | {"reward": float(line["correct"] + number % 3)} for number, line in enumerate(lines)]
    Path("given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    flags = "--rollouts given.jsonl --output-dir given --pool bucket --device cpu --bins 2".split()
    assert probe_grad_vectors.main(["--model-path", str(checkpoint_dir), *flags]) == 0
    assert set(outcomes("given")) == {0.0, 1.0, 2.0}
    shutil.copytree("given", "of_before")  # a dump that was judged anew when its rewards stayed in it
    manifest = json.loads(Path("of_before/manifest.json").read_text())
    judged = manifest["rollouts_from"] | {"correct_from": "verifier"}
    Path("of_before/manifest.json").write_text(json.dumps(manifest | {"rollouts_from": judged}))
    assert set(outcomes("of_before")) == {0.0}
    assert verify.main(["given", "--verifier", EVEN]) == 0
    assert f"{len(lines)} rewards of who judged before are left out" in capsys.readouterr().out
    assert outcomes("given") == [float(len(line["response"]) % 2 == 0) for line in lines]
    assert '"reward"' not in Path("given/meta.jsonl").read_text() + Path("given/rollouts.jsonl").read_text()
    assert problems_of(Path("given")) == ([], [])


def outcomes(dump: str) -> list[float]:
    """What Exp 3 weighs by."""
    return pooled_of(open_dumps({None: Path(dump)})[None][0]).outcome.tolist()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("n_done", range(9))
def test_cut_off_anywhere_the_next_call_finishes(n_done, monkeypatch):
    """Every rename is a moment; before the list is written nothing has changed."""
    original, n_calls = files.replace, 0

    def replace_or_die(source: Path, target: Path) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls > n_done:
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", replace_or_die)
        assert verify.main(["targets_boxed", "--verifier", EVEN]) == 130
    assert verify.main(["targets_boxed", "--verifier", EVEN]) == 0
    assert content("targets_boxed") == content("targets_even")
    assert problems_of(Path("targets_boxed")) == ([], [])
    assert not Path("targets_boxed", relabel.STAGED).exists()


@pytest.mark.usefixtures("here")
def test_shards_judged_anew_merge_as_shards_of_that_verifier(checkpoint_dir, problems_file):
    for name, verifier in (("boxed", "boxed"), ("even", EVEN)):
        for shard in range(2):
            flags = ("--shard-index", str(shard), "--num-shards", "2", "--verifier", verifier)
            assert probe(checkpoint_dir, problems_file, f"{name}_s{shard}", *flags) == 0
    assert verify.main(["boxed_s0", "boxed_s1", "--verifier", EVEN]) == 0
    for name in ("boxed", "even"):
        assert merge_grad_vector_shards.main([name, f"{name}_s0", f"{name}_s1"]) == 0
    assert content("boxed") == content("even")
