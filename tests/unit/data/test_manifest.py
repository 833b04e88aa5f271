"""The manifest of a finished blend."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.data.blend import Blend, BlendConfig, SourceConfig
from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.data.manifest import _files_of, describe_anew, shortfalls
from tests.blends import write_blend


def test_new_weights_reach_the_manifest_of_a_finished_blend(tiny_dense: Path, tmp_path: Path) -> None:
    folder = write_blend(tmp_path / "blend", tiny_dense)
    assert open_blend(folder).shares["talks"] == pytest.approx(0.7)
    sources = {name: SourceConfig(train=["x"], weight=weight) for name, weight in (("talks", 1.0), ("books", 3.0))}
    before = open_blend(folder).tokens
    found = describe_anew(Blend("tiny", tmp_path, BlendConfig(sources, max_epochs=5)), folder)
    assert open_blend(folder).manifest == found
    assert open_blend(folder).shares == pytest.approx({"talks": 0.25, "books": 0.75})
    assert (found["max_epochs"], found["blend"]) == (5, "tiny")
    assert open_blend(folder).tokens == before


def test_a_file_that_was_read_in_parts_is_one_entry(tmp_path: Path) -> None:
    def entry(whole: bool, digest: str, source: str = "web") -> dict[str, object]:
        return {"source": source, "files": {"a.jsonl": {"bytes": 9, "whole": whole, "texts_xxh3_128": digest}}}

    stats = [entry(True, "11"), entry(False, "22"), entry(True, "33", "other"), entry(True, "44")]
    assert _files_of("web", stats, tmp_path) == {"a.jsonl": {"bytes": 9, "whole": False, "texts_xxh3_128": "11-22-44"}}
    assert _files_of("other", stats, tmp_path)["a.jsonl"]["texts_xxh3_128"] == "33"


@pytest.mark.parametrize(("asked", "got", "is_said"), [(0, 5, False), (1000, 981, False), (1000, 979, True)])
def test_names_a_source_that_gives_less_than_asked(asked: float, got: int, is_said: bool) -> None:
    steps = {"tokenise": {"removed": {}}}
    sources = {"web": {"most_tokens": asked, "splits": {"train": {"tokens": got}}, "steps": steps}}
    assert [str(got) in line for line in shortfalls({"sources": sources})] == [True] * is_said
