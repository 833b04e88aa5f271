"""A big file of JSON lines is cut between lines for several workers, with the same result as in one piece."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.inputs import cut_between_lines
from nemo_upcycle.data.readers import InputFile
from tests.data_engine.blend import sentence, write_plan
from tests.data_engine.runs import execute, removed, stats, texts


def _write(path: Path, end: str = "\n") -> InputFile:
    """Write a file with long, short, empty, broken and Latin-1 lines, and no line end after the last."""
    lines = [json.dumps({"text": sentence(number, 5 + number % 40)}) for number in range(300)]
    lines[5:5] = ["", "{broken", json.dumps({"text": "long " * 2000})]
    content = end.join(lines).encode() + end.encode() + '{"text": "café"}'.encode("latin-1")
    path.write_bytes(content)
    return InputFile(str(path), "jsonl", len(content))


def _documents(folder: Path, tasks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the engine's result: texts by split, and removed documents."""
    work = execute(write_plan(folder, tasks, hold_out={"validation": 0.1, "heldout": 0.1}))
    ranks = range(len(tasks))
    for rank in ranks:
        stats(work, rank)
    held = "".join(path.read_text() for path in sorted(work.glob("tokens/*.heldout.jsonl")))
    return {
        **{split: [text for rank in ranks for text in texts(work, rank, split)] for split in ("train", "validation")},
        "heldout": held.splitlines(),
        "lost": [line for rank in ranks for line in removed(work, rank)],
    }


@pytest.mark.parametrize(("most_bytes", "end"), [(1000, "\r\n"), (9999, "\n"), (30_000, "\n")])
def test_parts_give_the_documents_of_the_whole(tmp_path: Path, most_bytes: int, end: str) -> None:
    file = _write(tmp_path / "some.jsonl", end)
    parts = cut_between_lines(file, most_bytes)
    assert len(parts) > 1
    assert sum(part.size_bytes or 0 for part in parts) == file.size_bytes
    task = {"files": [file.path], "split": None, "options": {}}
    whole = _documents(tmp_path / "whole", [task])
    assert _documents(tmp_path / "cut", [task | {"options": part.options} for part in parts]) == whole


def test_only_plain_lines_are_cut(tmp_path: Path) -> None:
    file = _write(tmp_path / "some.jsonl")
    content = Path(file.path).read_bytes()
    assert len(cut_between_lines(file, 1000)) > 1
    assert cut_between_lines(file, len(content)) == [file]
    for stored in (gzip.compress(content * 9), content.decode("latin-1").encode("utf-16"), b"PAR1" + content):
        Path(file.path).write_bytes(stored)
        other = InputFile(file.path, "jsonl", len(stored))
        assert cut_between_lines(other, 1000) == [other]
    text = InputFile(file.path, "text", len(content))
    assert cut_between_lines(text, 1000) == [text]
