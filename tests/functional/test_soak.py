"""The short form of `make soak`: a dozen kills, half of them aimed; every run ends as an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional.soak import TRAININGS, soak_training


pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.mark.parametrize(("ranks", "asynchronous"), TRAININGS)
def test_killed_training_resumes_and_ends_bit_equal(tmp_path: Path, ranks: int, asynchronous: bool) -> None:
    seen = soak_training(tmp_path, 4, ranks=ranks, asynchronous=asynchronous)
    assert sum(seen.values()) == 4
