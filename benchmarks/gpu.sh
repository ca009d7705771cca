#!/usr/bin/env bash
# What one card is asked: is it right, does memory follow docs/scaling.md, how fast is every phase. No network, no weights.
#
#     bash benchmarks/gpu.sh [OUT]                       # at most 9 minutes; OUT/gpu.md and OUT/gpu.jsonl (default: out/gpu)
#     DEVICE=cpu SHAPE=small bash benchmarks/gpu.sh      # the same path on a laptop
#
# gpu.md is for RESULTS.md. A step that the time limit (LIMIT_S) cuts off or does not reach is named there, and is no
# failure; a check that fails, or a step that breaks, makes the exit status 1.
set -Eeuo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
: "${PYTHON:=.venv/bin/python}" "${DEVICE:=cuda}" "${SHAPE:=qwen2.5-1.5b}" "${LIMIT_S:=530}"
out="${1:-out/gpu}"
mkdir -p -- "$out"
log="$out/step.log"
: >"$out/gpu.md"
: >"$out/gpu.jsonl"
failed=()

step() { # name, command -> its tables into gpu.md, its line of JSON and how it ended into gpu.jsonl
    local name="$1" left=$((LIMIT_S - SECONDS)) began=$SECONDS status=0 result
    shift
    printf '\n## %s\n\n' "$name" | tee -a "$out/gpu.md"
    if ((left < 5)); then
        echo "not reached: the time limit of $LIMIT_S s" | tee -a "$out/gpu.md"
        return
    fi
    # Killed where it does not heed the first signal; what it printed until then is kept.
    timeout --signal=TERM --kill-after=5 "$left" "$@" >"$log" 2>&1 || status=$?
    grep -v '^{' "$log" | tee -a "$out/gpu.md" || true
    case "$status" in
        0) ;;
        124 | 137) echo "cut off by the time limit of $LIMIT_S s" | tee -a "$out/gpu.md" ;;
        *)
            failed+=("$name")
            echo "FAILED with status $status" | tee -a "$out/gpu.md"
            ;;
    esac
    result="$(grep '^{' "$log" | tail -n 1 || true)"
    printf '{"step": "%s", "status": %d, "seconds": %d, "result": %s}\n' \
        "$name" "$status" $((SECONDS - began)) "${result:-null}" >>"$out/gpu.jsonl"
}

quick=() rollouts=()
probe=(--num-prompts 32 --max-new-tokens 256 --plain-prompts 1 --plain-rollouts 1 --repeats 3)
rows=20480x8960
if [[ "$SHAPE" == small ]]; then
    quick=(--quick) rollouts=(--rollouts 1)
    probe=(--num-prompts 2 --num-samples 2 --max-new-tokens 12 --prompt-tokens 8 --repeats 1)
    rows=400x64
fi
step "Checks" "$PYTHON" benchmarks/gpu_checks.py "${rollouts[@]}" --device "$DEVICE"
step "Memory against docs/scaling.md" "$PYTHON" benchmarks/bench_scaling.py --check "${quick[@]}" --device "$DEVICE"
step "The probe by phase" "$PYTHON" benchmarks/bench_probe.py --config "$SHAPE" --random-init --device "$DEVICE" "${probe[@]}"
step "The step" "$PYTHON" benchmarks/bench_step.py --shape "$SHAPE" --device "$DEVICE"
step "The analyses" "$PYTHON" benchmarks/bench_scaling.py --analyses "$rows" --device "$DEVICE"
rm -f -- "$log"
if ((${#failed[@]} > 0)); then
    printf 'failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
