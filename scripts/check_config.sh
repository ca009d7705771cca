# Sourced by run_exp1_exp2.sh: reads and checks the settings that bash itself uses. All others are flags of the scripts,
# which are asked whether they can do what they would be asked for. Problems are collected; all are shown.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154

declare -a tags=() gpus=()               # the models' tags in their order; the GPUs' numbers, none: on the CPU
declare -a probe_args=() sampling_args=() # the words of PROBE_ARGS and SAMPLING_ARGS
declare -A model_of=() adapter_of=()     # by tag
declare -A bytes_of=()                   # by part and tag: what one shard takes at most; of Exp 3, one row
problems=()
gpu_name='^((0|[1-9][0-9]{0,3})|(GPU|MIG)-[A-Za-z0-9/-]+)$' # its number, its UUID, or that of a part of it

problem_with() { # name of a setting, what is wrong
    problems+=("$1=$(printf '%q' "${!1}"): $2")
}

refuse_problems() {
    if ((${#problems[@]} > 0)); then printf 'error: %s\n' "${problems[@]}" >&2 && exit 2; fi
}

words_of() { # text -> words, split at blanks
    read -r -d '' -a words <<<"$1" || true # no delimiter is there to be found
}

make_absolute() { # name of a variable: if it holds the relative path of something that is there
    if [[ "${!1}" != /* && -e "${!1}" ]]; then printf -v "$1" '%s/%s' "$PWD" "${!1}"; fi
}

# ---- settings --------------------------------------------------------------------------------------------------

read_settings() { # -> tags, model_of, adapter_of, gpus, probe_args, sampling_args; local paths become absolute
    local name programs words
    for name in DRY_RUN CHAT_TEMPLATE STEP EXP3; do [[ "${!name}" =~ ^[01]$ ]] || problem_with "$name" "must be 0 or 1"; done
    for name in SHARDS_PER_MODEL NUM_PROMPTS NUM_SAMPLES EXP3_BINS PROGRESS_SECONDS; do
        [[ "${!name}" =~ ^[1-9][0-9]{0,8}$ || "$name=${!name}" == PROGRESS_SECONDS=0 ]] ||
            problem_with "$name" "must be a whole number above 0, without leading zeros and of 9 digits at most"
    done
    [[ "$DEVICE" =~ ^(auto|cpu|cuda)$ ]] || problem_with DEVICE "must be auto, cuda or cpu"
    [[ "$LAUNCHER" =~ ^(local|slurm)$ ]] || problem_with LAUNCHER "must be local or slurm"
    programs=(flock) # which keeps two launchers apart
    if [[ "$LAUNCHER" == slurm ]]; then programs+=(sbatch squeue scancel); fi
    for name in "${programs[@]}"; do command -v "$name" >/dev/null || problems+=("$name is not in PATH"); done
    words_of "$PROBE_ARGS" && probe_args=("${words[@]}")
    words_of "$SAMPLING_ARGS" && sampling_args=("${words[@]}")
    for name in BASE_MODEL TRAINED_MODEL DATASET PROMPT_TEMPLATE; do make_absolute "$name"; done
    [[ "$OUT_ROOT" == /* ]] || OUT_ROOT="$PWD/$OUT_ROOT"
    if [[ "$PYTHON" == */* ]]; then make_absolute PYTHON; fi
    if [[ -n "$PYTHON" ]]; then command -v -- "$PYTHON" >/dev/null || problem_with PYTHON "no such program"; fi
    read_models
    read_gpus
    refuse_problems
}

read_sizes() { # -> sizes, n_shards: a study that was smaller grows by further shards, of the prompts behind the old ones
    local settings size=0
    sizes=()
    while :; do
        settings="$OUT_ROOT/exp12_${tags[0]}_s$((${#sizes[@]} * SHARDS_PER_MODEL))/settings.json"
        size="$(sed -nE 's/.*"num_prompts_of_study": ([0-9]+).*/\1/p' "$settings" 2>/dev/null | head -n 1)" || true
        if [[ -z "$size" ]] || ((size >= NUM_PROMPTS)); then break; fi
        sizes+=("$size")
    done
    sizes+=("$NUM_PROMPTS")
    n_shards=$((${#sizes[@]} * SHARDS_PER_MODEL))
}

shards_of() { # part -> how many shards each model has, printed
    if [[ "$1" == exp12 ]]; then printf '%d' "$n_shards"; else printf '%d' "$SHARDS_PER_MODEL"; fi
}

read_models() { # MODELS, or its short form, and ADAPTERS -> tags, model_of, adapter_of
    local pairs pair tag
    read_pairs MODELS
    if ((${#pairs[@]} == 0)); then pairs=("base=$BASE_MODEL" "trained=$TRAINED_MODEL"); fi
    for pair in "${pairs[@]}"; do
        tag="${pair%%=*}"
        if [[ ! "$tag" =~ ^[A-Za-z0-9_.][A-Za-z0-9_.-]*$ ]]; then
            problems+=("MODELS: ${pair@Q}: a tag has letters, digits, _ . - and does not begin with -")
        elif [[ -n "${model_of[$tag]-}" ]]; then
            problems+=("MODELS: tag $tag is given twice")
        else
            tags+=("$tag") model_of[$tag]="${pair#*=}"
        fi
    done
    for tag in "${tags[@]}"; do # exp12_a_s0 would be both the merged dump of a_s0 and the first shard of a
        if [[ "$tag" == figures || ("$tag" =~ ^(.+)_s[0-9]+$ && -n "${model_of[${BASH_REMATCH[1]}]-}") ||
            ("$tag" == exp3_* && -n "${model_of[${tag#exp3_}]-}") ]]; then
            problems+=("MODELS: tag $tag: files of this name are others of the study; choose another tag")
        fi
    done
    read_pairs ADAPTERS
    for pair in "${pairs[@]}"; do
        tag="${pair%%=*}"
        [[ -n "${model_of[$tag]-}" ]] || problems+=("ADAPTERS: ${pair@Q}: no model has the tag $tag")
        adapter_of[$tag]="${pair#*=}"
    done
}

read_pairs() { # name of a setting: TAG=PATH words, or an array of them -> pairs, and the setting is that array
    local -n given="$1"
    local pair path words
    if [[ "$(declare -p "$1")" == "declare -a"* ]]; then words=("${given[@]}"); else words_of "$given"; fi
    pairs=()
    for pair in "${words[@]}"; do
        path="${pair#*=}" && make_absolute path
        if [[ "$pair" == ?*=?* ]]; then
            pairs+=("${pair%%=*}=$path")
        elif [[ -n "$pair" ]]; then
            problems+=("$1: ${pair@Q} is not TAG=PATH (where paths have blanks it must be an array, see config.env)")
        fi
    done
    unset "$1" && given=("${pairs[@]}")
}

read_gpus() { # GPUS, else CUDA_VISIBLE_DEVICES, else what nvidia-smi lists -> gpus; none for the CPU and under Slurm
    local from=GPUS wanted=() listed=() gpu words
    words_of "${GPUS//,/ }" && wanted=("${words[@]}")
    for gpu in "${wanted[@]}"; do
        [[ "$gpu" =~ $gpu_name ]] || problem_with GPUS "${gpu@Q} is no GPU's number or UUID; give for example 0,1"
    done
    if [[ "$LAUNCHER" == slurm ]]; then return; fi
    if ((${#wanted[@]} == 0)) && [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        # Somebody (a scheduler, a colleague) has said which are ours: empty, or -1, none. CUDA stops at what is no GPU.
        from=CUDA_VISIBLE_DEVICES
        words_of "${CUDA_VISIBLE_DEVICES//,/ }"
        for gpu in "${words[@]}"; do
            [[ "$gpu" =~ $gpu_name ]] || break
            wanted+=("$gpu")
        done
    fi
    gpu="$(printf '%s\n' "${wanted[@]}" | sort | uniq -d)"
    if [[ -n "$gpu" ]]; then problem_with "$from" "${gpu%%$'\n'*} is given twice"; fi # CUDA would take none at all
    if [[ "$DEVICE" != cpu ]] && command -v nvidia-smi >/dev/null; then
        # A driver out of order reports so on stdout, in words.
        mapfile -t listed < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+')
        for gpu in "${wanted[@]}"; do # UUIDs are left to CUDA: that of a part of a GPU is not among them
            [[ " ${listed[*]} " == *" $gpu "* || "$gpu" == *-* ]] ||
                problem_with "$from" "nvidia-smi lists ${listed[*]:-none}, not $gpu"
        done
    fi
    if [[ "$DEVICE" == cpu ]]; then
        gpus=()
    elif ((${#wanted[@]} > 0)) || [[ "$from" == CUDA_VISIBLE_DEVICES ]]; then
        gpus=("${wanted[@]}")
    else
        gpus=("${listed[@]}")
    fi
    if [[ "$DEVICE" == cuda && ${#gpus[@]} -eq 0 ]]; then
        if [[ "$from" == GPUS ]]; then from="nvidia-smi"; fi
        problem_with DEVICE "$from lists no GPU; set GPUS or DEVICE=cpu"
    fi
    if [[ "$from" == GPUS ]]; then export CUDA_DEVICE_ORDER=PCI_BUS_ID; fi # nvidia-smi's: CUDA's own has fast ones first
    export CUDA_VISIBLE_DEVICES="${gpus[0]-}"                               # each probe gets its own
}

refuse_lost_flags() { # those in PROBE_ARGS that a part's own flags, which come behind, would override unheard
    local part word own
    for part in "${parts[@]}"; do
        probe_command "$part" "${tags[0]}" 0
        for word in "${probe_args[@]%%=*}"; do
            if [[ "$word" == --* && " ${own[*]} " == *" $word "* ]]; then
                problems+=("PROBE_ARGS: $word would not reach $part, which has its own; try SAMPLING_ARGS")
            fi
        done
    done
    refuse_problems
}

# ---- what the scripts can tell -----------------------------------------------------------------------------------

ask_scripts() { # of every probe, without loading weights, and of the analyses' flags -> their answers in logs/checks
    local part tag own elsewhere=() checks="$logs/checks"
    rm -rf -- "$checks" && mkdir -- "$checks"
    # Where jobs are submitted there may be no GPU, and what it would change is no other setting: so nothing is
    # compared with dumps that are there. The probe does so on its node.
    if [[ "$LAUNCHER" == slurm ]]; then elsewhere=(--device cpu --output-dir "$checks/nothing"); fi
    # The rollouts that Exp 3 reads don't exist yet: one of one token stands in, on which flags, model, weights and the
    # bytes of a row can be judged.
    printf '{%s, %s}\n' '"prompt_idx": 0, "sample_idx": 0, "problem_id": "", "response": "", "ground_truth": ""' \
        '"prompt_ids": [0], "response_ids": [0], "entropies": [0.0], "logprobs": [0.0], "correct": true' \
        >"$checks/one_rollout.jsonl"
    with_threads 1
    for part in "${parts[@]}"; do
        for tag in "${tags[@]}"; do
            probe_command "$part" "$tag" 0
            if [[ "$part" == exp3 ]]; then
                command+=(--rollouts "$checks/one_rollout.jsonl" --num-shards 1 --output-dir "$checks/new/exp3_$tag")
            fi
            printf '%s\0' "${command[@]}" "${elsewhere[@]}" --check-only >"$checks/$part $tag.command"
        done
    done
    command=("$python" "$PROJECT/scripts/check_probes.py" "$checks"/*.command)
    start "checking the models" "$checks/models" - 0 "${where[@]}" "${command[@]}"
    analysis_command exp3 # which has the flags of the others too
    start "checking the analyses" "$checks/analyses" - 0 "${where[@]}" "${command[@]}" --help
    while ((${#name_of[@]} > 0)); do wait_for_one && unset "name_of[ended]"; done
}

read_answers() { # -> bytes_of each model's shards
    local part tag answer line
    local -A tags_with=()
    for tag in "${tags[@]}"; do
        for part in "${parts[@]}"; do
            answer="$({ cat "$logs/checks/$part $tag" 2>/dev/null || cat "$logs/checks/models"; } | printable)"
            if [[ "$answer" =~ \"bytes_at_most\":\ *([0-9]{1,18})[^0-9] ]]; then
                bytes_of[$part $tag]="${BASH_REMATCH[1]}"
            else
                # What several models complain of is said once; and once, what both probes of one do.
                tags_with[$(in_settings "$part" "$(error_in "$answer")")]+=" $tag"
                break
            fi
        done
    done
    for line in "${!tags_with[@]}"; do problems+=("$line (model:${tags_with[$line]})"); done
    answer="$(printable <"$logs/checks/analyses")"
    if [[ "$answer" == *error:* || "$answer" == *Traceback* ]]; then problems+=("$(in_settings exp3 "$(error_in "$answer")")"); fi
    refuse_problems
}

error_in() { # what a script has said -> its errors without what stands before them, or else its last line
    sed -n 's/^.*error: //p' <<<"$1" | grep . || tail -n 1 <<<"$1"
}

in_settings() { # exp12, exp3 or analyses, what its script says of flags -> the same of the settings they come from
    local name flag end text="$2 " by_hand=" ${probe_args[*]%%=*} ${sampling_args[*]%%=*} "
    for name in "${settings[@]/#/EXP3_}" "${settings[@]}"; do
        flag="${name#EXP3_}" flag="--${flag//_/-}" flag="${flag,,}"
        if [[ "$name" == SHARDS_PER_MODEL ]]; then flag=--num-shards; fi
        if [[ -z "${!name-}" || "$by_hand" == *" $flag "* || "$1 $name" == "exp12 EXP3_"* ]]; then continue; fi
        for end in ' ' ':' ',' ';'; do text="${text//"$flag$end"/"$name$end"}"; done # other flags begin like this one
    done
    if [[ "$text" == *--step-* ]]; then text+="(STEP=0 leaves the step out) "; fi
    if [[ "$1" == exp3 && -n "$PROBE_ARGS" ]]; then
        text+="(PROBE_ARGS are for both probes, SAMPLING_ARGS for the first alone)"
    fi
    printf '%s' "${text% }"
}

check_disk_space() { # gradients of shards and their merged copies, less what is there already
    local part tag bytes shard need=0 free
    # Rows of the largest shard of Exp 3 for each that its stand-in has.
    local n_prompts=$(((NUM_PROMPTS + SHARDS_PER_MODEL - 1) / SHARDS_PER_MODEL))
    for part in "${parts[@]}"; do
        for tag in "${tags[@]}"; do
            bytes="${bytes_of[$part $tag]}"
            if [[ "$part" == exp3 ]]; then ((bytes *= n_prompts * NUM_SAMPLES * EXP3_BINS)); fi
            for ((shard = 0; shard < $(shards_of "$part"); shard++)); do
                add_need "$OUT_ROOT/${part}_${tag}_s$shard" "$bytes"
            done
            add_need "$OUT_ROOT/${part}_$tag" $(($(shards_of "$part") * bytes))
        done
    done
    free="$(df --block-size=1 --output=avail -- "$OUT_ROOT" | tail -n 1)"
    if ((need > free)); then
        problem_with OUT_ROOT "up to $((need >> 30)) GiB are needed there, $((free >> 30)) GiB are free"
    fi
    refuse_problems
}

add_need() { # dump, bytes -> need
    local there=0
    if [[ -d "$1" ]]; then
        if [[ ! -e "$1/progress.jsonl" && -n "$(find "$1" -name manifest.json)" ]]; then return; fi # it is finished
        read -r there _ < <(du -sk -- "$1")
    fi
    if ((there * 1024 < $2)); then ((need += $2 - there * 1024)); fi
}
