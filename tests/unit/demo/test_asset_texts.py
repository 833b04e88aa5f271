from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nemo_upcycle.demo.asset_texts import mmlu_questions
from nemo_upcycle.demo.assets import fetch_asset


ROW = {
    "question": "2 + 2?",
    "answer_a": "3",
    "answer_b": "4",
    "answer_c": "5",
    "answer_d": "6",
    "correct_answer": "B",
    "topic": "high school us history",
}


def _write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_reads_choices_answer_and_subject_and_drops_header_rows(tmp_path):
    header = {key: key for key in ROW} | {"correct_answer": "answer"}
    questions = mmlu_questions(_write(tmp_path / "q.jsonl", ROW, header, ROW | {"correct_answer": "D"}))
    assert [question["answer"] for question in questions] == [1, 3]
    assert questions[0]["choices"] == ["3", "4", "5", "6"]
    assert questions[0]["subject"] == "high_school_us_history"


@pytest.mark.slow
def test_the_asset_holds_the_test_split_of_mmlu():
    lm_eval = pytest.importorskip("lm_eval")
    questions = mmlu_questions(fetch_asset("mmlu"))
    assert len(questions) == 14042
    tasks = (Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml")
    subjects = {re.sub(r"^mmlu_", "", path.stem) for path in tasks}
    assert {question["subject"] for question in questions} == subjects
    assert len(subjects) == 57
