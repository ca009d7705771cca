# Sourced by run_exp1_exp2.sh: starting steps, waiting for them, and stopping them all. A step is a process group of
# its own (the launcher has `set -m`).
# shellcheck shell=bash disable=SC2154

# By process id, which is its process group's too. offset_of: where in the log this run begins.
declare -A name_of=() log_of=() slot_of=() start_of=() offset_of=()
watched=() # before a command, so that it ends when this process is killed; where setpriv is missing it wouldn't
if setpriv --pdeathsig USR1 true 2>/dev/null; then
    watched=(setpriv --pdeathsig USR1 bash "$PROJECT/scripts/watch_step.sh" "$$")
fi

stop_all() {
    local pid deadline=$((SECONDS + 5)) pids=("${!name_of[@]}")
    if [[ -n "${!-}" ]]; then pids+=("$!"); fi # a signal may come before a step just started has its name
    for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do
        while kill -0 -- "-$pid" 2>/dev/null && ((SECONDS <= deadline)); do sleep 0.1; done
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
}

wait_for_one() { # waits for whichever step ends first -> ended, its process id, and ended_status
    ended="" ended_status=0
    wait -n -p ended "${!name_of[@]}" || ended_status=$?
    ended_name="${name_of[$ended]}"
    unset "name_of[$ended]"
}

finish_one() { # waits for whichever step ends first; its slot -> freed_slot
    wait_for_one
    local log="${log_of[$ended]}"
    if ((ended_status != 0)); then
        name_of[$ended]="$ended_name" # whatever it has left behind is stopped with the others
        printf 'error: %s failed with exit code %d; the end of %q:\n' "$ended_name" "$ended_status" "$log" >&2
        { tail -c "+$((offset_of[$ended] + 1))" -- "$log" | tail -n 20 | printable >&2; } || true
        stop_all
        exit 1
    fi
    say "$ended_name: done in $((SECONDS - start_of[$ended])) s"
    # shellcheck disable=SC2034
    freed_slot="${slot_of[$ended]}"
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
