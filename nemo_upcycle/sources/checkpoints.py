"""The checkpoints of a run in NeMo or Megatron-Bridge: which are complete, and which is the newest."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

from nemo_upcycle.errors import CheckpointError, StageStopped, UnfinishedError, UpcycleError
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint
from nemo_upcycle.utils.files import size_text, whole_file


#: Folder beside `checkpoints` whose content is never read again.
ASIDE = "checkpoints_aside"
#: While NeMo writes a checkpoint, an empty file with the checkpoint's name and this suffix lies beside it.
UNFINISHED = "-unfinished"
#: Suffix of the name of NeMo's last checkpoint.
LAST = "-last"
_STEP = re.compile(r"step=(\d+)|^iter_(\d+)$")
#: File in which Megatron-LM and Bridge write the number of the last checkpoint that all ranks have finished.
_TRACKER = "latest_checkpointed_iteration.txt"
#: File of Bridge with the counters of a training, in each checkpoint and, with the prefix `latest_`, beside them.
_TRAIN_STATE = "train_state.pt"
#: While the first checkpoint is written, its size is unknown. The disk then counts as full if it has less free space
#: than this (bytes).
_LITTLE_BYTES = 16 * 2**20


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a name like `model_name=0--step=5-last` or `iter_0000005`, or None if it has none."""
    found = _STEP.search(checkpoint.name)
    return int(found[1] or found[2]) if found else None


def steps_in(checkpoint: Path) -> int:
    """Return the number of steps in a checkpoint, or 0 if its name has no step.

    NeMo numbers the last step from 0, Bridge from 1.

    Example:
        >>> steps_in(Path("model_name=0--step=5-last")), steps_in(Path("iter_0000005"))
        (6, 5)
    """
    step = step_of(checkpoint)
    return 0 if step is None else step + (not checkpoint.name.startswith("iter_"))


def is_marked(checkpoint: Path) -> bool:
    """Return whether NeMo marked a checkpoint as being written or removed."""
    return checkpoint.with_name(checkpoint.name + UNFINISHED).exists()


def was_saved(checkpoint: Path) -> bool:
    """Return whether a checkpoint was once saved completely. Its metadata is written last."""
    return (checkpoint / "weights" / ".metadata").is_file()


def is_complete_checkpoint(checkpoint: Path) -> bool:
    """Return whether a folder is a finished checkpoint with every file that its metadata names, in full size.

    The marker alone is not enough: with asynchronous saving, NeMo deletes the marker before it removes an old
    checkpoint.
    """
    weights = checkpoint / "weights"
    if checkpoint.name.startswith("iter_"):
        weights = checkpoint
        if not (weights / ".metadata").is_file() or (step_of(checkpoint) or 0) > last_finished(checkpoint.parent):
            return False
    elif is_marked(checkpoint) or not was_saved(checkpoint) or not (weights / "common.pt").is_file():
        return False
    try:
        with DistributedCheckpoint(weights):
            return True
    except (CheckpointError, OSError):  # OSError: the checkpoint is removed while it is read
        return False


def last_finished(folder: Path) -> int:
    """Return the number of the last checkpoint that Megatron-LM or Bridge finished in a folder, or -1 without one."""
    try:
        return int((folder / _TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return -1


def by_step(folder: Path) -> list[Path]:
    """Return the checkpoints in a `checkpoints` folder, complete or not, sorted by step.

    Among checkpoints of one step, `-last` comes last.
    """
    found = [path for path in folder.glob("*") if path.is_dir()]
    return sorted(found, key=lambda path: (-1 if (step := step_of(path)) is None else step, path.name))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a `checkpoints` folder, sorted by step.

    Example:
        >>> complete_checkpoints(Path("runs/mine/pretrain/checkpoints"))  # doctest: +SKIP
        [PosixPath('runs/mine/pretrain/checkpoints/model_name=0--step=5-last')]
    """
    return [path for path in by_step(folder) if is_complete_checkpoint(path)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step in a `checkpoints` folder, or None if there is none."""
    return next(filter(is_complete_checkpoint, reversed(by_step(folder))), None)


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint to the folder `checkpoints_aside` under a new name, and return its new place.

    Example:
        >>> set_aside(Path("runs/mine/pretrain/checkpoints/iter_0000005"))  # doctest: +SKIP
        PosixPath('runs/mine/pretrain/checkpoints_aside/iter_0000005')
    """
    aside = checkpoint.parent.parent / ASIDE / checkpoint.name
    aside.parent.mkdir(exist_ok=True)
    number = 0
    while aside.exists():
        number += 1
        aside = aside.with_name(f"{checkpoint.name}.{number}")
    checkpoint.rename(aside)
    return aside


def make_last(checkpoint: Path) -> None:
    """Name a kept checkpoint as the last one of its run, as it was named when it was written.

    NeMo's last checkpoint has the suffix `-last`. Bridge writes the last checkpoint's number and training state beside
    the checkpoints.

    Args:
        checkpoint: complete checkpoint without later checkpoints beside it.
    """
    if not checkpoint.name.startswith("iter_"):
        if not checkpoint.name.endswith(LAST):
            checkpoint.rename(checkpoint.with_name(checkpoint.name + LAST))
        return
    with whole_file(checkpoint.with_name(f"latest_{_TRAIN_STATE}")) as aside:
        shutil.copyfile(checkpoint / _TRAIN_STATE, aside)
    with whole_file(checkpoint.with_name(_TRACKER)) as aside:
        aside.write_text(str(step_of(checkpoint)), encoding="utf-8")


def full_disk(error: BaseException, folder: Path) -> UnfinishedError | None:
    """Return the error to raise if a full disk ended a training run, or None if the run ended for another reason.

    Torch and Megatron hide a full disk behind other messages (`unexpected pos 704 vs 598`). Therefore the disk itself
    is checked, too. The disk counts as full if a checkpoint has been started and the disk has less free space than the
    checkpoint still needs.

    Args:
        error: exception that ended the run.
        folder: the run's `checkpoints` folder.

    Example:
        >>> full_disk(RuntimeError("unexpected pos"), Path("runs/mine/pretrain/checkpoints")) is None  # doctest: +SKIP
        True
    """
    if isinstance(error, SystemExit | KeyboardInterrupt | StageStopped | UpcycleError):
        return None  # the run was told to end, or the error already says why
    kept, found = newest_checkpoint(folder), by_step(folder)
    begun = found[found.index(kept) + 1 :] if kept else found
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free, written, size = shutil.disk_usage(there).free, sum(map(_size, begun)), _size(kept) if kept else 0
    lacks = (size - written if kept else _LITTLE_BYTES) - free
    told = _told_full(error)
    if not told and not (begun and lacks > 0):
        return None
    room = f"{size_text(free)} free ({told})" if told else f"{size_text(free)} free"
    half = f", beside {size_text(written)} of a half-written checkpoint" if begun else ""
    needed = size_text(size) if kept else f"more than {size_text(written)}"
    free_text = f"free at least {size_text(lacks)} there" if kept and lacks > 0 else "free some space there"
    goes_on = f"resumes from {kept}" if kept else "starts again, because no checkpoint is finished yet"
    return UnfinishedError(
        f"The disk of {folder}",
        kind="state",
        got=f"has {room}{half}; a checkpoint needs {needed}",
        fix=f"{free_text}, and run the same command again, which {goes_on}",
    )


def _told_full(error: BaseException | None) -> str | None:
    """Return the operating system's message if a full disk or quota caused an error, or None."""
    while error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error.strerror
        error = error.__cause__ or error.__context__
    return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
