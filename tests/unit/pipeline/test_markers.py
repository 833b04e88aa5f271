"""Markers: a stage is done only for the same inputs, and a resumable stage never resumes with other inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import spec
from nemo_upcycle.errors import StageError
from nemo_upcycle.pipeline.markers import StageFolder, content_hash, setting_texts
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import CHANGES, MARKER


def inputs_of(stage: StageFolder, settings: Mapping[str, Any], **others: Mapping[str, Any]) -> dict[str, str]:
    """Return the inputs of a stage: its own settings, and the settings of the stages that it reads."""
    read = {name: setting_texts(others.get(name, {})) for name in stage.reads}
    return stage.inputs(read | {stage.name: setting_texts(settings)})


def finish(stage: StageFolder, settings: Mapping[str, Any], seconds: float = 1.0, content: str = "") -> None:
    inputs = inputs_of(stage, settings)
    stage.start(inputs, resumable=False)
    stage.finish(inputs, seconds, {"seconds_measured": seconds}, content)


def _start(stage: StageFolder, settings: Mapping[str, Any], free: dict[str, object] | None = None) -> list[str]:
    return stage.start(inputs_of(stage, settings), setting_texts({"pretrain": free or {}}), resumable=True)


def test_a_stage_is_done_only_for_its_own_settings(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "import")
    inputs = inputs_of(stage, {"dense": "a"})
    stage.start(inputs, resumable=False)
    assert not stage.is_done(inputs)
    stage.finish(inputs, 1.0, {"x": 1})
    assert stage.is_done(inputs)
    assert stage.outputs() == {"x": 1}
    assert not stage.is_done(inputs_of(stage, {"dense": "b"}))


def test_a_marker_depends_on_settings_and_outputs_alone(tmp_path: Path) -> None:
    first, second = StageFolder(tmp_path, "import"), StageFolder(tmp_path, "data", ("import",))
    finish(first, {"dense": "a"}, content="1")
    started = inputs_of(second, {}, **{"import": {"dense": "a"}})
    second.start(started, resumable=True)
    finish(first, {"dense": "a"}, seconds=2.0, content="1")
    assert inputs_of(second, {}, **{"import": {"dense": "a"}}) == started
    first.marker.unlink()
    assert second.refusal(inputs_of(second, {}, **{"import": {"dense": "a"}})) == ""
    finish(first, {"dense": "a"}, content="2")
    with pytest.raises(StageError, match="stage import left something else"):
        second.start(inputs_of(second, {}, **{"import": {"dense": "a"}}), resumable=True)
    with pytest.raises(StageError, match="stage import has other settings"):
        second.start(inputs_of(second, {}, **{"import": {"dense": "b"}}), resumable=True)


def test_content_is_known_by_name_size_and_bytes_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1 << 20))
    before = content_hash([file])
    (tmp_path / "moved").mkdir()
    assert content_hash([file.rename(tmp_path / "moved" / file.name)]) == before
    for place in (0, 1 << 19, (1 << 20) - 1):
        changed = bytearray(1 << 20)
        changed[place] = 1
        file.write_bytes(changed)
        assert content_hash([file]) != before
    file.write_bytes(bytes((1 << 20) + 1))
    assert content_hash([file]) != before


def test_resumable_work_names_the_changed_setting(tmp_path: Path) -> None:
    stage, first = StageFolder(tmp_path, "pretrain"), {"lr": 3e-5, "seed": 1}
    for _ in range(2):
        _start(stage, first)
    with pytest.raises(StageError, match="started: lr was 3e-05, is 2e-05"):
        _start(stage, first | {"lr": 2e-5})
    with pytest.raises(StageError, match="wd was not set, is 0"):
        _start(stage, first | {"wd": 0.1})
    with pytest.raises(StageError, match="seed was 1, is not set"):
        _start(stage, {"lr": 3e-5})


def test_another_stage_before_it_is_refused(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "moe", ("dense_a-hf", "data"))
    _start(stage, {"seed": 1})
    other = StageFolder(tmp_path, "moe", ("dense_b-hf", "data"))
    with pytest.raises(StageError, match="it read stage dense_a-hf; it reads stage dense_b-hf now"):
        _start(other, {"seed": 1})


def test_started_work_resumes_only_with_more_steps(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "pretrain")
    assert _start(stage, {"pretrain steps": 100}) == []
    assert _start(stage, {"pretrain steps": 200}) == ["pretrain steps was 100, is 200"]
    with pytest.raises(StageError, match="pretrain steps was 200, is 199"):
        _start(stage, {"pretrain steps": 199})


def test_harmless_changes_are_allowed_and_noted(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "pretrain")
    _start(stage, {"pretrain": {"optim.lr": 3e-5}}, {"log.every": 1000})
    stage.finish(inputs_of(stage, {"pretrain": {"optim.lr": 3e-5}}), 1.0, {})
    assert stage.is_done(inputs_of(stage, {"pretrain": {"optim.lr": 3e-5}}))
    for said in (["pretrain.log.every was 1000, is 500"], []):
        assert _start(stage, {"pretrain": {"optim.lr": 3e-5}}, {"log.every": 500}) == said
    (noted,) = map(json.loads, (stage.path / CHANGES).read_text().splitlines())
    assert (noted["setting"], noted["before"], noted["after"]) == ("pretrain.log.every", "1000", "500")


@pytest.mark.parametrize("where", ["pretrain.resume.restore_config.spec", "pretrain.spec"])  # in NeMo and in Bridge
def test_a_new_field_of_the_spec_locks_no_run(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageFolder(tmp_path, "pretrain")
    _start(stage, {f"{where}.num_experts": "16", f"{where}.method": '"copy"'})
    later = make_dataclass("Later", [("neutral", float, 1.0)], bases=(UpcycleSpec,), frozen=True, kw_only=True)
    monkeypatch.setattr(spec, "UpcycleSpec", later)
    assert _start(stage, {f"{where}.num_experts": "16", f"{where}.neutral": "1.0"}) == []
    with pytest.raises(StageError, match=r"spec\.neutral was not set, is 2\.0"):
        _start(stage, {f"{where}.num_experts": "16", f"{where}.neutral": "2.0"})


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_marker_is_as_none(tmp_path: Path, content: str) -> None:
    folder = StageFolder(tmp_path, "pretrain")
    finish(folder, {"seed": 1})
    folder.marker.write_text(content)
    assert folder.done_from() is None
    with pytest.raises(StageError, match=f"{MARKER} is damaged"):
        folder.outputs()


def test_a_setting_that_was_fixed_before_0_4_may_change(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "pretrain")
    started = {"setting pretrain.trainer.callbacks.0.stop_on_spike": "true"}
    started["setting pretrain.trainer.callbacks.0.is"] = "nemo_upcycle.trainers.nemo.loss_guard.LossGuard"
    started["setting pretrain.seed"] = "1"
    stage.start(started, resumable=True)
    assert stage.refusal({"setting pretrain.seed": "1"}) == ""
    assert stage.refusal({"setting pretrain.seed": "2"}) != ""
