"""The launcher with a stub in the interpreter's place: what its steps do is up to the test, by variables."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
STUB = r"""#!/usr/bin/env bash
# Stands in for Python: notes its call, then does what the scenario of its step says. A dump is finished by a manifest
# and left alone then, as the real probe leaves it.
set -u
arguments=("$@")
script="$(basename "$1")"; shift
if [[ "$script" == check_probes.py ]]; then # as each of the commands in the files that it is given
    for file in "$@"; do mapfile -d '' -t words <"$file"; "$0" "${words[@]:1}" >"${file%.command}" 2>&1; done
    exit
fi
output=""; shard=""; check=""; help=""; bytes="$STUB_BYTES"
[[ "$script" != merge* ]] || output="$1"
while (($#)); do
    case "$1" in --output-dir) output="$2" ;; --shard-index) shard="$2" ;; --check-only) check=1 ;;
        --pool) bytes="$STUB_BYTES_POOLED" ;; --help) help=1 ;; esac
    shift
done
step="$script${shard:+:$(basename "$output")}"
if [[ -n "$check$help" ]]; then
    printf '%s\n' "$step" >>"$STUB_CALLS.checks"
    case " $STUB_REFUSE " in *" $step "*) printf '%b\n' "$STUB_REFUSAL" >&2; exit 2 ;; esac
    printf 'a warning of some library\n' >&2
    printf '{"bytes_at_most": %s, "positions_at_most": 10, "row_dims": [8], "targets": 1}\n' "$bytes"
    exit 0
fi
printf '%s\t%s\t%s\n' "$step" "${CUDA_VISIBLE_DEVICES-}" "${OMP_NUM_THREADS-}" >>"$STUB_CALLS"
printf '%s\0' "${arguments[@]}" >>"$STUB_CALLS.arguments"
printf 'this is %s\n' "$step"
[[ "$script" != *exp3_signal* ]] || printf 'progress\n' >&2
[[ -z "$shard" ]] || printf '%b' "$STUB_SAYS" >&2
case " $STUB_FAIL " in *" $step "*) printf 'the reason stands \033[31mhere\n' >&2; exit "$STUB_STATUS" ;; esac
case " $STUB_KILLED " in *" $step "*) kill -KILL $$ ;; esac
case " $STUB_DEAF " in *" $step "*) trap '' TERM; sleep 300 & sleep 300 ;; esac
case " $STUB_HANG " in *" $step "*) sleep 300 & sleep 300 ;; esac
if [[ -n "$shard" && ! -f "$output/manifest.json" ]]; then
    mkdir -p -- "$output"
    sleep "$STUB_SLEEP" & # a child, as a real step may have
    wait
    head -c 100000 /dev/zero >"$output/grads.npy" || exit 1
    trap '' TERM # what is finished is noted too, even where another step's end stops this one in between
    printf '{}' >"$output/manifest.json"
    printf '%s\n' "$step" >>"$STUB_CALLS.finished"
elif [[ -z "$shard" ]]; then
    sleep "$STUB_SLEEP"
fi
"""
NVIDIA_SMI = "#!/usr/bin/env bash\nprintf '%s\\n' $STUB_GPUS\n"
SETTINGS = re.findall(r'^: "\$\{(\w+):=', (ROOT / "config.env").read_text(), re.MULTILINE)
PROBES, POOLED_PROBES = (
    [f"probe_grad_vectors.py:{part}_{tag}_s{i}" for tag in ("base", "trained") for i in (0, 1)]
    for part in ("exp12", "exp3")
)


def write_program(file: Path, text: str) -> None:
    """An executable `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def stub_environment(directory: Path) -> dict[str, str]:
    """An environment whose launcher runs the stub on the CPU, writes below `directory` and sees no real GPU."""
    write_program(directory / "stub python", STUB)
    write_program(directory / "bin" / "nvidia-smi", NVIDIA_SMI)
    (directory / "tmp").mkdir()
    return {
        **{name: value for name, value in os.environ.items() if name not in (*SETTINGS, "CUDA_VISIBLE_DEVICES")},
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(directory / "stub python"),
        "OUT_ROOT": str(directory / "out 'root'"),
        "TMPDIR": str(directory / "tmp"),
        "DEVICE": "cpu",
        "EXP3": "1",  # all that the chain can have
        "STUB_CALLS": str(directory / "calls"),
        **dict.fromkeys(("STUB_BYTES", "STUB_BYTES_POOLED"), "1000"),
        **dict.fromkeys((f"STUB_{what}" for what in "FAIL KILLED SAYS HANG DEAF REFUSE GPUS".split()), ""),
        "STUB_STATUS": "7",
        "STUB_REFUSAL": "error: --layer 99: the model has 2 layers",
        "STUB_SLEEP": "0",
    }


def launch(
    environment: Mapping[str, str], *arguments: Path | str, root: Path = ROOT, cwd: Path | str = "/", **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end."""
    return subprocess.run(
        ["bash", root / "run_exp1_exp2.sh", *arguments],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
    )


def start_launcher(environment: Mapping[str, str], **settings: str) -> subprocess.Popen[str]:
    """Start the launcher and return."""
    return subprocess.Popen(
        ["bash", ROOT / "run_exp1_exp2.sh"],
        env={**environment, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored, as background jobs of a shell inherit SIGINT and those under nohup SIGHUP, they could not be trapped.
        preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)],
    )


def calls(environment: Mapping[str, str], kind: str = "") -> list[list[str]]:
    """The stub's calls: step, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS; with `kind`, the steps checked or finished."""
    file = Path(environment["STUB_CALLS"] + kind)
    return [line.split("\t") for line in file.read_text().splitlines()] if file.exists() else []


def steps(environment: Mapping[str, str]) -> list[str]:
    """The steps that the stub was called for, in order."""
    return [call[0] for call in calls(environment)]


def processes_of(environment: Mapping[str, str]) -> list[str]:
    """Command lines of living processes that have this test's stub in their environment."""
    marker = environment["STUB_CALLS"].encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and marker in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def wait_until(condition, seconds: float = 30) -> bool:
    """Whether `condition()` came to hold within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
