"""The launcher, with a stub in the interpreter's place: what it runs, refuses, and leaves behind when a step fails."""

import itertools
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import (
    POOLED_PROBES,
    PROBES,
    ROOT,
    calls,
    launch,
    processes_of,
    start_launcher,
    steps,
    stub_environment,
    wait_until,
    write_program,
)

ANALYSES = [
    "analyze_exp1_compression.py",
    "analyze_exp2_direction.py",
    "analyze_exp3_signal.py",
    "describe_step.py",
    "plot_exp12_intuitive.py",
]
MERGE = "merge_grad_vector_shards.py"
AWKWARD = "a b'c\"d\ne $(touch pwned); é"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return stub_environment(tmp_path)


def arguments_of_calls(environment: dict[str, str]) -> list[str]:
    return Path(environment["STUB_CALLS"] + ".arguments").read_bytes().decode().split("\0")


def planned(environment: dict[str, str], what: str, **settings: str) -> list[list[str]]:
    """The words of each command of the plan that has the word `what` in it."""
    lines = launch(environment, DRY_RUN="1", **settings).stdout.splitlines()[1:]
    return [words for words in map(shlex.split, lines) if what in words]


# ---- the chain -------------------------------------------------------------------------------------------------------


def test_the_chain_runs_in_order(environment):
    result = launch(environment)
    assert result.returncode == 0, result.stderr
    ran = steps(environment)
    assert sorted(ran[:4]) == PROBES
    assert ran[4:6] == [MERGE, MERGE]
    assert sorted(ran[6:10]) == POOLED_PROBES
    assert ran[10:12] == [MERGE, MERGE]
    assert sorted(ran[12:16]) == ANALYSES[:4], "two of them at once"
    assert ran[16:] == ANALYSES[4:]
    n_cores = len(os.sched_getaffinity(0))
    assert {call[2] for call in calls(environment)[:4]} == {str(n_cores // min(n_cores, 4))}, "threads are divided"
    out = Path(environment["OUT_ROOT"])
    results, where = result.stdout.split("\n\n")
    assert results == f"this is {ANALYSES[4]}", "the three answers, once"
    assert shlex.split(where)[-1] == f"{out}/exp12_figures/report.html"
    assert (out / "exp12_figures" / "exp3.txt").read_text() == f"this is {ANALYSES[2]}\n"
    assert (out / "logs" / "exp3.log").read_text() == "progress\n", "stderr stays out of the results"
    for label in ("exp3_base", "exp3_trained"):
        assert re.search(rf"^\S+  probe {label} shard 1: done in \d+ s$", result.stderr, re.MULTILINE)
        assert re.search(rf"^\S+  merge {label}: done in \d+ s$", result.stderr, re.MULTILINE)


def test_by_default_no_rollout_is_probed_twice(environment):
    """Exp 3 reads the dumps that tell of the step."""
    del environment["EXP3"]
    result = launch(environment, STUB_BYTES_POOLED=str(2**50))
    assert result.returncode == 0, result.stderr
    ran = steps(environment)
    assert sorted(ran[:4]) == PROBES
    assert ran[4:6] == [MERGE, MERGE]
    assert sorted(ran[6:10]) == ANALYSES[:4]
    assert ran[10:] == ANALYSES[4:]
    assert "probe exp3" not in result.stderr
    assert sorted(calls(environment, ".checks")) == [[ANALYSES[2]], [PROBES[0]], [PROBES[2]]]
    out = environment["OUT_ROOT"]
    for settings, part in (({}, "exp12"), ({"EXP3": "1"}, "exp3")):
        (words,) = planned(environment, str(ROOT / ANALYSES[2]), **settings)
        assert words[-2:] == [f"{tag}={out}/{part}_{tag}" for tag in ("base", "trained")]


def test_without_the_step_and_pooled_gradients_there_is_no_exp3(environment):
    result = launch(environment, EXP3="0", STEP="0")
    assert result.returncode == 0, result.stderr
    ran = steps(environment)
    assert sorted(ran[6:8]) == ANALYSES[:2]
    assert ran[8:] == ANALYSES[4:]
    assert not any("--step" in word for word in arguments_of_calls(environment))
    assert not list(Path(environment["OUT_ROOT"]).rglob("exp3*"))


def ends_of_step(words: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in itertools.pairwise(words) if re.match("--(step-)?(from|to)", flag)}


@pytest.mark.parametrize("tags", [["base", "trained"], ["base", "half", "trained"]])
def test_every_model_is_probed_along_the_step_from_the_first_to_the_last(environment, tags):
    models = " ".join(f"{tag}=hub/{tag}" for tag in tags)
    ends = {"base": {"--step-to": "hub/trained"}, "trained": {"--step-from": "hub/base"}}
    ends["half"] = ends["base"] | ends["trained"]
    probes = planned(environment, "--seed", MODELS=models)
    assert len(probes) == 4 * len(tags)
    for words in probes:
        tag = dict(itertools.pairwise(words))["--model-path"].removeprefix("hub/")
        assert ends_of_step(words) == ({} if "--pool" in words else ends[tag]), "pooled gradients carry it on"
    (words,) = planned(environment, str(ROOT / "describe_step.py"), MODELS=models)
    assert ends_of_step(words) == {"--from": "hub/base", "--to": "hub/trained"}


def test_a_step_between_adapters_names_both(environment):
    settings = {"MODELS": "base=hub/m sft=hub/m rl=hub/m", "ADAPTERS": "rl=an/adapter sft=other", "EXP3": "0"}
    to_rl, from_base = {"--step-to": "hub/m", "--step-to-adapter": "an/adapter"}, {"--step-from": "hub/m"}
    for words in planned(environment, "--seed", **settings):
        tag = re.search(r"exp12_(\w+)_s", dict(itertools.pairwise(words))["--output-dir"])[1]
        assert ends_of_step(words) == {"base": to_rl, "sft": from_base | to_rl, "rl": from_base}[tag]
    (words,) = planned(environment, str(ROOT / "describe_step.py"), **settings)
    assert ends_of_step(words) == {"--from": "hub/m", "--to": "hub/m", "--to-adapter": "an/adapter"}


@pytest.mark.parametrize("settings", [{"MODELS": "only=hub/only"}, {"STEP": "0"}])
def test_one_model_has_no_step_and_it_can_be_left_out(environment, settings):
    lines = launch(environment, DRY_RUN="1", **settings).stdout
    assert "--step" not in lines
    assert "describe_step.py" not in lines
    assert "analyze_exp3_signal.py" in lines, "of pooled gradients"
    assert "analyze_exp3_signal.py" not in launch(environment, DRY_RUN="1", **settings | {"EXP3": "0"}).stdout


def test_exp3_probes_the_merged_dumps_rollouts(environment):
    out = environment["OUT_ROOT"]
    settings = {"EXP3_BINS": "12", "EXP3_PROJECT": "8x4", "SEED": "3", "PARAM_SUFFIX": "a,b", "LAYER": "1,2"}
    probes = planned(environment, "--pool", DTYPE="float32", EXP3_OBJECTIVE="dr-grpo", **settings)
    assert probes[3][1:] == [
        *(str(ROOT / "probe_grad_vectors.py"), "--model-path", str(ROOT / "demo/trained"), "--device", "cpu"),
        *("--param-suffix", "a,b", "--layer", "1,2", "--seed", "3", "--dtype", "float32", "--verifier", "boxed"),
        *("--output-dir", f"{out}/exp3_trained_s1", "--shard-index", "1", "--num-shards", "2"),
        *("--rollouts", f"{out}/exp12_trained", "--pool", "bucket", "--bins", "12", "--project", "8x4"),
    ]
    assert len(probes) == 4
    merges = planned(environment, str(ROOT / MERGE))
    assert merges[2][2:] == [f"{out}/exp3_base", f"{out}/exp3_base_s0", f"{out}/exp3_base_s1"]
    (analysis,) = planned(environment, str(ROOT / "analyze_exp3_signal.py"), EXP3_OBJECTIVE="dr-grpo")
    dumps = [f"{tag}={out}/exp3_{tag}" for tag in ("base", "trained")]
    assert analysis[2:] == ["--output-dir", f"{out}/exp12_figures", "--objective", "dr-grpo", *dumps]
    for script in ANALYSES:
        (command,) = planned(environment, str(ROOT / script), FIGURE_FORMAT="pdf,svg")
        assert command[2:6] == ["--output-dir", f"{out}/exp12_figures", "--figure-format", "pdf,svg"]


def test_exp3_has_a_weight_and_layer_of_its_own(environment):
    settings = {"LAYER": "1", "EXP3_LAYER": "all", "EXP3_PARAM_SUFFIX": "all-linear"}
    for words in planned(environment, "--pool", **settings):
        after = dict(itertools.pairwise(words))  # the last of a flag counts
        assert (after["--layer"], after["--param-suffix"]) == ("all", "all-linear")
    assert all("--layer" not in words for words in planned(environment, "--pool"))


def test_every_flag_in_probe_args_reaches_both_probes_and_wins(environment):
    given = "--any-flag --device-map auto --max-memory=0=70GiB --seed 5 --layer 3 --dtype float32 -q"
    settings = {"PROBE_ARGS": f" {given}\n", "SAMPLING_ARGS": "--sampler openai", "SEED": "4", "LAYER": "2"}
    settings |= {"MIN_MIXED_PROMPTS": "3", "CHAT_TEMPLATE": "1"}
    probes = planned(environment, "--seed", **settings)
    assert len(probes) == 8
    for words in probes:
        assert " ".join(given.split()) in " ".join(words)
        after = dict(itertools.pairwise(words))
        assert (after["--seed"], after["--layer"], after["--dtype"]) == ("5", "3", "float32")
        assert after["--min-mixed-prompts"] == "3"
        assert "--chat-template" in words
        assert ("--sampler" in words) == ("--pool" not in words)
    assert all("--min-mixed-prompts" not in words for words in planned(environment, "--seed"))


@pytest.mark.parametrize("flag", ["--bins 7", "--project=8x8", "--output-dir=x", "--layer 3"])
def test_a_flag_that_could_not_reach_exp3_is_refused(environment, flag):
    name, own_layer = flag.replace("=", " ").split()[0], {"EXP3_LAYER": "1"}
    result = launch(environment, DRY_RUN="1", PROBE_ARGS=f"-q {flag}", **own_layer)
    assert result.returncode == 2
    assert f"error: PROBE_ARGS: {name} would not reach exp3, which has its own" in result.stderr
    assert launch(environment, DRY_RUN="1", SAMPLING_ARGS=f"-q {flag}", **own_layer).returncode == 0


def test_what_a_pooled_probe_cannot_take_is_refused_before_anything_runs(environment, tmp_path):
    """By the real probe, which is asked of one made-up rollout."""
    settings = {"PYTHON": sys.executable, "PROBE_ARGS": "--temperature 2 --row-idx 3", "LAYER": "99", "SEED": "-1"}
    settings |= {"MODELS": f"a={ROOT / 'demo' / 'base'}", "PROGRESS_SECONDS": "0"}
    result = launch(environment, **settings)
    assert result.returncode == 2
    assert result.stderr.splitlines()[1:] == ["error: SEED -1: must be at least 0 (model: a)"]
    result = launch(environment, **settings | {"SEED": "0", "LAYER": "0"})
    assert result.returncode == 2
    assert result.stderr.splitlines()[1:] == [
        "error: --temperature can't go with --rollouts, which brings its own; --row-idx can't go with EXP3_PROJECT, "
        "which takes whole weights (PROBE_ARGS are for both probes, SAMPLING_ARGS for the first alone) (model: a)"
    ]
    assert not list(tmp_path.rglob("manifest.json"))


def test_problems_and_verdicts_reach_the_probe(environment):
    settings = {"PROMPT_TEMPLATE": "Q: {problem}", "CHAT_TEMPLATE": "1", "SYSTEM_PROMPT": "Be 'brief'."}
    for words in planned(environment, "--seed", **settings, VERIFIER="numeric"):
        after = dict(itertools.pairwise(words))
        assert (after["--prompt-template"], after["--system-prompt"]) == ("Q: {problem}", "Be 'brief'.")
        assert after["--verifier"] == "numeric"


def test_an_adapter_reaches_both_probes_of_its_model_alone(environment):
    probes = planned(environment, "--seed", MODELS="base=demo/base rl=demo/base", ADAPTERS="rl=out/an_adapter")
    assert len(probes) == 8
    for words in probes:
        after = dict(itertools.pairwise(words))
        assert after.get("--adapter") == ("out/an_adapter" if "_rl_s" in after["--output-dir"] else None)


UUIDS = ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/2")


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({"GPUS": "3,5", "STUB_GPUS": "0 1 2 3 4 5"}, {"3", "5"}),
        ({"STUB_GPUS": "0 1 No-devices-were-found"}, {"0", "1"}),
        ({"CUDA_VISIBLE_DEVICES": "6,7", "STUB_GPUS": "0 1 2 3 4 5 6 7"}, {"6", "7"}),
        ({"CUDA_VISIBLE_DEVICES": "6,7", "GPUS": "2", "STUB_GPUS": "0 1 2"}, {"2"}),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,0", "STUB_GPUS": "0 1"}, {"1"}),
        *(({"CUDA_VISIBLE_DEVICES": none, "STUB_GPUS": "0 1"}, {""}) for none in ("", "-1", "NoDevFiles")),
        *(({name: ",".join(UUIDS), "STUB_GPUS": "0 1"}, set(UUIDS)) for name in ("CUDA_VISIBLE_DEVICES", "GPUS")),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "GPUS": "0", "DEVICE": "cpu", "STUB_GPUS": "0 1"}, {""}),
    ],
)
def test_one_shard_per_gpu(environment, settings, used):
    result = launch(environment, **{"DEVICE": "auto", "SHARDS_PER_MODEL": "3"} | settings)
    assert result.returncode == 0, result.stderr
    probes = [call for call in calls(environment) if call[0].startswith("probe")]
    assert len(probes) == 12
    assert {call[1] for call in probes} == used
    assert {call[1] for call in calls(environment)} <= used, "analyses take nobody else's"


