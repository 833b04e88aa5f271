"""A sample reads the first documents as the engine does, with the same ids and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_upcycle.data.engine.sample import sample


def _look(path: Path, documents: int = 50) -> dict[str, Any]:
    file = {"path": str(path), "name": path.name, "reader": "jsonl", "options": {}}
    return sample({"files": [file], "documents": documents, "bytes": 1 << 20, "tokenizer": None})


def test_documents_have_their_ids_and_bytes(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"träume {number}", "id": "own" if number else None}) for number in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    look = _look(tmp_path / "a.jsonl")
    assert look["documents"][:2] == [("a.jsonl:1", 9), ("own@a.jsonl:2", 9)]
    assert look["read_bytes"] == [None]
    part = _look(tmp_path / "a.jsonl", documents=2)
    assert len(part["documents"]) == 2
    assert 0 < part["read_bytes"][0] < sum(map(len, lines))
