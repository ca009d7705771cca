#!/usr/bin/env bash
# The demo study through a real Slurm of two nodes, one of which is lost while it probes, against the same study by the
# local launcher: equal bytes. Then an element that fails, and shards taken from srun.
#
#     bash tests/slurm/run.sh
#
# Takes some five minutes on two cores; needs root and Debian's slurm-wlm and munge. Exit status 0: all of it held.
set -Eeuo pipefail

project="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="$(bash "$project/scripts/ensure_venv.sh")"
work="$(mktemp -d)"
chmod 711 "$work" # munged wants its socket to be within everyone's reach
export PYTHON CLUSTER_DIR="$work/cluster" SLURM_CONF="$work/cluster/slurm.conf"
export NUM_PROMPTS=24 MAX_NEW_TOKENS=128 SHARDS_PER_MODEL=2 DEVICE=cpu EXP3=1
cluster="$project/tests/slurm/cluster.sh"
mkdir "$CLUSTER_DIR"

clean_up() {
    local status=$?
    bash "$cluster" stop
    if ((status != 0)); then keep_evidence; fi
    rm -rf -- "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

keep_evidence() {
    note "FAILED; what the jobs said last:"
    tail -n 5 -- "$work"/slurm/logs/*.log "$work"/slurm/exp12_figures/*.txt "$CLUSTER_DIR"/*.log | without_paths || true
}

without_paths() {
    sed -u -e "s#$work/##g; s#$PYTHON#python#g; s#$project/##g"
}

indented() {
    sed -u 's/^/        | /'
}

note() {
    printf '%4d s  %s\n' "$SECONDS" "$1"
}

fail() {
    note "error: $1"
    exit 1
}

launch() { # launcher, settings... : run_exp1_exp2.sh's output, indented
    env "LAUNCHER=$1" "OUT_ROOT=$work/$1" "${@:2}" bash "$project/run_exp1_exp2.sh" 2>&1 | without_paths | indented
}

wait_until() { # seconds at most, what, command...
    local deadline=$((SECONDS + $1))
    until "${@:3}"; do
        ((SECONDS < deadline)) || fail "not within $1 s: $2"
        sleep 0.2
    done
    note "$2"
}

queue_is_empty() {
    [[ -z "$(squeue --noheader)" ]]
}

show_jobs() {
    squeue --states=all --sort=i --format='%.6i %.10F %.3K %.14j %.10T %.6N %.8M %R' | indented
}

# ---- the study, with a node lost ------------------------------------------------------------------------------------

shard_on_node1() { # -> its directory, printed; none: the status is 1
    local step shard
    read -r step shard < <(squeue --noheader --nodelist=node1 --states=RUNNING --format='%j %K') || return 1
    [[ "$step" == probe_* ]] || return 1
    printf '%s/slurm/exp12_%s_s%s' "$work" "${step#probe_}" "$shard"
}

node1_is_amid_gradients() { # -> lost_shard
    lost_shard="$(shard_on_node1)" || return 1
    grep -qs '"kind": *"gradients"' -- "$lost_shard/progress.jsonl"
}

node1_is_down() {
    [[ "$(sinfo --noheader --nodes=node1 --format=%T)" == down* ]]
}

lose_and_return_node1() {
    lost_shard=""
    wait_until 120 "node1 is amid the gradients of a shard" node1_is_amid_gradients
    bash "$cluster" kill-node 1
    [[ ! -e "$lost_shard/manifest.json" ]] || fail "${lost_shard##*/} was finished before its node was lost"
    note "node1 is killed, with the probe of ${lost_shard##*/}, $(wc -l <"$lost_shard/progress.jsonl") batches in"
    local status=0
    launch slurm || status=$?
    ((status == 2)) || fail "the study was submitted while it was queued (exit status $status)"
    wait_until 120 "Slurm sees that node1 is down" node1_is_down
    show_jobs
    bash "$cluster" start-node 1
    note "node1 is back"
}

check_lost_shard() {
    local log="$work/slurm/logs/${lost_shard##*exp12_}.log"
    without_paths <"$log" | indented
    grep -q 'run 2, on' "$log" || fail "${lost_shard##*/} was not run again"
    grep -q 'continuing' "$log" || fail "${lost_shard##*/} began anew"
}

numbers_of() { # summary, without what names the directory and the manifests, which tell how long the probe took, or seals it
    "$PYTHON" - "$1" <<'PY'
import json
import sys

summary = json.load(open(sys.argv[1], encoding="utf-8"))
for of_tag in summary.values():
    for key in ("manifest_sha256", "run_dir", "content_sha256"):
        of_tag.pop(key, None)
json.dump(summary, sys.stdout, indent=1)
PY
}

