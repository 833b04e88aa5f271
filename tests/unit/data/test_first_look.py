"""A source is looked at before it is built: what has no text is named, with the fields that it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.data.blend import Blend, read_blend
from nemo_upcycle.data.first_look import Look, check_look, check_texts
from nemo_upcycle.data.readers import InputFile
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
    said = r"50 of its first 50 documents: no field `text`, expected it; they have `question`, `answer`"
    with pytest.raises(UpcycleError, match=said) as caught:
        check_look(blend, "texts", _look(0, 50, question=900, answer=800))
    assert caught.value.fix == "set sources.texts.options.text_key=question"
    check_look(blend, "texts", _look(26, 24))


def test_empty_files_are_refused_and_addresses_left_to_the_build(blend: Blend) -> None:
    with pytest.raises(UpcycleError, match="2 files, all empty"):
        check_texts(blend, "texts", [InputFile(f"/{name}.jsonl", "jsonl", 0) for name in "ab"])
    check_texts(blend, "texts", [InputFile("hf://datasets/a.jsonl", "jsonl", 0)])
