"""The calibration file of a run. The first rank makes it in the stage's folder if the spec names no file."""

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
    """Add the calibration file to a spec, unless the spec needs none or already names one.

    The other ranks wait until the file exists, because no rank has a process group yet.

    Args:
        spec: how a training upcycles; None for a dense model.
        folder: folder of the stage that trains or checks.
        dense_folder: the dense parent.
        started: whether an existing file belongs to work that is resumed; if not, a file made with other settings is
            replaced.

    Raises:
        UpcycleError: the file cannot be made.
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
    """Copy a stage's calibration file, if there is one, into another stage's folder, on the first rank only.

    Args:
        source: folder of the stage that made the file.
        target: folder of the stage that needs the file as well.
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
