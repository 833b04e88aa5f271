"""The command line itself: quick start, help for every command, and a clean end on signals and closed streams."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli.main import COMMANDS, examples_of, main
from nemo_upcycle.utils.cache import CACHE_VARIABLE
from nemo_upcycle.utils.files import MARKER
from tests.unit.cli.conftest import Command, refused, write_config
from tests.waiting import HANG_S


ROOT = Path(__file__).parents[3]


def _help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_begins_with_examples_that_parse(capsys: pytest.CaptureFixture[str], name: str) -> None:
    first, *others = examples_of(name)
    top = _help(capsys, name, "--help").partition("\noptions:")[0].partition("positional arguments:")[0]
    assert [example for example in (first, *others) if example not in top] == []
    assert str(refused(name, "one", "two", "three", "four")).partition("`")[2].startswith(f"{first}`")
    parser = argparse.ArgumentParser()
    importlib.import_module(f"nemo_upcycle.cli.{name}").add_arguments(parser)
    for example in (first, *others):
        program, command, *words = shlex.split(example)
        assert (program, command) == ("nemo-upcycle", name)
        _, unknown = parser.parse_known_args(words)
        assert [word for word in unknown if "=" not in word] == []  # KEY=VALUE may come anywhere
    assert [word for word in first.split() if word.startswith("examples/") and not (ROOT / word).exists()] == []


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys, "--help")
    assert all(f"\n    {name}" in text for name in COMMANDS)
    assert text == _help(capsys, "help")
    assert _help(capsys, "plan", "--help") == _help(capsys, "help", "plan")
    assert main([]) == 2
    assert "usage: nemo-upcycle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "heavy"),
    [
        ([f"{name} --help" for name in COMMANDS], "torch transformers"),
        (["start asset://smollm2-135m --gpus 2 --dir FOLDER/run"], "torch numpy"),
        (["plan --recipe llama3_8b_e8t2 --gpus 128 --json"], "torch"),
        (["plan --model asset://smollm2-135m --experts 8 --gpus 8 --json"], "torch numpy"),
    ],
)
def test_it_answers_without_what_takes_time_to_import(tmp_path: Path, typed: list[str], heavy: str) -> None:
    made = tmp_path / "cache/dense/smollm2-135m"  # an asset that an earlier command downloaded
    made.mkdir(parents=True)
    shutil.copy(f"{write_config(tmp_path)}/config.json", made)
    (made / MARKER).touch()
    code = (
        "import sys\nfrom nemo_upcycle.cli.main import main\n"
        "for typed in sys.argv[2:]:\n"
        "    try: assert main(typed.split()) < 2\n    except SystemExit: pass\n"
        "assert not {*sys.argv[1].split()} & {*sys.modules}\n"
    )
    words = [f"{heavy} megatron nemo nemo_run lightning", *(line.replace("FOLDER", str(tmp_path)) for line in typed)]
    variables = os.environ | {CACHE_VARIABLE: str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=HANG_S, env=variables)
    assert done.returncode == 0, done.stderr


def _command(*words: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command as a process whose output this process reads."""
    command = [str(Path(sys.executable).parent / "nemo-upcycle"), *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=ROOT, text=True, **streams)


def _answers(dense: Path, moe: Path) -> list[tuple[str, ...]]:
    """List two commands: one that writes a model, and one that only prints its answer."""
    return [("convert", str(dense), str(moe)), ("plan", "--recipe", "llama3_8b_e8t2", "--gpus", "64")]


@pytest.mark.slow
@pytest.mark.full
def test_a_reader_that_goes_does_not_fail_the_work(dense: Path, tmp_path: Path, command: Command) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    for words in _answers(dense, tmp_path / "moe"):
        with _command(*words, stdout=writes) as process:
            error = process.communicate()[1]
        assert process.returncode == 0, error
        assert "rror" not in error
    os.close(writes)
    command.text("verify", str(dense), str(tmp_path / "moe"), "--weights-only")


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_reports_an_output_without_room(dense: Path, tmp_path: Path, command: Command) -> None:
    moe = tmp_path / "moe"
    for words, status in zip(_answers(dense, moe), (0, 2), strict=True):
        with open("/dev/full", "w") as full, _command(*words, stdout=full) as process:
            error = process.communicate()[1]
        assert process.returncode == status
        assert error.startswith("error: Standard output cannot be written: No space left on device")
        assert (f"{moe} itself is complete" in error) is (status == 0)
    command.text("verify", str(dense), str(moe), "--weights-only")


def test_a_crash_is_no_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def crash(args: argparse.Namespace) -> int:
        raise RuntimeError("strides")

    monkeypatch.setattr("nemo_upcycle.cli.doctor.run", crash)
    assert main(["doctor"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-2]) == ("Traceback (most recent call last):", "RuntimeError: strides")
    assert lines[-1].startswith("error: the command failed unexpectedly (RuntimeError)")


@pytest.mark.parametrize(("sent", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_with_a_word(sent: str, status: int) -> None:
    code = (
        "import os, signal, sys\n"
        "from nemo_upcycle.cli import convert, main\n"
        f"convert.run = lambda args: (os.kill(os.getpid(), signal.{sent}), signal.pause())\n"
        "sys.exit(main.main(['convert', 'a', 'b']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (status, "stopped; run again to resume")


def test_ctrl_c_as_the_command_starts_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from nemo_upcycle.cli.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_little_is_imported_before_ctrl_c_is_silent() -> None:
    code = "import sys, nemo_upcycle.cli.entry; print(*(name for name in sys.modules if 'nemo_upcycle.' in name))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    own = {f"nemo_upcycle.{name}" for name in ("package_info", "utils", "utils.checkout", "cli", "cli.entry")}
    assert set(done.stdout.split()) == own
