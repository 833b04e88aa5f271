"""`report`: a run's folder that lacks something is one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.cli.main import main
from nemo_upcycle.reporting.grid_evidence import EVIDENCE, write_evidence
from nemo_upcycle.reporting.grid_table import BEGIN, END
from tests.unit.reporting.conftest import run_dir
from tests.unit.reporting.grids import laptop_evidence


__all__ = ["run_dir"]


def test_a_metrics_line_without_tokens_is_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    capsys.readouterr()
    (run_dir / "pretrain/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert main(["report", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl:1: got" in error
    assert "expected one JSON object with step, tokens, seconds. Fix: delete the line" in error


def test_a_folder_of_something_else_is_not_sent_to_the_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}: got no pipeline.json" in error
    assert "dir" not in error.partition("Fix: ")[2]


@pytest.mark.full
def test_the_evidence_of_a_grid_becomes_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, folder = tmp_path / "laptop.md", tmp_path / "laptop"
    write_evidence(folder / EVIDENCE, laptop_evidence())
    page.write_text(f"# Does it pay?\n{BEGIN}\n{END}\n")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert "| moe - dense | " in page.read_text()
    (folder / EVIDENCE).write_bytes(b"")
    assert main(["report", str(folder)]) == 2
    assert EVIDENCE in capsys.readouterr().err
