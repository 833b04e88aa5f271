"""Read the multiple-choice questions of the `mmlu` asset, in one shape for every evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.utils.files import read_json_lines


LETTERS = "ABCD"


def mmlu_questions(path: Path) -> list[dict[str, Any]]:
    """Read the MMLU test questions of the `mmlu` asset (JSON lines, one question a line).

    Rows whose `correct_answer` is not a letter A to D are dropped: the file contains two stray header rows.

    Args:
        path: `mmlu.jsonl`, as `fetch_asset("mmlu")` returns it.

    Returns:
        One dict a question, in the order of the file: `question` (str), `choices` (four str), `answer` (0 to 3) and
        `subject` as lm-eval spells it (`high_school_us_history`). The whole file gives 14,042.

    Raises:
        UpcycleError: the file is missing.

    Example:
        >>> mmlu_questions(fetch_asset("mmlu"))[0]["subject"]  # doctest: +SKIP
        'moral_scenarios'
    """
    return [
        {
            "question": row["question"],
            "choices": [row[f"answer_{letter.lower()}"] for letter in LETTERS],
            "answer": LETTERS.index(row["correct_answer"]),
            "subject": row["topic"].replace(" ", "_"),
        }
        for _, row in read_json_lines(path)
        if row["correct_answer"] in tuple(LETTERS)
    ]
