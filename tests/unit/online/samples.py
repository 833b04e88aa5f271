"""Samples of random tokens, and calibration files made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.online.calibration import CalibrationReport, Sample, calibrate


def random_sample(vocab_size: int, copies: int, seed: int = 11) -> Sample:
    """Draw two prompts for each copy; each prompt is one sequence."""
    generator = torch.Generator().manual_seed(seed)
    labels = tuple(number // 2 for number in range(2 * copies))
    batches = tuple(torch.randint(vocab_size, (1, 9 + number), generator=generator) for number in range(2 * copies))
    return Sample(batches, labels, {"random": seed})


def calibrated(dense: Path, file: Path, **fields: Any) -> UpcycleSpec:
    """Write the calibration file of a spec with router_init=prompts, and return the spec."""
    spec = UpcycleSpec(router_init="prompts", calibration=str(file), **fields)
    made(dense, file, spec)
    return spec


def made(dense: Path, file: Path, spec: UpcycleSpec, sample: Sample | None = None, **more: Any) -> CalibrationReport:
    """Write the calibration file of a spec."""
    with open_dense(dense) as source:
        sample = sample or random_sample(source.architecture.vocab_size, spec.copies)
        return calibrate(source, file, spec, sample, **more)
