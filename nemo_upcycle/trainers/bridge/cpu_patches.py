"""Let Megatron-Bridge run on a CPU by replacing things that need CUDA, as `cpu.patches` does for Megatron-Core."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from nemo_upcycle.cpu.configuration import configure_for_cpu


def start_without_cuda() -> None:
    """Let Bridge's set-up start over gloo, and seed Megatron's named random states.

    Without this patch, the set-up raises an AssertionError, "Megatron requires CUDA", or a ValueError,
    "ProcessGroupNCCL is only supported with GPUs". Dropout finds no random state, because Bridge seeds the states only
    if there is a CUDA device.
    """
    from megatron.bridge.training import initialize, setup
    from megatron.core.tensor_parallel import random

    seed_host, connect = initialize._set_random_seed, initialize._initialize_distributed

    def seed_all(seed_: int, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        seed_host(seed_, *args, pg_collection=pg_collection, **kwargs)
        random.model_parallel_cuda_manual_seed(seed_ + 100 * pg_collection.pp.rank())

    def connect_by_gloo(*args: Any, dist_config: Any, **kwargs: Any) -> Any:
        dist_config.distributed_backend = "gloo"
        return connect(*args, dist_config=dist_config, **kwargs)

    initialize._set_random_seed, initialize._initialize_distributed = seed_all, connect_by_gloo
    setup.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)


def use_compiled_helpers() -> None:
    """Use the compiled dataset helpers that are installed.

    Without this patch the process ends with "Failed to compile the C++ dataset helper functions", because the PyPI
    package contains the compiled helpers but no Makefile.
    """
    from megatron.bridge.training import initialize

    if find_spec("megatron.core.datasets.helpers_cpp"):
        initialize.compile_helpers = lambda: None


def keep_random_states() -> None:
    """Save the CPU generator's state in a checkpoint, in place of a device's state.

    Without this patch the first save ends with a RuntimeError, "Found no NVIDIA driver".
    """
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)


def build_without_transformer_engine() -> None:
    """Configure a builder's model for the CPU before it is built.

    Without this patch the model gets layers of Transformer Engine, which need a GPU.
    """
    from megatron.training.models.base import ModelBuilder

    keep = ModelBuilder.__init__

    @functools.wraps(keep)
    def configure_then_keep(self: Any, model_config: Any) -> None:
        configure_for_cpu(model_config)
        keep(self, model_config)

    ModelBuilder.__init__ = configure_then_keep


PATCHES: tuple[Callable[[], None], ...] = (
    start_without_cuda,
    use_compiled_helpers,
    keep_random_states,
    build_without_transformer_engine,
)
