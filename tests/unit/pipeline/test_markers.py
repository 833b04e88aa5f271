"""Markers: a stage is done only from the same inputs, and resumable work is never continued from others."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import StageError
from nemo_upcycle.pipeline.markers import StageFolder, setting_hashes
from nemo_upcycle.utils.files import MARKER


def test_changed_inputs_invalidate_the_marker(tmp_path: Path) -> None:
    first, second = StageFolder(tmp_path, "import"), StageFolder(tmp_path, "upcycle", ("import",))
    inputs = first.inputs({"dense": "a"})
    first.start(inputs, resumable=False)
    assert not first.is_done(inputs)
    first.finish(inputs, 1.0, {"x": 1})
    assert first.is_done(inputs)
    assert first.outputs() == {"x": 1}
    assert not first.is_done(first.inputs({"dense": "b"}))
    before = second.inputs({})
    first.finish(inputs, 2.0, {"x": 2})
    assert second.inputs({}) != before


def test_resumable_work_refuses_other_inputs(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "pretrain")
    stage.start(stage.inputs({"recipe": "a", "seed": 1}), resumable=True)
    stage.start(stage.inputs({"recipe": "a", "seed": 1}), resumable=True)
    stage.require_same(setting_hashes({"recipe": "a"}))
    with pytest.raises(StageError, match="changed: setting recipe"):
        stage.require_same(setting_hashes({"recipe": "b"}))
    with pytest.raises(StageError, match="changed: setting recipe"):
        stage.start(stage.inputs({"recipe": "b", "seed": 1}), resumable=True)


@pytest.mark.parametrize("content", ["{", "[]", ""])
@pytest.mark.parametrize(
    ("name", "fix"), [(MARKER, "the stage then runs again"), ("_STARTED.json", "to lose that work")]
)
def test_a_damaged_marker_is_refused_with_the_fix(tmp_path: Path, name: str, fix: str, content: str) -> None:
    folder = StageFolder(tmp_path, "pretrain")
    folder.start({}, resumable=True)
    folder.finish({}, 1.0, {})
    (folder.path / name).write_text(content)
    with pytest.raises(StageError, match=f"{name}: got a damaged file.*{fix}"):
        folder.require_same({}) if name != MARKER else folder.is_done({})
