"""Settings that every scheduler's executor has: GPUs, prices and disks for --dryrun, and changes for single stages."""

# Do not postpone annotations in this module, and write Optional[...]: NeMo-Run reads them to parse the executor's
# fields.

from dataclasses import dataclass, field
from typing import Any, Optional

from nemo_upcycle.pipeline.executors.ft import USUAL_GIB_S, USUAL_RESTART_S


@dataclass(kw_only=True)
class SiteSettings:
    """The GPUs, prices and disks of a site, and the settings that differ between stages.

    Args:
        card: kind of GPU, as `nemo-upcycle plan --gpu` names it, for --dryrun and for the performance settings.
        performance: new value of each setting that differs from `conf/performance.yaml`; None removes the setting.
        price_per_gpu_hour: price of a GPU-hour, for --dryrun; None if it is unknown.
        write_gib_s: speed (GiB/s) at which all nodes together write to the file system of `dir`, for --dryrun.
        gpu_hours_between_failures: mean GPU-hours between two failures of a job, for --dryrun; None for the rate that
            was published for the training of Llama 3.
        restart_s: time from a failure of a job to its next step (seconds), for --dryrun.
        stages: fields that differ for a stage, by the stage's name.
    """

    card: str = "h100"
    performance: dict[str, Any] = field(default_factory=dict)
    price_per_gpu_hour: Optional[float] = None  # noqa: UP045
    write_gib_s: float = USUAL_GIB_S
    gpu_hours_between_failures: Optional[float] = None  # noqa: UP045
    restart_s: float = USUAL_RESTART_S
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
