from __future__ import annotations

import json

from nemo_upcycle.sources.demo.asset_texts import mmlu_questions


ROW = {"question": "2 + 2?", "answer_a": "3", "answer_b": "4", "answer_c": "5", "answer_d": "6"}
ROW |= {"correct_answer": "B", "topic": "high school us history"}


def test_reads_choices_answer_and_subject_and_drops_header_rows(tmp_path):
    header = {key: key for key in ROW} | {"correct_answer": "answer"}
    path, rows = tmp_path / "q.jsonl", (ROW, header, ROW | {"correct_answer": "D"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = mmlu_questions(path)
    assert [question["answer"] for question in questions] == [1, 3]
    assert questions[0]["choices"] == ["3", "4", "5", "6"]
    assert questions[0]["subject"] == "high_school_us_history"
