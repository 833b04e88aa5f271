"""The page of a run that is under way and the report, in a real browser: a phone's width, a desk's, light, dark."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nemo_upcycle.reporting.figures import DPI, SMALL
from nemo_upcycle.reporting.live import REFRESH_S, write_page
from nemo_upcycle.reporting.progress import read_progress
from nemo_upcycle.reporting.report import write_report
from tests.browser.runs import write_wide_run
from tests.waiting import HANG_S


ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-browser/bin/python"
WIDTHS = {420, 1280}
#: What a first screen shows, and pixels of a figure's smallest letters.
HEIGHT, LETTERS = 900, 9
#: Where screenshots are kept, to be looked at.
PICTURES = ROOT / "runs/test-browser"

pytestmark = [
    pytest.mark.full,
    pytest.mark.weekly,
    pytest.mark.skipif(not PYTHON.is_file(), reason="`make test-browser` makes the browser's environment"),
]


@pytest.fixture(scope="module", params=["light", "dark"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both pages measure of themselves at each width."""
    run_dir = write_wide_run(tmp_path_factory.mktemp("browser") / f"run_{'of_a_long_name' * 6}")
    pages = [run_dir.parent / name for name in ("live.html", "report.html")]  # alone: nothing lies beside them
    write_page(run_dir, read_progress(run_dir))
    shutil.copy(run_dir / "report.html", pages[0])
    write_report(run_dir)
    shutil.copy(run_dir / "report.html", pages[1])
    PICTURES.mkdir(parents=True, exist_ok=True)
    command = [str(PYTHON), "-m", "tests.browser.screenshots", request.param, str(PICTURES)]
    command += [",".join(map(str, sorted(WIDTHS))), *map(str, pages)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert {(one["asked"], one["page"]) for one in found} == {(w, page.stem) for w in WIDTHS for page in pages}
    assert {one["dark"] for one in found} == {request.param == "dark"}
    return found


def test_nothing_is_cut_off_and_what_is_wide_scrolls_in_its_own_box(opened: list[dict[str, Any]]) -> None:
    for page in opened:
        assert page["scroll_width"] <= page["width"]
        assert (page["cut"], page["hidden"], page["tiny"]) == ([], [], [])


def test_the_first_screen_has_the_verdict_and_a_wide_one_the_losses(opened: list[dict[str, Any]]) -> None:
    for page in opened:
        assert page["verdict"] < HEIGHT / 2
        assert page["asked"] == min(WIDTHS) or page["images"][0]["bottom"] < HEIGHT


def test_figures_are_whole_and_their_smallest_letters_can_be_read(opened: list[dict[str, Any]]) -> None:
    for page in opened:
        assert len(page["images"]) == 1 if page["page"] == "live" else len(page["images"]) > 4
        for image in page["images"]:
            assert image["width"] / image["pixels"] * DPI * SMALL / 72 > LETTERS


def test_a_page_loads_nothing_and_that_of_a_run_under_way_alone_reloads_itself(opened: list[dict[str, Any]]) -> None:
    assert [page["loaded"] for page in opened] == [[]] * 4
    assert {(page["page"], page["refresh"]) for page in opened} == {("live", str(REFRESH_S)), ("report", None)}


def test_a_dark_page_is_dark_with_its_figures(opened: list[dict[str, Any]]) -> None:
    for page in opened:
        bright = float((np.asarray(Image.open(page["picture"]).convert("L")) > 128).mean())
        assert bright < 0.2 if page["dark"] else bright > 0.8
