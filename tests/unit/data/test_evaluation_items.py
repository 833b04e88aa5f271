from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.contamination import build_index
from nemo_upcycle.data.inputs import list_inputs
from nemo_upcycle.data.ngrams import NgramIndex
from nemo_upcycle.data.passages import cut
from nemo_upcycle.suites.items import suite_items
from nemo_upcycle.suites.suite import choose_questions
from nemo_upcycle.suites.suite_config import read_suite_config
from tests.planted import CHANGED, VERBATIM, plant, questions


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], NgramIndex]:
    path = tmp_path_factory.mktemp("index") / "ngrams.npz"
    summary = build_index(["demo", "full"], path)
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
    items = list(suite_items("demo"))
    assert [item.renderings[0] for item in items] == [question["question"] for question in asked]
    assert {item.id for item in items} <= {item.id for item in suite_items("full")}


def test_planted_items_are_found_in_every_verbatim_form(built: tuple[dict[str, Any], NgramIndex]) -> None:
    _, index = built
    total: dict[str, int] = defaultdict(int)
    found: dict[str, int] = defaultdict(int)
    whole: dict[str, int] = defaultdict(int)  # the others begin with boilerplate: "Which of the following statements"
    rows = questions()
    for planted in plant(80):
        hits = [hit for hit in index.find(planted.text) if hit.start < planted.stop and planted.start < hit.stop]
        texts = [rows[int(index.item(number)[1].split("/")[1])] for hit in hits for number in hit.items]
        assert not texts or planted.form in CHANGED or rows[planted.item] in texts
        total[planted.form] += 1
        found[planted.form] += rows[planted.item] in texts
        if planted.form in VERBATIM and planted.words >= 6:
            (hit,) = hits
            assert planted.start <= hit.start
            before = planted.text[planted.start : hit.start]
            whole[planted.form] += not before.strip("'\"\u2018\u2019\u201c\u201d(_ ")
            pieces = cut(planted.text, index.find(planted.text), margin=0)  # the speeches have hits of their own
            assert sum(map(len, pieces)) <= len(planted.text) - (hit.stop - hit.start)
            assert not any(index.find(piece) for piece in pieces)
    assert total == dict.fromkeys((*VERBATIM, *CHANGED), 80)
    assert [found[form] for form in VERBATIM] == [76, *[80] * 6]  # four questions have less than six words
    assert min(whole.values()) >= 72
    assert found[CHANGED[0]] >= 77  # 290 of 300
    assert found[CHANGED[1]] <= 2  # eight words in a row are rare in them: missed by design


def test_speeches_that_quote_what_mmlu_quotes_are_found(built: tuple[dict[str, Any], NgramIndex]) -> None:
    _, index = built
    paths = [Path(file.path) for file in list_inputs(read_blend("sotu"), "speeches", Path())["train"]]
    hits = {path.stem: index.find(path.read_text(encoding="utf-8")) for path in paths}
    assert {identity: [hit.size for hit in found] for identity, found in hits.items() if found} == {
        "1980-Carter-2": [31, 77, 108],  # 180 13-grams
        "1982-Reagan-1": [36, 19],
        "1990-Bush-1": [14],
        "1995-Clinton-1": [14],
    }
