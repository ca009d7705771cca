#!/usr/bin/env bash
# The experiments from start to end: probe the shards of every model (one per GPU, or as many at once as the CPU
# has cores), merge, probe the same rollouts again for Exp 3, merge, analyse, plot.
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

refuse_other_kinds() { # a file to be written: no link is followed, and no FIFO waited for
    [[ ! -L "$1" && (! -e "$1" || -f "$1") ]] || die "$(printf '%q' "$1"): is not an ordinary file; take it away"
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
# Which dumps there are of each model: OUT_ROOT/PART_TAG, of shards OUT_ROOT/PART_TAG_sN.
parts=(exp12)
if [[ "$EXP3" == 1 ]]; then parts+=(exp3); fi

label_of() { # part, tag: what the part's steps are called in logs and messages
    case "$1" in
        exp12) printf '%s' "$2" ;;
        *) printf '%s' "$1_$2" ;;
    esac
}

probe_command() { # part, tag, shard -> the array `command`
    case "$1" in
        exp12) sampling_probe_command "$2" "$3" ;;
        exp3) pooling_probe_command "$2" "$3" ;;
    esac
}

sampling_probe_command() { # tag, shard -> the array `command`
    command=(
        "$python" "$PROJECT/probe_grad_vectors.py" --model-path "${model_of[$1]}"
        ${adapter_of[$1]:+--adapter "${adapter_of[$1]}"} --dataset "$DATASET" --output-dir "$OUT_ROOT/exp12_$1_s$2"
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
    if [[ -n "$MIN_MIXED_PROMPTS" ]]; then command+=(--min-mixed-prompts "$MIN_MIXED_PROMPTS"); fi
    command+=("${probe_args[@]}")
}

pooling_probe_command() { # tag, shard -> the array `command`, which reads the rollouts of the merged dump
    pooling_command "$1"
    command+=(
        --rollouts "$OUT_ROOT/exp12_$1" --output-dir "$OUT_ROOT/exp3_$1_s$2"
        --shard-index "$2" --num-shards "$SHARDS_PER_MODEL"
    )
}

pooling_command() { # tag -> the array `command`: Exp 3's probe, but not of what
    local kept_args
    keep_probe_args
    command=(
        "$python" "$PROJECT/probe_grad_vectors.py" --model-path "${model_of[$1]}"
        ${adapter_of[$1]:+--adapter "${adapter_of[$1]}"} --pool bucket --bins "$EXP3_BINS" --project "$EXP3_PROJECT"
        --param-suffix "${EXP3_PARAM_SUFFIX:-$PARAM_SUFFIX}" --seed "$SEED" --device "$device" --dtype "$DTYPE"
    )
    if [[ -n "$EXP3_LAYER$LAYER" ]]; then command+=(--layer "${EXP3_LAYER:-$LAYER}"); fi
    if [[ -n "$MIN_MIXED_PROMPTS" ]]; then command+=(--min-mixed-prompts "$MIN_MIXED_PROMPTS"); fi
    command+=("${kept_args[@]}")
}

keep_probe_args() { # -> kept_args: those of probe_args that say which model, which weights and how to compute
    local with_value="--revision --adapter --tokenizer --device-map --max-memory --offload-dir --attention --batch-tokens"
    local alone="--trust-remote-code --overwrite --quiet --verbose -q -v" word is_value_kept=0
    with_value+=" --seed --device --dtype --min-mixed-prompts" # which win over SEED, DEVICE and so on
    if [[ -z "$EXP3_LAYER" ]]; then with_value+=" --layer"; fi
    if [[ -z "$EXP3_PARAM_SUFFIX" ]]; then with_value+=" --param-suffix"; fi
    kept_args=()
    for word in "${probe_args[@]}"; do
        if ((is_value_kept)); then
            kept_args+=("$word")
            is_value_kept=0
        elif [[ " $with_value " == *" ${word%%=*} "* ]]; then
            kept_args+=("$word")
            [[ "$word" == *=* ]] || is_value_kept=1
        elif [[ " $alone " == *" $word "* ]]; then
            kept_args+=("$word")
        fi
    done
}

merge_command() { # part, tag -> the array `command`
    local shard merged="$OUT_ROOT/$1_$2"
    command=("$python" "$PROJECT/merge_grad_vector_shards.py" "$merged")
    for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do command+=("${merged}_s$shard"); done
}

analysis_command() { # script, part, flags -> the array `command`
    command=("$python" "$PROJECT/$1" --output-dir "$figures" ${FIGURE_FORMAT:+--figure-format "$FIGURE_FORMAT"} "${@:3}")
    local tag
    for tag in "${tags[@]}"; do command+=("$tag=$OUT_ROOT/$2_$tag"); done
}

experiment_command() { # number -> the array `command`
    case "$1" in
        1) analysis_command analyze_exp1_compression.py exp12 ;;
        2) analysis_command analyze_exp2_direction.py exp12 ;;
        3) analysis_command analyze_exp3_signal.py exp3 --objective "$EXP3_OBJECTIVE" ;;
    esac
}
experiments=(1 2)
if [[ "$EXP3" == 1 ]]; then experiments+=(3); fi

