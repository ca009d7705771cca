#!/usr/bin/env bash
# One step of a study as a Slurm job; scripts/slurm.sh submits it:
#
#     sbatch [--array=INDEXES] slurm_step.sh STEP
#
# The command is read from STEP.INDEX (STEP.0 where the job is no array), its words ended by NUL. After success it is
# copied to STEP.INDEX.done, which tells a later submission what has been done.
set -Eeuo pipefail

plan="$1.${SLURM_ARRAY_TASK_ID:-0}"
mapfile -d '' -t command <"$plan"
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    # A requeued element adds to the log of its first run.
    printf '%s  job %s_%s, run %d, on %s\n' "$(date '+%F %T')" "$SLURM_ARRAY_JOB_ID" "$SLURM_ARRAY_TASK_ID" \
        "$((${SLURM_RESTART_COUNT:-0} + 1))" "$SLURMD_NODENAME"
fi
export OMP_NUM_THREADS="$SLURM_CPUS_ON_NODE" MKL_NUM_THREADS="$SLURM_CPUS_ON_NODE"
export OPENBLAS_NUM_THREADS="$SLURM_CPUS_ON_NODE"
"${command[@]}"
cp -- "$plan" "$plan.done"
