"""`convert`: mistakes that show in the command line alone, and what is told of the result."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemo_upcycle.cli.common import file_size
from nemo_upcycle.cli.main import main
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MODEL_MARKER
from tests.models import write_llama
from tests.parents import write_moe
from tests.tiers import quick
from tests.unit.convert.exports import _Usage


SPEC = ("--experts", "2", "--top-k", "2")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "dense", layers=1)


def test_a_type_on_disk_that_rounds_is_told(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(dense), str(tmp_path / "moe"), *SPEC, "--dtype", "bfloat16"]) == 0
    assert "not exact: float32 weights are rounded to bfloat16 (model.embed" in capsys.readouterr().out
    assert main(["convert", str(dense), str(tmp_path / "same"), *SPEC]) == 0
    assert "computes the parent's function" in capsys.readouterr().out


def test_more_parents_than_copies_are_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--branch", str(dense), "--branch", str(dense)]
    assert main(["convert", str(dense), str(tmp_path / "moe"), *more, *SPEC]) == 2
    assert "dense sources: got 3, expected at most 2" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("kind", "given"), [("Glm4Moe", ["--top-k=2"]), ("Mixtral", ["--top-k=1", "--router-order=softmax_topk"])]
)
def test_a_parent_with_experts_is_converted_once_the_fix_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, given: list[str]
) -> None:
    parent = write_moe(tmp_path / "dense", kind=kind, num_experts_per_tok=1)
    command = ["convert", str(parent), str(tmp_path / "moe"), "--experts", "8", *given]
    assert main(command) == 2
    fix = capsys.readouterr().err.strip().removesuffix(".").partition("Fix: set ")[2].split(", ")
    assert main([*command, *fix, "--router-std", "0"]) == 0


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
        ("loop/moe", "got links that form a loop, expected a path"),
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


@pytest.mark.parametrize("redirect", quick([">&-", "2>&-"], "2>&-"))
def test_a_closed_output_or_a_poor_terminal_stops_nothing(dense: Path, tmp_path: Path, redirect: str) -> None:
    command = _command(dense, tmp_path / "m\u00f6e")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(f"{command} {redirect}", shell=True, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "m\u00f6e/config.json").is_file()


@pytest.mark.slow
def test_a_file_larger_than_the_system_takes(dense: Path, tmp_path: Path) -> None:
    command = f"ulimit -f 100; {_command(dense, tmp_path / 'moe')}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False, text=True)
    assert done.returncode == 2
    assert (
        "got a file too large for it, expected files of that size: see ulimit -f, or lower --max-shard-size"
        in done.stderr
    )
    assert not (tmp_path / "moe").exists()


def test_granular_models_are_exact_with_float32_routing_and_it_says_so(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(dense), str(tmp_path / "moe"), "--experts", "8", "--top-k", "4", "--granularity", "2"]
    assert main(command) == 0
    assert "computes the parent's function\nwith router logits in float32: in 16 bits" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs_float32_routing"] is True
    assert main(["convert", str(dense), str(tmp_path / "whole"), *SPEC, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs_float32_routing"] is False


def test_a_stopped_run_keeps_files_of_the_size_asked_for(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(dense), str(tmp_path / "moe"), *SPEC, "--max-shard-size", "60 KB"]
    fsync, calls = os.fsync, []

    def stop(file: int) -> None:
        calls.append(file)
        if len(calls) == 5:
            raise KeyboardInterrupt
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        assert main(command) == 130
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["max_shard_bytes"] == 60_000
    assert 3 <= done["files_kept"] < done["files"]
    assert max(path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors")) < 70_000


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "-1GB", "5 Gigs", "", "1e3GB", "9999999GB", "5G"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        file_size(size)
    assert caught.value.subject == "size of a file"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--experts", "1000000000"], "--experts: got 1000000000, expected a whole number, 2 to 2048"),
        (["--experts", "100000", "--granularity", "1000"], "--experts: got 100000"),
        (["--experts", "2048", "--top-k", "2"], "disk space for convert moe in "),
        (["--top-k", "1"], "--top-k: got 1, expected 2 or more with --router-order=topk_softmax"),
    ],
)
def test_what_is_out_of_reach_is_refused_and_leaves_nothing(
    dense: Path,
    tmp_path: Path,
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**8, 10**8 - 10**7, 10**7))
    assert main(["convert", str(dense), str(tmp_path / "moe"), *words]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("content", ["{", "[]", '{"companions": 5}', '{"companions": [{}]}', "\x00"])
def test_a_damaged_marker_asks_for_the_run_not_for_the_file(
    dense: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(dense), str(tmp_path / "moe"), *SPEC]
    assert main(command) == 0
    (tmp_path / "moe" / MODEL_MARKER).write_text(content)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"{MODEL_MARKER}: got a damaged file, expected the marker of a finished folder. Fix: choose another" in told
    assert "restore it" not in told


def test_kept_files_are_reported_with_the_command_that_checks_them(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(dense), str(tmp_path / "moe"), *SPEC]
    assert main(command) == 0
    file = tmp_path / "moe/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 64
    file.write_bytes(content)
    capsys.readouterr()
    assert main(command) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "kept from before" in line]
    told, _, verify = line.partition("nemo-upcycle ")
    assert told == "1 of 1 files kept from before, by size and header; to check their content: "
    assert main(shlex.split(verify)) == 1
    assert "equal: no" in capsys.readouterr().out