plot_command() { # -> the array `command`
    if [[ "${tags[*]}" == "base trained" ]]; then
        command=("$python" "$PROJECT/plot_exp12_intuitive.py" --output-dir "$figures")
        command+=(${FIGURE_FORMAT:+--figure-format "$FIGURE_FORMAT"})
        command+=(--base "$OUT_ROOT/exp12_base" --trained "$OUT_ROOT/exp12_trained")
    else
        analysis_command plot_exp12_intuitive.py exp12
    fi
}

print_command() {
    printf '%q ' "${command[@]}"
    printf '\n'
}

print_plan() {
    local part tag shard number processors="$device${gpus[*]:+ ${gpus[*]}}"
    if [[ "$LAUNCHER" == slurm ]]; then
        printf '# %d shards, through Slurm, on %s\n' "$n_jobs" "$processors"
    else
        printf '# %d shards, %d at once, on %s\n' "$n_jobs" "$((n_slots < n_jobs ? n_slots : n_jobs))" "$processors"
    fi
    for part in "${parts[@]}"; do
        for tag in "${tags[@]}"; do
            for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do
                probe_command "$part" "$tag" "$shard" && print_command
            done
        done
        for tag in "${tags[@]}"; do merge_command "$part" "$tag" && print_command; done
    done
    for number in "${experiments[@]}"; do experiment_command "$number" && print_command; done
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
    refuse_other_kinds "$OUT_ROOT/.lock"
    exec 9>>"$OUT_ROOT/.lock"
    flock --nonblock 9 ||
        die "OUT_ROOT=$(printf %q "$OUT_ROOT"): another launcher is at work there, $(printable <"$OUT_ROOT/.lock")"
    printf 'process %d on %s since %s\n' "$$" "$HOSTNAME" "$(date '+%F %T %z')" >"$OUT_ROOT/.lock"
}

warn_of_shared_gpus() { # two studies on one GPU may be meant, so it is said and not refused; held as long as steps live
    local gpu descriptor directory="${TMPDIR:-/tmp}/gradprobe-$UID"
    (umask 077 && mkdir -p -- "$directory" 2>/dev/null) || true
    [[ -d "$directory" && ! -L "$directory" && -O "$directory" ]] || return 0
    for gpu in "${gpus[@]}"; do
        refuse_other_kinds "$directory/gpu$gpu"
        exec {descriptor}>>"$directory/gpu$gpu"
        if flock --nonblock "$descriptor"; then
            printf 'process %d, OUT_ROOT=%q\n' "$$" "$OUT_ROOT" >"$directory/gpu$gpu"
        else
            say "warning: GPU $gpu is in use by another launcher ($(printable <"$directory/gpu$gpu")): both get slower, \
and may run out of its memory; set GPUS to have one each"
        fi
    done
}

save_configuration() { # what was asked for, as a file of settings that asks for it again from any directory
    local file="$OUT_ROOT/config.resolved.env" name names
    rm -f -- "$file.part" # not written through, if it is a link
    mapfile -t names < <(sed -n 's/^: "${\([A-Z0-9_]*\):=.*/\1/p' "$PROJECT/config.env")
    {
        printf '# bash run_exp1_exp2.sh THIS_FILE runs this study again; the environment wins over what stands here.\n'
        # %q keeps on the line of the comment whatever it is given: this file will be executed.
        printf '# %s on %q; commit: %q; device: %s, GPUs: %s\n' \
            "$(date '+%F %T %z')" "$HOSTNAME" "$(commit)" "$device" "${gpus[*]:-none}"
        for name in "${names[@]}"; do
            case "$name" in
                MODELS) save_models ;;
                ADAPTERS) save_adapters ;;
                *) save_setting "$name" "$(from_anywhere "$name")" ;;
            esac
        done
    } >"$file.part"
    mv -f -- "$file.part" "$file"
}

