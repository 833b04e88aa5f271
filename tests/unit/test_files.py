"""Outputs are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError, problem, unknown
from nemo_upcycle.files import output_folder, read_json, require_disk, write_json


def test_a_failed_block_leaves_nothing_and_keeps_the_old_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with output_folder(target) as folder:
        (folder / "a").write_text("first")

    def fail() -> None:
        with output_folder(target) as folder:
            (folder / "a").write_text("second")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_remains_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    remains = tmp_path / ".out.partial"
    remains.mkdir()
    (remains / "half").write_text("x")
    with output_folder(tmp_path / "out") as folder:
        assert not (folder / "half").exists()


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    (tmp_path / "a.json").write_text('{"x":')
    with pytest.raises(UpcycleError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UpcycleError, match=r"b\.json.*no such file"):
        read_json(tmp_path / "b.json")


def test_a_full_disk_is_told_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"disk space for the export.*expected at least 1048576\.00 GiB"):
        require_disk(tmp_path / "new" / "folder", 2**50, "the export")


def test_error_texts() -> None:
    assert problem("x", got=1, expected="2", fix="do it.") == "x: got 1, expected 2. Fix: do it."
    assert "Did you mean" not in unknown("x", "zzz", ["abc"])
