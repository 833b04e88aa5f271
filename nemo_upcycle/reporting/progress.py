"""The progress of a run, read from its folder: the state of each stage, and the trainings' numbers so far."""

from __future__ import annotations

import json
import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.reporting.run_folder import Curve, read_markers, read_training
from nemo_upcycle.utils.files import ENDED, STARTED, read_json, read_text
from nemo_upcycle.utils.progress import duration


#: The stages that train.
TRAININGS = ("pretrain", "dense_ct")
#: The last stage, which writes the report itself.
LAST = "report"
#: Number of last steps over which the speed is averaged, and bytes at the end of a file that contain these steps.
_RECENT, _TAIL_BYTES = 20, 1 << 20


@dataclass(frozen=True)
class StageState:
    """The state of a stage.

    Attributes:
        name: name of the stage.
        how: `running`, `done`, `stopped` (it can resume) or `failed`. A killed stage still counts as `running`,
            because its files do not show the kill.
        seconds: wall time, up to now for a running stage (seconds); None if it is not known.
        begun_s: time of the start (seconds since the epoch).
    """

    name: str
    how: str
    seconds: float | None
    begun_s: float


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        plan: content of `pipeline.json`.
        stages: started stages, in order.
        receipt: content of `receipt.json`, from the check of step 0; None before that check.
        curves: stage -> curve, for trainings that have completed a step.
        settings: stage -> content of `training.json`, for the same trainings.
    """

    plan: dict[str, Any]
    stages: tuple[StageState, ...]
    receipt: dict[str, Any] | None
    curves: dict[str, Curve]
    settings: dict[str, dict[str, Any]]

    @property
    def is_over(self) -> bool:
        """Whether the final report exists or is being written."""
        return bool(self.stages) and self.stages[-1].name == LAST and self.stages[-1].how in ("done", "running")


def read_progress(folder: Path) -> Progress:
    """Read the progress of a run from its folder.

    Raises:
        UpcycleError: the run's plan is missing or damaged.
    """
    receipt, curves = None, {}
    with suppress(UpcycleError):  # there is no receipt yet
        receipt = read_json(folder / "receipt.json")
    for stage in TRAININGS:
        with suppress(UpcycleError):  # there is no step yet, or its line is being written
            curves[stage] = read_training(folder / stage)
    settings = {stage: read_json(folder / stage / "training.json") for stage in curves}
    return Progress(read_json(folder / "pipeline.json"), stage_states(folder), receipt, curves, settings)


def stage_states(folder: Path) -> tuple[StageState, ...]:
    """List the stages of a run in the order of their starts, without finished stages that will run again."""
    markers = read_markers(folder)
    begun = {path.parent.name: path.stat().st_mtime for path in folder.glob(f"*/{STARTED}")}
    under_way = {f"stage {name}" for name in begun if name not in markers}
    states = []
    for name, begun_s in begun.items():
        marker, ended = markers.get(name), folder / name / ENDED
        if marker is None:
            how = read_text(ended).strip() if ended.is_file() else "running"
            until_s = time.time() if how == "running" else ended.stat().st_mtime
            states.append(StageState(name, how, until_s - begun_s, begun_s))
        elif under_way.isdisjoint(marker.get("inputs", {})):
            states.append(StageState(name, "done", marker.get("seconds"), begun_s))
    return tuple(sorted(states, key=lambda state: state.begun_s))


def steps_left_s(steps: list[dict[str, Any]], max_steps: int) -> float:
    """Estimate the seconds for the remaining steps from the speed of the last steps."""
    return statistics.fmean(line["seconds"] for line in steps[-_RECENT:]) * (max_steps - steps[-1]["step"])


def training_line(folder: Path, since_s: float = 0) -> str:
    """Describe the progress of a training in one line; return "" before its first step.

    Args:
        folder: folder of the stage, with `metrics.jsonl` and `training.json`.
        since_s: time of the start (seconds since the epoch); metrics from an earlier start are ignored.
    """
    try:
        if (folder / "metrics.jsonl").stat().st_mtime < since_s:
            return ""
        settings = read_json(folder / "training.json")
        lines = _ends(folder / "metrics.jsonl")
    except (OSError, UpcycleError):
        return ""
    steps = [line for line in lines if line.get("loss") is not None]
    if not steps:
        return ""
    last, most = steps[-1], settings["max_steps"]
    left = duration(steps_left_s(steps, most))
    scored = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    at_first = f", {scored[0]:.3f} at first" if "validation_loss" in lines[0] else ""
    validation = f"  validation {scored[-1]:.3f}{at_first}" if scored else ""
    rate = f"{last['tokens_per_s']:,.0f} tokens/s"
    return f"step {last['step']:,}/{most:,}  left {left}  loss {last['loss']:.3f}  {rate}{validation}"


def _ends(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in the first line and the last lines of a file, which may be long."""
    with path.open("rb") as handle:
        first = handle.readline()
        handle.seek(max(len(first), os.fstat(handle.fileno()).st_size - _TAIL_BYTES))
        lines = [first, *handle.read().splitlines()]
    found = []
    for line in lines:
        with suppress(ValueError):  # reading starts inside a line, and the last line may be half written
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]
