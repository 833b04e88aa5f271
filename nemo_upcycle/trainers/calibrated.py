"""The calibration file of a run: made in its folder by the first rank, where the spec names none."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from nemo_upcycle.init.calibration import NAME
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.ranks import is_first_rank


_POLL_S = 0.5


def with_calibration(
    spec: UpcycleSpec | None, file: Path | None, folder: Path, dense_folder: Path, data_folder: Path
) -> UpcycleSpec | None:
    """Return a spec with its calibration file; it stays as it is where it needs none, or names one.

    The other ranks wait for the first: none of them has a process group yet.

    Args:
        spec: of a training; None of a dense model's.
        file: what an earlier stage has made; None: it is made in the folder.
        folder: of the stage that trains, or checks.
        dense_folder: the dense parent.
        data_folder: a finished folder of `nemo-upcycle data`, of which a sample is taken.

    Raises:
        UpcycleError: it cannot be made.
    """
    if spec is None or not spec.needs_calibration or spec.calibration:
        return spec
    if file is None:
        file = folder / NAME
        if is_first_rank():
            _make(spec, file, dense_folder, data_folder)
        while not file.is_file():
            time.sleep(_POLL_S)
    return replace(spec, calibration=str(file))


def _make(spec: UpcycleSpec, file: Path, dense_folder: Path, data_folder: Path) -> None:
    from nemo_upcycle.calibration.collect import calibrate
    from nemo_upcycle.data.calibration_sample import calibration_sample
    from nemo_upcycle.sources import open_dense

    with open_dense(dense_folder) as dense:
        calibrate(dense, file, spec, calibration_sample(spec, dense_folder, data_folder), replace=True)
