"""If held-out text also occurs in training text, one of the two documents is removed, and the overlap is counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.engine import overlap
from nemo_upcycle.data.finished import HELDOUT_OVERLAP
from tests.data_engine.blend import write_jsonl, write_plan
from tests.data_engine.runs import execute, removed, stats, texts


def words(seed: int, count: int = 300) -> str:
    """Return text whose words are unique to a seed."""
    return " ".join(random.Random(seed).choices([f"{seed}w{n}" for n in range(80)], k=count))


HELD = [words(n) for n in range(4)]
SHORT = f"{words(10, 20)} {HELD[0]}"  # mostly held-out text: removed
LONG = f"{words(11, 900)} {HELD[1]}"  # mostly its own text: the held-out document is removed
QUOTE = f"{words(12, 900)} {' '.join(HELD[2].split()[:100])}"  # under half of both documents: both stay
OTHER = words(13)


def _run(folder: Path, train: list[str], held: list[str], **plan: Any) -> Path:
    files = [write_jsonl(folder / name, *many) for name, many in (("held.jsonl", held), ("train.jsonl", train))]
    tasks = [{"files": files[:1], "split": "heldout"}, {"files": files[1:]}]
    return execute(write_plan(folder, tasks, **{"heldout_overlap": 0.5, **plan}))


def _held(work: Path, rank: int = 0) -> list[str]:
    path = work / "tokens" / f"{rank:05d}.heldout.jsonl"
    return [json.loads(line)["text"] for line in path.read_text().splitlines()] if path.exists() else []


def _summary(work: Path) -> dict[str, Any]:
    return json.loads((work / HELDOUT_OVERLAP).read_text())


def test_copies_leave_training_or_held_out_texts(tmp_path: Path) -> None:
    work = _run(tmp_path, [SHORT, LONG, QUOTE, OTHER], HELD)
    assert texts(work, 1) == [LONG, QUOTE, OTHER]
    assert _held(work) == [HELD[0], HELD[2], HELD[3]]
    assert stats(work, 0)["steps"]["overlap"] == {"in": 4, "kept": 3, "removed": {"mostly in training text": 1}}
    assert stats(work, 1)["steps"]["overlap"] == {"in": 4, "kept": 3, "removed": {"mostly in held-out text": 1}}
    (line,) = removed(work, 0)
    assert (line["step"], line["reason"]) == ("overlap", "mostly in training text")
    assert line["where"].endswith("held.jsonl:2")
    assert removed(work, 1)[0]["where"].endswith("train.jsonl:1")
    counts = {"documents": 4, "above": 2, "removed": 1, "words": 4 * 300, "shared": 300 + 300 + 100}
    counts |= {"words_after": 3 * 300, "shared_after": 100}
    assert _summary(work)["rows"] == [{"source": "source", "split": "heldout", **counts}]


def _reworded(text: str, seed: int, share: float = 0.1) -> str:
    """Return the text with some of its words changed."""
    chance = random.Random(seed)
    return " ".join(f"other{n}" if chance.random() < share else word for n, word in enumerate(text.split()))


def _chinese(seed: int, count: int = 300) -> str:
    return "".join(random.Random(seed).choices([chr(0x4E00 + n) for n in range(800)], k=count))


PIECES = [f"{words(20 + n, 90)} {' '.join(HELD[0].split()[60 * n : 60 * n + 60])}" for n in range(5)]
COPIED = [words(n) for n in range(20, 40)]
REGULAR = [" ".join(f"other{n}" if n % 10 == 5 else word for n, word in enumerate(text.split())) for text in COPIED]
LONGER = f"{words(11, 900)} {_reworded(HELD[1], 3)}"
STOCK = [" ".join(text.split()[at : at + 8]) for text in HELD for at in range(0, 100, 20)]
SPEECH = " ".join(f"{words(50 + n, 12)} {phrase}" for n, phrase in enumerate(STOCK))
SIGNS = _chinese(1)
STOCK_SIGNS = "".join(f"{_chinese(9 + at, 7)}{SIGNS[at : at + 12]}" for at in range(0, 240, 12))
COPIED_SIGNS = "".join(chr(0x5FFF) if n % 25 == 5 else letter for n, letter in enumerate(SIGNS))
FEW = words(7, 7)
#: Case -> training texts, held-out texts, training texts that remain, held-out texts that remain.
CASES = {
    "pieces of one all over training": (PIECES, HELD[:2], PIECES, HELD[1:2]),
    "copies with one word in ten changed": (
        [*REGULAR, *(_reworded(text, n) for n, text in enumerate(COPIED)), OTHER],
        COPIED,
        [OTHER],
        COPIED,
    ),
    "a reworded copy inside a longer document": ([LONGER, OTHER], HELD, [LONGER, OTHER], [HELD[0], *HELD[2:]]),
    "stock phrases, which are no copy": ([SPEECH], HELD, [SPEECH], HELD),
    "a script without blanks, of longer n-grams": ([STOCK_SIGNS, COPIED_SIGNS], [SIGNS], [STOCK_SIGNS], [SIGNS]),
    "fewer words than an n-gram": ([f"{FEW} {OTHER}"], [FEW, HELD[0]], [f"{FEW} {OTHER}"], [FEW, HELD[0]]),
}


@pytest.mark.parametrize("what", CASES)
def test_copies_leave_one_side_and_what_is_no_copy_stays(tmp_path: Path, what: str) -> None:
    train, held, train_left, held_left = CASES[what]
    work = _run(tmp_path, train, held)
    assert (texts(work, 1), _held(work)) == (train_left, held_left)


def test_one_removes_nothing_and_counts(tmp_path: Path) -> None:
    work = _run(tmp_path, [SHORT, LONG], HELD, heldout_overlap=1.0)
    assert (texts(work, 1), _held(work)) == ([SHORT, LONG], HELD)
    (row,) = _summary(work)["rows"]
    assert (row["shared"], row["shared_after"], row["removed"]) == (2 * 300, 2 * 300, 0)


def test_duplicate_of_a_training_document_goes_alone(tmp_path: Path) -> None:
    """The training document comes first and must stay, because the comparison ignores removed duplicates."""
    first = write_jsonl(tmp_path / "1.jsonl", HELD[0], OTHER)
    second = write_jsonl(tmp_path / "2.jsonl", HELD[0].replace(" ", "  "), HELD[3])
    tasks = [{"files": [first]}, {"files": [second], "split": "heldout"}]
    work = execute(write_plan(tmp_path, tasks, heldout_overlap=0.5))
    assert (texts(work, 0), _held(work, 1)) == ([HELD[0], OTHER], [HELD[3]])
    assert stats(work, 1)["steps"]["deduplicate"]["removed"] == {"duplicate": 1}


def test_many_ngrams_are_sampled_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MOST_NGRAMS", 300)
    overlap._searched.cache_clear()
    work = _run(tmp_path, [SHORT, LONG, QUOTE, OTHER], HELD)
    assert _summary(work)["every"] == 4
    (row,) = _summary(work)["rows"]
    assert (row["words"], row["shared"]) == (1200, pytest.approx(700, rel=0.1))
    assert (texts(work, 1), _held(work)) == ([LONG, QUOTE, OTHER], [HELD[0], HELD[2], HELD[3]])
