"""Supply on a CPU what NeMo 2.7 and Megatron-Bridge take for granted of CUDA, as `patches` does for Megatron-Core."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from nemo_upcycle.cpu.configuration import configure_for_cpu


def seed_random_states() -> None:
    """Seed Megatron's named random states, too.

    Without it they are never seeded: NeMo does so only when it counts a CUDA device.
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

    Without it loading any NeMo checkpoint ends with an AssertionError on `torch.cuda.is_initialized()`.
    """
    from nemo.lightning.io import pl

    pl._fix_tensors_device = lambda checkpoint: checkpoint


def print_progress_alone() -> None:
    """Keep NeMo's `ProgressPrinter` from asking Megatron's timers for a report.

    Without it a run of several ranks hangs at the next collective call: the report is an all-gather, and only the
    first rank prints.
    """
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    ProgressPrinter.log_megatron_timers = lambda self, timers: None


def adapt_layers_of_megatron() -> None:
    """Let NeMo's LoRA compare a layer's class with Transformer Engine's where that is not installed.

    Without it: UnavailableError, "transformer_engine.pytorch could not be imported", and then a TypeError of
    `isinstance`, for Megatron has None in the place of its classes for grouped experts.
    """
    from nemo.collections.llm.peft import lora, utils

    if not lora.HAVE_TE:
        lora.te, utils.HAVE_TE = SimpleNamespace(Linear=None), False


def start_without_cuda() -> None:
    """Let Bridge's set-up begin, over gloo, and seed Megatron's named random states.

    Without it: AssertionError, "Megatron requires CUDA"; ValueError, "ProcessGroupNCCL is only supported with GPUs";
    and dropout finds no random state: Bridge seeds them only when it counts a CUDA device.
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
    """Use the dataset helpers that are there.

    Without it the process ends, "Failed to compile the C++ dataset helper functions": the package from the index has
    them compiled, and no Makefile.
    """
    from megatron.bridge.training import initialize

    if find_spec("megatron.core.datasets.helpers_cpp"):
        initialize.compile_helpers = lambda: None


def keep_random_states() -> None:
    """Give a checkpoint the CPU generator's state in the place of a device's.

    Without it the first save ends with a RuntimeError, "Found no NVIDIA driver".
    """
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)


def build_without_transformer_engine() -> None:
    """Configure a builder's model for the CPU before it is built.

    Without it the layers are Transformer Engine's, whose modules need a GPU.
    """
    from megatron.training.models.base import ModelBuilder

    keep = ModelBuilder.__init__

    @functools.wraps(keep)
    def configure_then_keep(self: Any, model_config: Any) -> None:
        configure_for_cpu(model_config)
        keep(self, model_config)

    ModelBuilder.__init__ = configure_then_keep


NEMO_PATCHES: tuple[Callable[[], None], ...] = (
    seed_random_states,
    leave_loaded_tensors,
    print_progress_alone,
    adapt_layers_of_megatron,
)
BRIDGE_PATCHES: tuple[Callable[[], None], ...] = (
    start_without_cuda,
    use_compiled_helpers,
    keep_random_states,
    build_without_transformer_engine,
)
