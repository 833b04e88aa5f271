"""The plan that the data engine is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend import Blend, BlendConfig, HoldOut, SourceConfig, read_blend
from nemo_upcycle.data.inputs import InputFile, make_plan
from nemo_upcycle.errors import UpcycleError


TOKENIZER = {"eos_id": 0, "vocab_size": 100}


def _files(*names: str) -> list[InputFile]:
    return [InputFile(f"/{name}", "text", 10) for name in names]


def test_held_out_files_come_before_those_to_train_on(tmp_path: Path) -> None:
    """Of equal texts the engine keeps the first: the other order would train on what is held out."""
    sources = {"web": SourceConfig(train=["x"]), "books": SourceConfig(train=["x"])}
    inputs = {
        "web": {"train": _files("a"), "validation": [], "heldout": []},
        "books": {"train": _files("b"), "validation": _files("c"), "heldout": _files("d")},
    }
    tasks = make_plan(Blend("mine", tmp_path, BlendConfig(sources)), inputs, tmp_path, TOKENIZER)["tasks"]
    assert [(task["files"], task["split"]) for task in tasks] == [
        (["/d"], "heldout"),
        (["/c"], "validation"),
        (["/a"], None),  # spread over the splits, as the source has none of its own
        (["/b"], "train"),
    ]


def test_held_out_text_is_looked_for_where_some_is_held_out(tmp_path: Path) -> None:
    """Looking for it reads everything once more."""
    inputs = {"web": {"train": _files("a"), "validation": [], "heldout": []}}

    def plan(**shares: float) -> dict[str, Any]:
        config = BlendConfig({"web": SourceConfig(train=["x"])}, hold_out=HoldOut(**shares))
        return make_plan(Blend("mine", tmp_path, config), inputs, tmp_path, TOKENIZER)

    assert plan()["heldout_overlap"] == 0.5
    assert plan(validation=0, heldout=0)["heldout_overlap"] is None
    inputs["web"]["heldout"] = _files("b")
    assert plan(validation=0, heldout=0)["heldout_overlap"] == 0.5


def test_near_duplicates_need_the_removal_of_duplicates(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{sources: {web: {train: [x]}}, near_duplicates: {}}")
    settings = {"bands": 14, "hashes_per_band": 8, "n_grams": 5}
    inputs = {"web": {"train": _files("a"), "validation": [], "heldout": []}}
    blend = read_blend(tmp_path / "mine.yaml")
    assert make_plan(blend, inputs, tmp_path, TOKENIZER)["near_duplicates"] == settings
    with pytest.raises(UpcycleError, match="near_duplicates: got deduplicate: false, expected deduplicate: true"):
        read_blend(tmp_path / "mine.yaml", ["deduplicate=false"])
