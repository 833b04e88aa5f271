"""Make callbacks of NVIDIA's resiliency extension, or callbacks that do nothing if a requirement is missing."""

# Do not postpone annotations here: NeMo-Run needs them to parse `trainer.callbacks[4].every_s=60.0`.

import contextlib
import os

import torch
from lightning.pytorch.callbacks import Callback

from nemo_upcycle.trainers.base import FT_SOCKET
from nemo_upcycle.utils.progress import show_messages


def hang_detection() -> Callback:
    """Return the callback that tells `ft_launcher` after each step that this rank is alive.

    The launcher ends and restarts all ranks if one rank is silent for longer than its timeouts, which
    `pipeline.executors.ft.ft_command` sets. Under another launcher the extension's callback would fail, so a callback
    that does nothing is returned.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(hang_detection))  # doctest: +SKIP
    """
    if FT_SOCKET not in os.environ:
        return Callback()
    from nvidia_resiliency_ext.fault_tolerance.rank_monitor_client import RankMonitorClientError
    from nvidia_resiliency_ext.ptl_resiliency import FaultToleranceCallback

    class Heartbeat(FaultToleranceCallback):
        """The extension's callback, but it keeps running if its watcher process has ended.

        If a scheduler sends SIGTERM to all processes of a job, the watcher ends at once. The ranks must save first.
        """

        def _send_ft_heartbeat(self) -> None:
            with contextlib.suppress(RankMonitorClientError, OSError):
                super()._send_ft_heartbeat()

        def _shutdown_fault_tolerance(self) -> None:
            with contextlib.suppress(RankMonitorClientError, OSError):
                super()._shutdown_fault_tolerance()

    # Keep the launcher's timeouts: timeouts calculated from a short run would kill a slow step of a long run. The
    # checkpoint tells whether the training is finished, so no flag file is needed either.
    return Heartbeat(autoresume=False, calculate_timeouts=False)


def straggler_report(every_s: float = 600.0) -> Callback:
    """Return the callback that warns of GPUs slower than the others, or slower than before, and never ends the run.

    Without CUDA or its profiling interface, the returned callback does nothing. Not verified on GPUs.

    Args:
        every_s: seconds between two reports.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(straggler_report, every_s=60.0))  # doctest: +SKIP
    """
    if not torch.cuda.is_available():
        return Callback()
    try:
        import nvrx_cupti_module  # noqa: F401
        from nvidia_resiliency_ext.ptl_resiliency import StragglerDetectionCallback
    except ImportError as error:
        show_messages().warning("no report of slow GPUs: %s", error)
        return Callback()
    return StragglerDetectionCallback(
        report_time_interval=every_s,
        calc_relative_gpu_perf=True,
        calc_individual_gpu_perf=True,
        num_gpu_perf_scores_to_print=0,
        gpu_relative_perf_threshold=0.7,
        gpu_individual_perf_threshold=0.7,
        stop_if_detected=False,
        enable_ptl_logging=True,
        profiling_interval=10,  # the profiler slows every step that it measures
    )
