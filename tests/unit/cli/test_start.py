"""`nemo-upcycle start` on the command line: one screen, files to edit, and all missing things in one answer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_upcycle.cli.main import main
from nemo_upcycle.cli.start import choices
from tests.unit.cli.conftest import Command, refused
from tests.unit.cli.start.conftest import texts_folder


__all__ = ["texts_folder"]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_has", lambda module: module == "nemo")
    monkeypatch.setattr("nemo_upcycle.cli.start.find_spec", lambda name: name)
    monkeypatch.setattr("nemo_upcycle.cli.start.shortages", lambda *_: ())


def test_it_writes_two_files_and_says_how_to_go_on(dense: Path, texts_folder: Path, command: Command) -> None:
    folder = texts_folder.parent / "run"
    words = ["start", str(dense), str(texts_folder), "--gpus", "0", "--dir", str(folder), "--experts", "4"]
    answer = command.values(*words)
    assert sorted(path.name for path in folder.iterdir()) == ["blend.yaml", "recipe.py"]
    assert answer["choices"]["experts"] == {"value": "4, top-2", "because": "asked for"}
    assert answer["command"].endswith("upcycle pipeline --factory recipe.chain --yes")
    assert "already there, unchanged" in command.text(*words)


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    words = ["start", str(tmp_path), str(tmp_path / "nosuch")]
    error = str(refused(*words))
    assert error.startswith("2 mistakes:")
    assert all(word in error for word in ("config.json", "nosuch do not exist"))


@pytest.mark.parametrize(
    ("gpu", "said"), [("64", "'64' does not exist"), ("h100", "--gpu h100 needs the number of GPUs. Add --gpus N")]
)
def test_a_kind_of_gpus_needs_their_number(dense: Path, texts_folder: Path, gpu: str, said: str) -> None:
    words = ["start", str(dense), str(texts_folder), "--dir", str(texts_folder.parent / "run"), "--gpu", gpu]
    assert said in str(refused(*words))


def test_gpus_that_are_elsewhere_are_never_started_here(dense: Path, texts_folder: Path, command: Command) -> None:
    words = ["start", str(dense), str(texts_folder), "--gpus", "64", "--dir", str(texts_folder.parent / "run")]
    assert command.values(*words)["command"].endswith(" run.executor.container_image=IMAGE --dryrun")
    error = str(refused(*words, "--yes"))
    assert error.startswith("--yes needs 64 GPUs, and this machine has 0. Type `PYTHONPATH=")


def test_a_folder_of_another_start_is_forecast_and_compared(
    dense: Path, texts_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["start", str(dense), str(texts_folder), "--gpus", "0", "--dir", str(texts_folder.parent / "run")]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--steps", "7"]) == 2
    said = capsys.readouterr()
    assert "memory  " in said.out
    assert re.search(r"^-.*max_steps=10\b.*\n\+.*max_steps=7\b", said.out, re.MULTILINE)
    assert "run has recipe.py with other content" in said.err
    assert "upcycle pipeline --factory recipe.chain --dryrun" in said.err
