"""The environment variables that tests run with.

The user's variables must not change a test's result, and tests must not use the user's accounts. For this, `clean`
runs in pytest's main process and in each xdist worker, before any module that reads the variables is imported.
Subprocesses inherit the cleaned variables. `python -m tests.environment COMMAND ...` (`make weekly`) runs a command
with disturbing variables, such as a proxy, a Slurm allocation or a rank's shell can set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping


#: Prefixes of the variables to clear. The variables belong to hubs and accounts, schedulers, rank launchers, CUDA,
#: thread libraries, the console and Python.
CLEARED = (
    *("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "DATASETS_", "TOKENIZERS_", "WANDB_", "NEMO"),
    *("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMIX_", "OMPI_", "PET_", "TORCHELASTIC_", "KUBE"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "NODE_RANK", "MASTER_", "FT_"),
    *("CUDA_", "NVIDIA_", "NCCL_", "NVTE_", "GLOO_", "TORCH_", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "RAYON_"),
    *("LC_", "LANGUAGE", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "TTY_", "PYTHONIOENCODING"),
    "PYTHONDONTWRITEBYTECODE",
)
#: Variables that stay despite `CLEARED`: paths on this machine, and the GPUs that the user lends to the tests.
KEPT = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "SLURM_CONF", "SLURM_PARTITION"),
    *("NEMO_UPCYCLE_CACHE", "NEMO_UPCYCLE_DATA_PYTHON", "NEMO_UPCYCLE_K8S", "NEMO_UPCYCLE_LLAMA_CPP"),
)
#: Variables set for every test. Proxies are kept, because some machines can download only through a proxy. But tests
#: must reach the test servers on this host directly.
SET = {"LANG": "C.UTF-8", "TERM": "xterm", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
SET |= {"NEMO_UPCYCLE_REPORT_EVERY_S": "0"}  # a reporting process beside each chain would cost the tests minutes
#: Variables that `make weekly` sets.
HOSTILE = {
    **{"HF_HUB_OFFLINE": "1", "HF_TOKEN": "bad", "HF_HOME": "/nowhere/hf", "TRANSFORMERS_OFFLINE": "1"},
    **{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"},
    **{"SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NAME": "mine"},
    **{"SLURM_MEM_PER_CPU": "1", "SLURM_NTASKS_PER_NODE": "8", "SLURM_ARRAY_TASK_ID": "5"},
    **{"SBATCH_EXPORT": "NONE", "SBATCH_PARTITION": "nowhere", "SBATCH_ACCOUNT": "nobody", "SRUN_CPUS_PER_TASK": "1"},
    **{"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"},
    **{"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_LAUNCH_BLOCKING": "1"},
    **{"NVIDIA_PYTORCH_VERSION": "25.11", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    **{"LANG": "C", "LC_ALL": "C", "COLUMNS": "40", "LINES": "5", "FORCE_COLOR": "1", "TERM": "dumb"},
    **dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9"),  # not https: some tests download packages
    **{"NEMORUN_HOME": "/nowhere/runs", "NEMO_HOME": "/nowhere/nemo", "NEMO_UPCYCLE_VERBOSE": "1"},
    "PYTHONDONTWRITEBYTECODE": "1",
    **{"KUBECONFIG": "/nowhere/config", "KUBERNETES_SERVICE_HOST": "nowhere", "KUBERNETES_SERVICE_PORT": "1"},
}


def clean(variables: MutableMapping[str, str]) -> None:
    """Clear and set variables, so that every test has the same variables."""
    for name in [name for name in variables if name.startswith(CLEARED) and name not in KEPT]:
        del variables[name]
    variables.update(SET)


if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], os.environ | HOSTILE)