@pytest.mark.parametrize("tags", [["only"], ["base", "step-100", "step.500"]])
def test_any_number_of_models(environment, tags):
    models, out = "".join(f"  {tag}=hub/{tag}\n" for tag in tags), environment["OUT_ROOT"]
    probes = planned(environment, "--seed", MODELS=models)
    dumps = [f"{out}/{part}_{tag}_s{i}" for part in ("exp12", "exp3") for tag in tags for i in (0, 1)]
    assert [dict(itertools.pairwise(words))["--output-dir"] for words in probes] == dumps
    for script in (ANALYSES[0], ANALYSES[1], ANALYSES[4]):
        (words,) = planned(environment, str(ROOT / script), MODELS=models)
        assert words[2:] == ["--output-dir", f"{out}/exp12_figures", *(f"{tag}={out}/exp12_{tag}" for tag in tags)]


def test_each_probe_of_a_model_is_checked_once(environment):
    launch(environment, SHARDS_PER_MODEL="3")
    checked = [call[0] for call in calls(environment, ".checks")]
    dumps = ("exp12_base_s0", "exp12_trained_s0", "exp3_base", "exp3_trained")
    assert sorted(checked) == ["analyze_exp3_signal.py", *(f"probe_grad_vectors.py:{name}" for name in dumps)]


