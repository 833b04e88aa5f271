"""Paired differences between two models. A comment beside each expected number derives it by hand."""

from __future__ import annotations

import math

import pytest

from nemo_upcycle.evaluation.paired import paired_difference
from tests.unit.evaluation.test_compare import A, B, evaluation


def test_the_paired_difference_of_accuracies() -> None:
    # Differences 0 and 1: mean 0.5, standard deviation sqrt(0.5), standard error sqrt(0.5) / sqrt(2) = 0.5;
    # t(0.975, 1) = 12.7062
    found = paired_difference(A, B, "quiz/acc")
    assert (found["difference"], found["stderr"]) == pytest.approx((0.5, 0.5))
    assert (found["low"], found["high"]) == pytest.approx((0.5 - 0.5 * 12.7062, 0.5 + 0.5 * 12.7062), abs=1e-4)
    assert (found["items"], found["higher_is_better"], found["significant"]) == (2, True, False)
    assert paired_difference(A, B, "all/acc") == found  # a group has the items of all its tasks
    # two tests at once: t(0.9875, 1) = 25.452
    assert paired_difference(A, B, "quiz/acc", tests=2)["high"] == pytest.approx(0.5 + 0.5 * 25.452, abs=1e-3)


def test_the_paired_difference_of_perplexities() -> None:
    # A: exp(50 / 20), B: exp(44 / 20). Without one window: exp(2.4) - exp(3), or exp(2) - exp(2) = 0.
    found = paired_difference(A, B, "text/word_perplexity")
    first = math.exp(2.4) - math.exp(3)
    assert found["difference"] == pytest.approx(math.exp(2.2) - math.exp(2.5))
    assert found["stderr"] == pytest.approx(abs(first) / 2)  # sqrt(1/2 * 2 * (first / 2)^2)
    assert paired_difference(A, B, "text/bits_per_byte")["difference"] == pytest.approx(-6 / 100 / math.log(2))


def test_a_difference_beyond_twice_its_error_is_significant() -> None:
    texts = [-20.0, -30.0, -25.0, -22.0]
    one = evaluation("one", [], [], texts)
    better = evaluation("better", [], [], [value + 2.0 + 0.01 * number for number, value in enumerate(texts)])
    assert paired_difference(one, better, "text/bits_per_byte")["significant"] is True


@pytest.mark.parametrize("metric", ["quiz/acc", "text/bits_per_byte"])
def test_the_same_scores_on_every_item_have_no_interval(metric: str) -> None:
    one = evaluation("one", [[-1.0, -2.0]] * 10, [1.0] * 10, [-20.0] * 10)
    found = paired_difference(one, one, metric)
    assert (found["difference"], found["identical"], found["significant"]) == (0.0, True, False)
    assert [found[key] for key in ("stderr", "low", "high")] == [None] * 3


def test_windows_of_one_document_count_as_one_observation() -> None:
    # Each window differs by 1 in the first document and by 3 in the second document. The mean difference is therefore
    # 2 +- 1 for any number of windows.
    one = evaluation("one", [], [], [-20.0] * 6)
    other = evaluation("other", [], [], [-19.0] * 3 + [-17.0] * 3)
    for result in (one, other):
        for window in result["items"]["text"]:
            window["cluster"] = f"document {window['id'] // 3}"
    found = paired_difference(one, other, "text/bits_per_byte")
    unit = 1 / 50 / math.log(2)  # one nat in a window of 50 bytes
    assert found["difference"] == pytest.approx(-2 * unit)
    assert found["stderr"] == pytest.approx(1 * unit)
    assert (found["items"], found["clusters"]) == (6, 2)
