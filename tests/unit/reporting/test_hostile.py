"""The report of a run from another machine shows all values as typed, and embeds nothing of this machine."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from nemo_upcycle.reporting.live import write_page
from nemo_upcycle.reporting.progress import read_progress
from nemo_upcycle.reporting.report import write_report
from nemo_upcycle.utils.command_line import CommandLine
from tests.hostile import HOSTILE
from tests.unit.reporting.conftest import RECEIPT, write_run
from tests.unit.reporting.test_html import Page


pytestmark = pytest.mark.slow


FOLDER = "rep![q](x)<b>"
TYPED = "![z](SECRET) <script>alert(1)</script> `a` ```b``` | c [x](javascript:alert(2)) _d_ *e* $f^$ &lt; ~~g~~ \\h"
#: Names of hostile texts that are not words on one line, and the words of the other hostile texts. TYPED has no
#: single quotes, because a command doubles single quotes.
_LINES = ("new_lines", "code_on_a_new_line", "heading", "right_to_left", "line_separators", "control", "surrogate")
_WORDS = " ".join(" ".join(text.split()) for name, text in HOSTILE.items() if name not in (*_LINES, "long_words"))
TYPED += f" {_WORDS}".replace("'", "")
_TAGS = "html head meta title style body header nav a h1 h2 p img pre code ul li"
_KNOWN = {*_TAGS.split(), "div", "table", "thead", "tbody", "tr", "th", "td", "span", "strong"}
#: Keys whose values the code compares; these must stay as they are.
_KEPT = ("hash", "config_sha256")


def _hostile(value: Any, typed: str) -> Any:
    """Return a value with all its texts replaced."""
    if isinstance(value, dict):
        return {key: part if key in _KEPT else _hostile(part, typed) for key, part in value.items()}
    if isinstance(value, list):
        return [_hostile(part, typed) for part in value]
    return typed if isinstance(value, str) else value


def _change(path: Path, typed: str) -> None:
    value = _hostile(json.loads(path.read_text()), typed)
    if "metrics" in value:  # task names are texts, too
        value = json.loads(json.dumps(value).replace('"quiz', json.dumps(typed)[:-1]))
        value["metrics"][f"{typed}/acc"] = value["metrics"].pop(f"{typed}/acc")
        value["versions"] = {typed: typed}
        value["samples"] = [{"document": typed, "prompt": typed, "goes_on": typed, "continuation": typed}]
        value["suite"] = {"config": {}}
    path.write_text(json.dumps(value))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.png"
    path.write_bytes(b"\x89PNG of somebody else")
    return path


@pytest.fixture
def hostile(run_dir: Path, secret: Path) -> Path:
    """A run's folder in which every text is `TYPED`."""
    return _typed_into(run_dir, TYPED.replace("SECRET", str(secret)))


def _typed_into(run_dir: Path, typed: str) -> Path:
    folder = run_dir.rename(run_dir.with_name(FOLDER))
    (folder / "pretrain/receipt.json").write_text(json.dumps(RECEIPT))
    for path in folder.rglob("*.json"):
        _change(path, typed)
    line = CommandLine(("nemo", f"{typed}\n```\n{typed}"))
    (folder / "command.txt").write_bytes(f"{line}\n".encode(errors="replace"))
    return folder


def test_texts_of_a_run_are_shown_as_typed(hostile: Path, secret: Path) -> None:
    write_report(hostile)
    page = Page((hostile / "report.html").read_text())
    assert {tag for tag, _ in page.tags} <= _KNOWN
    loads = [str(attributes[key]) for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert all(one.startswith(("#section-", "data:image/png;base64,")) for one in loads)
    assert base64.b64encode(secret.read_bytes()).decode()[:24] not in (hostile / "report.html").read_text()
    typed = TYPED.replace("SECRET", str(secret))
    # Commands, task names in tables and headline, samples, versions, settings, receipts and machine appear as a whole.
    assert page.text.count(typed) == page.text.count("[z]") > 20
    assert page.text.count(FOLDER) >= 3  # title, heading, how to resume


def test_texts_of_a_run_stay_text_in_markdown(hostile: Path) -> None:
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(write_report(hostile).read_text())
    inline = [child for token in tokens for child in token.children or ()]
    obeyed = {"html_block", "html_inline", "link_open", "s_open", "em_open"}
    assert obeyed.isdisjoint(token.type for token in (*tokens, *inline))
    images = {str(token.attrs["src"]) for token in inline if token.type == "image"}
    assert images == {f"{name}.png" for name in json.loads((hostile / "results.json").read_text())["figures"]}


def test_only_figures_that_the_report_drew_are_embedded(run_dir: Path, secret: Path) -> None:
    other = run_dir / "routers.png"  # not drawn, because this run measured no routers
    other.write_bytes(b"\x89PNG that was there before")
    (run_dir / "loss.png").symlink_to(secret)
    write_report(run_dir)
    text = (run_dir / "report.html").read_text()
    for content in (secret.read_bytes(), other.read_bytes()):
        assert base64.b64encode(content).decode()[:24] not in text
    assert secret.read_bytes() == b"\x89PNG of somebody else"
    assert not (run_dir / "loss.png").is_symlink()
    drawn = json.loads((run_dir / "results.json").read_text())["figures"]
    assert len(Page(text).all("img")) == len(drawn) > 2


def test_lines_and_controls_make_no_heading_and_no_tag(tmp_path: Path) -> None:
    shapes = []
    for name, typed in (("usual", "a"), ("hostile", "\n".join(HOSTILE[name] for name in _LINES))):
        (tmp_path / name).mkdir()
        folder = _typed_into(write_run(tmp_path / name / "demo"), typed)
        write_report(folder)
        tags = [tag for tag, _ in Page((folder / "report.html").read_text()).tags]
        assert set(tags) <= _KNOWN
        shapes.append([tag for tag in tags if tag in ("h1", "h2", "table", "tr")])
    assert shapes[0] == shapes[1]


def test_the_page_of_a_run_under_way_obeys_no_text(hostile: Path) -> None:
    write_page(hostile, read_progress(hostile))
    page = Page((hostile / "report.html").read_text())
    assert {tag for tag, _ in page.tags} <= _KNOWN
    assert FOLDER in page.text
