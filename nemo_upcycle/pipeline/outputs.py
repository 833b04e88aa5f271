"""Find the results of finished stages: the files that identify them to other stages, and whether all files exist."""

from __future__ import annotations

from pathlib import Path

from nemo_upcycle.errors import StageError
from nemo_upcycle.models.wrapper import INDEX, SINGLE
from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.utils.files import read_json


def require_kept(folder: Path, run_dir: Path) -> None:
    """Check a model's folder for completeness if it is in the run's folder. This machine may not see other folders.

    Raises:
        UpcycleError: a file is missing.
    """
    if folder.is_relative_to(run_dir.resolve()) or folder.is_relative_to(run_dir):
        read_json(folder / "config.json")
        index = folder / INDEX
        files = set(read_json(index)["weight_map"].values()) if index.is_file() else {SINGLE}
        if gone := sorted(name for name in files if not (folder / name).is_file()):
            raise StageError(f"{folder / gone[0]}", kind="missing", got="does not exist", fix="run the stage again")


def weights_in(*folders: Path) -> list[Path]:
    """Return the weight files of models, which identify the models to the stages that read them."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the tensor files of a training's last checkpoint."""
    return sorted(last_checkpoint(folder).rglob("*.distcp"))
