"""Answers that were held back are scored behind their prompts, in bits per byte of the answers alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.evaluation.heldout import ANSWER_BITS
from nemo_upcycle.evaluation.paired import paired_difference
from nemo_upcycle.evaluation.run import evaluate
from nemo_upcycle.suites.suite import build_suite
from nemo_upcycle.suites.suite_config import HeldoutConfig, SuiteConfig, read_suite_config
from tests.unit.evaluation.test_run import loglikelihood


ROWS = [
    {"document": f"mine.jsonl:{number}", "turn": turn, "prompt": f"user: {number}?\nassistant:", "answer": answer}
    for number, answers in enumerate(((" One.", " Two, or three."), (" É.",), (" No.",)))
    for turn, answer in enumerate(answers)
]


@pytest.fixture(scope="module")
def result(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("answers")
    build_suite([], [], folder / "suite", SuiteConfig(tasks={"heldout_answers": [0]}), ROWS)
    return evaluate(tiny_llama, folder / "suite", folder, name="tiny")


def test_bits_per_byte_are_those_of_a_plain_loop(result: dict[str, Any], tiny_llama: Path) -> None:
    nats = sum(loglikelihood(tiny_llama, row["prompt"], row["answer"]) for row in ROWS)
    size_bytes = sum(len(row["answer"].encode()) for row in ROWS)
    assert result["metrics"][ANSWER_BITS]["value"] == pytest.approx(-nats / math.log(2) / size_bytes, rel=1e-4)
    assert result["metrics"][ANSWER_BITS]["higher_is_better"] is False
    assert set(result["metrics"]) == {ANSWER_BITS, "heldout_answers/acc"}


def test_the_answers_of_a_conversation_are_one_observation(result: dict[str, Any]) -> None:
    paired = paired_difference(result, result, ANSWER_BITS)
    assert (paired["difference"], paired["items"], paired["clusters"]) == (0, 4, 3)
    assert result["metrics"][ANSWER_BITS]["stderr"] > 0


def test_models_are_let_continue_the_prompts(result: dict[str, Any]) -> None:
    asked = {row["prompt"] for row in ROWS}
    assert len(result["samples"]) == 2
    assert all(sample["prompt"] in asked and "continuation" in sample for sample in result["samples"])


def test_a_number_of_answers_is_drawn_the_same_whatever_their_order(tmp_path: Path) -> None:
    config = SuiteConfig(tasks={"heldout_answers": [0]}, heldout=HeldoutConfig(answers=2))
    for name, rows in (("one", ROWS), ("other", ROWS[::-1])):
        build_suite([], [], tmp_path / name, config, rows)
    texts = [(tmp_path / name / "heldout_answers.jsonl").read_text() for name in ("one", "other")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 2
    assert dataclasses.asdict(read_suite_config("answers"))["heldout"]["answers"] == 64
