"""`nemo-upcycle start` as it is typed: one screen, files to edit, and all that is missing in one answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.start import choices
from tests.unit.cli.conftest import Command, refused
from tests.unit.start.conftest import texts_folder


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
    assert "there already, the same" in command.text(*words)


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    words = ["start", str(tmp_path), str(tmp_path / "nosuch"), "--trainer", "bridge"]
    error = str(refused(*words))
    assert error.startswith("3 mistakes:")
    assert all(word in error for word in ("config.json", "no such file or folder", "got NeMo alone"))


@pytest.mark.parametrize(("gpu", "said"), [("64", "'64' does not exist"), ("h100", "give --gpus N")])
def test_a_kind_of_gpus_needs_their_number(dense: Path, texts_folder: Path, gpu: str, said: str) -> None:
    words = ["start", str(dense), str(texts_folder), "--dir", str(texts_folder.parent / "run"), "--gpu", gpu]
    assert said in str(refused(*words))
