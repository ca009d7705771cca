# Sourced by run_exp1_exp2.sh where LAUNCHER=slurm: the chain as jobs of Slurm that wait for each other
# (docs/cluster.md). The shards of each model are one job array; the model's merge waits for all of them, Exp 3's array
# for that merge, the analyses for all merges, the plots for the analyses. What is done is not submitted. Each job runs
# scripts/slurm_step.sh.
# shellcheck shell=bash
#
# From run_exp1_exp2.sh: PROJECT DATASET OUT_ROOT SHARDS_PER_MODEL SLURM_ARGS SLURM_PROBE_ARGS SLURM_ANALYSIS_ARGS
# python figures logs tags model_of parts experiments, die, say, label_of, and the functions that set the array `command`.
# shellcheck disable=SC2154

slurm_dir="$OUT_ROOT/slurm" # each step's command (scripts/slurm_step.sh), and `jobs`: "ID STEP" of what was submitted
submitted=()                # ids of the jobs submitted by this process
job_id=""                   # of the job that was submitted last
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
    print_jobs
}

refuse_if_queued() { # two submissions of one study would write the same files
    [[ -s "$slurm_dir/jobs" ]] || return 0
    local id live queued=()
    live="$(squeue --noheader --user="$(id -un)" --format=%F)" || die "squeue doesn't answer; nothing was submitted" 1
    while read -r id _; do
        if grep -qxF -- "$id" <<<"$live"; then queued+=("$id"); fi
    done <"$slurm_dir/jobs"
    if ((${#queued[@]} > 0)); then
        die "$OUT_ROOT: jobs of this study are queued or running: wait for them, or: scancel ${queued[*]}"
    fi
}

# ---- steps ------------------------------------------------------------------------------------------------------

submit_probes() { # part, tag: an array of its shards that aren't done -> after
    local shard dump missing=() inputs=() indexes label dependency=() words
    label="$(label_of "$1" "$2")"
    if [[ -e "${model_of[$2]}" ]]; then inputs+=("${model_of[$2]}"); fi # else a name on the Hub
    if [[ -e "${adapter_of[$2]-}" ]]; then inputs+=("${adapter_of[$2]}"); fi
    if [[ "$1" == exp3 ]]; then
        inputs+=("$OUT_ROOT/exp12_$2") # its rollouts
    elif [[ -e "$DATASET" ]]; then
        inputs+=("$DATASET")
    fi
    for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do
        dump="$OUT_ROOT/$1_$2_s$shard"
        probe_command "$1" "$2" "$shard"
        if is_done "probe_$label.$shard" "${inputs[@]}" "$dump" && is_sound "$dump"; then continue; fi
        write_step "probe_$label.$shard"
        missing+=("$shard")
    done
    if ((${#missing[@]} == 0)); then return; fi
    indexes="$(join , "${missing[@]}")"
    depend_on_after
    words_of "${SLURM_PROBE_ARGS:-}"
    # What a requeued shard says is added to the log of its first run.
    submit "probe_$label" --array="$indexes" --output="$(log_pattern "$logs/$label")_s%a.log" --open-mode=append \
        "${dependency[@]}" "${words[@]}"
    say "probe $label: job $job_id, ${#missing[@]} of $SHARDS_PER_MODEL shards ($indexes)${after[*]:+, after ${after[*]}}"
    after=("$job_id")
}

submit_merge() { # part, tag -> after
    local shard dump="$OUT_ROOT/$1_$2" shards=() label
    label="$(label_of "$1" "$2")"
    for ((shard = 0; shard < SHARDS_PER_MODEL; shard++)); do shards+=("${dump}_s$shard"); done
    merge_command "$1" "$2"
    if is_done "merge_$label.0" "${shards[@]}" "$dump" && is_sound "$dump"; then return; fi
    submit_single "merge_$label" "$logs/merge_$label.log"
}

submit_analyses() { # and the plots
    local number tag part summary dumps summaries=() all_dumps=() analyses=()
    for number in "${experiments[@]}"; do
        part=exp12 dumps=() summary="$figures/exp${number}_summary.json"
        if ((number == 3)); then part=exp3; fi
        for tag in "${tags[@]}"; do dumps+=("$OUT_ROOT/${part}_$tag"); done
        read -r -a after <<<"${merges_of[$part]}"
        experiment_command "$number"
        is_done "exp$number.0" "${dumps[@]}" "$summary" || submit_single "exp$number" "$figures/exp$number.txt"
        analyses+=("${after[@]}") all_dumps+=("${dumps[@]}") summaries+=("$summary")
    done
    after=("${analyses[@]}")
    plot_command
    is_done plot.0 "${all_dumps[@]}" "${summaries[@]}" "$figures/plot.txt" || submit_single plot "$figures/plot.txt"
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

submit_single() { # step, log; the arrays `command` and `after` -> after
    local dependency=() words
    depend_on_after
    write_step "$1.0"
    words_of "${SLURM_ANALYSIS_ARGS:-}"
    submit "$1" --output="$(log_pattern "$2")" --open-mode=truncate "${dependency[@]}" "${words[@]}"
    say "${1/_/ }: job $job_id, ${after[*]:+after }${after[*]:-at once}"
    after=("$job_id")
}

depend_on_after() { # the array `after` -> dependency: an option of sbatch, none where there is nothing to wait for
    dependency=()
    if ((${#after[@]} > 0)); then dependency=(--dependency="afterok:$(join : "${after[@]}")"); fi
}

submit() { # step, options of sbatch -> job_id
    local answer words
    words_of "${SLURM_ARGS:-}"
    # --kill-on-invalid-dep: a job whose upstream has failed would otherwise wait for ever.
    answer="$(sbatch --parsable --requeue --kill-on-invalid-dep=yes --job-name="$1" "${words[@]}" "${@:2}" \
        "$PROJECT/scripts/slurm_step.sh" "$slurm_dir/$1")" || give_up "$1"
    job_id="${answer%%;*}" # the cluster's name may follow
    submitted+=("$job_id")
    printf '%s %s\n' "$job_id" "$1" >>"$slurm_dir/jobs"
}

give_up() { # the step that sbatch refused
    if ((${#submitted[@]} > 0)); then scancel "${submitted[@]}"; fi
    die "sbatch refused ${1/_/ }, see above; nothing is left in the queue"
}

write_step() { # step.index; the array `command`
    printf '%s\0' "${command[@]}" >"$slurm_dir/$1"
}

words_of() { # text -> words
    read -r -d '' -a words <<<"$1" || true # no delimiter is there to be found
}

join() { # separator, words
    local IFS="$1"
    printf '%s' "${*:2}"
}

log_pattern() { # path -> the same for sbatch, which takes %a and the like for something else
    printf '%s' "${1//%/%%}"
}

print_jobs() {
    if ((${#submitted[@]} == 0)); then
        printf 'Nothing to submit: every step is done.\n'
    else
        printf '%d jobs submitted.\n' "${#submitted[@]}"
        printf 'Watch:   squeue --jobs=%s\n' "$(join , "${submitted[@]}")"
        printf 'Cancel:  scancel %s\n' "$(join ' ' "${submitted[@]}")"
        printf 'If one fails, the same command again submits what is not done yet.\n'
    fi
    printf 'Logs:    %s\nResults: %s\n' "$logs" "$figures/report.html"
}
