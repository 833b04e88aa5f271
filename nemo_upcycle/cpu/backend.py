"""Train with NeMo and Megatron without CUDA, over gloo, with the same configuration that a GPU user writes.

`use_cpu_backend()` at the start of each process is all that a script needs:

    use_cpu_backend()
    model = llm.LlamaModel(llm.Llama31Config8B(num_moe_experts=8, moe_router_topk=2))
    trainer = nl.Trainer(accelerator="cpu", devices=2, strategy=nl.MegatronStrategy(expert_model_parallel_size=2), ...)
    llm.train(model, data, trainer, optim=optim, tokenizer="data")

A checkpoint's `context` records the configuration as the user wrote it, as on a GPU. Settings that need CUDA or
Transformer Engine are switched off in the configuration object when it is made. Each function in `patches` replaces
one thing that Megatron and NeMo would need CUDA for. If there is a CUDA device, no patch is imported.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch


logger = logging.getLogger(__name__)

#: Maps a trainer's package to the package of this project whose module `cpu_patches` has the trainer's patches.
_TRAINERS = {"nemo": "nemo_upcycle.trainers.nemo", "megatron.bridge": "nemo_upcycle.trainers.bridge"}
_installed = False


def use_cpu_backend() -> bool:
    """Let Megatron and NeMo run in this process without CUDA; call it once, before making a model or a trainer.

    The function does nothing if CUDA is available or if an earlier call has installed the backend.

    Returns:
        Whether this process now computes on the CPU.

    Example:
        >>> if use_cpu_backend():  # doctest: +SKIP
        ...     recipe.trainer.accelerator = "cpu"
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        from nemo_upcycle.cpu.patches import PATCHES

        for patch in PATCHES:
            patch()
        for trainer, folder in _TRAINERS.items():
            if find_spec(trainer) and find_spec(folder):
                for patch in importlib.import_module(f"{folder}.cpu_patches").PATCHES:
                    patch()
        _installed = True
        logger.info("no CUDA device: Megatron and NeMo compute on the CPU")
    return True


def cpu_has_fast_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, or Arm's BF16).

    With such hardware, `bf16-mixed` is faster than `32`. Without such hardware, `bf16-mixed` is slower. If this
    release of torch cannot tell, the function returns False, which may cost time but no accuracy.
    """
    ask: Callable[[], Any] | None = getattr(torch.cpu, "get_capabilities", None)
    return ask is not None and any(ask().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
