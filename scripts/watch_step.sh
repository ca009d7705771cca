#!/usr/bin/env bash
# Runs one step so that it ends when its launcher does, in whatever way that ends:
#     setpriv --pdeathsig USR1 bash watch_step.sh LAUNCHER_PID COMMAND [ARGUMENT ...]
#
# The launcher stops its steps by TERM to their process group, of which this is the first process. Where it can't (it
# was killed outright), the kernel sends USR1 here, and all that the command has started is asked to end, and killed if
# it doesn't. The exit status is the command's.
set -u

end_group() {
    kill -TERM 0
    local waited
    for ((waited = 0; waited < 50; waited++)); do
        kill -0 "$step" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL 0
}

step=""
trap : TERM # meant for the command, and this waits for it
trap end_group USR1
launcher="$1"
((PPID == launcher)) || exit 143 # it was gone before the kernel could be asked to tell

"${@:2}" &
step=$!
while :; do
    wait "$step" 2>/dev/null # bash would say how a command was killed
    status=$?
    kill -0 "$step" 2>/dev/null || exit "$status" # a signal ends `wait` too
done
