"""What the loss guard calls broken, and what a spike."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemo.utils.app_state import AppState

from nemo_upcycle.trainers.nemo.loss_guard import LEAST, LossGuard


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(AppState(), "log_dir", tmp_path)
    return tmp_path / "metrics.jsonl"


def _judge(guard: LossGuard, loss: float, step: int = 1, norm: float = 1.0) -> Any:
    numbers = {"reduced_train_loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}
    return guard._judge(SimpleNamespace(callback_metrics=numbers, global_step=step))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_or_norm_that_is_not_finite_ends_the_run(value: float) -> None:
    what, got, expected = _judge(LossGuard(), value)
    assert (what, str(got), expected) == ("loss", str(value), "a finite number")
    assert _judge(LossGuard(), 2.0, norm=value)[0] == "gradient norm"
    assert _judge(LossGuard(), 2.0) is None


def test_a_spike_is_written_and_does_not_move_the_window(metrics: Path) -> None:
    guard = LossGuard()
    for step in range(LEAST):
        assert guard.limit() is None
        assert _judge(guard, 2.0 + 0.01 * (step % 3), step) is None
    limit = guard.limit()
    assert limit == pytest.approx(2.01 + 8 * 0.0201)  # the spread is at least one per cent of the median
    assert _judge(guard, limit - 0.001, 21) is None
    assert not metrics.exists()
    assert _judge(guard, 9.0, 22) is None
    assert json.loads(metrics.read_text()) == {
        "step": 22,
        "loss_spike": 9.0,
        "limit": pytest.approx(limit, rel=1e-2),
    }
    assert guard.limit() == pytest.approx(limit, rel=1e-2)


def test_losses_that_scatter_widen_the_limit_by_their_standard_deviation(metrics: Path) -> None:
    """Of a normal distribution the median distance from the median is 1 / 1.4826 of its standard deviation."""
    guard, losses = LossGuard(window=255), statistics.NormalDist(2.0, 0.1).quantiles(256)
    random.Random(1).shuffle(losses)
    for step, loss in enumerate(losses):
        _judge(guard, loss, step)
    assert guard.limit() == pytest.approx(2.0 + 8 * 0.1, rel=0.005)
    assert not metrics.exists()


def test_a_spike_ends_the_run_where_that_is_asked_for(metrics: Path) -> None:
    guard = LossGuard(stop_on_spike=True)
    for step in range(LEAST):
        _judge(guard, 2.0, step)
    assert _judge(guard, 2.5, LEAST) == ("loss", 2.5, "at most 2.1600")


def test_a_loss_that_stays_higher_is_normal_after_a_while(metrics: Path) -> None:
    guard = LossGuard(window=40)
    for step in range(40):
        _judge(guard, 2.0, step)
    for step in range(40, 100):
        _judge(guard, 2.3, step)
    assert len(metrics.read_text().splitlines()) < 60
    assert _judge(guard, 2.3, 100) is None
