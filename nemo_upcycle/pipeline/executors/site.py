"""The settings that every scheduler's executor has: cards, prices and disks for --dryrun, and what stages change."""

# No postponed annotations, and Optional[...]: NeMo-Run parses the executor's fields by them.

from dataclasses import dataclass, field
from typing import Any, Optional

from nemo_upcycle.pipeline.executors.ft import USUAL_GIB_S


@dataclass(kw_only=True)
class SiteSettings:
    """The GPUs, prices and disks of a site, and the settings that differ between stages.

    Args:
        card: kind of GPU, as `nemo-upcycle plan --gpu` names it, for --dryrun and for the performance settings.
        performance: name -> value that replaces the one in `conf/performance.yaml`; None removes a setting.
        price_per_gpu_hour: price, for --dryrun; None if it is not known.
        write_gib_s: speed at which all nodes together write to the file system of `dir`, for --dryrun.
        stages: stage -> the fields that differ there.
    """

    card: str = "h100"
    performance: dict[str, Any] = field(default_factory=dict)
    price_per_gpu_hour: Optional[float] = None  # noqa: UP045
    write_gib_s: float = USUAL_GIB_S
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