def test_several_command_lines_are_checked_by_one_process_as_each_alone(tmp_path):
    probe = [sys.executable, ROOT / "probe_grad_vectors.py", "--model-path", ROOT / "demo" / "base", "--check-only"]
    probe += ["--output-dir", tmp_path / "none"]
    for name, flags in {"sound": [], "no model's": ["--layer", "99"], "no flag.s": ["--sow"]}.items():
        (tmp_path / f"{name}.command").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in (*probe, *flags)))
    command = [sys.executable, ROOT / "scripts" / "check_probes.py", *tmp_path.glob("*.command")]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b""
    assert '"bytes_at_most": ' in (tmp_path / "sound").read_text()
    assert "error: --layer 99: " in (tmp_path / "no model's").read_text()
    assert "error: unrecognized arguments: --sow" in (tmp_path / "no flag.s").read_text()


# ---- failures and interruptions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [PROBES[2], POOLED_PROBES[1], "analyze_exp2_direction.py"])
def test_a_failing_step_is_named_with_its_log_and_stops_the_run(environment, failing):
    result = launch(environment, STUB_FAIL=failing)
    assert result.returncode == 1
    assert "failed with exit code 7" in result.stderr
    assert "the reason stands [31mhere" in result.stderr, "control characters are left out"
    assert "plot_exp12_intuitive.py" not in steps(environment)
    assert processes_of(environment) == []


