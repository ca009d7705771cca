#!/usr/bin/env bash
# The experiments from start to end: probe the shards of every model (one per GPU, or as many at once as the CPU
# has cores), merge, where asked for probe the same rollouts again, pooled, for Exp 3, analyse, plot.
#
#     bash run_exp1_exp2.sh                     the study in config.env: by default the demo pair
#     bash run_exp1_exp2.sh my_study.env        another file of settings
#     DRY_RUN=1 bash run_exp1_exp2.sh           only print what would run
#     BASE_MODEL=Qwen/Qwen2.5-1.5B TRAINED_MODEL=my/checkpoint DATASET=problems.jsonl bash run_exp1_exp2.sh
#     MODELS="base=my/base step100=my/step100 step200=my/step200" bash run_exp1_exp2.sh
#     bash run_exp1_exp2.sh out/exp12/config.resolved.env      the study that was run there, once more
#
# The same command again continues: what is finished and valid is left alone; with more NUM_PROMPTS it adds these. Logs are in OUT_ROOT/logs. Exit status: 0
# done, 2 bad settings (nothing was begun), 1 a step failed (all others are stopped), 128 + N ended by signal N.
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
trap 'die "$(printf %q "$config"): not a file of settings that bash can read to its end"' EXIT
# shellcheck source=config.env
source "$config"
trap - EXIT
# shellcheck source=config.env
source "$PROJECT/config.env" # for what that file leaves out
mapfile -t settings < <(sed -n 's/^: "${\([A-Z0-9_]*\):=.*/\1/p' "$PROJECT/config.env") # their names

n_cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # which would lower nproc's answer
# shellcheck source=scripts/check_config.sh
source "$PROJECT/scripts/check_config.sh"
# shellcheck source=scripts/steps.sh
source "$PROJECT/scripts/steps.sh"

