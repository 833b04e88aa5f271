"""NeMo chains that are refused or stopped after they began, and commands that only NeMo handles."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nemo_upcycle.utils.files import in_use
from tests.contract.mistakes import DEMO
from tests.distributed.ranks import run_ranks, server
from tests.fifo import held_by_reader
from tests.functional.tiny import SEQUENCE, SIZES, write_parent
from tests.functional.typed import Answer, type_commands
from tests.waiting import HANG_S


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parents, and a blend with the same text in all splits."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("tiny", "other"):
        write_parent(folder / name)
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text("the state of our union")
    (folder / "same.yaml").write_text("sources: {mine: {train: [a.txt], validation: [b.txt], heldout: [c.txt]}}\n")
    return folder


def _type(command: list[str], folder: Path, files: Path) -> Answer:
    ((answer,),) = run_ranks(type_commands, 1, [command], str(folder), str(files), process_group=False)
    return answer


def test_nemos_own_recipes_are_left_to_nemo(files: Path, tmp_path: Path) -> None:
    answer = _type(["llm", "pretrain", "--factory", "llama3_8b", "trainer.max_step=3", "--yes"], tmp_path, files)
    assert answer.status == 1
    assert "No parameter named 'max_step'" in answer.text


def _on_tiny_parent(files: Path, folder: Path) -> list[str]:
    """Return a command with a mistake that is found only when texts are read: all splits have the same text."""
    sizes = [f"pretrain.model.config.{name}={value}" for name, value in SIZES.items()]
    data = [f"pretrain.data.seq_length={SEQUENCE}", f"data={files}/same.yaml"]
    command = [*DEMO.split(), f"dir={folder}", f"dense={files}/tiny", "dense_ct=None"]
    return [*command, *sizes, *data, "--yes"]


@pytest.mark.full
def test_a_mistake_inside_a_stage_ends_in_status_2(files: Path, tmp_path: Path) -> None:
    command = _on_tiny_parent(files, tmp_path / "run")
    answer = _type(command, tmp_path, files)
    assert answer.status == 2, answer.text
    last = answer.text.splitlines()[-1]
    assert last.startswith("[data] Source mine has ")
    assert "needs more than one sequence" in last
    assert "Traceback" not in answer.text
    assert not (tmp_path / "run/upcycle").exists()
    other = [word.replace("/tiny", "/other") for word in command]
    answer = _type(other, tmp_path, files)
    assert answer.status == 2, answer.text
    assert "changed after its work started: stage import has other settings" in answer.text
    assert answer.written == []


def test_a_second_run_in_the_same_folder_is_refused(files: Path, tmp_path: Path) -> None:
    command = _on_tiny_parent(files, tmp_path / "run")
    with in_use(tmp_path / "run"):
        answer = _type(command, tmp_path, files)
    assert answer.status == 2, answer.text
    assert f"{tmp_path / 'run'} is in use by another run" in answer.text
    assert answer.written == []


def test_ctrl_c_during_the_checks_ends_them_at_once(files: Path, tmp_path: Path) -> None:
    """The blend is a pipe that nobody writes to, so the checks never end."""
    os.mkfifo(tmp_path / "slow.yaml")
    command = _on_tiny_parent(files, tmp_path / "run")
    command[command.index(f"data={files}/same.yaml")] = f"data={tmp_path}/slow.yaml"
    arguments = ([command], str(tmp_path), str(files))
    process = server().Process(target=type_commands, args=arguments)
    process.start()
    with held_by_reader(tmp_path / "slow.yaml"):
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(HANG_S)
    assert process.exitcode == -signal.SIGINT
    assert not (tmp_path / "run").exists()
