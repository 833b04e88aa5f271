"""Only complete checkpoints of a run count, not the parts that a kill or a removal left.

torch's writer makes the checkpoints of these tests.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from nemo_upcycle.errors import SpecError
from nemo_upcycle.sources.checkpoints import complete_checkpoints, full_disk, newest_checkpoint, step_of


def write(folder: Path, step: int, ending: str = "-last") -> Path:
    """Write a small complete checkpoint under NeMo's name for it."""
    checkpoint = folder / f"model_name=0--step={step}{ending}"
    weights = checkpoint / "weights"
    weights.mkdir(parents=True)
    dcp.save({"module.weight": torch.arange(6.0)}, checkpoint_id=str(weights), no_dist=True)
    torch.save({}, weights / "common.pt")
    return checkpoint


def test_the_highest_step_is_the_newest_whatever_the_clock_says(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    late, early = write(tmp_path, 11), write(tmp_path, 9)  # the lower step was written last
    write(tmp_path, 11, ending="")  # `-last` is chosen, not the numbered checkpoint
    assert newest_checkpoint(tmp_path) == late
    assert complete_checkpoints(tmp_path)[0] == early
    assert step_of(Path("model_name=0--val_loss=1.25-step=12-consumed_samples=48.0-last")) == 12
    assert step_of(Path("model-last")) is None


def _mark(checkpoint: Path) -> None:
    checkpoint.with_name(checkpoint.name + "-unfinished").touch()


def _cut(checkpoint: Path) -> None:
    data = next((checkpoint / "weights").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        _mark,
        _cut,
        lambda checkpoint: (checkpoint / "weights" / ".metadata").unlink(),
        lambda checkpoint: (checkpoint / "weights" / "common.pt").unlink(),
        lambda checkpoint: next((checkpoint / "weights").glob("*.distcp")).unlink(),
        lambda checkpoint: shutil.rmtree(checkpoint / "weights"),
    ],
    ids=["marked", "data cut short", "no metadata", "no common.pt", "no data", "no weights"],
)
def test_what_a_kill_left_half_is_never_chosen(tmp_path: Path, damage: object) -> None:
    whole, half = write(tmp_path, 9), write(tmp_path, 11)
    assert newest_checkpoint(tmp_path) == half
    damage(half)  # type: ignore[operator]
    assert newest_checkpoint(tmp_path) == whole
    assert complete_checkpoints(tmp_path) == [whole]


def _fill_room_of(checkpoint: Path) -> None:
    """Make a checkpoint need twice the free space of its disk, without writing that much."""
    more = checkpoint / "more"
    more.touch()
    os.truncate(more, 2 * shutil.disk_usage(checkpoint).free)


def test_a_save_without_room_is_a_full_disk(tmp_path: Path) -> None:
    whole, half = write(tmp_path, 9), write(tmp_path, 11)
    _mark(half)
    anything = CheckpointException("write", {0: (RuntimeError("unexpected pos 704 vs 598"), None)})  # type: ignore
    assert full_disk(anything, tmp_path) is None
    _fill_room_of(whole)
    error = full_disk(anything, tmp_path)
    assert error is not None
    assert str(tmp_path) in error.subject
    assert error.fix.endswith(f"which resumes from {whole}")
    assert error.exit_status == 1
    for another in (SystemExit(75), KeyboardInterrupt(), SpecError("of a setting")):
        assert full_disk(another, tmp_path) is None, "it was told to end, or has said why"
    shutil.rmtree(half)
    assert full_disk(anything, tmp_path) is None, "nothing was being saved"


def test_a_full_disk_is_recognised_wherever_it_is_reported(tmp_path: Path) -> None:
    error = RuntimeError("of a library")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    found = full_disk(error, tmp_path / "checkpoints")
    assert found is not None
    assert " free (No space left on device); a checkpoint needs " in str(found)
    assert "no checkpoint is finished yet" in found.fix
    assert full_disk(OSError(errno.EACCES, "Permission denied"), tmp_path / "checkpoints") is None
