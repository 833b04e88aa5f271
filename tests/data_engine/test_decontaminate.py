"""Evaluation items are dropped or cut from training documents, and kept in documents of other splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_engine.blend import QUESTION, sentence, write_index, write_jsonl, write_plan
from tests.data_engine.runs import execute, removed, stats, texts


AROUND = [" ".join(f"word{n} of side {side}," for n in range(120)) for side in "AB"]
FULL = f"{AROUND[0]} {QUESTION} {AROUND[1]}"


def _run(folder: Path, *many: str, short_words: int = 0, **task: object) -> Path:
    file = write_jsonl(folder / "some.jsonl", *many)
    return execute(write_plan(folder, [{"files": [file], **task}], ngram_index=write_index(folder, short_words)))


def test_drop(tmp_path: Path) -> None:
    work = _run(tmp_path, sentence(1), FULL, sentence(2), on_hit="drop")
    assert texts(work) == [sentence(1), sentence(2)]
    counts = stats(work)
    assert counts["steps"]["decontaminate"] == {"in": 3, "kept": 2, "removed": {"dropped": 1}}
    found = counts["contamination"]["rivers"]
    assert (found["documents"], found["items"], found["bytes"]) == (1, ["17"], len(FULL))
    (line,) = removed(work)
    assert (line["step"], line["reason"], line["where"].rpartition(":")[2]) == ("decontaminate", "dropped", "2")
    assert line["sets"] == ["rivers"]


def test_cut(tmp_path: Path) -> None:
    work = _run(tmp_path, sentence(1), FULL, QUESTION, sentence(2), on_hit="cut")
    kept = texts(work)
    assert (kept[0], kept[-1], len(kept)) == (sentence(1), sentence(2), 4)
    assert AROUND[0].startswith(kept[1].rstrip())
    assert AROUND[1].endswith(kept[2].lstrip())
    counts = stats(work)
    assert counts["steps"]["decontaminate"] == {"in": 4, "kept": 3, "removed": {"nothing left": 1}}
    lost = len(FULL) - len(kept[1]) - len(kept[2])
    assert 2 * 200 + len(QUESTION) <= lost < 2 * 260 + len(QUESTION)
    assert counts["cut"] == {"documents": 1, "pieces": 2, "bytes": lost}
    assert counts["contamination"]["rivers"]["documents"] == 2
    gone = [(line["reason"], line["bytes"]) for line in removed(work)]
    assert gone == [("cut", lost), ("nothing left", len(QUESTION))]


def test_pieces_under_200_characters_are_dropped(tmp_path: Path) -> None:
    work = _run(tmp_path, f"{AROUND[0][:330]} {QUESTION} {AROUND[1]}", on_hit="cut")
    (kept,) = texts(work)
    assert AROUND[1].endswith(kept.lstrip())


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_other_splits_are_left_as_they_are(tmp_path: Path, split: str) -> None:
    work = _run(tmp_path, FULL, split=split)
    assert stats(work)["splits"][split]["documents"] == 1
    assert removed(work) == []


def test_short_ngrams_are_reported_in_what_is_left(tmp_path: Path) -> None:
    quote = " ".join(QUESTION.split()[:8])
    quoted = f"{AROUND[0]} {quote} {AROUND[1]} {QUESTION} {AROUND[1]} {quote} {AROUND[0]}"
    work = _run(tmp_path, FULL, quoted, sentence(1), on_hit="cut", short_words=8)
    counts = stats(work)
    assert sum(quote in text for text in texts(work)) == 2  # before and after the passage that is cut out
    assert counts["contamination"]["rivers"]["documents"] == 2
    left = counts["report"]["rivers"]
    assert (left["documents"], left["passages"], left["items"], left["bytes"]) == (1, 2, ["17"], 0)
    assert left["examples"][0]["where"] == f"{tmp_path / 'some.jsonl'}:2"
