#!/usr/bin/env bash
# Both experiments from start to end: probe the shards of both models (one per GPU, or as many at once as the CPU
# has cores), merge, analyse, plot.
#
#     bash run_exp1_exp2.sh                     the study in config.env: by default the demo pair
#     bash run_exp1_exp2.sh my_study.env        another file of settings
#     DRY_RUN=1 bash run_exp1_exp2.sh           only print what would run
#     BASE_MODEL=Qwen/Qwen2.5-1.5B TRAINED_MODEL=my/checkpoint DATASET=problems.jsonl bash run_exp1_exp2.sh
#
# Exit status: 0 done, 2 bad settings, 1 a step failed (its log's end is shown, all others are stopped).
set -Eeuo pipefail
set -m # each step in a process group of its own, so that it can be stopped with all its children

PROJECT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

die() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

say() {
    printf '%s  %s\n' "$(date +%H:%M:%S)" "$1" >&2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "bash 5.1 or later is needed, this is $BASH_VERSION"
(($# <= 1)) || die "usage: run_exp1_exp2.sh [CONFIG]"
config="${1:-$PROJECT/config.env}"
[[ -f "$config" ]] || die "$config: no such file of settings"
# shellcheck source=config.env
source "$config"

# ---- what to run, and where -----------------------------------------------------------------------------------

[[ "$LAUNCHER" == local ]] || die "LAUNCHER=$LAUNCHER: only 'local' is known"
for name in SHARDS_PER_MODEL NUM_PROMPTS NUM_SAMPLES; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || die "$name=${!name}: must be a whole number from 1"
done
[[ "$DEVICE" == auto || "$DEVICE" == cpu || "$DEVICE" == cuda ]] || die "DEVICE=$DEVICE: must be auto, cuda or cpu"

gpus=()
if [[ "$DEVICE" != cpu ]]; then
    if [[ -n "$GPUS" ]]; then
        IFS=', ' read -r -a gpus <<<"$GPUS"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
    fi
    [[ "$DEVICE" == auto || ${#gpus[@]} -gt 0 ]] || die "DEVICE=cuda: nvidia-smi lists no GPU; set GPUS or DEVICE=cpu"
fi

n_cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # which would lower nproc's answer
# Analyses work on many small matrices too, where threads that wait for each other cost more than they bring: with
# both of two cores, Exp 1 of the demo took twice as long as with one.
analysis_threads=$(((n_cores + 1) / 2))
n_jobs=$((2 * SHARDS_PER_MODEL))
if ((${#gpus[@]} > 0)); then
    device=cuda
    n_slots=${#gpus[@]}
    threads=""
else
    device=cpu
    n_slots=$((n_cores < n_jobs ? n_cores : n_jobs))
    threads=$((n_cores / n_slots))
fi

declare -A model_of=([base]="$BASE_MODEL" [trained]="$TRAINED_MODEL")
figures="$OUT_ROOT/exp12_figures"
logs="$OUT_ROOT/logs"

probe_command() { # tag, shard -> the array `command`
    command=(
        "$python" "$PROJECT/probe_grad_vectors.py"
        --model-path "${model_of[$1]}" --dataset "$DATASET" --output-dir "$OUT_ROOT/exp12_$1_s$2"
        --shard-index "$2" --num-shards "$SHARDS_PER_MODEL"
        --num-prompts "$NUM_PROMPTS" --num-samples "$NUM_SAMPLES"
        --max-new-tokens "$MAX_NEW_TOKENS" --temperature "$TEMPERATURE"
        --param-suffix "$PARAM_SUFFIX" --row-idx "$ROW_IDX"
        --bins "$BINS" --pos-per-bin-per-rollout "$POS_PER_BIN_PER_ROLLOUT" --seed "$SEED"
        --device "$device" --dtype "$DTYPE"
    )
    if [[ -n "$LAYER" ]]; then command+=(--layer "$LAYER"); fi
}

merge_command() { # tag -> the array `command`
    command=("$python" "$PROJECT/merge_grad_vector_shards.py" "$OUT_ROOT/exp12_$1")
    local shard
    for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do command+=("$OUT_ROOT/exp12_$1_s$shard"); done
}

analysis_command() { # script, name -> the array `command`
    command=("$python" "$PROJECT/$1" --output-dir "$figures")
    command+=("base=$OUT_ROOT/exp12_base" "trained=$OUT_ROOT/exp12_trained")
}

plot_command() { # -> the array `command`
    command=("$python" "$PROJECT/plot_exp12_intuitive.py" --output-dir "$figures")
    command+=(--base "$OUT_ROOT/exp12_base" --trained "$OUT_ROOT/exp12_trained")
}

# ---- running steps, and stopping them --------------------------------------------------------------------------

declare -A name_of=() log_of=() slot_of=() start_of=() # by process id, which is its process group's too

stop_all() {
    local pid waited
    for pid in "${!name_of[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    for pid in "${!name_of[@]}"; do
        for ((waited = 0; waited < 50; waited++)); do
            kill -0 -- "-$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
    name_of=()
}

interrupted() {
    trap - INT TERM HUP
    say "stopping"
    stop_all
    exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
trap 'interrupted 129' HUP
trap stop_all EXIT

start() { # name, log, slot, command...: stdout and stderr go to the log
    local name="$1" log="$2" slot="$3"
    shift 3
    "$@" </dev/null >"$log" 2>&1 &
    name_of[$!]="$name" log_of[$!]="$log" slot_of[$!]="$slot" start_of[$!]=$SECONDS
}

finish_one() { # waits for whichever step ends first; its slot -> freed_slot
    local pid="" status=0
    wait -n -p pid "${!name_of[@]}" || status=$?
    local name="${name_of[$pid]}" log="${log_of[$pid]}"
    unset "name_of[$pid]"
    if ((status != 0)); then
        printf 'error: %s failed with exit code %d; the end of %s:\n' "$name" "$status" "$log" >&2
        tail -n 20 -- "$log" >&2
        stop_all
        exit 1
    fi
    say "$name: done in $((SECONDS - start_of[$pid])) s"
    freed_slot="${slot_of[$pid]}"
}

with_threads() { # number -> the array `where`, to be put before a command
    where=(env "OMP_NUM_THREADS=$1" "MKL_NUM_THREADS=$1" "OPENBLAS_NUM_THREADS=$1")
}

run_step() { # name, log, command...
    with_threads "$analysis_threads"
    start "$1" "$2" 0 "${where[@]}" "${@:3}"
    finish_one
}

# ---- the chain ---------------------------------------------------------------------------------------------------

if [[ "$DRY_RUN" == 1 ]]; then
    python="${PYTHON:-$PROJECT/.venv/bin/python}"
    printf '# %d shards, %d at once, on %s\n' "$n_jobs" "$((n_slots < n_jobs ? n_slots : n_jobs))" \
        "$device${gpus[*]:+ ${gpus[*]}}"
    for tag in base trained; do
        for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do
            probe_command "$tag" "$shard" && printf '%q ' "${command[@]}" && printf '\n'
        done
    done
    for tag in base trained; do merge_command "$tag" && printf '%q ' "${command[@]}" && printf '\n'; done
    analysis_command analyze_exp1_compression.py && printf '%q ' "${command[@]}" && printf '\n'
    analysis_command analyze_exp2_direction.py && printf '%q ' "${command[@]}" && printf '\n'
    plot_command && printf '%q ' "${command[@]}" && printf '\n'
    exit 0
fi

python="$(bash "$PROJECT/scripts/ensure_venv.sh")"
mkdir -p -- "$figures" "$logs"
began=$SECONDS

freed_slot=""
free_slots=()
for ((slot = 0; slot < n_slots; slot++)); do free_slots+=("$slot"); done
for tag in base trained; do
    for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do
        if ((${#free_slots[@]} == 0)); then
            finish_one
            free_slots=("$freed_slot")
        fi
        slot="${free_slots[0]}"
        free_slots=("${free_slots[@]:1}")
        probe_command "$tag" "$shard"
        if [[ "$device" == cuda ]]; then
            where=(env "CUDA_VISIBLE_DEVICES=${gpus[$slot]}")
            say "probe $tag shard $shard: started on GPU ${gpus[$slot]}"
        else
            with_threads "$threads"
            say "probe $tag shard $shard: started on the CPU, $threads threads"
        fi
        start "probe $tag shard $shard" "$logs/${tag}_s$shard.log" "$slot" "${where[@]}" "${command[@]}"
    done
done
while ((${#name_of[@]} > 0)); do finish_one; done
say "all shards: $((SECONDS - began)) s"

for tag in base trained; do
    merge_command "$tag"
    run_step "merge $tag" "$logs/merge_$tag.log" "${command[@]}"
done
analysis_command analyze_exp1_compression.py
run_step "experiment 1" "$figures/exp1.txt" "${command[@]}"
analysis_command analyze_exp2_direction.py
run_step "experiment 2" "$figures/exp2.txt" "${command[@]}"
plot_command
run_step "plots" "$figures/plot.txt" "${command[@]}"
say "everything: $((SECONDS - began)) s"

cat -- "$figures/exp1.txt" "$figures/exp2.txt"
printf '\nFigures:\n'
printf '  %s\n' "$figures"/*.png
printf 'All of it on one page:\n  %s\n' "$figures/report.html"
