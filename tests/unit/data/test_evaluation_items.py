from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.contamination import build_index
from nemo_upcycle.data.inputs import list_inputs
from nemo_upcycle.data.ngrams import NgramIndex
from nemo_upcycle.data.suites.items import suite_items
from nemo_upcycle.data.suites.suite import choose_questions
from nemo_upcycle.data.suites.suite_config import read_suite_config
from tests.planted import questions


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], NgramIndex]:
    path = tmp_path_factory.mktemp("index") / "ngrams.npz"
    summary = build_index({name: read_suite_config(name) for name in ("demo", "full")}, path)
    return summary, NgramIndex.load(path)


def test_summary_counts_every_question_once(built: tuple[dict[str, Any], NgramIndex]) -> None:
    summary, index = built
    assert summary["sets"] == index.summary
    assert (summary["sets"]["mmlu"]["items"], summary["sets"]["mmlu"]["ngrams"]) == (14042, 1_153_666)
    assert summary["report"]["sets"] == index.short_summary
    assert (summary["words"], summary["report"]["words"]) == (13, 8)


def test_items_of_a_suite_are_the_questions_that_it_asks() -> None:
    config = read_suite_config("demo")
    asked = choose_questions(questions(), config.questions, config.seed)
    items = list(suite_items(config))
    assert [item.renderings[0] for item in items] == [question["question"] for question in asked]
    assert {item.id for item in items} <= {item.id for item in suite_items(read_suite_config("full"))}


def test_speeches_that_quote_what_mmlu_quotes_are_found(built: tuple[dict[str, Any], NgramIndex]) -> None:
    _, index = built
    paths = [Path(file.path) for file in list_inputs(read_blend("sotu"), "speeches", Path())["train"]]
    hits = {path.stem: index.find(path.read_text(encoding="utf-8")) for path in paths}
    assert {identity: [hit.size for hit in found] for identity, found in hits.items() if found} == {
        "1980-Carter-2": [31, 77, 108],  # 180 13-grams in total
        "1982-Reagan-1": [36, 19],
        "1990-Bush-1": [14],
        "1995-Clinton-1": [14],
    }
