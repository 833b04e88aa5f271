"""Patches that let NeMo 2.7 run without CUDA; the patches for Megatron-Core are in `cpu.patches`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace


def seed_random_states() -> None:
    """Let NeMo seed Megatron's named random states.

    Without this patch these states are never seeded: NeMo seeds them only if it finds a CUDA device.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from nemo.lightning import megatron_init

    seed_host = megatron_init._set_random_seed

    def seed_all(seed: int) -> None:
        seed_host(seed)
        random.model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())

    megatron_init._set_random_seed = seed_all


def leave_loaded_tensors() -> None:
    """Skip the check that a loaded checkpoint lies on the right GPU.

    Without this patch, loading any NeMo checkpoint fails with an AssertionError on `torch.cuda.is_initialized()`.
    """
    from nemo.lightning.io import pl

    pl._fix_tensors_device = lambda checkpoint: checkpoint


def print_progress_alone() -> None:
    """Keep NeMo's `ProgressPrinter` from asking Megatron's timers for a report.

    Without this patch, a run of several ranks hangs at the next collective call, because the report is an all-gather
    and only the first rank prints it.
    """
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    ProgressPrinter.log_megatron_timers = lambda self, timers: None


def adapt_layers_of_megatron() -> None:
    """Let NeMo's LoRA compare a layer's class with Transformer Engine's classes if Transformer Engine is missing.

    Without this patch, LoRA raises an UnavailableError, "transformer_engine.pytorch could not be imported". With that
    error fixed, `isinstance` raises a TypeError, because Megatron sets its classes for grouped experts to None.
    """
    from nemo.collections.llm.peft import lora, utils

    if not lora.HAVE_TE:
        lora.te, utils.HAVE_TE = SimpleNamespace(Linear=None), False


PATCHES: tuple[Callable[[], None], ...] = (
    seed_random_states,
    leave_loaded_tensors,
    print_progress_alone,
    adapt_layers_of_megatron,
)
