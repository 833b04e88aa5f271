"""The forecast says for each stage whether it is done, resumes, runs or is refused, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.pipeline.forecast.stages import State
from nemo_upcycle.pipeline.forecast.text import render_forecast
from nemo_upcycle.pipeline.stages import BY_NAME
from tests.golden.forecasts import forecast_of, plan_of


def finish(chain: Any, run_dir: Path, *names: str) -> None:
    """Write the markers that finished stages leave."""
    plan = plan_of(chain)
    for name in names:
        folder, inputs = BY_NAME[name].folder(run_dir, plan), BY_NAME[name].inputs(run_dir, plan)
        folder.start(inputs, resumable=False)
        folder.finish(inputs, 1.0, {})


def _start(chain: Any, run_dir: Path, name: str, steps: int | None) -> None:
    """Write the files that a killed training leaves, with a checkpoint after `steps` steps unless `steps` is None."""
    plan = plan_of(chain)
    folder = BY_NAME[name].folder(run_dir, plan)
    folder.start(BY_NAME[name].inputs(run_dir, plan), resumable=False)
    if steps is not None:
        import torch.distributed.checkpoint as dcp

        weights = folder.path / "checkpoints" / f"model_name=0--step={steps - 1}-last" / "weights"
        dcp.save({"weight": torch.zeros(2)}, checkpoint_id=weights, no_dist=True)
        torch.save({}, weights / "common.pt")


def _states(found: Any) -> dict[str, str]:
    return {stage.name: stage.finding.state.value for stage in found.stages}


def test_stages_are_done_resumed_or_run(demo: Any, tmp_path: Path) -> None:
    new = forecast_of(demo, tmp_path / "not/yet")
    assert set(_states(new).values()) == {"run"}
    assert (new.disk.folder, list(tmp_path.iterdir())) == (tmp_path, [])
    finish(demo, tmp_path, "import", "data", "upcycle")
    _start(demo, tmp_path, "pretrain", steps=4)
    _start(demo, tmp_path, "dense_ct", steps=None)
    found = forecast_of(demo, tmp_path)
    names = ("import", "data", "upcycle", "pretrain", "dense_ct", "export", "evaluate", "report")
    assert _states(found) == dict(zip(names, ["done"] * 3 + ["resume"] + ["run"] * 4, strict=True))
    why = {stage.name: stage.finding.why for stage in found.stages}
    assert why["import"] == "finished earlier, from the same inputs"
    assert why["pretrain"] == "checkpoint after step 4, model_name=0--step=3-last"
    assert "no checkpoint is finished" in why["dense_ct"]
    assert why["export"] == "not run yet; pretrain and dense_ct run first"
    assert found.trainings["pretrain"].steps_left == 2
    assert {use.stage for use in found.disk.uses} == {"pretrain", "dense_ct", "export"}


def test_checkpoints_that_a_run_holds_need_no_space_again(llama: Any, tmp_path: Path) -> None:
    finish(llama, tmp_path, "import", "data", "upcycle")
    needed = []
    # A run has two checkpoints, and two more of steps 10,000 and 20,000. A save needs a fifth for a while.
    for steps in (None, 1000, 2000, 3000):
        _start(llama, tmp_path, "pretrain", steps)
        found = forecast_of(llama, tmp_path, stages=[BY_NAME["pretrain"]])
        needed.append(found.disk.needed_bytes / found.trainings["pretrain"].facts.checkpoint_bytes)
    assert needed == [5, 4, 3, 2]


@pytest.mark.parametrize("part", ["build/tokens", "tokens"])
def test_kept_tokens_need_no_space_again(llama: Any, tmp_path: Path, part: str) -> None:
    finish(llama, tmp_path, "import")
    stages = [BY_NAME["data"]]
    (before,) = forecast_of(llama, tmp_path, stages=stages).disk.uses
    _start(llama, tmp_path, "data", None)
    folder = tmp_path / "data/blend" / part
    folder.mkdir(parents=True)
    with (folder / "0.bin").open("wb") as file:
        file.truncate(1 << 30)  # a sparse file
    (use,) = forecast_of(llama, tmp_path, stages=stages).disk.uses
    assert before.new_peak_bytes - use.new_peak_bytes == 1 << 30


def test_a_changed_setting_is_named_and_what_follows_runs_again(demo: Any, tmp_path: Path) -> None:
    finish(demo, tmp_path, *BY_NAME)
    assert set(_states(forecast_of(demo, tmp_path)).values()) == {"done"}
    assert forecast_of(demo, tmp_path).disk.needed_bytes == 0
    demo.evaluation = "full"
    found = forecast_of(demo, tmp_path)
    assert _states(found)["export"] == "done"
    evaluate, report = (stage.finding for stage in found.stages[-2:])
    assert (evaluate.state, evaluate.why) == (State.RUN, "finished earlier, but evaluation changed")
    assert (report.state, report.why) == (State.RUN, "finished earlier, but evaluate changed")


def test_a_part_of_the_chain_assumes_earlier_stages_are_done(demo: Any, tmp_path: Path) -> None:
    *earlier, only = BY_NAME
    finish(demo, tmp_path, *earlier)
    found = forecast_of(demo, tmp_path, stages=[BY_NAME[only]])
    assert _states(found) == {only: "run"}
    assert found.trainings == {}
    render_forecast(found)
