"""Values of a step that end a training in NeMo."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemo.utils.app_state import AppState

from nemo_upcycle.trainers.loss_spikes import LEAST, how_to_go_on
from nemo_upcycle.trainers.nemo.loss_guard import LossGuard


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(AppState(), "log_dir", tmp_path)
    return tmp_path


def _judge(guard: LossGuard, loss: float, step: int = 1, norm: float = 1.0) -> Any:
    numbers = {"reduced_train_loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}
    return guard._judge(SimpleNamespace(callback_metrics=numbers, global_step=step))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value: float) -> None:
    what, got, expected = _judge(LossGuard(), value)
    assert (what, str(got), expected) == ("loss", str(value), "a finite number")
    assert _judge(LossGuard(), 2.0, norm=value)[0] == "gradient norm"
    assert _judge(LossGuard(), 2.0) is None


@pytest.mark.parametrize("stops", [False, True])
def test_a_spike_ends_the_run_where_that_is_asked_for(stops: bool, folder: Path) -> None:
    guard = LossGuard(stop_on_spike=stops)
    for step in range(LEAST):
        _judge(guard, 2.0, step)
    assert _judge(guard, 2.5, LEAST) == (("loss", 2.5, "at most 2.1600") if stops else None)
    assert (folder / "metrics.jsonl").exists()


def test_a_run_that_fails_again_is_told_a_working_command(folder: Path) -> None:
    stage = folder / "runs/a/pretrain"
    stage.mkdir(parents=True)
    assert how_to_go_on(stage, "nemo", 3e-5, 9, None).endswith("train in a new folder with a lower optim.config.lr")
    (stage.parent / "command.txt").write_text("nemo upcycle pipeline --factory x dir=runs/a --only pretrain --yes\n")
    command = f"nemo upcycle pipeline --factory x dir={stage.parent}-lower-rate pretrain.optimizer.lr=1.5e-05 --yes"
    assert how_to_go_on(stage, "bridge", 3e-5, 9, None).endswith(f"with a lower optimizer.lr: `{command}`")
    kept = stage / "checkpoints/iter_0000008"
    command = "nemo upcycle pipeline --factory x dir=runs/a pretrain.optimizer.lr=1.5e-05 --rewind 8 --yes"
    assert f"rewind it with a lower optimizer.lr: `{command}`" in how_to_go_on(stage, "bridge", 3e-5, 9, kept)
    baseline = how_to_go_on(stage.with_name("dense_ct"), "bridge", 3e-5, 9, kept)
    assert "dense_ct.optimizer.lr=1.5e-05 --rewind dense_ct:8 --yes`" in baseline
