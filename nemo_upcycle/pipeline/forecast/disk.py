"""What a run needs of a disk, stage by stage, against what is free there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.finished import BUILD, TOKENS
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.pipeline.forecast.stages import StageForecast
from nemo_upcycle.pipeline.forecast.training import TrainingForecast
from nemo_upcycle.pipeline.stages import RunPlan, data_folder_of
from nemo_upcycle.sources.checkpoints import complete_checkpoints
from nemo_upcycle.utils.files import resolved


#: Folders of models are in BF16, as the dense parents and the exports are.
_MODEL_BYTES = 2
#: Above this a token of the data takes four bytes, else two.
_TWO_BYTE_TOKENS = 65_536


@dataclass(frozen=True)
class DiskUse:
    """What one stage writes into the run's folder.

    Args:
        stage: its name.
        what: what it is.
        kept_bytes: of it stay, as far as known.
        peak_bytes: lie there while it is written.
        present_bytes: lie there already and count as neither.
        unknown: the part of it whose size is not known.
    """

    stage: str
    what: str
    kept_bytes: int
    peak_bytes: int
    present_bytes: int = 0
    unknown: str = ""

    @property
    def new_kept_bytes(self) -> int:
        """Bytes that stay and are not there yet."""
        return max(0, self.kept_bytes - self.present_bytes)

    @property
    def new_peak_bytes(self) -> int:
        """Bytes that lie there while it is written and are not there yet."""
        return max(0, self.peak_bytes - self.present_bytes)


@dataclass(frozen=True)
class DiskForecast:
    """The disk of a run.

    Args:
        folder: the run's folder, or the nearest one above it that exists.
        free_bytes: free there.
        uses: what the stages write, in their order.
        at_once: stages whose uses may fall together.
    """

    folder: Path
    free_bytes: int
    uses: tuple[DiskUse, ...]
    at_once: frozenset[str] = frozenset()

    @property
    def needed_bytes(self) -> int:
        """The most that the run adds to the disk at one moment, as far as known."""
        kept = most = 0
        for number, use in enumerate(self.uses):
            beside = (other for other in self.uses[number + 1 :] if {use.stage, other.stage} <= self.at_once)
            most = max(most, kept + use.new_peak_bytes + sum(other.new_peak_bytes for other in beside))
            kept += use.new_kept_bytes
        return max(most, kept)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What has no known size."""
        return tuple(use.unknown for use in self.uses if use.unknown)

    @property
    def fits(self) -> bool:
        """Whether what is known fits."""
        return self.needed_bytes <= self.free_bytes


def forecast_disk(
    run_dir: Path,
    plan: RunPlan,
    stages: Sequence[StageForecast],
    models: Mapping[str, Architecture | None],
    trainings: Mapping[str, TrainingForecast],
    *,
    is_parallel: bool,
) -> DiskForecast:
    """Return what the stages that run need of the disk of a run's folder.

    Args:
        run_dir: the run's folder; need not exist.
        plan: what the stages are given.
        stages: what happens to each.
        models: architectures of the two trainings, by stage; None: not known before the parent is fetched.
        trainings: those of them that are among the stages.
        is_parallel: whether both trainings may run at the same time.
    """
    moe = models["pretrain"]
    uses: list[DiskUse] = []
    for stage in stages:
        if not stage.runs:
            continue
        if stage.name == "import" and plan.dense.startswith("asset://"):  # others stay where they are
            uses.append(_model_use(stage.name, "dense parent", moe and _dense_params(moe)))
        elif stage.name == "data" and not Path(plan.data).is_dir():
            uses.append(_data_use(plan.data, moe, data_folder_of(run_dir, plan)))
        elif stage.name == "upcycle":
            uses.append(_model_use(stage.name, "model of step 0", moe and moe.total_params))
        elif stage.name in models:
            uses.append(_checkpoints_use(stage.name, trainings.get(stage.name)))
        elif stage.name == "export":
            uses += [
                _model_use(stage.name, f"exported model of {name}", model and model.total_params)
                for name, model in models.items()
            ]
    folder = next(path for path in (resolved(run_dir), *resolved(run_dir).parents) if path.exists())
    at_once = frozenset(trainings) if is_parallel else frozenset()
    return DiskForecast(folder, shutil.disk_usage(folder).free, tuple(uses), at_once)


def _model_use(stage: str, what: str, params: int | None) -> DiskUse:
    if params is None:
        return DiskUse(stage, what, 0, 0, unknown=what)
    return DiskUse(stage, what, _MODEL_BYTES * params, _MODEL_BYTES * params)


def _dense_params(arch: Architecture) -> int:
    return replace(arch, num_experts=None, moe_pattern=None, shared_ffn_size=0).total_params


def _checkpoints_use(stage: str, training: TrainingForecast | None) -> DiskUse:
    what = f"checkpoints of {stage}"
    if training is None:
        return DiskUse(stage, what, 0, 0, unknown=what)
    size_bytes = training.facts.checkpoint_bytes
    newest = training.stage.finding.checkpoint
    present = len(complete_checkpoints(newest.parent)) if newest else 0
    at_once = max(training.checkpoints_at_once, present + (training.steps_left > 0))  # a new one, then old ones go
    return DiskUse(
        stage,
        what,
        training.checkpoints_kept * size_bytes,
        at_once * size_bytes,
        present * size_bytes,
    )


def _data_use(data: str, arch: Architecture | None, folder: Path) -> DiskUse:
    """Return what a blend takes at most, which is known of the sources that are sampled to a number of tokens.

    Its tokens are merged from parts, and both lie there until it is finished.
    """
    sources = read_blend(data).config.sources
    token_bytes = 2 if arch and arch.vocab_size <= _TWO_BYTE_TOKENS else 4
    kept_bytes = round(sum(source.tokens or 0 for source in sources.values()) * token_bytes)
    open_ended = [name for name, source in sources.items() if source.tokens is None]
    unknown = f"data of {', '.join(open_ended)}" if open_ended else ""
    present_bytes = _size_bytes(folder / BUILD / TOKENS) + _size_bytes(folder / TOKENS)
    return DiskUse("data", "tokens, at most", kept_bytes, 2 * kept_bytes, present_bytes, unknown)


def _size_bytes(folder: Path) -> int:
    """Return the size of the files of a folder, which a job may remove meanwhile; 0 without one."""
    total_bytes = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total_bytes += path.stat().st_size
    return total_bytes