@pytest.mark.slow
def test_a_failing_shard_stops_the_others_even_those_that_ignore_it(environment):
    started = time.monotonic()
    settings = {"STUB_FAIL": PROBES[1], "STUB_DEAF": PROBES[0], "GPUS": "0,1", "STUB_GPUS": "0 1"}
    result = launch(environment, DEVICE="cuda", **settings)
    assert result.returncode == 1
    assert "probe base shard 1 failed" in result.stderr
    assert time.monotonic() - started < 30
    assert processes_of(environment) == []


EARLY = ["rollouts: 12 of 64 correct", "prompts: 3 of 8 mixed", "tokens: 44 a rollout"]
PROGRESS = "gradients: 48/255 rows, 00:31 elapsed, 7.9 rows/s, about 01:01 left"


@pytest.mark.parametrize("seconds", ["1", "0"])
def test_the_terminal_is_told_what_shards_find_and_how_far_they_are(environment, seconds):
    says = "\\n".join([*EARLY, "a line of no account", PROGRESS, ""])
    settings = {"STUB_SLEEP": "3", "STUB_SAYS": says, "EXP3": "0", "MODELS": f"only={ROOT / 'demo' / 'base'}"}
    result = launch(environment, PROGRESS_SECONDS=seconds, **settings)
    assert result.returncode == 0, result.stderr
    told = [line.split("  ", 1)[1] for line in result.stderr.splitlines()]
    assert told[0].startswith("checking models and data before anything is computed: only, ")
    for shard in (0, 1):
        assert [line for line in told if line in [f"probe only shard {shard}: {x}" for x in EARLY]] == [
            f"probe only shard {shard}: {x}" for x in EARLY
        ], "in order, once"
    progress = [line for line in told if "01:01 left" in line]
    assert bool(progress) == (seconds == "1") == any(re.fullmatch(r"merge only: \d s so far", line) for line in told)
    for line in progress:
        assert set(re.sub(r"probe only shard \d: ", "", line).split(" | ")) == {PROGRESS.replace(" 00:31 elapsed,", "")}


@pytest.mark.parametrize("has_setpriv", [True, False])
def test_a_killed_step_is_told_in_our_words_alone(environment, tmp_path, has_setpriv):
    if not has_setpriv:
        write_program(tmp_path / "bin" / "setpriv", "#!/bin/sh\nexit 1\n")
    result = launch(environment, STUB_KILLED=PROBES[1], STUB_HANG=PROBES[0], DEVICE="cuda", GPUS="0,1", STUB_GPUS="0 1")
    assert result.returncode == 1
    assert "probe base shard 1 failed with exit code 137 (killed, as the system does" in result.stderr
    assert not re.search(r"^.*(Killed|Terminated|line \d+:).*$", result.stderr, re.MULTILINE)
    assert processes_of(environment) == []


