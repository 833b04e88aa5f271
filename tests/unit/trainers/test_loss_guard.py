"""Values of a step that end a training in NeMo."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemo.utils.app_state import AppState

from nemo_upcycle.trainers.loss_spikes import LEAST
from nemo_upcycle.trainers.nemo.loss_guard import LossGuard
from nemo_upcycle.trainers.stop_limits import StopReason


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(AppState(), "log_dir", tmp_path)
    return tmp_path


def _judge(guard: LossGuard, loss: float, step: int = 1, norm: float = 1.0) -> Any:
    numbers = {"reduced_train_loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}
    return guard._judge(SimpleNamespace(callback_metrics=numbers, global_step=step, callbacks=[]))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value: float) -> None:
    reason = _judge(LossGuard(), value)
    assert (reason.what, str(reason.got), reason.expected) == ("loss", str(value), "a finite number")
    assert _judge(LossGuard(), 2.0, norm=value).what == "gradient norm"
    assert _judge(LossGuard(), 2.0) is None


@pytest.mark.parametrize("stops", [False, True])
def test_a_spike_ends_the_run_where_that_is_asked_for(stops: bool, folder: Path) -> None:
    guard = LossGuard(stop_on_spike=stops)
    for step in range(LEAST):
        _judge(guard, 2.0, step)
    assert _judge(guard, 2.5, LEAST) == (StopReason("loss", 2.5, "at most 2.1600", LEAST, LEAST) if stops else None)
    assert (folder / "metrics.jsonl").exists()
