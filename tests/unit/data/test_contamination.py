from __future__ import annotations

import json

import pytest

from nemo_upcycle.data.contamination import EXAMPLES, Contamination, merge_contamination
from nemo_upcycle.data.ngrams import Hit, NgramIndex, removed_spans
from nemo_upcycle.suites.items import Item


@pytest.fixture
def index() -> NgramIndex:
    return NgramIndex.build(
        [
            Item("physics", "light", ("What is the speed of light?",)),
            Item("physics", "sound", ("What is the speed of sound?",)),
            Item("history", "light", ("Who asked what is the speed of light?",)),
            Item("unused", "none", ("This is not asked by anybody here",)),
        ]
    )


def test_sets_items_documents_and_bytes_are_counted(index: NgramIndex) -> None:
    counts = Contamination(index)
    pad = "\u00e9 " * 300
    first = f"{pad}What is the speed of light?{pad}WHAT is the speed\nof light? {pad}"
    second = "Who asked: what is the speed of light"
    counts.add("1", "a.jsonl:1", first, hits := index.find(first), removed_spans(first, hits))
    counts.add("2", "a.jsonl:2", second, index.find(second), [(0, len(second))])
    counts.add("3", "a.jsonl:3", "nothing", index.find("nothing"))
    found = counts.to_dict()
    assert list(found) == ["history", "physics"]
    removed = sum(len(first[start:stop].encode()) for start, stop in removed_spans(first, hits))
    assert removed > 2 * 600
    physics = found["physics"]
    assert (physics["documents"], physics["passages"], physics["items"]) == (2, 3, ["light"])
    assert physics["bytes"] == removed + len(second)
    assert physics["examples"][1] == {
        "id": "1",
        "where": "a.jsonl:1",
        "words": "WHAT is the speed of light",
        "item": "light",
    }
    assert (found["history"]["documents"], found["history"]["bytes"]) == (1, len(second))
    assert json.loads(json.dumps(found)) == found


def test_passage_inside_one_removed_span_counts_its_bytes_once(index: NgramIndex) -> None:
    text = "What is the speed of light? What is the speed of sound?"
    counts = Contamination(index)
    counts.add("1", "a:1", text, hits := index.find(text), removed_spans(text, hits))
    assert len(hits) == 2
    assert counts.to_dict()["physics"]["bytes"] == len(text)
    assert counts.to_dict()["physics"]["items"] == ["light", "sound"]


def test_report_removes_nothing(index: NgramIndex) -> None:
    counts = Contamination(index)
    counts.add("1", "a:1", "what is the speed of light", [Hit(0, 26, 6, (0,))])
    assert counts.to_dict()["physics"]["bytes"] == 0
    assert counts.to_dict()["physics"]["documents"] == 1


def test_merged_counts_are_sums_and_items_are_counted_once(index: NgramIndex) -> None:
    parts = []
    for text in ("what is the speed of light", "what is the speed of light what is the speed of sound", "nothing"):
        counts = Contamination(index)
        for number in range(15):
            counts.add(str(number), f"{text[-5:]}:{number}", text, index.find(text), [(0, len(text))])
        parts.append(counts.to_dict())
    merged = merge_contamination(parts, index.summary)
    assert list(merged) == ["physics", "history", "unused"]
    physics = merged["physics"]
    assert (physics["items"], physics["items_hit"], physics["documents"]) == (2, 2, 30)
    assert physics["bytes"] == 15 * 26 + 15 * 53
    assert [example["where"] for example in physics["examples"]] == [
        *(f"light:{number}" for number in range(15)),
        "sound:0",
        "sound:0",
        "sound:1",
        "sound:1",
        "sound:2",
    ]
    assert len(physics["examples"]) == EXAMPLES
    assert merged["unused"] == {
        **index.summary["unused"],
        "items_hit": 0,
        "documents": 0,
        "passages": 0,
        "bytes": 0,
        "examples": [],
    }
