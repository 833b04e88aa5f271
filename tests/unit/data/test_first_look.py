"""A source is inspected before the build: a source without texts is named, with the fields that it has."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_upcycle.data.blend import Blend, read_blend
from nemo_upcycle.data.environment import VARIABLE
from nemo_upcycle.data.first_look import Look, check_look, check_texts
from nemo_upcycle.data.readers import InputFile, input_file
from nemo_upcycle.data.schemas import kept_and_lost, read_schemas, schema_text, split_by_field
from nemo_upcycle.errors import UpcycleError


@pytest.fixture
def blend(tmp_path: Path) -> Blend:
    return read_blend(tmp_path / "a.jsonl")


def _look(documents: int, lost: int, **fields: int) -> Look:
    reasons = {"no field text": (lost, "a.jsonl:1")} if lost else {}
    return Look([(str(number), 9) for number in range(documents)], reasons, fields, [None], None)


@pytest.mark.parametrize(
    ("look", "field"),
    [
        (_look(20, 30, content=900, url=90), "content"),
        (_look(0, 50, question=900, answer=800), ""),
        (_look(40, 10, content=900), ""),
        (_look(50, 0), ""),
    ],
)
def test_the_one_field_that_can_be_the_text_is_found(look: Look, field: str) -> None:
    assert look.text_field == field


def test_fields_are_named_with_the_setting(blend: Blend) -> None:
    said = r"50 of its first 50 documents: no field `text`; they have `question`, `answer`"
    with pytest.raises(UpcycleError, match=said) as caught:
        check_look(blend, "texts", _look(0, 50, question=900, answer=800))
    assert caught.value.fix == "set sources.texts.options.text_key=question"
    check_look(blend, "texts", _look(26, 24))


def test_files_without_the_field_are_shown_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, sys.executable)
    for name in ("body", "content"):
        table = pyarrow.table({name: ["some words " * 9], "id": ["7"]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    lost_file, kept_file = files = [input_file(path, "parquet") for path in sorted(tmp_path.iterdir())]
    lost, kept = kept_and_lost(files, read_schemas(files), "content")
    assert (kept["kept_bytes"], kept["lost_bytes"]) == (kept_file.size_bytes, 0)
    assert schema_text(lost).startswith("1 .parquet: no field `content`, but `body`, `id`: ")
    assert "LOST" in schema_text(lost)
    split, _ = split_by_field(read_blend(tmp_path), "texts", files)
    assert {name: one.train for name, one in split.config.sources.items()} == {
        "texts_body": [lost_file.path],
        "texts_content": [kept_file.path],
    }


def test_empty_files_are_refused_and_addresses_left_to_the_build(blend: Blend) -> None:
    with pytest.raises(UpcycleError, match="2 files, all empty"):
        check_texts(blend, "texts", [InputFile(f"/{name}.jsonl", "jsonl", 0) for name in "ab"])
    check_texts(blend, "texts", [InputFile("hf://datasets/a.jsonl", "jsonl", 0)])
