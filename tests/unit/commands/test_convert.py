"""`convert`: mistakes that show in the command line alone, and what is told of the result."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemo_upcycle.cli import main
from tests.models import write_llama


SPEC = ("--experts", "2", "--top-k", "2")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "dense", layers=1)


def test_a_type_on_disk_that_rounds_is_told(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(dense), str(tmp_path / "moe"), *SPEC, "--dtype", "bfloat16"]) == 0
    assert "not exact: float32 weights are rounded to bfloat16 (model.embed" in capsys.readouterr().out
    assert main(["convert", str(dense), str(tmp_path / "same"), *SPEC]) == 0
    assert "computes the dense function" in capsys.readouterr().out


def test_more_parents_than_copies_are_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--branch", str(dense), "--branch", str(dense)]
    assert main(["convert", str(dense), str(tmp_path / "moe"), *more, *SPEC]) == 2
    assert "dense sources: got 3, expected at most 2" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_a_source_in_float64_asks_for_a_type(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = dense / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert main(["convert", str(dense), str(tmp_path / "moe"), *SPEC]) == 2
    assert "Fix: add --dtype float32" in capsys.readouterr().err


def test_the_current_folder_will_do(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["convert", str(dense), ".", *SPEC]) == 0
    assert str(tmp_path / "here") in capsys.readouterr().out
    assert (tmp_path / "here/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("file/moe", "Not a directory, expected access and room. Fix: a part of the path is a file"),
        ("x" * 300, "File name too long, expected access and room. Fix: choose a shorter name"),
        ("loop/moe", "got links that go in a circle, expected a path"),
        ("dense/moe", "got one inside the other, expected a folder apart from"),
    ],
)
def test_where_nothing_can_be_written_says_what_to_do(
    dense: Path, tmp_path: Path, output: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main(["convert", str(dense), str(tmp_path / output), *SPEC]) == 2
    assert words in capsys.readouterr().err


def _command(dense: Path, output: Path) -> str:
    return shlex.join([sys.executable, "-m", "nemo_upcycle.cli", "convert", str(dense), str(output), *SPEC])


@pytest.mark.parametrize("redirect", [">&-", "2>&-"])
def test_a_closed_output_or_a_poor_terminal_stops_nothing(dense: Path, tmp_path: Path, redirect: str) -> None:
    command = shlex.join(
        [sys.executable, "-m", "nemo_upcycle.cli", "convert", str(dense), str(tmp_path / "m\u00f6e"), *SPEC]
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(f"{command} {redirect}", shell=True, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "m\u00f6e/config.json").is_file()


def test_a_file_larger_than_the_system_takes(dense: Path, tmp_path: Path) -> None:
    command = shlex.join(
        [sys.executable, "-m", "nemo_upcycle.cli", "convert", str(dense), str(tmp_path / "moe"), *SPEC]
    )
    done = subprocess.run(["bash", "-c", f"ulimit -f 100; {command}"], capture_output=True, check=False, text=True)
    assert done.returncode == 2
    assert "got a file too large for it, expected files of that size: see ulimit -f, or lower --max-shard-size" in done.stderr
    assert not (tmp_path / "moe").exists()
