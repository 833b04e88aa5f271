"""What Lightning says of one rank's part, and of accelerators that nobody has, stays off the console."""

from __future__ import annotations

import subprocess
import sys

import pytest


_FIT_TWICE = """
import sys
import lightning.pytorch as pl
import pytorch_lightning  # as NeMo's telemetry does: the last one's name is what all of them speak under
from lightning.pytorch.demos.boring_classes import BoringModel
from nemo_upcycle.trainers.nemo.imports import quiet_lightning

settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
pl.Trainer(max_steps=1, limit_val_batches=0, **settings).fit(BoringModel())
sys.stderr.write("now quiet")
quiet_lightning()
pl.Trainer(max_steps=1, limit_val_batches=0, **settings).fit(BoringModel())
"""


@pytest.mark.slow
def test_neither_a_ranks_parameters_nor_accelerators_are_listed_but_the_end_is_told() -> None:
    done = subprocess.run([sys.executable, "-c", _FIT_TWICE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    as_it_is, quiet = done.stderr.split("now quiet")
    for said in ("Total params", "GPU available", "TPU available", "HPU available"):
        assert said in as_it_is
        assert said not in quiet
    assert "`Trainer.fit` stopped" in quiet
