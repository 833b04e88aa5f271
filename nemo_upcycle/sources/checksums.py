"""Checksums of a checkpoint's files, which find a flipped bit before a run resumes from it.

Each rank hashes the files that it has written, as soon as the checkpoint is complete: `checksums/RANK.json` in the
checkpoint, with the sha256 of each file. A checkpoint without checksums, of an earlier release, is not checked.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.checkpoints import by_step, is_complete_checkpoint
from nemo_upcycle.utils.files import read_json, sha256_file, write_json
from nemo_upcycle.utils.progress import track


logger = logging.getLogger(__name__)
#: Folder in a checkpoint with one file of checksums per rank.
FOLDER = "checksums"
#: Name of a file with tensors: its first number is the rank that wrote it.
_OF_RANK = re.compile(r"__(\d+)_\d+\.distcp")
#: Number of files to hash in parallel; `hashlib` lets other threads run.
_THREADS = min(16, os.cpu_count() or 1)


def write_checksums(checkpoint: Path, rank: int) -> None:
    """Write the checksums of the files that a rank has written. The first rank also hashes the files without a rank.

    Args:
        checkpoint: complete checkpoint of NeMo or Bridge.
        rank: rank in the job.
    """
    weights = _weights(checkpoint)
    sums = {
        path.name: sha256_file(path)
        for path in sorted(weights.iterdir())
        if path.is_file() and (int(found[1]) if (found := _OF_RANK.fullmatch(path.name)) else 0) == rank
    }
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    write_json(checkpoint / FOLDER / f"{rank}.json", sums)


def wrong_files(checkpoint: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Return the names of the files whose content is not what was written; empty without checksums.

    Args:
        checkpoint: complete checkpoint.
        rank: number of the caller, which checks one file in `ranks`.
        ranks: number of callers.

    Raises:
        UpcycleError: a file of checksums is damaged.
    """
    sums: dict[str, str] = {}
    for path in sorted((checkpoint / FOLDER).glob("*.json")):
        sums |= read_json(path)
    weights, mine = _weights(checkpoint), sorted(sums)[rank::ranks]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: sha256_file(weights / name), mine)
        shown = track(found, f"check {checkpoint.name}", len(mine)) if rank == 0 and mine else found
        return [name for name, digest in zip(mine, shown, strict=True) if digest != sums[name]]


def trusted_checkpoint(
    folder: Path,
    set_aside: Callable[[Path], Path],
    *,
    rank: int = 0,
    ranks: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> Path | None:
    """Return the complete checkpoint with the highest step whose files are as written; None if there is no checkpoint.

    Only the first rank lists the folder, because other ranks may see another state of it.

    Args:
        folder: `checkpoints` folder of a run.
        set_aside: function that moves a damaged checkpoint away, and returns its new place.
        rank: this rank.
        ranks: number of ranks that call this function together; each rank checks a part of the files.
        gather: function that returns the values of all these ranks.

    Raises:
        CheckpointError: every complete checkpoint is damaged.
    """
    names = [path.name for path in reversed(by_step(folder)) if rank == 0 and is_complete_checkpoint(path)]
    damaged: list[Path] = []
    for name in gather(names)[0]:
        checkpoint = folder / str(name)
        wrong = sorted({file for part in gather(wrong_files(checkpoint, rank, ranks)) for file in part})
        if not wrong:
            for one in damaged if rank == 0 else ():
                logger.warning("%s is damaged and was moved to %s", one, set_aside(one))
            return checkpoint
        logger.warning("%s: %s differs from what was written", checkpoint, ", ".join(wrong))
        damaged.append(checkpoint)
    if damaged:
        raise CheckpointError(
            f"Checkpoint {damaged[0]}",
            kind="state",
            got="is damaged, and so is every earlier one",
            fix=f"restore its files, or move {folder} away to start from the dense checkpoint again",
        )
    return None


def _weights(checkpoint: Path) -> Path:
    """Return the folder with the files of a checkpoint: NeMo's has a folder `weights`, Bridge's has not."""
    return checkpoint / "weights" if (checkpoint / "weights").is_dir() else checkpoint
