"""Limits that end a training, and the commands that their errors print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.stop_error import stop_error
from nemo_upcycle.trainers.stop_limits import LimitWatch, StopLimits, StopReason
from tests.unit.sources.test_checkpoints import write


LINE: dict[str, Any] = {
    "expert_load": [[0.0, 0.0], [0.75, 0.25]],  # the first layer has no experts
    "router": {"dropped": [None, 0.25]},
    "loss": 3.5,
}


def add(watch: LimitWatch, *steps: int, **changed: Any) -> list[StopReason | None]:
    return [watch.add({"step": step, **LINE, **changed}) for step in steps]


@pytest.mark.parametrize(
    ("limits", "what", "got", "expected"),
    [
        ({"min_expert_load": 0.6}, "load of an expert", 0.5, "at least 0.6 in one of the last 3 steps"),
        ({"max_dropped": 0.2}, "share of dropped tokens", 0.25, "at most 0.2 in one of the last 3 steps"),
        ({"max_above_parent": 0.25}, "loss", 3.5, "at most 3.25 in one of the last 3 steps"),
    ],
)
def test_a_limit_ends_the_run_after_enough_steps(
    tmp_path: Path, limits: dict[str, float], what: str, got: float, expected: str
) -> None:
    parent = [{"step": 0, "validation_loss": 3.0}, {"step": 1, "loss": 3.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in parent))
    watch = LimitWatch(StopLimits(**limits, limit_steps=3), tmp_path)
    *before, reason = add(watch, 5, 6, 7)
    assert before == [None, None]
    assert reason == StopReason(what, got, expected, 5, 7, is_balance=what != "loss")
    inside = {"expert_load": [[0.5, 0.5]], "router": {"dropped": [0.0]}, "loss": 3.0}
    assert [*add(watch, 8, **inside), *add(watch, 9, 10)] == [None] * 3


def test_the_first_loss_stands_for_the_parents_without_a_validation(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.25}) + "\n")
    watch = LimitWatch(StopLimits(max_above_parent=0.25, limit_steps=1), tmp_path)
    assert add(watch, 2, loss=3.5) == [None]
    assert add(watch, 3, loss=3.51) != [None]


def test_without_limits_nothing_ends_the_run(tmp_path: Path) -> None:
    assert not StopLimits().are_set
    assert add(LimitWatch(StopLimits(limit_steps=1), tmp_path), 1) == [None]


@pytest.mark.parametrize("wrong", [{"min_expert_load": 1.5}, {"max_dropped": -1.0}, {"limit_steps": 0}])
def test_a_limit_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        StopLimits(**wrong).check()


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The folder of a training that keeps the checkpoints after 4 and 8 steps."""
    write(tmp_path / "run/pretrain/checkpoints", 3, ending="")
    write(tmp_path / "run/pretrain/checkpoints", 7)
    return tmp_path / "run/pretrain"


def note_command(stage: Path) -> None:
    """Write the command line of the run."""
    text = "nemo upcycle pipeline --factory x dir=runs/a --only pretrain --yes\n"
    (stage.parent / "command.txt").write_text(text)


NAN = StopReason("loss", 0.0, "a finite number", 9, 9)
COLLAPSE = StopReason("load of an expert", 0.0, "at least 0.1", 6, 9, is_balance=True)


def test_a_failed_step_is_told_how_to_resume_and_rewind(stage: Path) -> None:
    note_command(stage)
    text = str(stop_error(NAN, stage, "bridge", rate=3e-5, aux_loss=None))
    assert f"The last good checkpoint is {stage}/checkpoints/model_name=0--step=7-last. Start again to resume" in text
    command = "nemo upcycle pipeline --factory x dir=runs/a --rewind 8 --skip-steps 9 --yes"
    assert f"if step 9 fails again, leave out the samples of this step: `{command}`; if a later" in text
    assert text.endswith("add pretrain.optimizer.lr=1.5e-05.")
    baseline = str(stop_error(NAN, stage.rename(stage.with_name("dense_ct")), "bridge", rate=3e-5, aux_loss=None))
    assert "--rewind dense_ct:8 --skip-steps 9 --yes`" in baseline


def test_a_collapse_is_rewound_to_before_it_with_stronger_balancing(stage: Path) -> None:
    note_command(stage)
    text = str(stop_error(COLLAPSE, stage, "nemo", rate=3e-5, aux_loss=0.01))
    assert text.startswith("Load of an expert in steps 6 to 9 is 0.0; expected at least 0.1. Rewind it with")
    command = "dir=runs/a pretrain.model.config.moe_aux_loss_coeff=0.02 --rewind 4 --yes`."
    assert text.endswith(command)


@pytest.mark.parametrize("aux_loss", [None, 0.0, [0.01, 0.02]])
def test_a_collapse_without_one_coefficient_gets_a_lower_rate(stage: Path, aux_loss: Any) -> None:
    text = str(stop_error(COLLAPSE, stage, "nemo", rate=3e-5, aux_loss=aux_loss))
    assert "a lower optim.config.lr" in text


def test_without_an_earlier_checkpoint_the_run_starts_again_elsewhere(stage: Path) -> None:
    note_command(stage)
    early = StopReason("loss", 0.0, "a finite number", 2, 2)
    text = str(stop_error(early, stage, "nemo", rate=3e-5, aux_loss=None))
    assert "The last good checkpoint is the dense checkpoint" in text
    command = f"nemo upcycle pipeline --factory x dir={stage.parent}-rewound pretrain.optim.config.lr=1.5e-05 --yes"
    assert text.endswith(f"train in a new folder with a lower optim.config.lr: `{command}`.")
