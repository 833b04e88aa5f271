"""The model is found as it is, and what is no parent is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.start.parent import find_model


def test_a_folder_says_family_size_and_positions(parent_folder: Path) -> None:
    parent = find_model(str(parent_folder))
    assert parent.description == "Llama, 94,912 parameters, 2,048 positions, tokenizer of 259"
    assert (parent.name, parent.address, parent.tokenizer) == ("my_llama", str(parent_folder), parent_folder)


@pytest.mark.parametrize(
    ("config", "files", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["tokenizer.json", "model.safetensors"], "MambaForCausalLM"),
        ({}, ["model.safetensors"], "tokenizer"),
        ({}, ["tokenizer.json"], "no weights"),
        (None, [], "config.json"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, parent_folder: Path, config: dict[str, object] | None, files: list[str], said: str
) -> None:
    if config is not None:
        content = json.loads((parent_folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | config))
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UpcycleError, match=said):
        find_model(str(tmp_path))


def test_a_checkpoint_is_to_be_exported_first() -> None:
    with pytest.raises(UpcycleError, match="nemo-upcycle export /runs/mine FOLDER"):
        find_model("nemo:///runs/mine")
