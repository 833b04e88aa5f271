"""Construct the objects that a job constructs on its ranks, on the meta device and in simulated process groups.

Megatron's classes check their settings themselves, some only when a module is built. An error that is found here would
otherwise stop the job, after hours of other stages.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from packaging.version import Version

from nemo_upcycle.cpu.configuration import configure_for_cpu
from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.megatron_config import mismatches
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.utils.attributes import temporarily_set


#: Settings that replace a configuration's own while modules are built on the meta device, without a GPU.
ON_META: dict[str, Any] = {
    "perform_initialization": False,
    "init_model_with_meta_device": True,
    "use_cpu_initialization": True,  # so that Megatron uses no other device
    "context_parallel_size": 1,  # Megatron's own attention supports no other size
    "fp8": None,
    "fp4": None,
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "cuda_graph_impl": "none",
    "delay_wgrad_compute": False,
    "overlap_moe_expert_parallel_comm": False,
}
#: Errors of a construction that this machine may cause: a package or a device is missing.
_OF_MACHINES = (ImportError, AttributeError, NameError, RuntimeError)


def construction_errors(construct: Callable[[], list[UpcycleError]], unit: str) -> list[UpcycleError]:
    """Return the errors of a construction.

    An error that this machine may cause is printed, and not returned.

    Args:
        construct: function that constructs something and returns the errors of the result.
        unit: name of the constructed thing in error texts.

    Example:
        >>> def construct():
        ...     raise ValueError("no such depth")
        >>> [str(error) for error in construction_errors(construct, "box")]
        ['box cannot be constructed: ValueError: no such depth.']
    """
    found: list[UpcycleError] = []
    error = failure_of(lambda: found.extend(construct()))
    if error is None:
        return found
    if isinstance(error, UpcycleError):
        return [error]
    if isinstance(error, _OF_MACHINES):
        sys.stderr.write(f"Not constructed before the start: {unit}: {text_of(error)}\n")
        return []
    return [UpcycleError(f"{unit} cannot be constructed: {text_of(error)}.")]


def failure_of(construct: Callable[[], object]) -> Exception | None:
    """Construct without any output and without changing the environment, and return the error.

    Args:
        construct: function that raises if something cannot be constructed.
    """
    environment = dict(os.environ)
    try:
        with (
            temporarily_set(logging.root.manager, "disable", logging.CRITICAL),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            construct()
    except Exception as error:
        return getattr(error, "proxy_base_exception", error)  # Fiddle's wrapper adds the whole configuration
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return None


def text_of(error: Exception) -> str:
    """Return an error's class and text on one line; for an assertion without text, its line of code."""
    text = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{type(error).__name__}: {' '.join(text.split())}".rstrip(".: ")


def wrong_choices(config: Any, where: str) -> Iterator[UpcycleError]:
    """Yield an error for each field of a configuration whose value is not among the names in its annotation.

    Args:
        config: instance of a dataclass.
        where: prefix of field names in error texts.
    """
    for name, hint in get_type_hints(type(config)).items():
        parts = [hint, *get_args(hint)]
        choices = [one for part in parts if get_origin(part) is Literal for one in get_args(part)]
        value = getattr(config, name, None)
        if choices and isinstance(value, str) and value not in choices:
            yield UpcycleError.unknown(f"{where}{name}", value, map(str, choices))


def construct_ranks(
    layout: Layout,
    configure: Callable[[], Any],
    make_chunk: Callable[[Any, int | None], Any],
    arch: Architecture | None,
) -> list[UpcycleError]:
    """Construct the modules of one rank in the first, in a middle and in the last pipeline stage.

    Args:
        layout: layout of the job.
        configure: function that makes and checks the model's configuration, and checks all other settings.
        make_chunk: function that makes a chunk of the model from that configuration; gets the chunk's number if a rank
            has several chunks.
        arch: expected architecture of the model; None: unknown.

    Returns:
        The differences between the model and `arch`.

    Raises:
        Exception: any exception from the construction.
    """
    found: dict[str, UpcycleError] = {}
    if torch.distributed.is_initialized():  # a running job has been checked already
        return []
    for stage in sorted({0, layout.pp // 2, layout.pp - 1}):
        with megatron_rank(layout, stage * layout.gpus // layout.pp), _without_hardware():
            config = configure()
            for name, value in ON_META.items():
                if hasattr(config, name):  # some releases lack a field
                    setattr(config, name, value)
            for number in range(layout.vp):
                chunk = make_chunk(config, number if layout.vp > 1 else None)
                if arch is not None:
                    found |= {error.subject: error for error in mismatches(chunk, arch)}
    return list(found.values())


class _Nothing:
    """Stands in for a stream, or for a library that sends tokens."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


@contextlib.contextmanager
def _without_hardware() -> Iterator[None]:
    """Let Megatron build modules on the meta device, whatever hardware and packages this machine has."""
    from megatron.core import utils
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_upcycle.cpu.patches import mark_norms_sequence_parallel

    check = inspect.unwrap(TransformerConfig.__post_init__)

    def configure_then_check(self: Any) -> None:
        configure_for_cpu(self)
        check(self)

    senders = [name for name in vars(token_dispatcher) if name.startswith("_") and name.endswith("Manager")]
    changes: list[tuple[Any, str, Any]] = [
        (TransformerConfig, "__post_init__", configure_then_check),
        (WrappedTorchNorm, "__new__", WrappedTorchNorm.__new__),
        (transformer_block, "LayerNormImpl", WrappedTorchNorm),
        (utils, "_te_version", utils._te_version if find_spec("transformer_engine") else Version("99")),
        (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (torch.cuda, "current_device", lambda: torch.device("meta")),
        (torch.cuda, "Stream", _Nothing),
        (token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", _Nothing()),
        *((token_dispatcher, name, _Nothing) for name in senders),
    ]
    if not torch.cuda.is_available():
        gpu = SimpleNamespace(major=9, minor=0, name="NVIDIA H100")  # some dispatchers look at the GPU
        changes.append((torch.cuda, "get_device_properties", lambda *_: gpu))
    if find_spec("megatron.core.models.hybrid"):  # only in later releases
        from megatron.core.models.hybrid import hybrid_block

        changes.append((hybrid_block, "TENorm", WrappedTorchNorm))
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(temporarily_set(owner, name, value))
        mark_norms_sequence_parallel()
        yield
