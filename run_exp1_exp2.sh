#!/usr/bin/env bash
# Both experiments from start to end: probe the shards of every model (one per GPU, or as many at once as the CPU
# has cores), merge, analyse, plot.
#
#     bash run_exp1_exp2.sh                     the study in config.env: by default the demo pair
#     bash run_exp1_exp2.sh my_study.env        another file of settings
#     DRY_RUN=1 bash run_exp1_exp2.sh           only print what would run
#     BASE_MODEL=Qwen/Qwen2.5-1.5B TRAINED_MODEL=my/checkpoint DATASET=problems.jsonl bash run_exp1_exp2.sh
#     MODELS="base=my/base step100=my/step100 step200=my/step200" bash run_exp1_exp2.sh
#     bash run_exp1_exp2.sh out/exp12/config.resolved.env      the study that was run there, once more
#
# The same command again continues: what is finished and valid is left alone. Logs are in OUT_ROOT/logs.
# Exit status: 0 done, 2 bad settings (nothing was begun), 1 a step failed (its log's end is shown, all others are
# stopped), 128 + N ended by signal N.
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

printable() { # text: a terminal gets no control characters
    tr '\r' '\n' | tr -d '\000-\010\013-\037\177'
}

# ---- settings ---------------------------------------------------------------------------------------------------

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "bash 5.1 or later is needed, this is $BASH_VERSION"
(($# <= 1)) || die "usage: run_exp1_exp2.sh [CONFIG]"
config="${1:-$PROJECT/config.env}"
[[ "$config" == */* ]] || config="./$config" # a bare name would be looked up in PATH
[[ -f "$config" && -r "$config" ]] || die "$(printf '%q' "$config"): no such file of settings, or not readable"
bash -n -- "$config" || die "$(printf '%q' "$config"): is not a file that bash can read"
trap 'die "$(printf %q "$config"): ended early"' EXIT
# shellcheck source=config.env
source "$config"
trap - EXIT
# shellcheck source=config.env
source "$PROJECT/config.env" # for what that file leaves out

n_cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # which would lower nproc's answer
# shellcheck source=scripts/check_config.sh
source "$PROJECT/scripts/check_config.sh"
# shellcheck source=scripts/steps.sh
source "$PROJECT/scripts/steps.sh"
check_settings

# ---- what to run, and where -------------------------------------------------------------------------------------

# Analyses work on many small matrices too, where threads that wait for each other cost more than they bring: with
# both of two cores, Exp 1 of the demo took twice as long as with one.
analysis_threads=$(((n_cores + 1) / 2))
n_jobs=$((${#tags[@]} * SHARDS_PER_MODEL))
threads=""
if [[ "$LAUNCHER" == slurm ]]; then
    device="$DEVICE"
    n_slots=$n_jobs
elif ((${#gpus[@]} > 0)); then
    device=cuda
    n_slots=${#gpus[@]}
else
    device=cpu
    n_slots=$((n_cores < n_jobs ? n_cores : n_jobs))
    threads=$((n_cores / n_slots))
fi
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
        --device "$device" --dtype "$DTYPE" --verifier "$VERIFIER"
    )
    if [[ -n "$LAYER" ]]; then command+=(--layer "$LAYER"); fi
    if [[ -n "$PROMPT_TEMPLATE" ]]; then command+=(--prompt-template "$PROMPT_TEMPLATE"); fi
    if [[ "$CHAT_TEMPLATE" == 1 ]]; then command+=(--chat-template); fi
    if [[ -n "$SYSTEM_PROMPT" ]]; then command+=(--system-prompt "$SYSTEM_PROMPT"); fi
    command+=("${probe_args[@]}")
}

merge_command() { # tag -> the array `command`
    command=("$python" "$PROJECT/merge_grad_vector_shards.py" "$OUT_ROOT/exp12_$1")
    local shard
    for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do command+=("$OUT_ROOT/exp12_$1_s$shard"); done
}

analysis_command() { # script -> the array `command`
    command=("$python" "$PROJECT/$1" --output-dir "$figures")
    local tag
    for tag in "${tags[@]}"; do command+=("$tag=$OUT_ROOT/exp12_$tag"); done
}

plot_command() { # -> the array `command`
    if [[ "${tags[*]}" == "base trained" ]]; then
        command=("$python" "$PROJECT/plot_exp12_intuitive.py" --output-dir "$figures")
        command+=(--base "$OUT_ROOT/exp12_base" --trained "$OUT_ROOT/exp12_trained")
    else
        analysis_command plot_exp12_intuitive.py
    fi
}

print_command() {
    printf '%q ' "${command[@]}"
    printf '\n'
}

print_plan() {
    local tag shard processors="$device${gpus[*]:+ ${gpus[*]}}"
    if [[ "$LAUNCHER" == slurm ]]; then
        printf '# %d shards, through Slurm, on %s\n' "$n_jobs" "$processors"
    else
        printf '# %d shards, %d at once, on %s\n' "$n_jobs" "$((n_slots < n_jobs ? n_slots : n_jobs))" "$processors"
    fi
    for tag in "${tags[@]}"; do
        for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do probe_command "$tag" "$shard" && print_command; done
    done
    for tag in "${tags[@]}"; do merge_command "$tag" && print_command; done
    analysis_command analyze_exp1_compression.py && print_command
    analysis_command analyze_exp2_direction.py && print_command
    plot_command && print_command
}

if [[ "$DRY_RUN" == 1 ]]; then
    python="${PYTHON:-$PROJECT/.venv/bin/python}"
    print_plan
    exit 0
fi

# ---- before the first step --------------------------------------------------------------------------------------

answers="" # a directory for the time of the checks
clean_up() {
    stop_all
    if [[ -n "$answers" ]]; then rm -rf -- "$answers"; fi
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
trap 'interrupted 129' HUP
trap clean_up EXIT

is_locked=0
take_lock() { # on OUT_ROOT, for the life of this process
    ((is_locked == 0)) || return 0
    is_locked=1
    exec 9>>"$OUT_ROOT/.lock"
    flock --nonblock 9 ||
        die "OUT_ROOT=$(printf %q "$OUT_ROOT"): another launcher is at work there, $(printable <"$OUT_ROOT/.lock")"
    printf 'process %d on %s since %s\n' "$$" "$HOSTNAME" "$(date '+%F %T %z')" >"$OUT_ROOT/.lock"
}

save_configuration() { # what was asked for, as a file of settings that asks for it again from any directory
    local file="$OUT_ROOT/config.resolved.env" name names
    mapfile -t names < <(sed -n 's/^: "${\([A-Z0-9_]*\):=.*/\1/p' "$PROJECT/config.env")
    {
        printf '# bash run_exp1_exp2.sh THIS_FILE runs this study again; the environment wins over what stands here.\n'
        # %q keeps on the line of the comment whatever it is given: this file will be executed.
        printf '# %s on %q; commit: %q; device: %s, GPUs: %s\n' \
            "$(date '+%F %T %z')" "$HOSTNAME" "$(commit)" "$device" "${gpus[*]:-none}"
        for name in "${names[@]}"; do
            if [[ "$name" == MODELS ]]; then save_models; else save_setting "$name" "$(from_anywhere "$name")"; fi
        done
    } >"$file.part"
    mv -f -- "$file.part" "$file"
}

from_anywhere() { # name of a setting -> its value; local paths absolute
    local value="${!1}"
    case "$1" in
        DATASET) [[ "$value" == hf:* ]] || make_absolute value ;;
        BASE_MODEL | TRAINED_MODEL) if is_local_model "$value"; then make_absolute value; fi ;;
    esac
    printf '%s' "$value"
}

save_setting() { # name, value
    # shellcheck disable=SC2016
    printf '[[ -n "${%s-}" ]] || %s=%q\n' "$1" "$1" "$2"
}

save_models() { # with absolute paths; where the short form was used it stands for itself
    local tag
    # shellcheck disable=SC2016
    printf '[[ -n "${MODELS-}" ]] || MODELS=('
    if [[ -n "${MODELS[*]}" ]]; then
        local path
        for tag in "${tags[@]}"; do
            path="${model_of[$tag]}"
            if is_local_model "$path"; then make_absolute path; fi
            printf '%q ' "$tag=$path"
        done
    fi
    printf ')\n'
}

commit() {
    local found
    if ! found="$(git -C "$PROJECT" rev-parse HEAD 2>/dev/null)"; then found="none"; fi
    if [[ "$found" != none ]] && ! git -C "$PROJECT" diff --quiet HEAD; then found+="-changed"; fi
    printf '%s' "$found"
}

libraries_for_settings() { # -> needed: the tested versions of what these settings want beside requirements.txt
    local names=() name
    case "$DATASET" in
        *.parquet) names+=(pyarrow) ;;
        hf:*) names+=(datasets pyarrow) ;;
        *) if [[ -d "$DATASET" || ! -f "$DATASET" ]]; then names+=(datasets pyarrow); fi ;;
    esac
    if [[ "$VERIFIER" == math-verify || "$VERIFIER" == numeric ]]; then names+=(math-verify); fi
    if [[ " ${probe_args[*]} " == *" --adapter "* ]]; then names+=(peft); fi
    if [[ " ${probe_args[*]} " == *" --sampler openai "* ]]; then names+=(urllib3); fi
    if [[ " ${probe_args[*]} " == *" --device-map "* ]]; then names+=(accelerate); fi
    for name in "${names[@]}"; do
        mapfile -t -O "${#needed[@]}" needed < <(grep -E "^${name}[=>]" "$PROJECT/requirements-dev.txt")
    done
}

