"""The calibration file of a run: made in the folder of the stage by the first rank, where the spec names none."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from nemo_upcycle.init.calibration_file import NAME
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import whole_file
from nemo_upcycle.utils.ranks import is_first_rank


_POLL_S = 0.5


def with_calibration(
    spec: UpcycleSpec | None, folder: Path, dense_folder: Path, *, started: bool = True
) -> UpcycleSpec | None:
    """Give a spec its calibration file; it stays as it is where it needs none, or names one.

    The other ranks wait for the first: none of them has a process group yet.

    Args:
        spec: how a training upcycles; None for a dense model.
        folder: folder of the stage that trains, or checks.
        dense_folder: the dense parent.
        started: whether a file that is there is of work that goes on; else it is made anew if it is of other settings.

    Raises:
        UpcycleError: it cannot be made.
    """
    if spec is None or not spec.needs_calibration or spec.calibration:
        return spec
    file = folder / NAME
    if is_first_rank() and not (started and file.is_file()):
        _make(spec, file, dense_folder)
    while not file.is_file():
        time.sleep(_POLL_S)
    return replace(spec, calibration=str(file))


def take_calibration(source: Path, target: Path) -> None:
    """Copy the file that a stage has made, if it has, into the folder of another; the first rank does.

    Args:
        source: folder of the stage that made it.
        target: folder of the stage that needs it as well.
    """
    if is_first_rank() and (source / NAME).is_file():
        target.mkdir(parents=True, exist_ok=True)
        with whole_file(target / NAME) as aside:
            shutil.copyfile(source / NAME, aside)


def _make(spec: UpcycleSpec, file: Path, dense_folder: Path) -> None:
    from nemo_upcycle.data.calibration_sample import calibration_sample
    from nemo_upcycle.online.calibration import calibrate
    from nemo_upcycle.sources.resolve import open_dense

    with open_dense(dense_folder) as dense:
        calibrate(dense, file, spec, calibration_sample(spec, dense_folder), replace=True)
