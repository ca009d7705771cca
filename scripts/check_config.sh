# Sourced by run_exp1_exp2.sh: is the study in the settings possible? First what bash can tell, then, by asking the
# probe, whether each model, data set and target fit together and fit on the disk. Problems are collected; all are shown.
# shellcheck shell=bash disable=SC2154

declare -a tags=() gpus=()           # the models' tags in their order; the GPUs' numbers, none: on the CPU
declare -a probe_args=()             # the words of PROBE_ARGS
declare -A model_of=() adapter_of=() # by tag
declare -A bytes_of=() targets_of=() # by part and tag: what one shard takes at most, and how many dumps it has
nearest_parent=""                    # of OUT_ROOT, which may have to be made
problems=()

problem_with() { # name of a setting, what is wrong
    local shown
    printf -v shown '%s=%q: %s' "$1" "${!1}" "$2"
    problems+=("$shown")
}

refuse_problems() {
    ((${#problems[@]} == 0)) && return
    printf 'error: %s\n' "${problems[@]}" >&2
    exit 2
}

# ---- settings --------------------------------------------------------------------------------------------------

check_settings() { # all that can be told without Python; tags, model_of, gpus, nearest_parent are set on the way
    check_choices
    check_numbers
    read_models
    read_adapters
    check_paths
    read_gpus
    command -v flock >/dev/null || problems+=("flock is needed, which keeps two launchers apart; install util-linux")
    refuse_problems
}

check_choices() {
    [[ "$DEVICE" =~ ^(auto|cpu|cuda)$ ]] || problem_with DEVICE "must be auto, cuda or cpu"
    [[ "$DTYPE" =~ ^(auto|bfloat16|float32)$ ]] || problem_with DTYPE "must be auto, bfloat16 or float32"
    [[ "$DRY_RUN" =~ ^[01]$ ]] || problem_with DRY_RUN "must be 0 or 1"
    [[ "$CHAT_TEMPLATE" =~ ^[01]$ ]] || problem_with CHAT_TEMPLATE "must be 0 or 1"
    [[ "$EXP3" =~ ^[01]$ ]] || problem_with EXP3 "must be 0 or 1"
    [[ "$EXP3_PROJECT" =~ ^[1-9][0-9]{0,5}x[1-9][0-9]{0,5}$ ]] ||
        problem_with EXP3_PROJECT "must be rows x columns, like 16x16"
    [[ "$EXP3_OBJECTIVE" =~ ^(dapo|grpo|dr-grpo|reinforce)$ ]] ||
        problem_with EXP3_OBJECTIVE "must be dapo, grpo, dr-grpo or reinforce"
    [[ "$FIGURE_FORMAT" =~ ^((png|pdf|svg)(,(png|pdf|svg))*)?$ ]] ||
        problem_with FIGURE_FORMAT "must be some of png, pdf and svg, like pdf,svg"
    # shellcheck disable=SC2034,SC2153
    read -r -d '' -a probe_args <<<"$PROBE_ARGS" || true # no delimiter is there to be found
    [[ "$LAUNCHER" =~ ^(local|slurm)$ ]] || problem_with LAUNCHER "must be local or slurm"
    local program
    if [[ "$LAUNCHER" == slurm ]]; then
        for program in sbatch squeue scancel; do
            command -v "$program" >/dev/null || problem_with LAUNCHER "$program is not in PATH"
        done
    fi
}

check_numbers() {
    local name
    for name in SHARDS_PER_MODEL NUM_PROMPTS NUM_SAMPLES MAX_NEW_TOKENS; do check_whole_number "$name" 1; done
    check_whole_number BINS 2
    check_whole_number EXP3_BINS 2
    check_whole_number POS_PER_BIN_PER_ROLLOUT 0
    check_whole_number SEED 0
    check_whole_number PROGRESS_SECONDS 0
    if [[ -n "$MIN_MIXED_PROMPTS" ]]; then check_whole_number MIN_MIXED_PROMPTS 0; fi
    if ((${#problems[@]} == 0 && SHARDS_PER_MODEL > NUM_PROMPTS)); then
        problem_with SHARDS_PER_MODEL "more shards than prompts, NUM_PROMPTS=$NUM_PROMPTS"
    fi
    [[ "$TEMPERATURE" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$ && "${BASH_REMATCH[1]}" == *[1-9]* ]] ||
        problem_with TEMPERATURE "must be a number above 0"
}

check_whole_number() { # name, least
    [[ "${!1}" =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((${!1} >= $2)) && return
    problem_with "$1" "must be a whole number from $2, without leading zeros and of 9 digits at most"
}

read_models() { # MODELS, or its short form -> tags in their order, and model_of each
    local pairs=() pair
    split_pairs MODELS
    if ((${#pairs[@]} > 0)); then
        for pair in "${pairs[@]}"; do read_model "$pair"; done
    else
        read_model "base=$BASE_MODEL"
        read_model "trained=$TRAINED_MODEL"
        BASE_MODEL="${model_of[base]-}" TRAINED_MODEL="${model_of[trained]-}"
    fi
    check_names_of_dumps
}

split_pairs() { # name of a setting, TAG=PATH words or an array of them -> pairs
    local -n given="$1"
    local -a words
    if [[ "$(declare -p "$1")" =~ ^declare\ -[A-Za-z]*a ]]; then
        words=("${given[@]}")
    else
        read -r -d '' -a words <<<"$given" || true # no delimiter is there to be found
    fi
    for pair in "${words[@]}"; do if [[ -n "$pair" ]]; then pairs+=("$pair"); fi; done
}

read_model() { # TAG=PATH
    local tag="${1%%=*}" path="${1#*=}" shown
    printf -v shown '%q' "$1"
    if [[ "$1" != *=* || -z "$tag" || -z "$path" ]]; then
        problems+=("MODELS: $shown is not TAG=PATH (where paths have blanks, MODELS must be an array, see config.env)")
        return
    elif [[ ! "$tag" =~ ^[A-Za-z0-9_.][A-Za-z0-9_.-]*$ ]]; then
        problems+=("MODELS: $shown: a tag has letters, digits, _ . - and does not begin with -")
        return
    elif [[ -n "${model_of[$tag]-}" ]]; then
        problems+=("MODELS: tag $tag is given twice")
        return
    fi
    if is_local_model "$path" && [[ ! -d "$path" ]]; then problems+=("model $shown: no such directory"); fi
    tags+=("$tag")
    model_of[$tag]="$path"
}

read_adapters() { # ADAPTERS -> adapter_of
    local pairs=() pair tag shown
    split_pairs ADAPTERS
    for pair in "${pairs[@]}"; do
        tag="${pair%%=*}"
        printf -v shown '%q' "$pair"
        if [[ "$pair" != *=?* || -z "$tag" || -z "${model_of[$tag]-}" ]]; then
            problems+=("ADAPTERS: $shown is not TAG=PATH with the tag of a model")
        else
            # shellcheck disable=SC2034
            adapter_of[$tag]="${pair#*=}"
        fi
    done
}

is_local_model() { # path: else it is a name on the Hub
    [[ "$1" == [./~]* || -e "$1" ]]
}

check_names_of_dumps() { # exp12_a_s0 would be both the merged dump of a_s0 and the first shard of a
    local tag
    for tag in "${tags[@]}"; do
        if [[ "$tag" == figures || ("$tag" =~ ^(.+)_s[0-9]+$ && -n "${model_of[${BASH_REMATCH[1]}]-}") ]]; then
            problems+=("MODELS: tag $tag: exp12_$tag is the name of another directory of the study; choose another tag")
        elif [[ "$tag" == exp3_* && -n "${model_of[${tag#exp3_}]-}" ]]; then
            problems+=("MODELS: tag $tag: its logs would be those of Exp 3 of ${tag#exp3_}; choose another tag")
        fi
    done
}

make_absolute() { # name of a variable that holds a path
    [[ "${!1}" == /* ]] || printf -v "$1" '%s/%s' "$PWD" "${!1}"
}

check_paths() {
    if [[ "$DATASET" != hf:* && "$DATASET" != gym:* ]]; then
        [[ -e "$DATASET" && -r "$DATASET" ]] || problem_with DATASET "no such file or directory, or not readable"
    fi
    if [[ -n "$PYTHON" ]]; then
        command -v -- "$PYTHON" >/dev/null || problem_with PYTHON "no such program"
        if [[ "$PYTHON" == */* ]]; then make_absolute PYTHON; fi
    fi
    make_absolute OUT_ROOT
    nearest_parent="$OUT_ROOT"
    until [[ -e "$nearest_parent" || -L "$nearest_parent" ]]; do
        nearest_parent="${nearest_parent%/*}"
        nearest_parent="${nearest_parent:-/}"
    done
    if [[ ! -d "$nearest_parent" ]]; then
        problem_with OUT_ROOT "$(printf '%q' "$nearest_parent") is not a directory"
    elif [[ ! -w "$nearest_parent" || ! -x "$nearest_parent" ]]; then
        problem_with OUT_ROOT "$(printf '%q' "$nearest_parent") is not writable"
    fi
}

read_gpus() { # GPUS, or what nvidia-smi lists -> gpus; none for the CPU and where a scheduler gives them out
    local wanted=() listed=() gpu
    local -A seen=()
    # shellcheck disable=SC2153
    IFS=$', \t\n' read -r -d '' -a wanted <<<"$GPUS" || true # no delimiter is there to be found
    if command -v nvidia-smi >/dev/null; then
        # A driver out of order reports so on stdout, in words.
        mapfile -t listed < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+')
    fi
    for gpu in "${wanted[@]}"; do
        if [[ ! "$gpu" =~ ^(0|[1-9][0-9]{0,3})$ ]]; then
            problem_with GPUS "$(printf '%q' "$gpu") is not the number of a GPU; give for example 0,1"
        elif [[ -n "${seen[x$gpu]-}" ]]; then
            problem_with GPUS "$gpu is given twice"
        elif [[ "$LAUNCHER" == local && "$DEVICE" != cpu && " ${listed[*]} " != *" $gpu "* ]] &&
            command -v nvidia-smi >/dev/null; then
            problem_with GPUS "nvidia-smi does not list $gpu, but ${listed[*]:-none}"
        fi
        seen[x$gpu]=1
    done
    if [[ "$LAUNCHER" == slurm || "$DEVICE" == cpu ]]; then return; fi
    if ((${#wanted[@]} > 0)); then gpus=("${wanted[@]}"); else gpus=("${listed[@]}"); fi
    if [[ "$DEVICE" == cuda && ${#gpus[@]} -eq 0 ]]; then
        problem_with DEVICE "nvidia-smi lists no GPU; set GPUS or DEVICE=cpu"
    fi
}

# ---- what the probe can tell ---------------------------------------------------------------------------------------

ask_probe() { # an empty directory: the probes of every model, checked without loading weights -> its answers
    local part tag n_started=0 elsewhere=()
    # Where jobs are submitted there may be no GPU, and what it would change is no other setting: so nothing is
    # compared with dumps that are there. The probe does so on its node.
    if [[ "$LAUNCHER" == slurm ]]; then elsewhere=(--device cpu --output-dir "$1/nothing"); fi
    with_threads 1
    for part in "${parts[@]}"; do
        for tag in "${tags[@]}"; do
            if ((n_started++ >= n_cores)); then wait_for_one; fi
            question "$part" "$tag" "$1"
            start "checking $tag for $part" "$1/${part}_$tag" 0 "${where[@]}" "${command[@]}" "${elsewhere[@]}" --check-only
        done
    done
    while ((${#name_of[@]} > 0)); do wait_for_one; done
}

question() { # part, tag, a directory that stays empty -> the array `command`: what the probe is asked about
    if [[ "$1" == exp12 ]]; then
        probe_command "$1" "$2" 0
    else
        # The rollouts that Exp 3 reads don't exist yet. Model, weights and projection can be judged without them, and
        # the most that one rollout takes, for which any problem stands in; nothing is compared with dumps that are
        # there.
        pooling_command "$2"
        command+=(
            --num-prompts 1 --num-samples 1 --max-new-tokens "$MAX_NEW_TOKENS"
            --shard-index 0 --num-shards 1 --output-dir "$3/new/$1_$2"
        )
    fi
}

check_models() { # the directory of answers -> bytes_of and targets_of each model's shards
    local part tag answer line n_prompts bytes
    local -A tags_with=() said=()
    n_prompts=$(((NUM_PROMPTS + SHARDS_PER_MODEL - 1) / SHARDS_PER_MODEL)) # of the largest shard
    for part in "${parts[@]}"; do
        for tag in "${tags[@]}"; do
            answer="$(<"$1/${part}_$tag")"
            if [[ "$answer" =~ \"bytes_at_most\":\ *([0-9]{1,18})[^0-9] ]]; then
                bytes="${BASH_REMATCH[1]}"
                if [[ "$part" == exp3 ]]; then bytes="$(at_most $((n_prompts * NUM_SAMPLES)) "$bytes")"; fi
                bytes_of[$part $tag]="$bytes"
                targets_of[$part $tag]=1
                if [[ "$answer" =~ \"targets\":\ *([0-9]{1,9})[^0-9] ]]; then
                    targets_of[$part $tag]="${BASH_REMATCH[1]}"
                fi
                continue
            fi
            answer="$(printable <<<"$answer")"
            line="$(grep '^error: ' <<<"$answer" || tail -n 1 <<<"$answer")"
            line="${line#error: }"
            # What several models or both probes of one model complain of is said once.
            [[ "${said[$tag]-}" != "$line" ]] || continue
            said[$tag]="$line"
            if [[ "$part" == exp3 ]]; then line="Exp 3: $line"; fi
            tags_with[${line:-no answer}]+=" $tag"
        done
    done
    for line in "${!tags_with[@]}"; do
        problems+=("$line (model:${tags_with[$line]})")
    done
    refuse_problems
}

at_most() { # rollouts, bytes of one -> bytes of all; a pebibyte stands for more, so that sums can still be told
    if (($2 > 2 ** 50 / $1)); then printf '%d' $((2 ** 50)); else printf '%d' $(($1 * $2)); fi
}

check_disk_space() { # gradients of shards and their merged copies, less what is there already
    local part tag shard merged dump need=0 bytes n_targets there block_size blocks free
    for part in "${parts[@]}"; do
        for tag in "${tags[@]}"; do
            bytes="${bytes_of[$part $tag]}" n_targets="${targets_of[$part $tag]}" merged="$OUT_ROOT/${part}_$tag"
            for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do
                dump="${merged}_s$shard"
                there="$(bytes_in "$dump")"
                if ! is_finished "$dump" "$n_targets" && ((there < bytes)); then ((need += bytes - there)); fi
            done
            if ! is_finished "$merged" "$n_targets"; then ((need += SHARDS_PER_MODEL * bytes)); fi
        done
    done
    read -r blocks block_size < <(stat --file-system --format '%a %S' -- "$nearest_parent")
    free=$((blocks * block_size))
    if ((need > free)); then
        problem_with OUT_ROOT "up to $(gibibytes "$need") GiB are needed there, $(gibibytes "$free") GiB are free"
    fi
    refuse_problems
}

is_finished() { # dump, how many targets
    local manifest n_manifests=0
    for manifest in "$1/manifest.json" "$1"/*/manifest.json; do
        if [[ -f "$manifest" ]]; then ((n_manifests += 1)); fi
    done
    ((n_manifests >= $2))
}

bytes_in() { # directory, which needn't exist
    local kibibytes=0
    if [[ -d "$1" ]]; then read -r kibibytes _ < <(du -sk -- "$1"); fi
    printf '%d' $((kibibytes * 1024))
}

gibibytes() {
    printf '%d.%d' $(($1 / 2 ** 30)) $(($1 % 2 ** 30 * 10 / 2 ** 30))
}
