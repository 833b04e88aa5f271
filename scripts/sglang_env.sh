#!/usr/bin/env bash
# Makes the environment of `make test-in ENV=sglang`: SGLang as it is released, which needs a card, on a machine without one.
#
#   scripts/sglang_env.sh FOLDER       (11 GB)
#
# Needs Linux, a C compiler and Python 3.11 or newer; PYTHON chooses it.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
"${PYTHON:-python3}" -m venv "$1"
env=$(cd "$1" && pwd)
"$env/bin/pip" install --progress-bar off --upgrade pip
# "===": the CUDA build of the package index, whose libraries SGLang's kernels are linked with, not another one of that
# number from a folder that pip searches too.
"$env/bin/pip" install --progress-bar off "sglang==0.5.23" "torch===2.14.1" omegaconf rich "pytest>=8,<10"
"$env/bin/pip" install --progress-bar off --no-deps -e "$root"

# The kernels' library asks the driver's for one function, which no test calls; without a driver, this is all of it.
mkdir -p "$env/driver"
if ! ldconfig -p | grep -q libcuda.so.1; then
    echo "int cuPointerGetAttribute(void) { return 100; } /* no device */" |
        "${CC:-cc}" -shared -fPIC -x c - -o "$env/driver/libcuda.so.1"
fi
touch "$env/.complete"
