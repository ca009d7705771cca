#!/usr/bin/env bash
# Print the Python interpreter to use: $PYTHON if set, else that of .venv beside the scripts, made and filled from
# requirements.txt if need be. Further arguments are requirements to install into .venv too.
set -Eeuo pipefail

project="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$project/.venv"
stamp="$venv/.requirements" # what was asked for last time, one a line
if [[ -n "${PYTHON:-}" ]]; then
    printf '%s\n' "$PYTHON"
    exit
fi
wanted="$(printf '%s\n' "$(<"$project/requirements.txt")" "$@")"
if [[ ! -f "$stamp" ]] || grep -qvxF -f "$stamp" <<<"$wanted"; then
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        printf 'error: python3 must be 3.10 or later; or set PYTHON to an interpreter with requirements.txt\n' >&2
        exit 2
    fi
    printf 'setting up %s (once; may take a few minutes)\n' "$venv" >&2
    [[ -x "$venv/bin/python" ]] || python3 -m venv "$venv" >&2
    # torch first and by its very version: asked for in any other way it may bring gigabytes of CUDA packages.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep -E '^torch==' <<<"$wanted")" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$project/requirements.txt" "$@" >&2
    printf '%s\n' "$wanted" >"$stamp"
fi
printf '%s\n' "$venv/bin/python"
