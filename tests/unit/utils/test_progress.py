"""The progress report stays sensible if there is more work than expected."""

from __future__ import annotations

import pytest

from nemo_upcycle.utils import progress


def test_more_work_than_was_expected_is_no_negative_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with progress.ProgressLine("questions", total=153) as line:
        line.advance(200)
    assert "questions: 200/200 (100%)" in (said := capsys.readouterr().err)
    assert "ETA -" not in said
