"""Hide misleading console messages of NeMo and Lightning: on optional parts, model sizes and accelerators."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_upcycle.utils.console import LIBRARIES, is_verbose, quiet_libraries


#: Lightning packages whose loggers a trainer may use; the trainer uses the loggers of the package imported last.
_TRAINER = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
_SUMMARY = "lightning.pytorch.callbacks.model_summary"
_DEVICES = re.compile(r"(GPU|TPU|HPU) available: ")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide warnings about optional parts (zarr, OneLogger, `deploy`) while NeMo is imported; still show errors."""
    if is_verbose():
        yield
        return
    from nemo.utils import logging as nemo_logging

    levels = {name: logging.getLogger(name).level for name in (*LIBRARIES, "nemo")}
    verbosity = nemo_logging.get_verbosity()
    with warnings.catch_warnings():
        quiet_libraries()
        logging.getLogger("nemo").setLevel(logging.ERROR)
        nemo_logging.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            nemo_logging.set_verbosity(verbosity)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def quiet_lightning() -> None:
    """Hide Lightning's table of parameters and its list of accelerators.

    The table counts one rank's shard and calls it the total. `MetricsLogger` prints the size of the whole model.
    """
    logging.getLogger(_SUMMARY).addFilter(_drop)
    for name in _TRAINER:
        logging.getLogger(f"{name}.utilities.rank_zero").addFilter(_is_of_the_run)


def _drop(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO


def _is_of_the_run(record: logging.LogRecord) -> bool:
    return not _DEVICES.match(record.getMessage())
