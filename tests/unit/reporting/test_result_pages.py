"""Numbers in the prose of result pages are those of the tables beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.result_pages import CITED, RESULTS, ROOT, cell_of, pages, with_cells
from nemo_upcycle.reporting.grid_table import BEGIN, END


#: A difference with its error, wherever a page's own words have one.
_DIFFERENCE = re.compile(r"\d ± \d")
_COMMENT = re.compile(r"<!--(?:fp8|routers|routers_from_data|laptop|budget) ")


def prose(page: Path) -> str:
    """The words of a result page, without what the evidence writes."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return before + rest.partition(END)[2]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_cited_number_is_that_of_its_cell(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_cells(text) == text, "run python -m benchmarks.result_pages"
    assert len(CITED.findall(text)) == len(_COMMENT.findall(text)), "a comment that cites, and is not understood"


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*.md")), ids=lambda page: page.stem)
def test_every_difference_of_a_result_page_names_its_cell(page: Path) -> None:
    left = CITED.sub("", prose(page))
    assert _DIFFERENCE.findall(left) == []
    assert len(CITED.findall(prose(page))) >= 5


def test_one_digit_or_one_verdict_that_is_changed_is_seen() -> None:
    text = with_cells("by 0.1 ± 0.1 (tie)<!--laptop moe.end-->, from 1.234<!--laptop arms.moe.start.value-->")
    assert with_cells(text) == text
    end, start = cell_of("laptop", "moe.end"), cell_of("laptop", "arms.moe.start.value")
    assert f"({end['verdict']})" in text
    assert f"{start:.3f}" in text
    for right, wrong in ((f"({end['verdict']})", "(tie)"), (f"{start:.3f}", f"{start + 0.001:.3f}")):
        assert with_cells(text.replace(right, wrong)) == text
