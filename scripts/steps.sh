# Sourced by run_exp1_exp2.sh: starting steps, waiting for them, and stopping them all. A step is a process group of
# its own (the launcher has `set -m`).
# shellcheck shell=bash disable=SC2154

# By process id, which is its process group's too. offset_of: where in the log this run begins.
declare -A name_of=() log_of=() slot_of=() start_of=() offset_of=() has_spoken=()
ticking="" # the process that ends when it is time to look at the logs
last_told=0 # in SECONDS
SECONDS_BETWEEN_LOOKS=2
watched=() # before a command, so that it ends when this process is killed; where setpriv is missing it wouldn't
if setpriv --pdeathsig USR1 true 2>/dev/null; then
    watched=(setpriv --pdeathsig USR1 bash "$PROJECT/scripts/watch_step.sh" "$$")
fi

stop_all() {
    local pid deadline=$((SECONDS + 5)) pids=("${!name_of[@]}")
    if [[ -n "$ticking" ]]; then pids+=("$ticking"); fi
    if [[ -n "${!-}" ]]; then pids+=("$!"); fi # a signal may come before a step just started has its name
    for pid in "${pids[@]}"; do
        disown "$pid" 2>/dev/null || true # so that bash says nothing of how it ends
        kill -TERM -- "-$pid" 2>/dev/null || true
    done
    for pid in "${pids[@]}"; do
        while kill -0 -- "-$pid" 2>/dev/null && ((SECONDS <= deadline)); do sleep 0.1; done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
    name_of=() ticking=""
}

interrupted() {
    trap - INT TERM HUP
    say "stopping"
    stop_all
    exit "$1"
}

start() { # name, log, slot, command...: stdout and stderr are added to the log
    local name="$1" log="$2" slot="$3" offset=0
    shift 3
    refuse_other_kinds "$log"
    if [[ -s "$log" ]]; then
        printf '\n==== %s ====\n' "$(date '+%F %T %z')" >>"$log"
        offset="$(stat --format %s -- "$log")"
    fi
    # The lock (9) is the launcher's alone: a step that outlives it must not keep the next one out.
    "${watched[@]}" "$@" </dev/null >>"$log" 2>&1 9>&- &
    name_of[$!]="$name" log_of[$!]="$log" slot_of[$!]="$slot" start_of[$!]=$SECONDS offset_of[$!]="$offset"
    has_spoken[$!]=""
}

wait_for_one() { # waits for whichever step ends first, and tells how all are doing -> ended (process id), ended_status
    while :; do
        if [[ -z "$ticking" ]]; then
            "${watched[@]}" sleep "$SECONDS_BETWEEN_LOOKS" </dev/null >/dev/null 2>&1 9>&- &
            ticking=$!
        fi
        ended="" ended_status=0
        wait -n -p ended "${!name_of[@]}" "$ticking" 2>/dev/null || ended_status=$?
        [[ "$ended" == "$ticking" ]] || break
        ticking=""
        tell_progress
    done
    ended_name="${name_of[$ended]}"
    unset "name_of[$ended]"
}

# ---- what the terminal is told of steps at work -----------------------------------------------------------------------

tell_progress() { # what shards have found in their rollouts, at once; every PROGRESS_SECONDS how far each step is
    local pid line=""
    for pid in "${!name_of[@]}"; do tell_early_word "$pid"; done
    ((PROGRESS_SECONDS > 0 && SECONDS - last_told >= PROGRESS_SECONDS)) || return 0
    last_told=$SECONDS
    while read -r pid; do
        line+="${line:+ | }${name_of[$pid]}: $(progress_of "$pid")"
    done < <(printf '%s\n' "${!name_of[@]}" | sort -n) # in the order of their start, mostly
    say "$line"
}

log_of_run() { # process id: what its step has logged in this run
    { tail -c "+$((offset_of[$1] + 1))" -- "${log_of[$1]}" 2>/dev/null | printable; } || true
}

progress_of() { # process id: the last line of progress in its log (gradprobe/common/console.py), or for how long it runs
    local found
    found="$(log_of_run "$1" | sed -n 's/^\(.*: [0-9]*\/[0-9]* .*\), [0-9:]* elapsed, *\(.*\)/\1, \2/p' | tail -n 1)"
    printf '%s' "${found:-$((SECONDS - start_of[$1])) s so far}"
}

tell_early_word() { # process id: of a probe that samples, three lines on its rollouts, once
    [[ "${name_of[$1]}" == "probe "* && "${name_of[$1]}" != "probe exp3_"* && -z "${has_spoken[$1]-}" ]] || return 0
    local lines line
    mapfile -t lines < <(log_of_run "$1" | grep -E '^(rollouts|prompts|tokens): ')
    ((${#lines[@]} >= 3)) || return 0
    has_spoken[$1]=1
    for line in "${lines[@]}"; do say "${name_of[$1]}: $line"; done
}

# ---- what has ended -----------------------------------------------------------------------------------------------------

finish_one() { # waits for whichever step ends first; its slot -> freed_slot
    wait_for_one
    name_of[$ended]="$ended_name" # whatever it has left behind is stopped with the others
    tell_early_word "$ended"
    if ((ended_status != 0)); then
        tell_failure
        stop_all
        exit 1
    fi
    unset "name_of[$ended]"
    say "$ended_name: done in $((SECONDS - start_of[$ended])) s"
    # shellcheck disable=SC2034
    freed_slot="${slot_of[$ended]}"
}

tell_failure() { # of the step that has ended
    local log="${log_of[$ended]}" verdict killed=""
    verdict="$(log_of_run "$ended" | sed -n 's/^error: --min-mixed-prompts \([0-9]*\): /\1: /p' | tail -n 1)"
    if [[ -n "$verdict" ]]; then
        printf 'error: %s has stopped by MIN_MIXED_PROMPTS=%s\n' "$ended_name" \
            "${verdict//--min-mixed-prompts 0/MIN_MIXED_PROMPTS=0}" >&2
        return
    fi
    if ((ended_status == 137)); then killed=" (killed, as the system does where memory runs out)"; fi
    printf 'error: %s failed with exit code %d%s; the end of %q:\n' "$ended_name" "$ended_status" "$killed" "$log" >&2
    log_of_run "$ended" | tail -n 20 >&2
}

with_threads() { # number -> the array `where`, to be put before a command
    where=(env "OMP_NUM_THREADS=$1" "MKL_NUM_THREADS=$1" "OPENBLAS_NUM_THREADS=$1")
}

run_step() { # name, log, command...
    with_threads "$analysis_threads"
    start "$1" "$2" 0 "${where[@]}" "${@:3}"
    finish_one
}

start_analysis() { # name, the file of results that its output is, command...
    rm -f -- "$figures/$2"
    with_threads "$analysis_threads"
    start "$1" "$figures/$2" 0 "${where[@]}" "${@:3}"
}
