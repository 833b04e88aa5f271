"""The process that writes the report of an unfinished run as long as the launcher lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.live import REPORT_EVERY, watched
from tests.unit.reporting.conftest import run_dir
from tests.unit.reporting.test_live import start, under_way
from tests.waiting import wait_until


__all__ = ["run_dir", "under_way"]


@pytest.mark.slow
def test_a_live_report_says_how_the_run_ended(under_way: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPORT_EVERY, "60")
    page = under_way / "report.html"
    with watched(under_way):
        wait_until(lambda: page.is_file() and "Running: dense_ct" in page.read_text())
        start(under_way, "export", 3000)
        wait_until(lambda: "export, since" in page.read_text())
        for stage in ("dense_ct", "export"):
            (under_way / stage / "_ENDED").write_text("failed\n")
    assert "Nothing is running. Stage export is failed" in page.read_text()
    assert "refresh" not in page.read_text()


def test_none_is_written_where_the_user_wants_none(under_way: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPORT_EVERY, "0")
    with watched(under_way):
        pass
    monkeypatch.setenv(REPORT_EVERY, "often")
    with pytest.raises(UpcycleError, match=f"{REPORT_EVERY} is often"), watched(under_way):
        pass
    assert not (under_way / "report.html").exists()
