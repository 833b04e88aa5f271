"""Arms of a grid compared; every expected number is computed by hand in the comment beside it."""

from __future__ import annotations

import math

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.arms import better_from, bits_per_byte, difference_of_arms, document_sums, mean_of_seeds


BIT = math.log(2)  # nats


def documents(*bits: float) -> dict[str, tuple[float, float]]:
    """Documents of 100 bytes each that take so many bits a byte."""
    return {f"document {number}": (-100 * BIT * value, 100) for number, value in enumerate(bits)}


def test_windows_are_added_up_to_documents() -> None:
    items = [
        {"cluster": "a", "scores": {"bits_per_byte": [-1.0, 10]}},
        {"cluster": "b", "scores": {"bits_per_byte": [-4.0, 20]}},
        {"cluster": "a", "scores": {"bits_per_byte": [-2.0, 5]}},
    ]
    assert document_sums({"items": {"text": items}}, "text") == {"a": (-3.0, 15), "b": (-4.0, 20)}
    with pytest.raises(UpcycleError, match="Did you mean 'text'"):
        document_sums({"items": {"text": items}}, "texts")


def test_the_mean_of_seeds() -> None:
    # 1.0 and 1.2: mean 1.1, standard deviation 0.1414, over the root of 2: 0.1
    value, stderr = mean_of_seeds([documents(0.9, 1.1), documents(1.2, 1.2)])
    assert (value, stderr) == (pytest.approx(1.1), pytest.approx(0.1))
    assert mean_of_seeds([documents(1.0)]) == (pytest.approx(1.0), None)
    assert bits_per_byte(documents(1.0, 3.0)) == pytest.approx(2.0)


def test_documents_and_seeds_make_a_difference_uncertain() -> None:
    # Seed 1 gains 0.2 and 0.0 on its two documents, seed 2 0.4 and 0.2: 0.1 and 0.3, so 0.2 +- 0.1 over seeds.
    # Mean over seeds 0.3 and 0.1: without one document 0.1, without the other 0.3; jackknife 0.1.
    found = difference_of_arms([documents(0.8, 1.0), documents(0.6, 0.8)], [documents(1.0, 1.0)] * 2)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["seeds"] == pytest.approx([-0.1, -0.3])
    assert found["stderr_seeds"] == pytest.approx(0.1)
    assert found["stderr_documents"] == pytest.approx(0.1)
    assert found["stderr"] == pytest.approx(math.sqrt(0.02))
    assert found["verdict"] == "tie"  # 0.2 is less than twice 0.141


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "better"), (-0.1, "worse"), (0.0, "tie")])
def test_a_difference_beyond_twice_its_error_has_a_direction(gain: float, verdict: str) -> None:
    spread = [(0.001, -0.001, 0.002), (0.0, 0.001, -0.001)]
    arm = [documents(*(1.0 - gain + noise for noise in noises)) for noises in spread]
    assert difference_of_arms(arm, [documents(1.0, 1.0, 1.0)] * 2)["verdict"] == verdict


def test_other_documents_are_refused() -> None:
    with pytest.raises(UpcycleError, match="train both in one grid"):
        difference_of_arms([documents(1.0, 1.0)], [documents(1.0)])


def test_better_from_is_where_it_stays_better() -> None:
    def verdicts(*names: str) -> dict[int, dict[str, str]]:
        return {100 * number: {"verdict": name} for number, name in enumerate(names)}

    assert better_from(verdicts("tie", "better", "tie", "better", "better")) == 300
    assert better_from(verdicts("better", "better", "worse")) is None
    assert better_from(verdicts("better")) == 0