compare_studies() {
    local dump file
    for dump in exp{12,3}_{base,trained}{_s0,_s1,}; do
        for file in grads.npy meta.jsonl rollouts.jsonl; do
            cmp -- "$work/local/$dump/$file" "$work/slurm/$dump/$file" || fail "$dump/$file differs"
        done
    done
    for file in exp{1,2,3}_summary.json; do
        cmp -- <(numbers_of "$work/local/exp12_figures/$file") <(numbers_of "$work/slurm/exp12_figures/$file") ||
            fail "$file differs"
    done
    note "equal bytes: gradients, meta lines, rollouts of 8 shards and 4 merged dumps; equal numbers: all summaries"
}

# The nodes have one CPU each; the same number of threads for each shard here needs two cores.
two_cores="$("$PYTHON" -c 'import os; print(*sorted(os.sched_getaffinity(0))[:2], sep=",")')"
note "the study by the local launcher"
taskset --cpu-list --pid "$two_cores" "$$" >/dev/null
launch local | grep ' done in \| s$'

bash "$cluster" start
note "a Slurm of two nodes is up: $(sinfo --version)"
launch slurm
lose_and_return_node1
wait_until 300 "the queue is empty" queue_is_empty
show_jobs
check_lost_shard
compare_studies
launch slurm >"$work/again"
grep -q 'Nothing to submit' "$work/again" || fail "a finished study was submitted again"
note "once more: nothing to submit"

# ---- other settings -------------------------------------------------------------------------------------------------

launch slurm NUM_SAMPLES=4
wait_until 300 "the queue is empty" queue_is_empty
show_jobs | tail -n 14
for log in "$work"/slurm/logs/{base,trained}_s[01].log; do
    tail -n 1 -- "$log" | grep -q 'num_samples_per_prompt: 8, now 4' || fail "${log##*/}: other settings, not refused"
done
compare_studies
launch slurm >"$work/again"
grep -q 'Nothing to submit' "$work/again" || fail "other settings left a mark: the study was submitted again"
note "other settings are refused by each element, and the study stands"

# ---- an element that fails ------------------------------------------------------------------------------------------

note "'trained' once more; its second shard can't be written: a file is in its place"
rm -rf "$work"/slurm/exp12_trained_s[01]
: >"$work/slurm/exp12_trained_s1"
launch slurm
wait_until 300 "the queue is empty" queue_is_empty
show_jobs | tail -n 9
[[ -e "$work/slurm/exp12_trained_s0/manifest.json" ]] || fail "the other element did not go on"
rm "$work/slurm/exp12_trained_s1"
launch slurm | tee "$work/again"
grep -q 'probe trained: job .*, 1 of 2 shards (1)' "$work/again" || fail "not just the failed shard was submitted"
wait_until 300 "the queue is empty" queue_is_empty
compare_studies

# ---- shards taken from srun -----------------------------------------------------------------------------------------

probe=("$PYTHON" "$project/probe_grad_vectors.py" --model-path "$project/demo/base" --device cpu)
export OMP_NUM_THREADS=1
note "srun with two tasks: each probes its own shard"
srun --ntasks=2 --label "${probe[@]}" --output-dir "$work/by_srun" --num-prompts "$NUM_PROMPTS" \
    --max-new-tokens "$MAX_NEW_TOKENS" 2>&1 | without_paths | indented
for shard in 0 1; do
    cmp -- "$work/"{local/exp12_base,by_srun}"_s$shard/grads.npy" || fail "shard $shard by srun differs"
done
note "equal bytes: grads.npy of both shards"

# There SLURM_NTASKS is 2 and SLURM_PROCID 0, but nobody has started a second task.
sbatch --quiet --wait --ntasks=2 --output="$work/by_sbatch.log" --wrap "$(
    printf '%q ' "${probe[@]}" --output-dir "$work/by_sbatch" --num-prompts 2 --max-new-tokens 16
)"
[[ -e "$work/by_sbatch/manifest.json" ]] || fail "a probe in a batch script, without srun, did not take the whole study"
note "in a batch script, without srun: the whole study"

bash "$cluster" stop
[[ -z "$(find /proc/[0-9]*/fd -lname "$CLUSTER_DIR/*" 2>/dev/null)" ]] || fail "the cluster left a process behind"
note "everything held"
