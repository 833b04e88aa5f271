"""What reaches the console: progress and results, and the libraries' words only where asked for; and no idle end."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


_LIBRARIES = (
    "megatron",
    "lightning.pytorch",
    "lightning.fabric",
    "nv_one_logger",
    "NeMo",
    "torch.utils.cpp_extension",
)


def is_verbose() -> bool:
    """Return whether the user wants to read what the libraries say: NEMO_UPCYCLE_VERBOSE=1."""
    return bool(os.environ.get("NEMO_UPCYCLE_VERBOSE"))


def end_soon() -> None:
    """Spare this process, at its end, seconds in which Python would look through what the import of NeMo left.

    Not with Triton of PyTorch for GPUs: its nanobind lists everything that is not freed as a leak.
    """
    if "triton._C.libtriton" not in sys.modules:
        gc.freeze()


def quiet_libraries(*others: str) -> None:
    """Keep the console for progress and results; errors are still shown."""
    warnings.filterwarnings("ignore")
    for name in (*_LIBRARIES, *others):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import NeMo without warnings of parts that nobody asked for (zarr, OneLogger, `deploy`); errors are shown."""
    if is_verbose():
        yield
        return
    from nemo.utils import logging as nemo_logging

    loggers = [logging.getLogger(name) for name in (*_LIBRARIES, "nemo")]
    levels, verbosity = [logger.level for logger in loggers], nemo_logging.get_verbosity()
    with warnings.catch_warnings():
        quiet_libraries("nemo")
        nemo_logging.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            nemo_logging.set_verbosity(verbosity)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
