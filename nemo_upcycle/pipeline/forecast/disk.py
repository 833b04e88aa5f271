"""Forecast the disk space that a run needs, stage by stage, and compare it with the free space."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.pipeline.disk_use import DiskUse
from nemo_upcycle.pipeline.forecast.stages import StageForecast
from nemo_upcycle.pipeline.forecast.training import TrainingForecast
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.sources.checkpoints import complete_checkpoints
from nemo_upcycle.utils.files import resolved


@dataclass(frozen=True)
class DiskForecast:
    """The disk space of a run.

    Args:
        folder: the run's folder, or the nearest existing folder above it.
        free_bytes: free bytes on this folder's disk; None if this machine does not see the disk.
        uses: disk use of the stages, in their order.
        at_once: stages that may write at the same time.
    """

    folder: Path
    free_bytes: int | None
    uses: tuple[DiskUse, ...]
    at_once: frozenset[str] = frozenset()

    @property
    def needed_bytes(self) -> int:
        """Largest number of bytes that the run adds to the disk at one moment, without parts of unknown size."""
        kept = most = 0
        for number, use in enumerate(self.uses):
            beside = (other for other in self.uses[number + 1 :] if {use.stage, other.stage} <= self.at_once)
            most = max(most, kept + use.new_peak_bytes + sum(other.new_peak_bytes for other in beside))
            kept += use.new_kept_bytes
        return max(most, kept)

    @property
    def fits(self) -> bool:
        """Whether the known disk use fits into the free space."""
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


def forecast_disk(
    run_dir: Path,
    plan: RunPlan,
    stages: Sequence[StageForecast],
    models: Mapping[str, Architecture | None],
    trainings: Mapping[str, TrainingForecast],
    *,
    is_parallel: bool,
    is_here: bool = True,
) -> DiskForecast:
    """Add up the disk space that the stages of a run need in its folder.

    Args:
        run_dir: the run's folder; need not exist.
        plan: plan of the run.
        stages: forecasts of the stages.
        models: architecture of the model of each training, by stage; None if the architecture is unknown until the
            parent is fetched.
        trainings: forecast of each training among the stages, by stage.
        is_parallel: whether both trainings may run at the same time.
        is_here: whether the stages run on this machine; a cluster's folder may lie on storage that is not mounted
            here.
    """
    uses: list[DiskUse] = []
    for stage in (stage for stage in stages if stage.runs):
        if stage.name in models:
            uses.append(_checkpoints_use(stage.name, trainings.get(stage.name)))
        elif list_uses := plan.stage(stage.name).disk:
            uses += list_uses(run_dir, plan, models)
    folder = next(path for path in (resolved(run_dir), *resolved(run_dir).parents) if path.exists())
    at_once = frozenset(trainings) if is_parallel else frozenset()
    is_seen = is_here or folder != Path(folder.anchor)
    return DiskForecast(folder, shutil.disk_usage(folder).free if is_seen else None, tuple(uses), at_once)


def _checkpoints_use(stage: str, training: TrainingForecast | None) -> DiskUse:
    what = f"checkpoints of {stage}"
    if training is None:
        return DiskUse(stage, what, 0, 0, unknown=what)
    size_bytes = training.facts.checkpoint_bytes
    newest = training.stage.finding.checkpoint
    present = len(complete_checkpoints(newest.parent)) if newest else 0
    at_once = max(training.checkpoints_at_once, present + (training.steps_left > 0))  # a save comes before a deletion
    return DiskUse(stage, what, training.checkpoints_kept * size_bytes, at_once * size_bytes, present * size_bytes)
