from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle.data.contamination import EXAMPLES, Contamination, build_index, check_suites, merge_contamination
from nemo_upcycle.data.ngrams import NgramIndex
from nemo_upcycle.data.passages import removed_spans
from nemo_upcycle.data.suites.items import Item
from nemo_upcycle.data.suites.suite_config import read_suite_config
from nemo_upcycle.errors import UpcycleError
from tests.lm_eval_tasks import write_task


INDEX = NgramIndex.build(
    [
        Item("physics", "light", ("What is the speed of light?",)),
        Item("physics", "sound", ("What is the speed of sound?",)),
        Item("history", "light", ("Who asked what is the speed of light?",)),
        Item("unused", "none", ("This is not asked by anybody here",)),
    ]
)


def test_sets_items_documents_and_bytes_are_counted() -> None:
    counts = Contamination(INDEX)
    pad = "\u00e9 " * 300
    first = f"{pad}What is the speed of light?{pad}WHAT is the speed\nof light? {pad}"
    second = "Who asked: what is the speed of light"
    counts.add("1", "a.jsonl:1", first, hits := INDEX.find(first), removed_spans(first, hits))
    counts.add("2", "a.jsonl:2", second, INDEX.find(second), [(0, len(second))])
    counts.add("3", "a.jsonl:3", "nothing", INDEX.find("nothing"))
    counts.add("4", "a.jsonl:4", second, INDEX.find(second))  # this hit is reported, but nothing is removed
    found = counts.to_dict()
    assert list(found) == ["history", "physics"]
    removed = sum(len(first[start:stop].encode()) for start, stop in removed_spans(first, hits))
    assert removed > 2 * 600
    physics = found["physics"]
    assert (physics["documents"], physics["passages"], physics["items"]) == (3, 4, ["light"])
    assert physics["bytes"] == removed + len(second)
    example = {"id": "1", "where": "a.jsonl:1", "words": "WHAT is the speed of light", "item": "light"}
    assert physics["examples"][1] == example
    assert (found["history"]["documents"], found["history"]["bytes"]) == (2, len(second))
    assert json.loads(json.dumps(found)) == found


def test_passage_inside_one_removed_span_counts_its_bytes_once() -> None:
    text = "What is the speed of light? What is the speed of sound?"
    counts = Contamination(INDEX)
    counts.add("1", "a:1", text, hits := INDEX.find(text), removed_spans(text, hits))
    assert len(hits) == 2
    assert counts.to_dict()["physics"]["bytes"] == len(text)
    assert counts.to_dict()["physics"]["items"] == ["light", "sound"]


def test_merged_counts_are_sums_and_items_are_counted_once() -> None:
    parts = []
    for text in ("what is the speed of light", "what is the speed of light what is the speed of sound", "nothing"):
        counts = Contamination(INDEX)
        for number in range(15):
            counts.add(str(number), f"{text[-5:]}:{number}", text, INDEX.find(text), [(0, len(text))])
        parts.append(counts.to_dict())
    merged = merge_contamination(parts, INDEX.summary)
    assert list(merged) == ["physics", "history", "unused"]
    physics = merged["physics"]
    assert (physics["items"], physics["items_hit"], physics["documents"]) == (2, 2, 30)
    assert physics["bytes"] == 15 * 26 + 15 * 53
    places = [example["where"] for example in physics["examples"]]
    assert (places[0], places[14:17], len(places)) == ("light:0", ["light:14", "sound:0", "sound:0"], EXAMPLES)
    assert merged["unused"]["items"] == 1
    assert (merged["unused"]["items_hit"], merged["unused"]["examples"]) == (0, [])


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite with one task of the user's own, whose data file is missing."""
    (tmp_path / "tasks").mkdir()
    form = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "none"}
    write_task(tmp_path / "tasks", "lost", {"test": []}, **form)
    path = tmp_path / "mine.yaml"
    path.write_text("{tasks: {lost: [0]}, local: false, include_path: tasks}", encoding="utf-8")
    return path


def test_no_set_is_left_out_in_silence(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UpcycleError,
        match=r"task lost are not available: .*lost\.test\.jsonl.* or name the task in decontaminate_without",
    ):
        build_index({"mine": read_suite_config(suite)}, tmp_path / "index.npz")
    assert not (tmp_path / "index.npz").exists()


def test_only_tasks_that_are_asked_can_be_left_out(suite: Path) -> None:
    with pytest.raises(UpcycleError, match=r"decontaminate_without: task 'last' does not exist\. Did you mean 'lost'"):
        check_suites({"mine": read_suite_config(suite)}, ["last"])
    for suites in ({}, {"full": read_suite_config("full")}):
        with pytest.raises(UpcycleError, match=r"decontaminate_without names lost, but no suite"):
            check_suites(suites, ["lost"])
