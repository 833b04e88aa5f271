"""What Lightning says of a run that is not so: sizes of one rank's part, and accelerators that nobody asked for."""

from __future__ import annotations

import logging
import re


#: Under whose name a trainer of Lightning speaks: that of the one which was imported last.
_TRAINER = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
_SUMMARY = "lightning.pytorch.callbacks.model_summary"
_DEVICES = re.compile(r"(GPU|TPU|HPU) available: ")


def quiet_lightning() -> None:
    """Let Lightning leave out its table of parameters and its list of accelerators.

    The table counts one rank's shard and calls it the total; `MetricsLogger` states the size of the whole model.
    """
    logging.getLogger(_SUMMARY).addFilter(_drop)
    for name in _TRAINER:
        logging.getLogger(f"{name}.utilities.rank_zero").addFilter(_is_of_the_run)


def _drop(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO


def _is_of_the_run(record: logging.LogRecord) -> bool:
    return not _DEVICES.match(record.getMessage())
