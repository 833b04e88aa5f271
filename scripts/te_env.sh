#!/usr/bin/env bash
# Makes the environment of tests/te: real Transformer Engine modules, which can be built, not run, without a GPU.
#
#   scripts/te_env.sh FOLDER       (`make te-env`: .venv-te)
#
# Needs Python 3.11 or 3.12 on Linux and a C++17 compiler; a CUDA toolkit of the machine is not used.
# PYTHON chooses the interpreter, MAX_JOBS how many compilers run at a time (each takes up to 2 GB).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
"${PYTHON:-python3}" -m venv "$1"
env=$(cd "$1" && pwd)
install() { "$env/bin/pip" install --progress-bar off "$@"; }

# "===" compares the text: this is the CUDA 13 build of the package index. A CPU build in a folder that pip searches too
# is called 2.12.0+cpu and does not match. torch brings CUDA's, cuDNN's and NCCL's libraries and headers as packages;
# cuda-toolkit adds the compiler and the headers that they include, in the release that torch asks for.
# setuptools: from 77 on it reads this package's license field, from 82 on torch refuses it.
install "torch===2.12.0" "cuda-toolkit[nvcc,nvvm,crt,cccl]==13.0.2" "numpy<2" "megatron-core==0.15.3" einops pytest \
    "setuptools>=77,<82" wheel ninja pybind11

# Transformer Engine's Python code and its CUDA library.
install transformer-engine==2.10.0 transformer-engine-cu13==2.10.0

# The torch binding exists as source only (C++, no kernels). The packages above stand in for a toolkit: one folder each
# under nvidia/, libraries without the links that a linker looks for, and no lib64.
nvidia=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
for library in "$nvidia"/*/lib/lib*.so.*; do
    ln -sfn "$(basename "$library")" "${library%%.so.*}.so"
done
ln -sfn lib "$nvidia/cu13/lib64"
join() { local IFS=:; echo "$*"; }
CPATH=$(join "$nvidia"/*/include "$nvidia/cu13/include/cccl")
LIBRARY_PATH=$(join "$nvidia"/*/lib)
export CPATH LIBRARY_PATH CUDA_HOME="$nvidia/cu13"
# FORCE_BUILD: do not look for a ready binary elsewhere. Not isolated: it is for the torch above. Its dependencies are
# there, but for what it exports to ONNX and debugs with.
NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
    install --no-deps --no-build-isolation transformer-engine-torch==2.10.0

# This package without its NeMo extras.
install --no-build-isolation -e "$root"
touch "$env/.complete"