from_anywhere() { # name of a setting -> its value; local paths absolute
    local value="${!1}"
    case "$1" in
        DATASET) [[ "$value" == hf:* || "$value" == gym:* ]] || make_absolute value ;;
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

save_adapters() { # with absolute paths
    local tag path
    # shellcheck disable=SC2016
    printf '[[ -n "${ADAPTERS-}" ]] || ADAPTERS=('
    for tag in "${!adapter_of[@]}"; do
        path="${adapter_of[$tag]}"
        if is_local_model "$path"; then make_absolute path; fi
        printf '%q ' "$tag=$path"
    done
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
        gym:*) names+=(reasoning-gym) ;;
        *) if [[ -d "$DATASET" || ! -f "$DATASET" ]]; then names+=(datasets pyarrow); fi ;;
    esac
    if [[ "$VERIFIER" == math-verify || "$VERIFIER" == numeric ]]; then names+=(math-verify); fi
    if ((${#adapter_of[@]} > 0)) || [[ " ${probe_args[*]} " == *" --adapter "* ]]; then names+=(peft); fi
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
say "checking models and data before anything is computed: ${tags[*]}, $(printf %q "$DATASET")"
answers="$(mktemp -d)" || die "no temporary directory can be made; set TMPDIR"
ask_probe "$answers"
check_models "$answers"
check_disk_space
reason="$(mkdir -p -- "$figures" "$logs" 2>&1)" || die "OUT_ROOT=$(printf %q "$OUT_ROOT"): $reason"
take_lock
save_configuration
if [[ "$LAUNCHER" == local && "$device" == cuda ]]; then warn_of_shared_gpus; fi

# ---- the chain --------------------------------------------------------------------------------------------------

if [[ "$LAUNCHER" == slurm ]]; then
    # shellcheck source=scripts/slurm.sh
    source "$PROJECT/scripts/slurm.sh"
    submit_chain
    exit
fi

run_probes() { # part: the shards of every model, as many at once as there are slots
    local began=$SECONDS freed_slot="" free_slots=() slot tag shard label
    for ((slot = 0; slot < n_slots; slot++)); do free_slots+=("$slot"); done
    for tag in "${tags[@]}"; do
        label="$(label_of "$1" "$tag")"
        for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do
            if ((${#free_slots[@]} == 0)); then
                finish_one
                free_slots=("$freed_slot")
            fi
            slot="${free_slots[0]}"
            free_slots=("${free_slots[@]:1}")
            probe_command "$1" "$tag" "$shard"
            if [[ "$device" == cuda ]]; then
                where=(env "CUDA_VISIBLE_DEVICES=${gpus[$slot]}")
                say "probe $label shard $shard: started on GPU ${gpus[$slot]}"
            else
                with_threads "$threads"
                say "probe $label shard $shard: started on the CPU, $threads threads"
            fi
            start "probe $label shard $shard" "$logs/${label}_s$shard.log" "$slot" "${where[@]}" "${command[@]}"
        done
    done
    while ((${#name_of[@]} > 0)); do finish_one; done
    say "all shards of $1: $((SECONDS - began)) s"
}

run_merges() { # part
    local tag label
    for tag in "${tags[@]}"; do
        label="$(label_of "$1" "$tag")"
        merge_command "$1" "$tag"
        run_step "merge $label" "$logs/merge_$label.log" "${command[@]}"
    done
}

run_experiments() { # two at once where there are two cores
    local number
    for number in "${experiments[@]}"; do
        if ((${#name_of[@]} >= n_cores / analysis_threads)); then finish_one; fi
        experiment_command "$number"
        start_analysis "experiment $number" "exp$number.txt" "${command[@]}"
    done
    while ((${#name_of[@]} > 0)); do finish_one; done
}

began=$SECONDS
for part in "${parts[@]}"; do
    run_probes "$part"
    run_merges "$part"
done
run_experiments
plot_command
start_analysis "plots" plot.txt "${command[@]}"
finish_one
say "everything: $((SECONDS - began)) s"

{
    for number in "${experiments[@]}"; do cat -- "$figures/exp$number.txt"; done
    printf '\nFigures:\n'
    printf '  %s\n' "$figures"/*.png
    printf 'All of it on one page:\n  %s\n' "$figures/report.html"
} | printable
