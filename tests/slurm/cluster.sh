#!/usr/bin/env bash
# A small real Slurm on this machine, for tests: its own munge daemon, one controller and two nodes of one CPU each,
# all in one directory and on ports of their own, so that nothing of the system's Slurm, if it has one, is touched.
#
#     export CLUSTER_DIR="$(mktemp -d)" SLURM_CONF="$CLUSTER_DIR/slurm.conf"
#     bash tests/slurm/cluster.sh start
#     sinfo                                         # or sbatch, squeue, ...: SLURM_CONF says which cluster
#     bash tests/slurm/cluster.sh kill-node 1       # node1 is lost, with all that ran on it
#     bash tests/slurm/cluster.sh start-node 1      # and comes back
#     bash tests/slurm/cluster.sh stop
#
# Needs root (steps run as the user who submits) and Debian's packages slurm-wlm and munge.
set -Eeuo pipefail

die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

usage="usage: CLUSTER_DIR=DIRECTORY cluster.sh start | stop | kill-node 1|2 | start-node 1|2"
dir="${CLUSTER_DIR:-}"
[[ -n "$dir" && -d "$dir" ]] || die "CLUSTER_DIR must name a directory; $usage"
dir="$(cd -- "$dir" && pwd)"
export SLURM_CONF="$dir/slurm.conf"

port_is_free() {
    ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

free_ports() { # how many -> the array `ports`
    ports=()
    local port
    for ((port = 20000 + RANDOM % 10000; ${#ports[@]} < $1; port++)); do
        if port_is_free "$port"; then ports+=("$port"); fi
    done
}

write_configuration() {
    local ports
    free_ports 3
    # A lost node is noticed after SlurmdTimeout. A requeued job waits for cred_expire (120 s by default), after
    # which no part of its first run can start any more.
    cat >"$SLURM_CONF" <<CONF
ClusterName=gradprobe
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=15
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=5
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=1 State=UNKNOWN
NodeName=node2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=1 State=UNKNOWN
PartitionName=test Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
CONF
}

start_munge() {
    chmod 711 "$dir" # or munged refuses: its socket, and all directories above, must be within everyone's reach
    mkdir -m 700 "$dir/munge"
    dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 status=none
    chmod 600 "$dir/munge/key"
    munged --socket="$dir/munge.socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --origin=127.0.0.1
}

start_node() { # number
    slurmd -N "node$1" -f "$SLURM_CONF"
}

wait_for() { # what, command...: until the command succeeds, 60 s at most
    local waited
    for ((waited = 0; waited < 300; waited++)); do
        if "${@:2}" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    die "$1: not within 60 s; logs are in $dir"
}

node_is_up() { # number
    [[ "$(sinfo --noheader --nodes="node$1" --format=%T)" =~ ^(idle|mixed|allocated)$ ]]
}

start() {
    [[ $(id -u) == 0 ]] || die "the test cluster must be started by root"
    local program
    for program in munged slurmctld slurmd; do
        command -v "$program" >/dev/null || die "$program is missing: apt-get install slurm-wlm munge"
    done
    [[ ! -e "$SLURM_CONF" ]] || die "$dir: holds a cluster already"
    write_configuration
    mkdir "$dir/state" "$dir/spool.node1" "$dir/spool.node2"
    start_munge
    slurmctld -f "$SLURM_CONF"
    wait_for "the controller answers" scontrol ping
    start_node 1
    start_node 2
    wait_for "node1 is up" node_is_up 1
    wait_for "node2 is up" node_is_up 2
}

children_of() { # process id -> its descendants, printed
    local child
    while read -r child; do
        [[ -n "$child" ]] || continue
        printf '%s\n' "$child"
        children_of "$child"
    done < <(cat /proc/"$1"/task/*/children 2>/dev/null | tr ' ' '\n')
}

processes_of_node() { # number -> ids of its daemon, its step managers and all that they started, printed
    local open_log pid
    # The daemon and the step managers are those that have the node's log open.
    while read -r open_log; do
        pid="${open_log#/proc/}"
        pid="${pid%%/*}"
        printf '%s\n' "$pid"
        children_of "$pid"
    done < <(find /proc/[0-9]*/fd -lname "$dir/slurmd.node$1.log" 2>/dev/null || true)
}

kill_node() { # number
    local processes
    mapfile -t processes < <(processes_of_node "$1")
    if ((${#processes[@]} > 0)); then kill -KILL "${processes[@]}" 2>/dev/null || true; fi
}

end_daemon() { # file with its process id
    [[ -f "$1" ]] || return 0
    local pid waited
    pid="$(<"$1")"
    kill -TERM "$pid" 2>/dev/null || return 0
    for ((waited = 0; waited < 50; waited++)); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

stop() {
    end_daemon "$dir/slurmctld.pid"
    kill_node 1
    kill_node 2
    end_daemon "$dir/munge/pid"
}

case "$*" in
    start) start ;;
    stop) stop ;;
    "kill-node "[12]) kill_node "$2" ;;
    "start-node "[12])
        start_node "$2"
        wait_for "node$2 is up" node_is_up "$2"
        ;;
    *) die "$usage" ;;
esac
