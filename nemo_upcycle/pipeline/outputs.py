"""Find the results of finished stages: the files that identify them to other stages, and whether all are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.errors import StageError
from nemo_upcycle.models.wrapper import INDEX, SINGLE
from nemo_upcycle.pipeline.markers import STARTED
from nemo_upcycle.pipeline.plan import WorkPlan
from nemo_upcycle.sources.checkpoints import steps_in
from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.utils.files import read_json


def require_kept(folder: Path, run_dir: Path) -> None:
    """Check that a folder of a model is whole, if it lies in a run's folder: of another, this machine may not know.

    Raises:
        UpcycleError: it is gone.
    """
    if folder.is_relative_to(run_dir.resolve()) or folder.is_relative_to(run_dir):
        read_json(folder / "config.json")
        index = folder / INDEX
        files = set(read_json(index)["weight_map"].values()) if index.is_file() else {SINGLE}
        if gone := sorted(name for name in files if not (folder / name).is_file()):
            raise StageError(f"{folder / gone[0]}", got="no such file", expected="weights", fix="run the stage again")


def weights_in(*folders: Path) -> list[Path]:
    """Return the files that identify models to the stages that read them: those with the weights."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files with the tensors of the last checkpoint of a training."""
    return sorted(last_checkpoint(folder).rglob("*.distcp"))


def require_newer(path: Path, run_dir: Path, stage: str) -> None:
    """Check that a stage wrote a file after its last start, and not at an earlier one.

    Raises:
        StageError: the file is missing or older.
    """
    if not path.is_file() or path.stat().st_mtime_ns < (run_dir / stage / STARTED).stat().st_mtime_ns:
        raise StageError(str(path), got="of an earlier start", expected="of the last one", fix="run the stage again")


def whole_training(run_dir: Path, plan: WorkPlan, stage: str) -> dict[str, Any]:
    """Make the report of a training's marker from its last checkpoint.

    Raises:
        StageError: it has not taken all of its steps, or only its recipe knows how many.
    """
    checkpoint, wanted = last_checkpoint(run_dir / stage), plan.training_settings(stage).steps
    if not 0 < wanted <= steps_in(checkpoint):
        raise StageError(str(checkpoint), got="an earlier step", expected=f"step {wanted}", fix="run the stage again")
    return {"checkpoint": str(checkpoint)}