needed=()
libraries_for_settings
python="$(bash "$PROJECT/scripts/ensure_venv.sh" "${needed[@]}")"
if [[ -e "$OUT_ROOT/.lock" ]]; then take_lock; fi # who comes second learns it before seconds of checks
answers="$(mktemp -d)" || die "no temporary directory can be made; set TMPDIR"
ask_probe "$answers"
check_models "$answers"
check_disk_space
reason="$(mkdir -p -- "$figures" "$logs" 2>&1)" || die "OUT_ROOT=$(printf %q "$OUT_ROOT"): $reason"
take_lock
save_configuration

# ---- the chain --------------------------------------------------------------------------------------------------

if [[ "$LAUNCHER" == slurm ]]; then
    # shellcheck source=scripts/slurm.sh
    source "$PROJECT/scripts/slurm.sh"
    submit_chain
    exit
fi

began=$SECONDS
freed_slot=""
free_slots=()
for ((slot = 0; slot < n_slots; slot++)); do free_slots+=("$slot"); done
for tag in "${tags[@]}"; do
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

for tag in "${tags[@]}"; do
    merge_command "$tag"
    run_step "merge $tag" "$logs/merge_$tag.log" "${command[@]}"
done
analysis_command analyze_exp1_compression.py
run_analysis "experiment 1" exp1.txt "${command[@]}"
analysis_command analyze_exp2_direction.py
run_analysis "experiment 2" exp2.txt "${command[@]}"
plot_command
run_analysis "plots" plot.txt "${command[@]}"
say "everything: $((SECONDS - began)) s"

{
    cat -- "$figures/exp1.txt" "$figures/exp2.txt"
    printf '\nFigures:\n'
    printf '  %s\n' "$figures"/*.png
    printf 'All of it on one page:\n  %s\n' "$figures/report.html"
} | printable
