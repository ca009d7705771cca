# Sourced by run_exp1_exp2.sh where LAUNCHER=slurm: the chain as jobs of Slurm that wait for each other
# (docs/cluster.md). The shards of each model are one job array; the model's merge waits for all of them, Exp 3's array
# for that merge, the analyses for all merges, the plots for the analyses. What is done is not submitted. Each job runs
# scripts/slurm_step.sh.
# shellcheck shell=bash disable=SC2154

slurm_dir="$OUT_ROOT/slurm" # each step's command (scripts/slurm_step.sh), and `jobs`: "ID STEP" of what was submitted
submitted=()                # ids of the jobs submitted by this process
after=()                    # ids of the jobs for which the next one waits

submit_chain() {
    mkdir -p -- "$slurm_dir"
    refuse_if_queued
    : >"$slurm_dir/jobs"
    local part tag
    local -A merges_of=() # by part: ids of the jobs, with blanks between them
    for tag in "${tags[@]}"; do
        after=()
        for part in "${parts[@]}"; do # what is made of the merged dump of one part is the next one's input
            submit_probes "$part" "$tag"
            submit_merge "$part" "$tag"
            merges_of[$part]+=" ${after[*]}"
        done
    done
    submit_analyses
    if ((${#submitted[@]} == 0)); then
        printf 'Nothing to submit: every step is done.\n'
    else
        printf '%d jobs submitted.\nWatch:   squeue --jobs=%s\nCancel:  scancel %s\n' "${#submitted[@]}" \
            "$(join , "${submitted[@]}")" "${submitted[*]}"
        printf 'If one fails, the same command again submits what is not done yet.\n'
    fi
    printf 'Logs:    %s\nResults: %s\n' "$logs" "$figures/report.html"
}

refuse_if_queued() { # two submissions of one study would write the same files
    [[ -s "$slurm_dir/jobs" ]] || return 0
    local live queued
    live="$(squeue --noheader --user="$(id -un)" --format=%F)" || die "squeue doesn't answer; nothing was submitted" 1
    queued="$(cut -d ' ' -f 1 "$slurm_dir/jobs" | grep -xF -e "${live:-none}" | paste -sd ' ')" || true
    [[ -z "$queued" ]] || die "$OUT_ROOT: jobs of this study are queued or running: wait for them, or: scancel $queued"
}

# ---- steps ------------------------------------------------------------------------------------------------------

submit_probes() { # part, tag: an array of its shards that aren't done -> after
    local label="${prefix_of[$1]}$2" shard dump missing=() inputs=() name
    for name in "${model_of[$2]}" "${adapter_of[$2]-}" "$DATASET"; do # names on the Hub are no inputs
        if [[ -e "$name" ]]; then inputs+=("$name"); fi
    done
    if [[ "$1" == exp3 ]]; then inputs+=("$OUT_ROOT/exp12_$2"); fi # its rollouts
    for ((shard = 0; shard < $(shards_of "$1"); shard++)); do
        dump="$OUT_ROOT/$1_$2_s$shard"
        probe_command "$1" "$2" "$shard"
        if is_done "probe_$label.$shard" "${inputs[@]}" "$dump" && is_sound "$dump"; then continue; fi
        printf '%s\0' "${command[@]}" >"$slurm_dir/probe_$label.$shard"
        missing+=("$shard")
    done
    if ((${#missing[@]} == 0)); then return; fi
    # What a requeued shard says is added to the log of its first run.
    submit "probe_$label" "$SLURM_PROBE_ARGS" "${#missing[@]} of $(shards_of "$1") shards ($(join , "${missing[@]}"))" \
        --array="$(join , "${missing[@]}")" --output="$(log_pattern "$logs/$label")_s%a.log" --open-mode=append
}

submit_merge() { # part, tag -> after
    local dump="$OUT_ROOT/$1_$2" label="${prefix_of[$1]}$2"
    merge_command "$1" "$2"
    if is_done "merge_$label.0" "${command[@]:3}" "$dump" && is_sound "$dump"; then return; fi
    printf '%s\0' "${command[@]}" >"$slurm_dir/merge_$label.0"
    submit "merge_$label" "$SLURM_ANALYSIS_ARGS" "" --open-mode=truncate \
        --output="$(log_pattern "$logs/merge_$label.log")"
}

submit_analyses() { # and the plots
    local name part tag inputs=() dumps waits=()
    for name in "${analyses[@]}"; do
        after=() dumps=()
        if [[ "$name" == step ]]; then # which reads the models alone
            for tag in "${tags[0]}" "${tags[-1]}"; do
                if [[ -e "${model_of[$tag]}" ]]; then dumps+=("${model_of[$tag]}"); fi # names on the Hub are no inputs
            done
        else
            if [[ "$name" == exp3 ]]; then part="${parts[-1]}"; else part=exp12; fi
            read -r -a after <<<"${merges_of[$part]}"
            dumps=("${tags[@]/#/"$OUT_ROOT/${part}_"}")
        fi
        submit_analysis "$name" "${dumps[@]}" "$figures/${name}_summary.json"
        inputs+=("${dumps[@]}" "$figures/${name}_summary.json") waits+=("${after[@]}")
    done
    after=("${waits[@]}")
    submit_analysis plot "${inputs[@]}" "$figures/plot.txt"
}

submit_analysis() { # its name, files and directories that it reads and makes
    analysis_command "$1"
    if is_done "$1.0" "${@:2}"; then return; fi
    printf '%s\0' "${command[@]}" >"$slurm_dir/$1.0"
    submit "$1" "$SLURM_ANALYSIS_ARGS" "" --output="$(log_pattern "$figures/$1.txt")" \
        --error="$(log_pattern "$logs/$1.log")" --open-mode=truncate
}

# ---- what is done -------------------------------------------------------------------------------------------------

is_done() { # step.index, files and directories that it reads and makes; the array `command`
    # Nothing that it reads is about to be made anew, its job ran this very command, and all files are older than that.
    local stamp="$slurm_dir/$1.done" newer
    ((${#after[@]} == 0)) || return 1
    cmp --quiet -- "$stamp" <(printf '%s\0' "${command[@]}") || return 1
    newer="$(find -L "${@:2}" -maxdepth 2 -type f -newer "$stamp" -not -name .lock 2>/dev/null)" ||
        return 1 # one of them is missing
    [[ -z "$newer" ]]
}

is_sound() { # dump: finished, and nothing in it is damaged
    local status=0
    PYTHONPATH="$PROJECT" "$python" -m gradprobe.check "$1" >/dev/null 2>&1 || status=$?
    ((status == 0 || status == 2)) || die "$1: can't be checked; try $python -m gradprobe.check $1" 1
    return "$status"
}

# ---- sbatch -------------------------------------------------------------------------------------------------------

submit() { # step, options of its kind, what is to be said of it, further options of sbatch -> after
    local words dependency=() answer
    if ((${#after[@]} > 0)); then dependency=(--dependency="afterok:$(join : "${after[@]}")"); fi
    words_of "$SLURM_ARGS $2"
    # --kill-on-invalid-dep: a job whose upstream has failed would otherwise wait for ever.
    if ! answer="$(sbatch --parsable --requeue --kill-on-invalid-dep=yes --job-name="$1" "${@:4}" "${dependency[@]}" \
        "${words[@]}" "$PROJECT/scripts/slurm_step.sh" "$slurm_dir/$1")"; then
        if ((${#submitted[@]} > 0)); then scancel "${submitted[@]}"; fi
        die "sbatch refused ${1/_/ }, see above; nothing is left in the queue"
    fi
    say "${1/_/ }: job ${answer%%;*}${3:+, $3}${after[*]:+, after ${after[*]}}" # the cluster's name may follow the id
    after=("${answer%%;*}") submitted+=("${answer%%;*}")
    printf '%s %s\n' "${answer%%;*}" "$1" >>"$slurm_dir/jobs"
}

join() { # separator, words
    local IFS="$1"
    printf '%s' "${*:2}"
}

log_pattern() { # path -> the same for sbatch, which takes %a and the like for something else
    printf '%s' "${1//%/%%}"
}
