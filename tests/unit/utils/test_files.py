"""Outputs are complete or absent."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import (
    MARKER,
    output_folder,
    read_json,
    read_text,
    require_apart,
    write_json,
)


def test_a_failed_block_leaves_nothing_and_keeps_the_old_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with output_folder(target) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(RuntimeError):
        _stop(target, None, RuntimeError(), kept=False)
    assert (target / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(UpcycleError, match="is being written by another process"), output_folder(tmp_path / "out"):
            pass
        assert (folder / "a").read_text() == "first"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_file_system_without_locks_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with output_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize("marker", [{"made_by": "another"}, {}, None])
def test_only_what_the_same_maker_made_is_replaced(tmp_path: Path, marker: dict[str, str] | None) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "weights").write_text("of days")
    if marker is not None:
        write_json(target / MARKER, marker)
    why = "a finished folder that maker did not make" if marker is not None else "files that maker did not write"
    with pytest.raises(UpcycleError, match=why), output_folder(target, "maker"):
        pass
    assert (target / "weights").read_text() == "of days"
    write_json(target / MARKER, {"made_by": "maker"})
    with output_folder(target, "maker") as folder:
        (folder / "a").write_text("new")
    assert [path.name for path in target.iterdir()] == ["a"]


def test_an_empty_folder_is_filled_that_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with output_folder(Path(), "maker") as folder:
        (folder / "a").write_text("x")
    assert list(tmp_path.rglob("*")) == [tmp_path / "here", tmp_path / "here/a"]


def test_a_mount_point_is_refused_before_the_work() -> None:
    with (
        pytest.raises(UpcycleError, match=r"/proc is a mount point.*Name a folder inside it"),
        output_folder(Path("/proc")),
    ):
        pass


@pytest.mark.parametrize("target", ["run/ck", "run", "run/ck/hf", "run/link"])
def test_a_result_lies_apart_from_what_it_is_made_of(tmp_path: Path, target: str) -> None:
    (tmp_path / "run/ck").mkdir(parents=True)
    (tmp_path / "run/link").symlink_to(tmp_path / "run/ck")
    with pytest.raises(UpcycleError, match=rf"(is the same folder as|lies inside) {tmp_path}/run/ck"):
        require_apart(tmp_path / target, tmp_path / "run/ck")
    require_apart(tmp_path / "run/hf", tmp_path / "run/ck")


@pytest.mark.parametrize(
    ("read", "content", "fix"),
    [
        *((read_json, content, "restore the file") for content in (b'{"x":', b"[" * 100_000, b"1" * 5000, b"\xff")),
        (read_json, None, "check the path"),
        (read_text, b"\xff", "convert it with iconv"),
        (read_text, None, "check the path"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_helps(
    tmp_path: Path, read: Callable[[Path], object], content: bytes | None, fix: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UpcycleError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert fix in caught.value.fix


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}


_KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from nemo_upcycle.utils.files import output_folder
rename, target = Path.rename, Path(sys.argv[1])
def kill_after(self, other):
    rename(self, other)
    if self == target:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = kill_after
with output_folder(target) as folder:
    (folder / "a").write_text("second")
"""


def test_a_kill_between_old_and_new_loses_neither(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with output_folder(target) as folder:
        (folder / "a").write_text("first")
    killed = subprocess.run([sys.executable, "-c", _KILLED_BETWEEN, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.replaced/a").read_text() == "first"
    assert (tmp_path / ".out.partial/a").read_text() == "second"
    with output_folder(target) as folder:  # restores the old result first
        assert (target / "a").read_text() == "first"
        (folder / "b").write_text("third")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_result_comes_back_where_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "out", Path.rename
    with output_folder(target) as folder:
        (folder / "a").write_text("first")

    def refuse(self: Path, other: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"), output_folder(target) as folder:
        (folder / "a").write_text("second")
    assert (target / "a").read_text() == "first"


def _stop(target: Path, plan: int | None, error: BaseException, *, kept: bool) -> None:
    with output_folder(target, plan=plan) as folder:
        assert (folder / "half").is_file() is kept
        (folder / "half").write_text("x")
        raise error


def test_work_of_the_same_plan_is_gone_on_with(tmp_path: Path) -> None:
    for plan, kept in ((1, False), (1, True), (2, False)):
        with pytest.raises(KeyboardInterrupt):
            _stop(tmp_path / "out", plan, KeyboardInterrupt(), kept=kept)
    with pytest.raises(UpcycleError, match="a mistake"):
        _stop(tmp_path / "out", 2, UpcycleError("a mistake of the user's"), kept=True)
    assert list(tmp_path.iterdir()) == []
    with output_folder(tmp_path / "out", plan=2) as folder:
        (folder / "a").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
