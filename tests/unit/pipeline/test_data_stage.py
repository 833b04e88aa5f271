"""Messages about a run's data when the run resumes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nemo_upcycle.pipeline.data_stage import require_data
from nemo_upcycle.pipeline.stages import RunPlan
from tests.blends import set_manifest, write_blend
from tests.functional.tiny import write_parent


def test_a_resumed_run_names_changed_data_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("nemo_upcycle"), "propagate", True)
    dense, text = write_parent(tmp_path / "parent"), tmp_path / "texts/a.txt"
    text.parent.mkdir()
    text.write_text("text")
    (tmp_path / "mine.yaml").write_text("sources: {texts: {train: ['texts/*.txt']}}\n")
    folder = write_blend(tmp_path / "data", dense, texts={"train": ["some words"], "validation": ["more"]})
    files = {str(text): {"bytes": 4, "modified_ns": text.stat().st_mtime_ns, "texts_xxh3_128": "ab"}}
    set_manifest(folder, sources={"texts": {"weight": 1.0, "splits": {}, "files": files}})
    plan = RunPlan("tiny", str(dense), str(tmp_path / "mine.yaml"), "demo", "", None)
    caplog.clear()
    require_data(plan, folder)
    assert not caplog.records
    added = tmp_path / "texts/added.txt"
    added.write_text("more")
    require_data(plan, folder)
    assert f"1 input file is new ({added})" in caplog.messages[0]
