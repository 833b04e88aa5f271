"""The user's command that runs when a run stops, fails or ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline import notify as notify_module
from nemo_upcycle.pipeline.markers import FAILED, STOPPED
from nemo_upcycle.pipeline.notify import checked_command, notify, notify_of_end


SCRIPT = """#!{python}
import os, sys
print("told")
with open({out!r}, "a") as out:
    about = " ".join(os.environ["NEMO_UPCYCLE_" + name] for name in ("EVENT", "STAGE", "DIR"))
    out.write(about + " " + " ".join(sys.argv[1:]) + "|" + sys.stdin.read())
"""


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """The file to which the command `tell` adds what it is told."""
    tell = tmp_path / "tell"
    tell.write_text(SCRIPT.format(python=sys.executable, out=str(tmp_path / "told")))
    tell.chmod(0o755)
    return tmp_path / "told"


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "pretrain"
    folder.mkdir(parents=True)
    return folder


def test_the_command_reads_the_message_and_the_event(told: Path, stage: Path) -> None:
    command = checked_command(f"{told.with_name('tell')} --to 'a b'", is_here=True)
    notify(command, STOPPED, stage, "The loss is NaN.")
    first, text = told.read_text().split("|")
    assert first == f"stopped pretrain {stage.parent} --to a b"
    assert text == f"{stage.parent}: pretrain stopped\nThe loss is NaN.\n"


def test_a_stop_is_told_once_until_the_stage_starts_again(told: Path, stage: Path) -> None:
    command = str(told.with_name("tell"))
    for _ in range(2):
        notify_of_end(command, FAILED, stage, "x")
    assert told.read_text().count("failed pretrain") == 1
    (stage / notify_module.NOTIFIED).unlink()
    notify_of_end(command, FAILED, stage, "x")
    assert told.read_text().count("failed pretrain") == 2


def test_a_folder_that_cannot_be_written_is_told(told: Path, stage: Path) -> None:
    notify_of_end(str(told.with_name("tell")), FAILED, stage / "missing", "x")
    assert "failed missing" in told.read_text()


def test_no_command_runs_nothing(stage: Path) -> None:
    assert checked_command("", is_here=True) == ""
    notify_of_end("", FAILED, stage, "x")
    assert not list(stage.iterdir())


@pytest.mark.parametrize(
    ("command", "why"),
    [("false", "ended with status 1"), ("/no/such", "did not start: No such file"), ("sleep 9", "took longer than")],
)
def test_a_command_that_fails_gives_a_warning(
    command: str, why: str, stage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify_module, "LIMIT_S", 0.2)
    notify(command, STOPPED, stage, "x")
    assert f"Warning: the command of notify {why}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("curl 'http", "Close each quote"),
        ("no-such-program x", "The program no-such-program of notify does not exist"),
        ("./plain x", "is not an executable file"),
        ("curl -H hf_abcdefghijklmnopqrstuvwxyzabcdefgh", "contains a secret"),
    ],
)
def test_a_wrong_command_is_refused_with_a_fix(
    command: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").touch()
    with pytest.raises(UpcycleError, match=text):
        checked_command(command, is_here=True)


def test_a_command_on_a_cluster_may_be_missing_here() -> None:
    assert checked_command("/cluster/tell 'a b'", is_here=False) == "/cluster/tell 'a b'"
