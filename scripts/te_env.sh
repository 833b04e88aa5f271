#!/usr/bin/env bash
# Makes an environment with real Transformer Engine modules, which can be built, not run, without a GPU.
#
#   scripts/te_env.sh FOLDER te            beside the Megatron-Core of NeMo 2.7, for tests/te (`make test-in ENV=te`)
#   scripts/te_env.sh FOLDER bridge        beside Megatron-Bridge, for tests/bridge, too (`make test-in ENV=bridge`)
#   scripts/te_env.sh FOLDER bridge-next   the same beside commits of Bridge and Megatron-Core that are on GitHub alone
#
# Needs Linux, a C++17 compiler and a Python that this package supports, for Bridge 3.12; a CUDA toolkit of the machine
# is not used.
# PYTHON chooses the interpreter, MAX_JOBS how many compilers run at a time. BRIDGE_SRC and LM_SRC name folders with the
# sources of Megatron-Bridge and Megatron-LM that bridge-next installs in place of its commits.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
"${PYTHON:-python3}" -m venv "$1"
env=$(cd "$1" && pwd)
install() { "$env/bin/pip" install --progress-bar off "$@"; }
case $2 in
    te) engine=2.10.0 packages=("megatron-core==0.15.3" "numpy<2") ;;
    bridge|bridge-next)
        engine=2.16.1 packages=(--requirement "$root/scripts/bridge.txt")
        "$env/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' ||
            { echo "$0: Megatron-Bridge needs Python 3.12: PYTHON=python3.12" >&2; exit 1; } ;;
    *) echo "$0: got $2, expected te, bridge or bridge-next" >&2; exit 1 ;;
esac

# "===" compares the text: this is the CUDA 13 build of the package index. A CPU build in a folder that pip searches too
# is called 2.12.0+cpu and does not match. torch brings CUDA's, cuDNN's and NCCL's libraries and headers as packages;
# cuda-toolkit adds the compiler and the headers that they include, in the release that torch asks for.
# Transformer Engine comes as Python code and a CUDA library, and imports einops and onnxscript; nvdlfw-inspect takes its
# statistics.
# setuptools: from 77 on it reads this package's license field, from 82 on torch refuses it. All in one command, for pip
# to hold megatron-core's numpy<2 against the others.
install "torch===2.12.0" "cuda-toolkit[nvcc,nvvm,crt,cccl]==13.0.2" \
    "transformer-engine==$engine" "transformer-engine-cu13==$engine" einops onnxscript \
    "${packages[@]}" nvdlfw-inspect pytest "setuptools>=77,<82" wheel ninja pybind11

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
# FORCE_BUILD: do not look for a ready binary elsewhere. Not isolated, so that it is made for the torch above.
NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
    install --no-deps --no-build-isolation "transformer-engine-torch==$engine"

# This package without its NeMo extras.
if [ "$2" != te ]; then
    # This Transformer Engine calls a cuBLAS newer than the one that torch 2.12 asks for; torch runs with it.
    install --no-deps "megatron-bridge==0.6.2" "nvidia-cublas==13.10.0.20"
    if [ "$2" = bridge-next ]; then # Bridge 0.7.0 and Megatron-Core 0.20.0 of 2026-08-22, in place of the releases
        bridge=https://github.com/NVIDIA-NeMo/Megatron-Bridge/archive/067f987df03b8355b03192d88d70f1709fedf51a.tar.gz
        core=https://github.com/NVIDIA/Megatron-LM/archive/d98e8a64ddf34856e74b24714e3bedb2f5a39553.tar.gz
        # NO_VCS_VERSION: their versions do not end in the commit of a repository around them.
        NO_VCS_VERSION=1 install --no-deps --no-build-isolation "${BRIDGE_SRC:-$bridge}" "${LM_SRC:-$core}"
    fi
    # mamba-ssm as Python code: Megatron's Mamba layers can then be built, not run, and the module with their CUDA
    # kernels is an empty one. Not cached: pip would take it for the whole package elsewhere.
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
        install --no-deps --no-build-isolation --no-cache-dir "mamba-ssm==2.3.2.post1"
    touch "$(dirname "$nvidia")/selective_scan_cuda.py"
    install --no-deps --no-build-isolation -e "$root"
else
    install --no-build-isolation -e "$root"
    "$env/bin/pip" check
fi
touch "$env/.complete"
