"""A learning rate for random weights is told."""

from __future__ import annotations

import pytest

from nemo_upcycle.trainers import paper
from nemo_upcycle.trainers.paper import high_rate


@pytest.mark.parametrize("peak", [None, 0.0, paper.PEAK, paper.HIGH])
def test_nothing_is_said_of_other_learning_rates(peak: float | None) -> None:
    assert high_rate(peak) == ""


def test_a_high_learning_rate_is_said_with_the_papers() -> None:
    said = high_rate(3e-4)
    assert "0.0003" in said
    assert "3e-05" in said
