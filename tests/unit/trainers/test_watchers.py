"""The resiliency extension's callbacks: there only where they can work."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback
from nvidia_resiliency_ext.fault_tolerance.data import FT_RANK_MONITOR_IPC_SOCKET_ENV_VAR
from nvidia_resiliency_ext.ptl_resiliency import FaultToleranceCallback

from nemo_upcycle.trainers.nemo.watchers import FT_SOCKET, hang_detection, straggler_report


def test_hang_detection_acts_under_ft_launcher_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FT_SOCKET == FT_RANK_MONITOR_IPC_SOCKET_ENV_VAR
    monkeypatch.delenv(FT_SOCKET, raising=False)
    assert type(hang_detection()) is Callback
    monkeypatch.setenv(FT_SOCKET, "socket")
    found = hang_detection()
    assert isinstance(found, FaultToleranceCallback)
    assert not found.calculate_timeouts
    assert not found.autoresume


def test_straggler_report_does_nothing_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert type(straggler_report()) is Callback


def test_straggler_report_takes_the_arguments_of_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "nvrx_cupti_module", object())
    found = straggler_report(every_s=60.0)
    assert found.report_time_interval == 60.0
    assert not found.stop_if_detected


def test_straggler_report_survives_a_missing_profiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "nvrx_cupti_module", None)
    assert type(straggler_report()) is Callback
