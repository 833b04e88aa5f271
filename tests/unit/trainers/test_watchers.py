"""The resiliency extension's callbacks are created only if they can work."""

from __future__ import annotations

import sys
from typing import Any

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


@pytest.mark.parametrize(("has_cuda", "profiler"), [(False, object()), (True, None)])
def test_straggler_reports_need_cuda_and_a_profiler(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, profiler: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_cuda)
    monkeypatch.setitem(sys.modules, "nvrx_cupti_module", profiler)
    assert type(straggler_report()) is Callback
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvrx_cupti_module", sys)
    found = straggler_report(every_s=60.0)
    assert found.report_time_interval == 60.0
    assert not found.stop_if_detected
