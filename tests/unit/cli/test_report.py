"""`nemo-upcycle report` for a run, and for the evidence of a grid."""

from __future__ import annotations

from pathlib import Path

from tests.unit.cli.conftest import Command, refused
from tests.unit.reporting.conftest import run_dir


__all__ = ["run_dir"]


def test_watching_ends_with_the_report_of_the_run(run_dir: Path, command: Command) -> None:
    (run_dir / "report").mkdir()
    (run_dir / "report/_STARTED.json").write_text("{}")
    (run_dir / "report/_SUCCESS.json").write_text('{"stage": "report", "outputs": {}}')
    assert command.text("report", str(run_dir), "--watch").endswith("report.html")
    assert not (run_dir / "report.html").exists()  # the report stage writes this file
    assert f"{run_dir.parent} has no pipeline.json" in str(refused("report", str(run_dir.parent), "--watch"))


def test_does_not_send_other_folders_to_the_pipeline(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    error = refused("report", str(tmp_path))
    assert str(error).startswith(f"{tmp_path} has no pipeline.json")
    assert "dir" not in error.fix
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/pipeline.json").touch()
    assert refused("report", str(tmp_path)).fix == f"name {tmp_path}/mine"
