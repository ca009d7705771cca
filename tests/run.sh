#!/usr/bin/env bash
# The whole test suite: bash tests/run.sh [pytest arguments]
set -Eeuo pipefail
project="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
mapfile -t needed < <(grep -v '^#' "$project/requirements-dev.txt")
python="$(bash "$project/scripts/ensure_venv.sh" "${needed[@]}")"
cd -- "$project"
# One worker per core, each with one thread: more would only wait for each other.
n_cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # which would lower nproc's answer
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# A module stays on one worker: what its tests share is made once.
exec "$python" -m pytest -n "$n_cores" --dist loadscope "$@"
