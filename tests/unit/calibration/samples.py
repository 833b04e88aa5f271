"""Samples of random tokens, and calibration files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.calibration.collect import CalibrationReport, Sample, calibrate


def random_sample(vocab_size: int, lengths: tuple[int, ...] = (64,) * 9, labels: tuple[int, ...] = ()) -> Sample:
    """Return batches of one sequence each, of these lengths."""
    generator = torch.Generator().manual_seed(11)
    batches = tuple(torch.randint(vocab_size, (1, length), generator=generator) for length in lengths)
    return Sample(batches, labels or (0,) * len(lengths), {"random": list(lengths)})


def calibrated(dense: Path, file: Path, sample: Sample | None = None, **fields: Any) -> UpcycleSpec:
    """Return a spec with the calibration file that is made for it."""
    spec = UpcycleSpec(**fields)
    made(dense, file, spec, sample)
    return UpcycleSpec(**fields, calibration=str(file))


def made(
    dense: Path, file: Path, spec: UpcycleSpec, sample: Sample | None = None, **options: Any
) -> CalibrationReport:
    """Make the calibration file of a spec."""
    with open_dense(dense) as source:
        return calibrate(source, file, spec, sample or random_sample(source.architecture.vocab_size), **options)
