"""Test the page of a running chain and the report of a run in a real browser.

Both are opened at the width of a phone and at the width of a desktop, in light and in dark colors.
"""

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
from tests.unit.reporting.conftest import EVALUATIONS, metrics, write_run
from tests.waiting import HANG_S


ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-browser/bin/python"
WIDTHS = {420, 1280}
#: Height (px) of the part of a page that is visible first, and minimum height (px) of the letters in figures.
HEIGHT, LETTERS = 900, 9
#: Folder that keeps the screenshots for inspection.
PICTURES = ROOT / "runs/test-browser"

UNBROKEN = "unbroken" * 30
LAYERS = {"load_cv": [0.1, 0.3], "load_entropy": [0.9, 0.95], "dropped": [0.0, 0.1], "dead_experts": [1, 0]}

pytestmark = [
    pytest.mark.full,
    pytest.mark.weekly,
    pytest.mark.skipif(not PYTHON.is_file(), reason="`make test-in ENV=browser` makes the browser's environment"),
]


def _write_wide_run(folder: Path) -> Path:
    """Write a run whose report has long names, long words, wide tables and all figures, which a page could cut off."""
    write_run(folder)
    (folder / "command.txt").write_text(f"nemo upcycle pipeline --factory {UNBROKEN} dir={folder} --yes\n")
    for name, value in EVALUATIONS.items():
        texts = dict.fromkeys(("document", "prompt", "goes_on", "continuation"), UNBROKEN)
        (folder / f"evaluation/{name}.json").write_text(json.dumps(value | {"samples": [texts]}))
    for stage in ("pretrain", "dense_ct"):
        lines = metrics(stage)[::2]  # every second line belongs to a step
        many = [{"step": 0, "validation_loss": 4.0}]
        for step in range(1, 401):
            line = lines[(step - 1) % 3] | {"step": step, "tokens": 1000 * step, "loss": 3 + 1 / step}
            many.append(line | ({"router": LAYERS} if "expert_load" in line else {}))
        score = {"heldout_perplexity/bits_per_byte": {"value": 1.5, "stderr": 0.01}}
        many += [{"step": 400, "validation_loss": 3.1}, {"step": 400, "evaluation": score}]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in many))
    return folder


@pytest.fixture(scope="module", params=["light", "dark"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The measurements of both pages at each width."""
    run_dir = _write_wide_run(tmp_path_factory.mktemp("browser") / f"run_{'of_a_long_name' * 6}")
    pages = [run_dir.parent / name for name in ("live.html", "report.html")]  # the only files in their folder
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


def test_wide_content_scrolls_in_its_own_box(opened: list[dict[str, Any]]) -> None:
    for page in opened:
        assert page["scroll_width"] <= page["width"]
        assert (page["cut"], page["hidden"], page["tiny"]) == ([], [], [])


def test_the_first_screen_has_the_verdict(opened: list[dict[str, Any]]) -> None:
    for page in opened:
        assert page["verdict"] < HEIGHT / 2
        assert page["asked"] == min(WIDTHS) or page["images"][0]["bottom"] < HEIGHT


def test_figures_are_whole_and_their_smallest_letters_can_be_read(opened: list[dict[str, Any]]) -> None:
    for page in opened:
        assert len(page["images"]) == 1 if page["page"] == "live" else len(page["images"]) > 4
        for image in page["images"]:
            assert image["width"] / image["pixels"] * DPI * SMALL / 72 > LETTERS


def test_only_a_running_page_reloads_itself(opened: list[dict[str, Any]]) -> None:
    assert [page["loaded"] for page in opened] == [[]] * 4
    assert {(page["page"], page["refresh"]) for page in opened} == {("live", str(REFRESH_S)), ("report", None)}


def test_a_dark_page_is_dark_with_its_figures(opened: list[dict[str, Any]]) -> None:
    for page in opened:
        bright = float((np.asarray(Image.open(page["picture"]).convert("L")) > 128).mean())
        assert bright < 0.2 if page["dark"] else bright > 0.8
