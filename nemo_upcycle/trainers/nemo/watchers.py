"""NVIDIA's resiliency extension in a run, or callbacks that do nothing if its surroundings are missing."""

# No postponed annotations: NeMo-Run parses `trainer.callbacks[4].every_s=60.0` by them.

import contextlib
import os

import torch
from lightning.pytorch.callbacks import Callback

from nemo_upcycle.trainers.base import FT_SOCKET
from nemo_upcycle.utils.progress import show_messages


def hang_detection() -> Callback:
    """Return the callback that tells `ft_launcher` after each step that this rank is alive.

    The launcher ends and restarts all ranks when one is silent for longer than its timeouts, which
    `pipeline.executors.ft.ft_command` sets. Under another launcher the extension's callback would fail, and the one
    returned does nothing.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(hang_detection))  # doctest: +SKIP
    """
    if FT_SOCKET not in os.environ:
        return Callback()
    from nvidia_resiliency_ext.fault_tolerance.rank_monitor_client import RankMonitorClientError
    from nvidia_resiliency_ext.ptl_resiliency import FaultToleranceCallback

    class Heartbeat(FaultToleranceCallback):
        """Goes on without its watcher, which ends at once when a scheduler sends SIGTERM to all of a job's processes.

        The ranks have to save first.
        """

        def _send_ft_heartbeat(self) -> None:
            with contextlib.suppress(RankMonitorClientError, OSError):
                super()._send_ft_heartbeat()

        def _shutdown_fault_tolerance(self) -> None:
            with contextlib.suppress(RankMonitorClientError, OSError):
                super()._shutdown_fault_tolerance()

    # The launcher's timeouts stand: ones calculated from a short run would end a slow step of a long one. Whether the
    # training is finished is told by its checkpoint, so no flag file is wanted either.
    return Heartbeat(autoresume=False, calculate_timeouts=False)


def straggler_report(every_s: float = 600.0) -> Callback:
    """Return the callback that warns of GPUs that are slower than the others, or than they were; it ends no run.

    Without CUDA or its profiling interface the callback returned does nothing. Not verified on GPUs.

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
        profiling_interval=10,  # the profiler costs time in every step that it looks at
    )
