#!/usr/bin/env bash
# Runs the tests that need another environment, a server or much memory, and first creates what they need.
#
#   make test-in ENV=NAME
#
#   bridge         Megatron-Bridge with a compiled Transformer Engine (Python 3.12; 19 minutes, 13 to build)
#   bridge-next    the same on commits of Bridge 0.7 and Megatron-Core 0.20 from GitHub, or on folders: BRIDGE_SRC= LM_SRC=
#   bridge-sample  the part of bridge that needs no compiler (Python 3.12; 2 minutes, 1 to install)
#   te             real Transformer Engine modules in CPU memory (a minute, 11 to build)
#   data           the engine of the data stage (3 minutes); SLURM_PARTITION=NAME: on a Slurm, too
#   tf5            exports in the newest transformers (2 minutes); CASES=240: so many random models
#   vllm           exports served by vLLM on CPUs (2 minutes, 3 to install; 2 GB)
#   sglang         exports served by SGLang without its kernels (Python 3.11; 12 minutes, 4 to install; 11 GB)
#   llama-cpp      exports converted and run by llama.cpp, fetched into .cache/ (npm; 20 minutes; 0.5 GB)
#   slurm          the chain on a Slurm of two nodes, installed as root (30 minutes); ACCOUNTING=--accounting: with slurmdbd
#   k8s            every stage, sent to a real Kubernetes API server (Debian; a minute, 3 to 14 to build into .cache/)
#   browser        reports in Chromium at two widths, screenshots in runs/test-browser (a minute, 1 to install; 0.7 GB)
#   newest         a report: releases newer than the locked ones, and what fails with them (20 minutes; 8 GB in build/)
#   command        `nemo llm pretrain` with the real 135M model, then resumed (3 minutes, 14 GiB of memory, 11 GB of disk)
#
# PYTHON=FOLDER/bin/python3.12 chooses the interpreter of a new environment. bridge and bridge-next take ROWS= for every
# row of every table.
set -euo pipefail
cd "$(dirname "$0")/.."

need() {
    for folder in "$@"; do make --silent "$folder/.complete"; done
}

# Runs pytest in an environment: run_in FOLDER ARGUMENTS.
run_in() {
    need "$1"
    "$1/bin/python" -m pytest "${@:2}"
}

case ${1:-} in
    bridge|bridge-next)
        rows=${ROWS-not weekly}
        run_in ".venv-$1" -m "$rows" tests/te
        run_in ".venv-$1" -m "$rows" -n 3 --dist loadfile \
            tests/bridge tests/contract tests/distributed/test_balancing.py \
            tests/unit/{init,online,convert,planning,trainers/monitoring} tests/unit/data/test_epoch_dataset.py ;;
    bridge-sample) # models filled, also beside Bridge's own loader; a training with a resume; mistakes; odd experts
        # One worker: each rank's process is forked from one that has imported Bridge.
        run_in .venv-bridge-sample -m "not weekly" tests/contract/test_mistakes.py \
            tests/bridge/test_models.py tests/bridge/test_parents.py tests/bridge/test_config_fields.py \
            tests/bridge/test_delta_nets.py::test_a_resumed_training_has_the_same_bits \
            tests/bridge/test_upcycling.py::test_a_second_start_does_not_upcycle_again \
            tests/bridge/test_upcycling.py::test_paths_are_compared_resolved \
            tests/unit/convert/test_verification.py::test_experts_that_no_grouped_product_takes_are_compared ;;
    te) run_in .venv-te tests/te ;;
    data) run_in .venv-data tests/data_engine ;;
    tf5) run_in .venv-tf5 tests/loading tests/unit/convert/test_verification.py tests/unit/convert/test_compared_weights.py ;;
    vllm) run_in .venv-vllm tests/servers/test_engines.py ;;
    sglang)
        export LD_LIBRARY_PATH=$PWD/.venv-sglang/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
        run_in .venv-sglang tests/servers/test_engines.py ;;
    llama-cpp)
        need .venv
        PIP=.venv/bin/pip scripts/llama_cpp.sh
        run_in .venv tests/servers/test_llama_cpp.py ;;
    slurm)
        need .venv
        need .venv-data
        trap "scripts/slurm_cluster.sh stop" EXIT
        scripts/slurm_cluster.sh start ${ACCOUNTING:+"$ACCOUNTING"}
        run_in .venv tests/functional/test_slurm.py tests/functional/test_slurm_jobs.py ;;
    k8s)
        scripts/k8s_apiserver.sh
        run_in .venv tests/functional/test_kubernetes.py ;;
    browser)
        need .venv-browser
        run_in .venv tests/browser ;;
    newest) # Its status is 1 if a test fails; nothing else depends on it.
        folder=build/newest
        rm -rf "$folder"
        failed=()
        NEWEST=1 scripts/env.sh "$folder/.venv" dev
        NEWEST=1 scripts/env.sh "$folder/.venv-data" data
        "$folder/.venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not full" || failed+=("make test")
        "$folder/.venv-data/bin/python" -m pytest tests/data_engine || failed+=("make test-in ENV=data")
        echo "Newer than scripts/constraints/nemo.txt:"
        "$folder/.venv/bin/python" scripts/newer_releases.py scripts/constraints/nemo.txt
        echo "Newer than scripts/constraints/data.txt:"
        "$folder/.venv-data/bin/python" scripts/newer_releases.py scripts/constraints/data.txt
        echo "Commands with failing tests, named above: ${failed[*]:-none}"
        [ ${#failed[@]} = 0 ] ;;
    command) # A user's command, on default threads. It looks for a hang, so it has a limit.
        need .venv
        dir=runs/test-command
        pretrain() { timeout 900 .venv/bin/nemo llm pretrain --factory "smollm2_135m_e8t2(dir='$dir')" --yes "$@"; }
        rm -rf "$dir"
        pretrain trainer.max_steps=2
        # The optimizer makes a checkpoint of 9 GiB, and nothing resumes from this one.
        pretrain trainer.max_steps=3 log.ckpt.save_optim_on_train_end=False
        test -f "$dir/smollm2_135m_e8t2/checkpoints/model_name=0--step=2-last/weights/.metadata"
        rm -rf "$dir" ;;
    *)
        echo "ENV is ${1:-missing}; expected one of:" >&2
        sed -n 's/^#   \([a-z0-9-]*  .*\)/  \1/p' "$0" >&2
        exit 2 ;;
esac