# Which dumps there are of each model: OUT_ROOT/PART_TAG, of shards OUT_ROOT/PART_TAG_sN; their logs are PREFIX and TAG.
declare -A prefix_of=([exp12]="" [exp3]=exp3_)
parts=(exp12) analyses=(exp1)
device="$DEVICE" python="${PYTHON:-$PROJECT/.venv/bin/python}"
read_settings
if [[ "$EXP3" == 1 ]]; then parts+=(exp3); fi
read_sizes
if ((${#tags[@]} < 2)); then STEP=0; fi # no step lies between one model and itself
if [[ "$STEP" == 1 ]]; then analyses+=(step); fi # long ones first: none is then left alone at the end
analyses+=(exp2)
if [[ "$EXP3$STEP" != 00 ]]; then analyses+=(exp3); fi

# ---- what to run, and where -------------------------------------------------------------------------------------

# Analyses work on many small matrices too, where threads that wait for each other cost more than they bring: with
# both of two cores, Exp 1 of the demo took twice as long as with one.
analysis_threads=$(((n_cores + 1) / 2))
n_jobs=$((${#tags[@]} * n_shards)) n_slots=1 threads=""
if ((${#gpus[@]} > 0)); then
    device=cuda n_slots=${#gpus[@]}
elif [[ "$LAUNCHER" == local ]]; then
    device=cpu n_slots=$((n_cores < n_jobs ? n_cores : n_jobs))
    threads=$((n_cores / n_slots))
fi
figures="$OUT_ROOT/exp12_figures" logs="$OUT_ROOT/logs"

probe_command() { # part, tag, shard -> the array `command`, and those of its flags that nothing may override, `own`
    local set=$(($3 / SHARDS_PER_MODEL))
    own=(--output-dir "$OUT_ROOT/$1_$2_s$3" --shard-index $(($3 % SHARDS_PER_MODEL)) --num-shards "$SHARDS_PER_MODEL")
    command=("$python" "$PROJECT/probe_grad_vectors.py" --model-path "${model_of[$2]}")
    command+=(${adapter_of[$2]:+--adapter "${adapter_of[$2]}"} --device "$device")
    add_flags PARAM_SUFFIX LAYER SEED DTYPE PROMPT_TEMPLATE SYSTEM_PROMPT VERIFIER MIN_MIXED_PROMPTS
    if [[ "$CHAT_TEMPLATE" == 1 ]]; then command+=(--chat-template); fi
    if [[ "$1" == exp12 ]]; then
        command+=(--num-prompts "${sizes[set]}")
        if ((set > 0)); then command+=(--skip-prompts "${sizes[set - 1]}"); fi
        add_flags DATASET NUM_SAMPLES MAX_NEW_TOKENS TEMPERATURE ROW_IDX BINS POS_PER_BIN_PER_ROLLOUT
        if [[ "$STEP" == 1 ]]; then add_step step- "$2"; fi
        command+=("${probe_args[@]}" "${sampling_args[@]}" "${own[@]}")
    else
        own+=(--rollouts "$OUT_ROOT/exp12_$2" --pool bucket --bins "$EXP3_BINS" --project "$EXP3_PROJECT")
        own+=(${EXP3_LAYER:+--layer "$EXP3_LAYER"} ${EXP3_PARAM_SUFFIX:+--param-suffix "$EXP3_PARAM_SUFFIX"})
        command+=("${probe_args[@]}" "${own[@]}")
    fi
}

add_step() { # prefix of the flags, tag -> the array `command`: the step from the first model to the last, without tag
    local end tag
    for end in from to; do
        if [[ "$end" == from ]]; then tag="${tags[0]}"; else tag="${tags[-1]}"; fi
        if [[ "$tag" == "$2" ]]; then continue; fi
        command+=("--$1$end" "${model_of[$tag]}" ${adapter_of[$tag]:+"--$1$end-adapter" "${adapter_of[$tag]}"})
    done
}

step_command() { # -> the array `command`: what the step itself is like
    command=("$python" "$PROJECT/describe_step.py" --output-dir "$figures")
    add_flags FIGURE_FORMAT
    add_step "" ""
}

add_flags() { # names of settings -> the array `command`: the flags of these names, of all that are not empty
    local name flag
    for name in "$@"; do
        flag="--${name//_/-}"
        if [[ -n "${!name}" ]]; then command+=("${flag,,}" "${!name}"); fi
    done
}

merge_command() { # part, tag -> the array `command`
    local shard merged="$OUT_ROOT/$1_$2"
    command=("$python" "$PROJECT/merge_grad_vector_shards.py" "$merged")
    for ((shard = 0; shard < $(shards_of "$1"); shard++)); do command+=("${merged}_s$shard"); done
}

analysis_command() { # exp1, exp2, exp3, step or plot -> the array `command`
    local script tag part=exp12
    if [[ "$1" == step ]]; then step_command && return; fi
    case "$1" in
        exp1) script=analyze_exp1_compression.py ;;
        exp2) script=analyze_exp2_direction.py ;;
        exp3) script=analyze_exp3_signal.py part="${parts[-1]}" ;;
        plot) script=plot_exp12_intuitive.py ;;
    esac
    command=("$python" "$PROJECT/$script" --output-dir "$figures")
    add_flags FIGURE_FORMAT
    if [[ "$1" == exp3 ]]; then command+=(--objective "$EXP3_OBJECTIVE"); fi
    for tag in "${tags[@]}"; do command+=("$tag=$OUT_ROOT/${part}_$tag"); done
}

# ---- before the first step --------------------------------------------------------------------------------------

refuse_lost_flags
trap 'say stopping && exit 130' INT
trap 'say stopping && exit 143' TERM
trap 'say stopping && exit 129' HUP
trap stop_all EXIT

save_configuration() { # what was asked for, as a file of settings that asks for it again from any directory
    local file="$OUT_ROOT/config.resolved.env" name text commit
    commit="$(git -C "$PROJECT" rev-parse HEAD 2>/dev/null || printf none)"
    if [[ "$commit" != none ]] && ! git -C "$PROJECT" diff --quiet HEAD; then commit+="-changed"; fi
    {
        printf '# bash run_exp1_exp2.sh THIS_FILE runs this study again; the environment wins over what stands here.\n'
        # %q and @Q keep on its line whatever they are given: this file will be executed.
        printf '# %s on %q; commit: %q; device: %s, GPUs: %s\n' \
            "$(date '+%F %T %z')" "$HOSTNAME" "$commit" "$device" "${gpus[*]:-none}"
        for name in "${settings[@]}"; do
            local -n value="$name"
            text="${value[*]@Q}"
            if [[ "$name" == MODELS || "$name" == ADAPTERS ]]; then text="($text)"; fi
            # shellcheck disable=SC2016
            printf '[[ -n "${%s-}" ]] || %s=%s\n' "$name" "$name" "$text"
        done
    } >"$file.part"
    mv -f -- "$file.part" "$file"
}

libraries_for_settings() { # -> the tested versions of what these settings want beside requirements.txt, printed
    local names=() name flags=" ${probe_args[*]} ${sampling_args[*]} "
    case "$DATASET" in
        *.parquet) names+=(pyarrow) ;;
        hf:*) names+=(datasets pyarrow) ;;
        gym:*) names+=(reasoning-gym) ;;
        *) if [[ -d "$DATASET" || ! -f "$DATASET" ]]; then names+=(datasets pyarrow); fi ;;
    esac
    if [[ "$VERIFIER" == math-verify || "$VERIFIER" == numeric ]]; then names+=(math-verify); fi
    if ((${#adapter_of[@]} > 0)) || [[ "$flags" == *" --adapter"[\ =]* ]]; then names+=(peft); fi
    if [[ "$flags" == *" --sampler"[\ =]openai* ]]; then names+=(urllib3); fi
    if [[ "$flags" == *" --device-map"[\ =]* ]]; then names+=(accelerate); fi
    for name in "${names[@]}"; do grep -E "^${name}[=>]" "$PROJECT/requirements-dev.txt"; done
}

if [[ "$DRY_RUN" == 1 ]]; then
    at_once="$((n_slots < n_jobs ? n_slots : n_jobs)) at once"
    if [[ "$LAUNCHER" == slurm ]]; then at_once="through Slurm"; fi
    printf '# %d shards, %s, on %s\n' "$n_jobs" "$at_once" "$device${gpus[*]:+ ${gpus[*]}}"
    say() { :; }
    start() { # in the place of starting it
        printf '%q ' "${command[@]}" && printf '\n'
        free_slots+=("$4")
    }
else
    mapfile -t needed < <(libraries_for_settings)
    python="$(bash "$PROJECT/scripts/ensure_venv.sh" "${needed[@]}")"
    reason="$(mkdir -p -- "$figures" 2>&1)" || die "OUT_ROOT=$(printf %q "$OUT_ROOT"): $reason"
    mkdir -p -- "$logs"
    exec 9>>"$OUT_ROOT/.lock" # a lock for the life of this process
    flock --nonblock 9 ||
        die "OUT_ROOT=$(printf %q "$OUT_ROOT"): another launcher is at work there, $(printable <"$OUT_ROOT/.lock")"
    printf 'process %d on %s since %s\n' "$$" "$HOSTNAME" "$(date '+%F %T %z')" >"$OUT_ROOT/.lock"
    say "checking models and data before anything is computed: ${tags[*]}, $(printf %q "$DATASET")"
    ask_scripts
    read_answers
    check_disk_space
    save_configuration
    if [[ "$LAUNCHER" == slurm ]]; then
        # shellcheck source=scripts/slurm.sh
        source "$PROJECT/scripts/slurm.sh"
        submit_chain
        exit
    fi
fi

# ---- the chain --------------------------------------------------------------------------------------------------

run_probes() { # part: the shards of every model, as many at once as there are slots
    local slot tag shard label processor
    mapfile -t free_slots < <(seq 0 $((n_slots - 1)))
    for tag in "${tags[@]}"; do
        label="${prefix_of[$1]}$tag"
        for ((shard = 0; shard < $(shards_of "$1"); shard++)); do
            if ((${#free_slots[@]} == 0)); then finish_one; fi
            slot="${free_slots[0]}" free_slots=("${free_slots[@]:1}")
            if [[ "$device" == cuda ]]; then
                where=(env "CUDA_VISIBLE_DEVICES=${gpus[$slot]-}") processor="GPU ${gpus[$slot]-}"
            else
                with_threads "$threads" && processor="the CPU, $threads threads"
            fi
            say "probe $label shard $shard: started on $processor"
            probe_command "$1" "$tag" "$shard"
            start "probe $label shard $shard" "$logs/${label}_s$shard.log" - "$slot" "${where[@]}" "${command[@]}"
        done
    done
    finish_all
}

start_beside() { # name, log, file of results: the array `command`, two at once where there are two cores
    if ((${#name_of[@]} >= n_cores / analysis_threads)); then finish_one; fi
    start "$@" 0 "${where[@]}" "${command[@]}"
}

began=$SECONDS
for part in "${parts[@]}"; do
    run_probes "$part"
    with_threads "$analysis_threads"
    for tag in "${tags[@]}"; do
        label="${prefix_of[$part]}$tag"
        merge_command "$part" "$tag"
        start_beside "merge $label" "$logs/merge_$label.log" -
    done
    finish_all
done
for name in "${analyses[@]}" plot; do
    if [[ "$name" == plot ]]; then finish_all; fi
    analysis_command "$name"
    start_beside "$name" "$logs/$name.log" "$figures/$name.txt"
done
finish_all
if [[ "$DRY_RUN" == 1 ]]; then exit; fi
say "everything: $((SECONDS - began)) s"

printable <"$figures/plot.txt"
printf '\nFigures and summaries:  %q\nAll of it on one page:  %q\n' "$figures" "$figures/report.html"
