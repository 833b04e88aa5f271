"""Read multiple-choice questions from a local file, in one shape for every evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json_lines


LETTERS = "ABCD"
_FIELDS = ("question", "answer_a", "answer_b", "answer_c", "answer_d", "correct_answer", "topic")


def mmlu_questions(path: Path) -> list[dict[str, Any]]:
    """Read the MMLU test questions of the `mmlu` asset (JSON lines, one question a line).

    Rows whose `correct_answer` is not a letter A to D are dropped: the file contains two stray header rows.

    Args:
        path: `mmlu.jsonl`, as `fetch_asset("mmlu")` returns it.

    Returns:
        One dict a question, in the order of the file: `question` (str), `choices` (four str), `answer` (0 to 3) and
        `subject` as lm-eval spells it (`high_school_us_history`). The whole file gives 14,042.

    Raises:
        UpcycleError: the file is missing, a line is not JSON or lacks a field, or no question is left.

    Example:
        >>> mmlu_questions(fetch_asset("mmlu"))[0]["subject"]  # doctest: +SKIP
        'moral_scenarios'
    """
    questions = []
    for where, row in read_json_lines(path):
        if not all(isinstance(row.get(field), str) for field in _FIELDS):
            raise UpcycleError(
                where,
                got=sorted(row),
                expected=f"text in {', '.join(_FIELDS)}",
                fix="use the file of the mmlu asset",
            )
        if row["correct_answer"] in tuple(LETTERS):
            questions.append(_question(row))
    if not questions:
        raise UpcycleError(
            f"questions in {path}", got="none", expected="at least one", fix="use the file of the mmlu asset"
        )
    return questions


def _question(row: dict[str, str]) -> dict[str, Any]:
    return {
        "question": row["question"],
        "choices": [row[f"answer_{letter.lower()}"] for letter in LETTERS],
        "answer": LETTERS.index(row["correct_answer"]),
        "subject": row["topic"].replace(" ", "_"),
    }
