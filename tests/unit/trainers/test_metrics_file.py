"""A resumed run, and the lines that the earlier run wrote."""

from __future__ import annotations

from pathlib import Path

from nemo_upcycle.trainers.metrics_file import keep_until


def test_resume_deletes_lines_of_repeated_steps_and_cut_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.5}', '{"step": 3, "loss": 2.0}', '{"step": 4, "lo']
    path.write_text("\n".join(lines))
    keep_until(path, 2)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    keep_until(tmp_path / "absent.jsonl", 2)