def test_a_step_that_says_why_it_stops_ends_the_run_in_one_line(environment):
    says = "error: --min-mixed-prompts 2: 0 of 64 (0%) prompts are mixed; with --min-mixed-prompts 0 it goes on\\n"
    stops = {"STUB_FAIL": PROBES[0], "STUB_STATUS": "2", "STUB_SAYS": says}
    result = launch(environment, MIN_MIXED_PROMPTS="2", **stops)
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if "mixed" in line] == [
        "error: probe base shard 0: MIN_MIXED_PROMPTS 2: 0 of 64 (0%) prompts are mixed; "
        "with MIN_MIXED_PROMPTS 0 it goes on"
    ]
    assert "the end of" not in result.stderr


@pytest.mark.parametrize(("failing", "log"), [(PROBES[0], "base_s0"), (POOLED_PROBES[3], "exp3_trained_s1")])
def test_a_second_run_continues_and_keeps_the_first_log(environment, failing, log):
    assert launch(environment, STUB_FAIL=failing).returncode == 1
    result = launch(environment)
    assert result.returncode == 0, result.stderr
    finished = [call[0] for call in calls(environment, ".finished")]
    assert sorted(finished) == PROBES + POOLED_PROBES, "each shard is computed once over both runs"
    text = (Path(environment["OUT_ROOT"]) / "logs" / f"{log}.log").read_text()
    assert re.search(r"the reason stands .*\n==== \d{4}-\d\d-\d\d .* ====\nthis is probe", text, re.DOTALL)


def test_the_tail_of_a_log_and_results_are_of_this_run(environment):
    assert [launch(environment, STUB_FAIL=PROBES[0]).stderr.count("the reason stands") for _ in range(2)] == [1, 1]
    assert launch(environment).stdout == launch(environment).stdout
    results = Path(environment["OUT_ROOT"]) / "exp12_figures" / "exp1.txt"
    assert results.read_text() == f"this is {ANALYSES[0]}\n"


def start_and_hang(environment: dict[str, str], how: str = "STUB_HANG") -> subprocess.Popen[str]:
    """A launcher whose first probes, as many as run at once, hang with a child each; `STUB_DEAF`: ignoring SIGTERM."""
    launcher = start_launcher(environment, **{how: " ".join(PROBES)})
    n_slots = min(len(os.sched_getaffinity(0)), 4)
    assert wait_until(lambda: sum("sleep" in line for line in processes_of(environment)) >= 2 * n_slots)
    return launcher


