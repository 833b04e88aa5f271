"""Intervals between validations that are longer than a run."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest

from nemo_upcycle.data.blend_samples import clamp_interval
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.progress import show_messages


@pytest.mark.parametrize(
    ("interval", "batches", "clamped", "said"),
    [(2000, 1, 4, True), (4, 1, 4, True), (3, 1, 3, False), (1.0, 1, 1.0, False), (2000, 0, 4, False)],
)
def test_an_interval_beyond_the_run_ends_behind_it_and_is_said_where_a_validation_was_wanted(
    interval: float, batches: int, clamped: float, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, val_check_interval=interval, limit_val_batches=batches, logger=False
    )
    with temporarily_set(show_messages(), "propagate", True):
        clamp_interval(trainer)
    assert trainer.val_check_interval == clamped
    assert any(record.name == "nemo_upcycle" for record in caplog.records) is said
