"""If torch finds a CUDA device, no patch of the CPU backend is imported.

The test has a module of its own because a rank imports the whole module of the function that it runs.
"""

from __future__ import annotations

import sys

import torch

from tests.distributed.ranks import run_ranks


def _modules_with_cuda() -> list[str]:
    """Import the modules of a training job as if torch had found a CUDA device; return the CPU backend's modules."""
    torch.cuda.is_available = lambda: True
    current_device = torch.cuda.current_device
    import nemo_upcycle.pipeline.nemo.recipes
    import nemo_upcycle.trainers.nemo.upcycling  # noqa: F401
    from nemo_upcycle.cpu.backend import use_cpu_backend

    assert use_cpu_backend() is False
    assert torch.cuda.current_device is current_device
    return [name for name in sys.modules if name.startswith("nemo_upcycle.cpu.")]


def test_patches_are_not_imported_where_cuda_is_available() -> None:
    (imported,) = run_ranks(_modules_with_cuda, 1, process_group=False)
    assert sorted(imported) == [f"nemo_upcycle.cpu.{name}" for name in ("backend", "configuration", "one_rank")]
