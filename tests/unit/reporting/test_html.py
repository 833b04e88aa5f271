"""report.html is one file that loads nothing and obeys nothing that a model wrote."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest


class Page(HTMLParser):
    """Parses a page into its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(reported: Path) -> Page:
    return Page((reported / "report.html").read_text())


def test_the_page_has_the_tables_of_the_report(page: Page, reported: Path) -> None:
    markdown = (reported / "report.md").read_text()
    assert len(page.all("table")) == len(re.findall(r"^\|---", markdown, re.MULTILINE))
    assert "trained baseline" in page.text


def test_every_section_is_in_the_contents(page: Page) -> None:
    targets = {str(attributes["href"]) for attributes in page.all("a") if str(attributes["href"]).startswith("#")}
    assert targets == {f"#{attributes['id']}" for attributes in page.all("h2")}
    assert len(targets) > 5


def test_a_page_opens_with_verdict_numbers_and_one_figure(judged: Path) -> None:
    page = Page((judged / "report.html").read_text())
    tags = [tag for tag, _ in page.tags]
    opening = tags[tags.index("h1") : tags.index("nav")]
    assert [tag for tag in opening if tag != "span"][1:4] == ["p", "p", "div"]
    assert (opening.count("tr"), opening.count("img"), opening.count("h2")) == (1 + 6, 1, 0)
    headline, numbers = page.text.split("measured")[:2]
    assert "The MoE is better than its parent" in headline
    verdicts = ["the MoE is better", "the baseline is better", "baseline 3.750", "equal up to rounding"]
    verdicts += ["balanced; at most 2.80 (layer 0, step 100)", "times the baseline's"]
    places = [numbers.index(verdict) for verdict in verdicts]
    assert places == sorted(places)


def test_numbers_stay_on_one_line_and_tables_scroll(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    assert text.count("<table>") == text.count('<div class="table">\n<table>') > 5
    for found in ("1.60 ± 0.14", "+0.0289 ± 0.0091", "256.0 MiB", "70.00 %", "6.25e-05", "3,000"):
        assert f'<span class="n">{found}</span>' in text
