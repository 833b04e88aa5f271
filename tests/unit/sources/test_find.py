"""Check a model's address without fetching the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources import resolve
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.sources.resolve import open_dense
from tests.models import write_llama, write_tokenizer


def test_a_configuration_alone_describes_a_parent(tmp_path: Path) -> None:
    whole = write_tokenizer(write_llama(tmp_path / "whole"))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((whole / "config.json").read_bytes())
    assert Parent(str(alone)).configured == Parent(str(whole)).whole
    with pytest.raises(UpcycleError, match=r"Folder .* has no tokenizer \(tokenizer\.json"):
        _ = Parent(str(alone)).whole
    (alone / "model.safetensors.index.json").write_text("{}")  # incomplete weights
    with pytest.raises(UpcycleError):
        _ = Parent(str(alone)).configured
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UpcycleError, match=r"model\.safetensors"):
        _ = Parent(str(whole)).configured


def test_refuses_an_asset_that_is_no_dense_model() -> None:
    with pytest.raises(UpcycleError, match="model asset 'mmlu' does not exist"):
        _ = Parent("asset://mmlu").configured


def test_a_parent_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tokenizer(write_llama(tmp_path / "parent"))
    parent, opened = Parent(str(folder)), []
    monkeypatch.setattr(resolve, "open_dense", lambda name: opened.append(name) or open_dense(name))
    assert parent.configured is parent.whole is parent.architecture
    assert opened == [str(folder)]
