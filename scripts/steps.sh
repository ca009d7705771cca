# Sourced by run_exp1_exp2.sh: starting steps, waiting for them, and stopping them all. A step is a process group of
# its own (the launcher has `set -m`).
# shellcheck shell=bash disable=SC2154

# By process id, which is its process group's too. offset_of: where in the log this run begins.
name_of=() log_of=() slot_of=() start_of=() offset_of=() has_spoken=()
free_slots=()
ticking=""  # the process that ends when it is time to look at the logs
last_told=0 # in SECONDS
SECONDS_BETWEEN_LOOKS=2
watched=() # before a command, so that it ends when this process is killed; where setpriv is missing it wouldn't
if setpriv --pdeathsig USR1 true 2>/dev/null; then
    watched=(setpriv --pdeathsig USR1 bash "$PROJECT/scripts/watch_step.sh" "$$")
fi

stop_all() {
    local pid deadline=$((SECONDS + 5)) pids=("${!name_of[@]}")
    trap '' INT TERM HUP
    # A signal may come before a step just started has its name.
    for pid in "$ticking" "${!-}"; do if [[ -n "$pid" ]]; then pids+=("$pid"); fi; done
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

start() { # name, log, file of results, slot, command...: stderr is added to the log; stdout too if the file is -
    local name="$1" log="$2" results="$3" slot="$4" offset=0
    if [[ "$results" == - ]]; then results="$log"; else rm -f -- "$results"; fi
    if [[ -s "$log" ]]; then
        printf '\n==== %s ====\n' "$(date '+%F %T %z')" >>"$log"
        offset="$(stat --format %s -- "$log")"
    fi
    # The lock (9) is the launcher's alone: a step that outlives it must not keep the next one out.
    "${watched[@]}" "${@:5}" </dev/null >>"$results" 2>>"$log" 9>&- &
    name_of[$!]="$name" log_of[$!]="$log" slot_of[$!]="$slot" start_of[$!]=$SECONDS offset_of[$!]="$offset"
    has_spoken[$!]=""
}

# shellcheck disable=SC2034
with_threads() { # number -> the array `where`, to be put before a command
    where=(env "OMP_NUM_THREADS=$1" "MKL_NUM_THREADS=$1" "OPENBLAS_NUM_THREADS=$1")
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
}

# ---- what the terminal is told of steps at work ------------------------------------------------------------------

tell_progress() { # what shards have found in their rollouts, at once; every PROGRESS_SECONDS how far each step is
    local pid found line=""
    for pid in "${!name_of[@]}"; do tell_early_word "$pid"; done
    ((PROGRESS_SECONDS > 0 && SECONDS - last_told >= PROGRESS_SECONDS)) || return 0
    last_told=$SECONDS
    for pid in "${!name_of[@]}"; do # the last line of progress (gradprobe/common/console.py), or for how long it runs
        found="$(log_of_run "$pid" | sed -nE 's/^(.*: [0-9]+\/[0-9]+ .*), [0-9:]+ elapsed, *(.*)/\1, \2/p' | tail -n 1)"
        line+="${line:+ | }${name_of[pid]}: ${found:-$((SECONDS - start_of[pid])) s so far}"
    done
    say "$line"
}

log_of_run() { # process id: what its step has logged in this run
    { tail -c "+$((offset_of[$1] + 1))" -- "${log_of[$1]}" 2>/dev/null | printable; } || true
}

tell_early_word() { # process id: of a probe that samples, three lines on its rollouts, once
    [[ "${name_of[$1]}" == "probe "* && "${name_of[$1]}" != "probe exp3_"* && -z "${has_spoken[$1]-}" ]] || return 0
    local lines line
    mapfile -t lines < <(log_of_run "$1" | grep -E '^(rollouts|prompts|tokens): ')
    ((${#lines[@]} >= 3)) || return 0
    has_spoken[$1]=1
    for line in "${lines[@]}"; do say "${name_of[$1]}: $line"; done
}

# ---- what has ended -----------------------------------------------------------------------------------------------

finish_one() { # waits for whichever step ends first; its slot is free again
    wait_for_one
    tell_early_word "$ended"
    if ((ended_status != 0)); then
        tell_failure
        exit 1 # which stops the others, and whatever this one has left behind
    fi
    say "${name_of[ended]}: done in $((SECONDS - start_of[ended])) s"
    free_slots+=("${slot_of[ended]}")
    unset "name_of[ended]"
}

finish_all() {
    while ((${#name_of[@]} > 0)); do finish_one; done
}

tell_failure() { # of the step that has ended
    local part=exp12 killed=""
    if ((ended_status == 2)); then # what it was asked for can't be done, and it has said so in one line
        if [[ "${name_of[ended]}" == *" exp3_"* ]]; then part=exp3; fi
        printf 'error: %s: %s\n' "${name_of[ended]}" "$(in_settings "$part" "$(error_in "$(log_of_run "$ended")")")" >&2
        return
    fi
    if ((ended_status == 137)); then killed=" (killed, as the system does where memory runs out)"; fi
    printf 'error: %s failed with exit code %d%s; the end of %q:\n' \
        "${name_of[ended]}" "$ended_status" "$killed" "${log_of[ended]}" >&2
    log_of_run "$ended" | tail -n 20 >&2
}
