"""`start` describes a dense model from its folder, and names the problem with any other input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_upcycle.cli.start.parent import inspect_parent
from nemo_upcycle.errors import UpcycleError


def test_a_folder_says_family_size_and_positions(parent_folder: Path) -> None:
    parent = inspect_parent(str(parent_folder))
    assert parent.description == "Llama, 94,912 parameters, 2,048 positions, tokenizer of 259"
    assert (parent.name, parent.address, parent.tokenizer) == ("my_llama", str(parent_folder), parent_folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "model.safetensors"], "tokenizer"),
        (["config.json", "tokenizer.json"], "no \\*.safetensors"),
        ([], "config.json"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, parent_folder: Path, files: list[str], said: str) -> None:
    for name in files:
        shutil.copy(parent_folder / name, tmp_path)
    with pytest.raises(UpcycleError, match=said):
        inspect_parent(str(tmp_path))


def test_a_checkpoint_is_to_be_exported_first() -> None:
    with pytest.raises(UpcycleError, match="nemo-upcycle export /runs/mine FOLDER"):
        inspect_parent("nemo:///runs/mine")
