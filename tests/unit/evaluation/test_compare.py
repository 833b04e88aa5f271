"""Comparison of two evaluations item by item. A comment beside each expected number derives it by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.compare import compare_items, jackknife_stderr, left_out, parts_of, statistic


def evaluation(
    name: str, likelihoods: list[list[float]], accuracies: list[float], texts: list[float], size_bytes: int = 50
) -> dict[str, Any]:
    """Return an evaluation of these questions, and of windows of 10 words and `size_bytes` bytes each."""
    questions, windows = [], []
    for number, (values, accuracy) in enumerate(zip(likelihoods, accuracies, strict=True)):
        question = {"id": number, "hash": f"question {number}", "loglikelihoods": values, "scores": {"acc": accuracy}}
        questions.append(question | {"answer": values.index(max(values))})
    for number, value in enumerate(texts):
        scores = {"word_perplexity": [value, 10], "bits_per_byte": [value, size_bytes]}
        windows.append({"id": number, "hash": f"window {number}", "loglikelihoods": [value], "scores": scores})
    items = {"quiz": questions, "text": windows}
    metrics = {
        "quiz/acc": {"higher_is_better": True},
        "all/acc": {"higher_is_better": True},
        "text/word_perplexity": {"higher_is_better": False},
        "text/bits_per_byte": {"higher_is_better": False},
    }
    return {"name": name, "items": items, "metrics": metrics, "groups": {"all": ["quiz"]}}


A = evaluation("a", [[-1.0, -2.0], [-4.0, -3.0]], [1.0, 0.0], [-20.0, -30.0])
B = evaluation("b", [[-1.5, -2.0], [-2.0, -3.0]], [1.0, 1.0], [-20.0, -24.0])


def test_statistics() -> None:
    assert statistic("acc", [1.0, 0.0, 0.0, 1.0]) == 0.5
    assert statistic("perplexity", [-1.0, -3.0]) == pytest.approx(math.exp(2))  # mean -2
    assert statistic("word_perplexity", [[-20.0, 10], [-30.0, 15]]) == pytest.approx(math.exp(2))  # 50 / 25
    assert statistic("bits_per_byte", [[-math.log(2) * 30, 20], [-math.log(2) * 30, 40]]) == pytest.approx(1.0)


def test_the_jackknife_of_a_mean_is_the_usual_standard_error() -> None:
    # mean 4; squared deviations 9 + 4 + 0 + 25 = 38; sqrt(38 / 3 / 4)
    without = left_out("acc", parts_of("acc", [1.0, 2.0, 4.0, 9.0]))
    assert without == pytest.approx([5.0, 14 / 3, 4.0, 7 / 3])
    assert jackknife_stderr(without) == pytest.approx(math.sqrt(38 / 12))
    assert jackknife_stderr(left_out("acc", [(1.0, 1)])) is None


def test_items_are_compared_one_by_one() -> None:
    found = compare_items(A, B)
    assert found == {
        "items": 4,
        "loglikelihoods": 6,
        "questions": 2,
        "changed_answers": 1,  # the second question changes from 1 to 0
        "max_absolute_loglikelihood_difference": 6.0,  # from -30 to -24
        # -1 to -1.5 and -4 to -2 both change by 0.5, and the first is named.
        "max_relative_loglikelihood_difference": 0.5,
        "largest_at": {"task": "quiz", "id": 0},
    }
    same = compare_items(A, A)
    assert same["max_absolute_loglikelihood_difference"] == same["max_relative_loglikelihood_difference"] == 0.0
    assert same["changed_answers"] == 0


def test_a_changed_normalised_answer_counts_as_changed() -> None:
    other = evaluation("c", [[-1.0, -2.0], [-4.0, -3.0]], [1.0, 1.0], [-20.0, -30.0])
    assert compare_items(A, other)["changed_answers"] == 1


def test_different_items_are_refused() -> None:
    shorter = evaluation("short", [[-1.0, -2.0]], [1.0], [-20.0, -30.0])
    with pytest.raises(
        UpcycleError, match="Evaluations a and short cannot be compared: they have different items of quiz"
    ):
        compare_items(A, shorter)
    fewer_tasks = {**A, "items": {"quiz": A["items"]["quiz"]}}
    with pytest.raises(UpcycleError, match="same suite and limit"):
        compare_items(A, fewer_tasks)
