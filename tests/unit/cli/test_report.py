"""`report`: a run's folder that lacks something is one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.cli.main import main
from tests.unit.reporting.conftest import run_dir


__all__ = ["run_dir"]


def test_a_metrics_line_without_tokens_is_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    capsys.readouterr()
    (run_dir / "pretrain/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert main(["report", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl:1: got" in error
    assert "expected one JSON object with step, tokens, seconds. Fix: delete the line" in error
