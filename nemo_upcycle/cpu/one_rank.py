"""Set up Megatron's process groups in a single process, as the only rank or as one rank of a simulated cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.planning.layout import Layout


@contextmanager
def one_rank() -> Iterator[None]:
    """Set up torch.distributed and Megatron's groups for this process alone, unless they exist already."""
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


@contextmanager
def megatron_rank(layout: Layout, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """Act as one rank of a simulated cluster, with Megatron's own groups over a fake back end.

    Yields:
        The rank's numbers in its tp, ep, etp and pp groups, in Megatron's own numbering.
    """
    from megatron.core import parallel_state as ps
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.gpus)
    try:
        ps.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
        )
        yield (
            ps.get_tensor_model_parallel_rank(),
            ps.get_expert_model_parallel_rank(),
            ps.get_expert_tensor_parallel_rank(),
            ps.get_pipeline_model_parallel_rank(),
        )
    finally:
        ps.destroy_model_parallel()
        torch.distributed.destroy_process_group()
