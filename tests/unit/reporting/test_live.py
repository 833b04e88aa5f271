"""The page of an unfinished run is written from the run's folder again and again, until the report itself exists."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from nemo_upcycle.reporting import live
from nemo_upcycle.reporting.progress import read_progress, stage_states, training_line
from tests.unit.reporting.conftest import SETTINGS, lengthen
from tests.waiting import wait_until


def start(folder: Path, stage: str, at_s: float, needs: tuple[str, ...] = ()) -> None:
    """Write the files of a stage's start. If the stage has a success marker, record `needs` in the marker."""
    (folder / stage).mkdir(exist_ok=True)
    (folder / stage / "_STARTED.json").write_text("{}")
    os.utime(folder / stage / "_STARTED.json", (at_s, at_s))
    if (marker := folder / stage / "_SUCCESS.json").is_file():
        inputs = dict.fromkeys((f"stage {name}" for name in needs), "")
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"inputs": inputs}))


@pytest.fixture
def under_way(run_dir: Path) -> Path:
    """A run with a trained MoE, and a baseline at step 3 of 10."""
    (run_dir / "dense_ct/_SUCCESS.json").unlink()
    (run_dir / "dense_ct/training.json").write_text(json.dumps(SETTINGS | {"max_steps": 10}))
    lines = run_dir / "pretrain/metrics.jsonl"
    lines.write_text('{"step": 0, "validation_loss": 4.5}\n' + lines.read_text())
    start(run_dir, "pretrain", 1000)
    start(run_dir, "dense_ct", 2000)
    return run_dir


def test_the_page_shows_the_present_state(under_way: Path) -> None:
    text = live.compose(under_way, read_progress(under_way), price=2.0)
    assert text.split("\n\n")[1:3] == [
        "Tiny-100M, 100.0M parameters → MoE of 4 experts, top-2: 300.0M, 150.0M active per token.",
        "Running: dense_ct, step 3 of 10, about 0:14 left in this stage.",  # 7 steps of 2 s
    ]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if line[:2] == "| "}
    assert rows["MoE, validation loss after 3,000 tokens"] == ["3.250", "parent 4.500, baseline 3.750 |"]
    assert rows["MoE, training loss at step 3"] == ["2.750", "at step 1 3.250, baseline 3.250 |"]
    assert rows["Load of the busiest expert now (1: balanced)"][0] == "1.20"
    assert rows["tokens per second, dense_ct"] == ["500", "2 ranks, CPU |"]
    assert rows["rank-hours of the trainings"][1].endswith(" at 2 per hour |")
    assert rows["pretrain"] == ["done", "1:01 |"]
    assert "imbalanced" not in text, "after 3 steps nothing is alarming"
    assert "imbalanced" in live.compose(under_way, read_progress(lengthen(under_way)))


def test_the_page_says_if_nothing_is_running(under_way: Path) -> None:
    (under_way / "dense_ct/_ENDED").write_text("failed\n")
    text = live.compose(under_way, read_progress(under_way))
    assert "Nothing is running. Stage dense_ct is failed, and the same command resumes it." in text
    for path in under_way.glob("*/*.jsonl"):
        path.unlink()
    for path in (*under_way.glob("*/_*"), under_way / "receipt.json"):
        path.unlink()
    text = live.compose(under_way, read_progress(under_way))
    assert "Tiny-100M → MoE, with the recipe smollm2_135m_e8t2.\n\nNo stage has started yet." in text
    start(under_way, "import", 3000)
    text = live.compose(under_way, read_progress(under_way), is_last=True)
    assert "Not finished: import, since " in text
    assert "for the last time" in text


def test_a_repeated_stage_repeats_its_readers(under_way: Path) -> None:
    for stage, needs in (("export", ("dense_ct",)), ("report", ("dense_ct", "export"))):
        (under_way / stage).mkdir()
        (under_way / stage / "_SUCCESS.json").write_text(json.dumps({"stage": stage, "seconds": 1.0, "outputs": {}}))
        start(under_way, stage, 1500, needs)
    states = [(state.name, state.how) for state in stage_states(under_way)]
    assert states == [("pretrain", "done"), ("dense_ct", "running")]
    assert not read_progress(under_way).is_over


def test_a_line_tells_how_far_a_training_is(under_way: Path) -> None:
    with (under_way / "dense_ct/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert training_line(under_way / "dense_ct") == "step 3/10  left 0:14  loss 3.250  500 tokens/s  validation 3.750"
    assert training_line(under_way / "pretrain").endswith("  validation 3.250, 4.500 at first")
    assert training_line(under_way / "pretrain", since_s=4e9) == training_line(under_way / "export") == ""


def test_the_page_is_written_until_the_report_is_there(under_way: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_POLL_S", 0.01)
    page = under_way / "report.html"
    watching = threading.Thread(target=live.watch, args=(under_way,))
    watching.start()
    wait_until(lambda: page.is_file() and "Running: dense_ct" in page.read_text())
    assert '<meta http-equiv="refresh" content="30">' in page.read_text()
    start(under_way, "report", 3000)  # the report stage writes the page itself, and the watching ends
    wait_until(lambda: read_progress(under_way).is_over)
    page.write_text("the report")
    (under_way / "report/_SUCCESS.json").write_text('{"stage": "report", "outputs": {}}')
    watching.join()
    assert page.read_text() == "the report"
    assert not [path for path in under_way.iterdir() if path.name.startswith(".")]