@pytest.mark.parametrize(
    ("signal_number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_no_process_behind(environment, signal_number, status):
    launcher = start_and_hang(environment)
    launcher.send_signal(signal_number)
    _, error = launcher.communicate(timeout=30)
    assert launcher.returncode == status
    assert "stopping" in error
    assert processes_of(environment) == []


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_behind_and_no_lock(environment):
    launcher = start_and_hang(environment, "STUB_DEAF")
    launcher.kill()
    launcher.wait(timeout=30)
    result = launch(environment, STUB_FAIL=" ".join(PROBES))
    assert "another launcher" not in result.stderr, "the lock ends with its holder, not with the steps"
    assert wait_until(lambda: processes_of(environment) == [], seconds=10), processes_of(environment)
    assert launch(environment).returncode == 0


def test_a_second_launcher_is_refused(environment):
    launcher = start_and_hang(environment)
    second = launch(environment)
    launcher.terminate()
    launcher.communicate(timeout=30)
    assert second.returncode == 2
    assert second.stderr.startswith("error: OUT_ROOT=")
    assert f": another launcher is at work there, process {launcher.pid} on " in second.stderr
    assert second.stderr.count("\n") == 1
    assert launch(environment).returncode == 0


def test_a_full_disk_is_a_failed_step_and_the_next_run_completes(environment):
    full = subprocess.run(
        ["bash", ROOT / "run_exp1_exp2.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert full.returncode == 1
    assert "failed with exit code" in full.stderr
    assert calls(environment, ".finished") == []
    assert processes_of(environment) == []
    result = launch(environment)
    assert result.returncode == 0, result.stderr
    assert sorted(call[0] for call in calls(environment, ".finished")) == PROBES + POOLED_PROBES


# ---- what is refused before anything begins --------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"SHARDS_PER_MODEL": "0"}, "SHARDS_PER_MODEL=0: must be a whole number above 0"),
    ({"NUM_PROMPTS": "many"}, "NUM_PROMPTS=many: must be a whole number above 0"),
    ({"NUM_SAMPLES": "99999999999999999999"}, "NUM_SAMPLES=99999999999999999999: must be a whole number"),
    ({"EXP3_BINS": "010"}, "EXP3_BINS=010: must be a whole number above 0, without leading zeros"),
    ({"PROGRESS_SECONDS": "0.5"}, "PROGRESS_SECONDS=0.5: must be a whole number above 0"),
    ({"DEVICE": "tpu"}, "DEVICE=tpu: must be auto, cuda or cpu"),
    ({"DEVICE": "cuda"}, "DEVICE=cuda: nvidia-smi lists no GPU"),
    ({"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "", "STUB_GPUS": "0"}, "DEVICE=cuda: CUDA_VISIBLE_DEVICES lists no"),
    ({"DEVICE": "auto", "CUDA_VISIBLE_DEVICES": "9", "STUB_GPUS": "0"}, "CUDA_VISIBLE_DEVICES=9: nvidia-smi lists 0"),
    ({"LAUNCHER": "magic"}, "LAUNCHER=magic: must be local or slurm"),
    ({"DRY_RUN": "yes"}, "DRY_RUN=yes: must be 0 or 1"),
    ({"EXP3": "yes"}, "EXP3=yes: must be 0 or 1"),
    ({"STEP": "2"}, "STEP=2: must be 0 or 1"),
    ({"DEVICE": "auto", "CUDA_VISIBLE_DEVICES": "0,0", "STUB_GPUS": "0"}, "CUDA_VISIBLE_DEVICES=0\\,0: 0 is given"),
    ({"GPUS": "0,x"}, "GPUS=0\\,x: 'x' is no GPU's number or UUID"),
    ({"GPUS": "1 2 1"}, "GPUS=1\\ 2\\ 1: 1 is given twice"),
    ({"GPUS": "0,8", "DEVICE": "auto", "STUB_GPUS": "0 1"}, "GPUS=0\\,8: nvidia-smi lists 0 1, not 8"),
    ({"MODELS": "Qwen/Qwen2.5-1.5B"}, "MODELS: 'Qwen/Qwen2.5-1.5B' is not TAG=PATH"),
    ({"MODELS": "a=x a=y"}, "MODELS: tag a is given twice"),
    ({"MODELS": "a/b=x"}, "MODELS: 'a/b=x': a tag has letters"),
    ({"MODELS": "a=x a_s0=y"}, "MODELS: tag a_s0: files of this name are others of the study"),
    ({"MODELS": "figures=x"}, "MODELS: tag figures: files of this name"),
    ({"MODELS": "a=x exp3_a=y"}, "MODELS: tag exp3_a: files of this name"),
    ({"ADAPTERS": "tuned=somewhere"}, "ADAPTERS: 'tuned=somewhere': no model has the tag tuned"),
    ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python: no such program"),
    ({"OUT_ROOT": "/etc/passwd/out"}, "OUT_ROOT=/etc/passwd/out: mkdir: "),
    ({"STUB_REFUSE": PROBES[0], "LAYER": "99"}, "error: LAYER 99: the model has 2 layers (model: base)"),
    (
        {"STUB_REFUSE": f"{PROBES[0]} {PROBES[2]}", "PROBE_ARGS": "--layer 99"},
        "error: --layer 99: the model has 2 layers (model: base trained)",
    ),
    ({"STUB_REFUSE": "probe_grad_vectors.py:exp3_base", "EXP3_LAYER": "99"}, "error: EXP3_LAYER 99: the model has 2"),
    (
        {"STUB_REFUSE": PROBES[0], "STUB_REFUSAL": "usage: a\\nb\\nx.py: error: argument --seed: invalid"},
        "error: argument SEED: invalid (model: base)",
    ),
    (
        {"STUB_REFUSE": ANALYSES[2], "STUB_REFUSAL": "usage: a\\nx.py: error: argument --objective: invalid choice"},
        "error: argument EXP3_OBJECTIVE: invalid choice",
    ),
    (
        {"STUB_REFUSE": ANALYSES[2], "STUB_REFUSAL": "Traceback (most recent call):\\nImportError: no such library"},
        "error: ImportError: no such library",
    ),
    ({"STUB_BYTES_POOLED": str(2**33)}, "up to 655360 GiB are needed there, "),  # 2 models × 2 copies × 20480 rows
    ({"STUB_BYTES": str(2**50)}, "up to 8388608 GiB are needed there, "),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused(environment, settings, message):
    result = launch(environment, **settings)
    assert result.returncode == 2
    *before_it, error = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert all("  checking models and data before" in line for line in before_it), "one line a problem"
    assert result.stdout == ""
    assert steps(environment) == []


def test_all_problems_are_reported_at_once(environment):
    settings = {"NUM_SAMPLES": "1.5", "EXP3": "2", "GPUS": "0 0", "MODELS": "-a=x", "DEVICE": "tpu"}
    result = launch(environment, **settings, STUB_GPUS="0")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == len(settings)
    assert all(line.startswith("error: ") for line in lines)
    assert all(name in result.stderr for name in settings)


def test_what_is_finished_needs_no_room(environment):
    assert launch(environment).returncode == 0
    out = Path(environment["OUT_ROOT"])
    for dump in ("exp12_base", "exp12_trained", "exp3_base", "exp3_trained"):
        (out / dump).mkdir()
        (out / dump / "manifest.json").write_text("{}")
    assert launch(environment, STUB_BYTES=str(2**50), STUB_BYTES_POOLED=str(2**50)).returncode == 0
    (out / "exp12_base_s1" / "manifest.json").unlink()
    result = launch(environment, STUB_BYTES=str(2**50))
    assert "up to 1048575 GiB are needed" in result.stderr, "one shard, less what lies there"


@pytest.mark.parametrize("text", ["if then\n", "exit 0\n", "false\n", 'X="$NO_SUCH_VARIABLE"\n'])
def test_a_broken_file_of_settings_is_refused(environment, tmp_path, text):
    (tmp_path / "broken.env").write_text(text)
    result = launch(environment, tmp_path / "broken.env")
    assert result.returncode == 2
    assert f"error: {tmp_path / 'broken.env'}: " in result.stderr
    assert steps(environment) == []


def test_a_hub_name_and_a_hub_data_set_need_not_exist(environment):
    result = launch(environment, BASE_MODEL="Qwen/Qwen2.5-1.5B", DATASET="hf:openai/gsm8k", DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    assert "--model-path Qwen/Qwen2.5-1.5B " in result.stdout
    assert "--dataset hf:openai/gsm8k " in result.stdout


# ---- settings, and where they are kept -------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_touches_nothing(environment, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = launch(environment, DRY_RUN="1", SHARDS_PER_MODEL="3", LAYER="2", SEED="11")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert sum("probe_grad_vectors.py" in line for line in lines) == 12
    assert all("--seed 11" in line and "--layer 2" in line for line in lines if "probe_grad" in line)
    assert re.match(r"# 6 shards, \d+ at once, on cpu", lines[0])
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_come_from_the_environment_then_the_file_then_the_defaults(environment, tmp_path):
    (tmp_path / "my study.env").write_text(': "${SEED:=8}"\n: "${BINS:=4}"\nMODELS=("a=x y" b=z)\n')
    plan = launch(environment, "my study.env", cwd=tmp_path, DRY_RUN="1", BINS="7").stdout
    assert all(f" {flag} " in plan for flag in ("--seed 8", "--bins 7", "--num-samples 8", "--model-path x\\ y"))


def test_the_resolved_configuration_runs_the_same_study(environment, tmp_path):
    settings = {"SEED": "11", "LAYER": "1,2", "ROW_IDX": "random:3", "OUT_ROOT": "out", "BASE_MODEL": "models/b 1"}
    (tmp_path / "models" / "b 1").mkdir(parents=True)
    (tmp_path / "my.env").write_text(f"TEMPERATURE=0.7\nDATASET={tmp_path.name}.jsonl\n")
    (tmp_path / f"{tmp_path.name}.jsonl").touch()
    result = launch(environment, tmp_path / "my.env", cwd=tmp_path, **settings)
    assert result.returncode == 0, result.stderr
    saved = tmp_path / "out" / "config.resolved.env"
    plan = launch(environment, tmp_path / "my.env", cwd=tmp_path, DRY_RUN="1", **settings).stdout
    others = {name: value for name, value in environment.items() if name not in ("OUT_ROOT", "PYTHON", "DEVICE")}
    assert plan.count("--temperature 0.7") == 4
    assert f"--model-path {tmp_path}/models/b\\ 1" in plan, "local paths are absolute"
    assert f"--dataset {tmp_path}/{tmp_path.name}.jsonl" in plan
    assert launch(others, saved, DRY_RUN="1").stdout == plan
    assert "--seed 12" in launch(others, saved, DRY_RUN="1", SEED="12").stdout
    names = re.findall(r'^: "\$\{(\w+):=', (ROOT / "config.env").read_text(), re.MULTILINE)
    text = saved.read_text()
    assert len(names) > 20
    assert all(f" {name}=" in text for name in names)
    assert re.search(r"^# \d{4}-.* on .*commit: \S+; device: cpu, GPUs: none$", text, re.MULTILINE)
    assert all(line[:1] in "#[" for line in text.splitlines())
    assert not list(saved.parent.glob("*.part"))


def copy_of_the_project(project: Path) -> None:
    """What the launcher itself consists of."""
    shutil.copytree(ROOT / "scripts", project / "scripts")
    shutil.copy(ROOT / "run_exp1_exp2.sh", project)
    shutil.copy(ROOT / "config.env", project)
    shutil.copy(ROOT / "requirements.txt", project)
    shutil.copy(ROOT / "requirements-dev.txt", project)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"DATASET": "data.parquet"}, ["pyarrow"]),
        ({"VERIFIER": "numeric"}, ["math-verify"]),
        ({"DATASET": "hf:openai/gsm8k", "VERIFIER": "math-verify"}, ["datasets", "pyarrow", "math-verify"]),
        ({"SAMPLING_ARGS": "--sampler=openai --base-url http://localhost:8000"}, ["urllib3"]),
        ({"DATASET": "saved", "PROBE_ARGS": "--adapter a"}, ["datasets", "pyarrow", "peft"]),
    ],
)
def test_what_the_settings_need_is_installed(environment, tmp_path, settings, names):
    """With a stand-in for the script that installs: what it is asked for."""
    project = tmp_path / "project"
    copy_of_the_project(project)
    (project / "scripts" / "ensure_venv.sh").write_text(
        'printf "%s\\n" "$@" >"$STUB_CALLS.asked"; printf "%s" "$PYTHON"'
    )
    (tmp_path / "data.parquet").touch()
    (tmp_path / "saved").mkdir()
    launch(
        environment,
        root=project,
        cwd=tmp_path,
        BASE_MODEL="hub/a",
        TRAINED_MODEL="hub/b",
        **({"DATASET": str(ROOT / "demo" / "problems.jsonl")} | settings),
    )
    asked = Path(environment["STUB_CALLS"] + ".asked").read_text().split("\n")
    found = [re.split("[=>]", line)[0] for line in asked if line]
    assert sorted(set(found)) == sorted(names)
    assert all(line in (ROOT / "requirements-dev.txt").read_text().splitlines() for line in asked if line)


def test_awkward_paths_everywhere(environment, tmp_path):
    """The project, its settings, models, data set, interpreter and results all lie at names that need quoting."""
    here = tmp_path / AWKWARD
    project = here / "project"
    copy_of_the_project(project)
    for name in ("model one", "model=two"):
        (here / name).mkdir()
    (here / "data.jsonl").touch()
    write_program(here / "python", Path(environment["PYTHON"]).read_text())
    (here / "my.env").write_text('MODELS=("one=$PROJECT/../model one" "two=$PROJECT/../model=two")\n')
    settings = {"OUT_ROOT": str(here / "out"), "DATASET": str(here / "data.jsonl"), "PYTHON": str(here / "python")}
    result = launch(environment, here / "my.env", root=project, cwd=here, **settings)
    assert result.returncode == 0, result.stderr
    arguments = arguments_of_calls(environment)
    assert str(project / "../model one") in arguments
    assert str(project / "../model=two") in arguments
    assert arguments.count(str(here / "data.jsonl")) == 4
    assert arguments.count(str(here / "out" / "exp12_one")) == 3, "what the merge makes, and both probes read"
    assert f"two={here / 'out' / 'exp12_two'}" in arguments
    plan = launch(environment, here / "my.env", root=project, cwd=here, DRY_RUN="1", **settings).stdout
    saved = here / "out" / "config.resolved.env"
    assert launch(environment, saved, root=project, DRY_RUN="1", OUT_ROOT="", PYTHON="").stdout == plan
    assert launch(environment, "my.env", root=project, cwd=here, STUB_FAIL=MERGE, **settings).returncode == 1
    assert not list(tmp_path.rglob("pwned"))


SBATCH = r"""#!/usr/bin/env bash
# Takes a job and never runs it: notes its name, what it waits for and its array, and gives it a number.
printf '%s\n' "$@" | sed -n 's/^--\(job-name\|dependency\|array\)=//p' | paste -sd' ' >>"$STUB_CALLS.jobs"
wc -l <"$STUB_CALLS.jobs"
"""


@pytest.mark.parametrize(
    ("exp3", "jobs"),
    [
        (
            "1",
            "probe_base 0,1; merge_base afterok:1; probe_exp3_base 0,1 afterok:2; merge_exp3_base afterok:3; "
            "probe_trained 0,1; merge_trained afterok:5; probe_exp3_trained 0,1 afterok:6; "
            "merge_exp3_trained afterok:7; exp1 afterok:2:6; step; exp2 afterok:2:6; exp3 afterok:4:8; "
            "plot afterok:9:10:11:12",
        ),
        (
            "0",
            "probe_base 0,1; merge_base afterok:1; probe_trained 0,1; merge_trained afterok:3; exp1 afterok:2:4; "
            "step; exp2 afterok:2:4; exp3 afterok:2:4; plot afterok:5:6:7:8",
        ),
    ],
)
def test_jobs_of_slurm_wait_for_what_they_read(environment, tmp_path, exp3, jobs):
    write_program(tmp_path / "bin" / "sbatch", SBATCH)
    for name in ("squeue", "scancel"):
        write_program(tmp_path / "bin" / name, "#!/bin/sh\n")
    result = launch(environment, LAUNCHER="slurm", EXP3=exp3, DEVICE="cuda", GPUS="0,9")
    assert result.returncode == 0, result.stderr
    assert Path(environment["STUB_CALLS"] + ".jobs").read_text().splitlines() == jobs.split("; ")
    assert "merge base: job 2, after 1\n" in result.stderr
    assert steps(environment) == []
    assert ["probe_grad_vectors.py:nothing"] in calls(environment, ".checks"), "compared with no dump from here"
    command = (Path(environment["OUT_ROOT"]) / "slurm" / "probe_base.1").read_text().split("\0")
    assert dict(itertools.pairwise(command))["--device"] == "cuda"
    if exp3 == "1":
        assert "probe exp3_base: job 3, 2 of 2 shards (0,1), after 2\n" in result.stderr
        command = (Path(environment["OUT_ROOT"]) / "slurm" / "probe_exp3_base.1").read_text().split("\0")
        assert command[command.index("--rollouts") + 1] == f"{environment['OUT_ROOT']}/exp12_base"


def test_slurm_without_its_programs_is_refused(environment, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "env", "date", "sed", "nproc", "dirname", "flock", "setpriv"):
        (programs / name).symlink_to(shutil.which(name))
    missing = launch(environment, PATH=str(programs), LAUNCHER="slurm")
    assert missing.returncode == 2
    assert missing.stderr.splitlines() == [f"error: {n} is not in PATH" for n in ("sbatch", "squeue", "scancel")]
