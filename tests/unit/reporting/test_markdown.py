from __future__ import annotations

import doctest

import pytest

from nemo_upcycle.reporting import markdown
from nemo_upcycle.reporting.markdown import with_half


def test_the_examples_of_the_docstrings() -> None:
    assert doctest.testmod(markdown).attempted >= 5
    assert doctest.testmod(markdown).failed == 0


@pytest.mark.parametrize(("value", "half"), [(-0.1131, 0.1068), (0.1099, 0.1101), (1.0004e-7, 1.0001e-7), (4.0, 4.1)])
def test_a_verdict_can_be_read_from_the_printed_numbers(value: float, half: float) -> None:
    shown, its = map(float, with_half(value, half).split(" ± "))
    assert (abs(shown) > its) == (abs(value) > half)


def test_a_value_is_as_precise_as_its_interval() -> None:
    assert with_half(101.33, 16.45) == "101 ± 16"
    assert with_half(7.2e-9, 2.7e-8) == "7.2e-09 ± 2.7e-08"
    assert with_half(None, None) == "-"
