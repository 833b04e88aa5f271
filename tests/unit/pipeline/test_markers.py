"""Markers: a stage is done only from the same inputs, and resumable work is never continued from others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle.errors import StageError
from nemo_upcycle.pipeline.markers import StageFolder, setting_texts
from nemo_upcycle.utils.files import CHANGES, MARKER


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


def test_resumable_work_refuses_other_inputs_and_names_the_setting_that_changed(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "pretrain")
    stage.start(stage.inputs({"pretrain": {"optim.lr": 3e-5}, "seed": 1}), resumable=True)
    stage.start(stage.inputs({"pretrain": {"optim.lr": 3e-5}, "seed": 1}), resumable=True)
    changed = {"pretrain": {"optim.lr": 2e-5}, "seed": 1}
    for refused in (lambda: stage.require_same(setting_texts(changed)), lambda: _start(stage, changed)):
        with pytest.raises(StageError, match=r"\(pretrain\.optim\.lr was 3e-05, is 2e-05\)"):
            refused()
    with pytest.raises(StageError, match="wd was not set, is 0"):
        _start(stage, {"pretrain": {"optim.lr": 3e-5, "optim.wd": 0.1}, "seed": 1})
    with pytest.raises(StageError, match="seed was 1, is not set"):
        _start(stage, {"pretrain": {"optim.lr": 3e-5}})


def test_another_stage_before_it_is_refused_at_the_start_of_a_run(tmp_path: Path) -> None:
    """Before the stages that it reads are done; that one of them ran again is seen when it starts."""
    for name in ("dense_a-hf", "data"):
        before = StageFolder(tmp_path, name)
        before.start({}, resumable=False)
        before.finish({}, 1.0, {})
    stage = StageFolder(tmp_path, "moe", ("dense_a-hf", "data"))
    _start(stage, {"seed": 1})
    stage.require_same(setting_texts({"seed": 1}))
    other = StageFolder(tmp_path, "moe", ("dense_b-hf", "data"))
    with pytest.raises(StageError, match=r"\(it read stage dense_a-hf; it reads stage dense_b-hf now\)"):
        other.require_same(setting_texts({"seed": 1}))
    StageFolder(tmp_path, "data").finish({}, 2.0, {})
    stage.require_same(setting_texts({"seed": 1}))
    with pytest.raises(StageError, match=r"\(stage data ran again\)"):
        _start(stage, {"seed": 1})


def _start(stage: StageFolder, settings: dict[str, object], free: dict[str, object] | None = None) -> list[str]:
    return stage.start(stage.inputs(settings), setting_texts({"pretrain": free or {}}), resumable=True)


def test_started_work_goes_on_with_more_steps_and_not_with_fewer(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "pretrain")
    assert _start(stage, {"pretrain steps": 100}) == []
    assert _start(stage, {"pretrain steps": 200}) == ["pretrain steps was 100, is 200"]
    with pytest.raises(StageError, match="pretrain steps was 200, is 199"):
        _start(stage, {"pretrain steps": 199})


def test_what_does_not_change_the_result_may_change_and_is_noted(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "pretrain")
    _start(stage, {"pretrain": {"optim.lr": 3e-5}}, {"log.every": 1000})
    inputs = stage.inputs({"pretrain": {"optim.lr": 3e-5}})
    stage.finish(inputs, 1.0, {})
    assert stage.is_done(inputs)
    assert _start(stage, {"pretrain": {"optim.lr": 3e-5}}, {"log.every": 500}) == [
        "pretrain.log.every was 1000, is 500"
    ]
    assert _start(stage, {"pretrain": {"optim.lr": 3e-5}}, {"log.every": 500}) == []
    (noted,) = map(json.loads, (stage.path / CHANGES).read_text().splitlines())
    assert (noted["setting"], noted["before"], noted["after"]) == ("pretrain.log.every", "1000", "500")


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
