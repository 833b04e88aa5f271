"""Megatron's process groups for one process, on whatever it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nemo_upcycle.cpu.backend import use_cpu_backend


@contextmanager
def one_rank() -> Iterator[None]:
    """Set up torch.distributed and Megatron's groups for this process alone, where nobody has yet."""
    from megatron.core import parallel_state, tensor_parallel

    on_cpu = use_cpu_backend()
    if not torch.distributed.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
