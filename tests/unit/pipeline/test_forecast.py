"""The forecast of a run: sizes and memory, speed, disk, settings, and its text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.jobs import Job, JobState
from nemo_upcycle.pipeline.forecast import check_space, render_forecast
from nemo_upcycle.pipeline.forecast.recipe_to_plan import planned_of
from nemo_upcycle.pipeline.forecast.text import WIDTH
from nemo_upcycle.pipeline.forecast.training import time_limit_s
from nemo_upcycle.pipeline.stages import STAGES
from nemo_upcycle.planning.hardware import gpu_names
from nemo_upcycle.trainers.nemo.recipes import dump_recipe
from nemo_upcycle.trainers.nemo.training import NeMoTraining
from tests.golden import forecasts
from tests.golden.forecasts import forecast_of
from tests.unit.pipeline.markers import finish


@dataclass
class SiteExecutor:
    """An executor with what a forecast asks of one."""

    account: str = "mine"
    partition: str = "batch"
    queue: str = ""
    time: str = "4:00:00"
    price_per_gpu_hour: float | None = 2.5
    stages: dict[str, dict[str, str]] = field(default_factory=dict)


class SiteCluster(Cluster):
    """Renders, and holds stages back; a forecast asks nothing else."""

    label = "Site"
    holds_back = True

    def check_settings(self, jobs: Sequence[Job]) -> None:
        raise AssertionError

    def check(self, jobs: Sequence[Job]) -> None:
        raise AssertionError

    def render(self, job: Job) -> dict[str, str]:
        return {"job.sh": f"#!/bin/sh\n{' '.join(job.command)}\n"}

    def submit(self, job: Job, after: Sequence[str]) -> str:
        raise AssertionError

    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        raise AssertionError

    def cancel(self, ids: Sequence[str]) -> None:
        raise AssertionError

    def cancel_command(self, identity: str) -> str:
        raise AssertionError

    def logs(self, job: Job, identity: str) -> Sequence[Path]:
        raise AssertionError

    def resources(self, job: Job) -> dict[str, str]:
        return {"partition": self.executor.partition, "time": self.executor.time}


def test_llama3_8b_has_the_papers_and_the_planners_numbers(llama: Any, tmp_path: Path) -> None:
    pretrain = forecast_of(llama, tmp_path).trainings["pretrain"]
    assert (pretrain.facts.arch.total_params, pretrain.facts.arch.active_params) == (47_491_321_856, 13_668_454_400)
    assert (pretrain.stage.nodes, pretrain.stage.ranks_per_node, pretrain.facts.layout.gpus) == (64, 8, 512)
    layout = pretrain.facts.layout
    sizes = (layout.tp, layout.pp, layout.vp, layout.cp, layout.ep, layout.etp, layout.dp)
    assert sizes == (2, 4, 8, 1, 8, 1, 64)
    assert (pretrain.facts.step_tokens, pretrain.facts.steps) == (4_194_304, 23_842)
    assert pretrain.tokens == 4_194_304 * 23_842
    assert pretrain.fullest is not None
    assert pretrain.fullest.verdict == "fits"
    assert pretrain.memory_gib == pytest.approx(60.0, abs=0.1)
    assert pretrain.facts.checkpoint_bytes / 2**30 == pytest.approx(pretrain.fullest.checkpoint_gib)
    assert pretrain.facts.checkpoint_bytes / 2**30 == pytest.approx(619.2, abs=0.1)
    assert (pretrain.checkpoints_at_once, pretrain.checkpoints_kept) == (3, 2)


def test_a_report_gets_what_the_forecast_said(llama: Any, tmp_path: Path) -> None:
    pretrain = forecast_of(llama, tmp_path).trainings["pretrain"]
    facts = NeMoTraining(dump_recipe(llama.pretrain)).facts(llama.dense)
    planned = planned_of(facts, "NVIDIA H100 80GB HBM3")
    assert planned is not None
    assert planned["memory_gib"] == pytest.approx(pretrain.memory_gib)
    assert pretrain.later is not None
    assert planned["tokens_per_s"] == pytest.approx(pretrain.facts.step_tokens / pretrain.later.time.total)
    assert planned_of(facts, "another GPU") is None


def test_first_steps_recompute_and_count_as_slower(llama: Any, tmp_path: Path) -> None:
    pretrain = forecast_of(llama, tmp_path).trainings["pretrain"]
    assert pretrain.first is not None
    assert pretrain.later is not None
    slow_s, usual_s = pretrain.first.time.total, pretrain.later.time.total
    assert (pretrain.first.work.recompute, pretrain.later.work.recompute) == ("moe", "none")
    assert pretrain.first.memory.total < pretrain.later.memory.total
    assert pretrain.seconds_left == pytest.approx(500 * slow_s + 23_342 * usual_s)
    assert pretrain.longest_loss_s == pytest.approx(500 * slow_s + 500 * usual_s)


def test_forecast_plans_the_recipe_as_it_was_changed(llama: Any, tmp_path: Path) -> None:
    from nemo_upcycle.recipes import llama3_8b_e8t2

    chain = copy.deepcopy(llama)
    chain.pretrain = llama3_8b_e8t2.pretrain_recipe(performance_mode=True, fp8_recipe="tensorwise")
    chain.pretrain.trainer.strategy.pipeline_model_parallel_size = 1
    chain.pretrain.trainer.strategy.virtual_pipeline_model_parallel_size = None
    in_bf16 = forecast_of(chain, tmp_path).trainings["pretrain"].fullest
    assert in_bf16 is not None
    assert (in_bf16.work.gradients, in_bf16.verdict) == ("bf16", "tight")
    chain.pretrain.trainer.plugins.grad_reduce_in_fp32 = True
    found = forecast_of(chain, tmp_path)
    plan = found.trainings["pretrain"].fullest
    assert plan is not None
    assert (plan.work.precision, plan.work.pad, plan.work.capacity_factor) == ("fp8-current", True, 1.0)
    assert (plan.layout.pp, plan.layout.vp, plan.layout.cp, plan.verdict) == (1, 1, 2, "no")
    (warning,) = [text for text in found.warnings if text.startswith("pretrain: memory does not fit")]
    assert "nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 512" in warning


def test_demo_without_a_gpu_has_sizes_and_no_speed(demo: Any, tmp_path: Path) -> None:
    found = forecast_of(demo, tmp_path)
    pretrain = found.trainings["pretrain"]
    assert (pretrain.facts.arch.total_params, pretrain.later, pretrain.seconds_left) == (692_036_928, None, None)
    assert pretrain.facts.checkpoint_bytes == 14 * pretrain.facts.arch.total_params
    text = render_forecast(found)
    assert "no estimate of the speed: no GPU here" in text
    assert "9.02 GiB every 10 steps, 1 at once" in text
    assert "TFLOP" not in text
    demo.pretrain.trainer.plugins.precision = "32"
    assert (
        forecast_of(demo, tmp_path).trainings["pretrain"].facts.checkpoint_bytes
        == 16 * pretrain.facts.arch.total_params
    )


def test_vocabulary_of_an_unknown_parent_is_said_to_be_unknown(demo: Any, tmp_path: Path) -> None:
    for recipe in (demo.pretrain, demo.dense_ct):
        recipe.model.config.hidden_size, recipe.model.config.num_attention_heads = 64, 4
    demo.dense = "hf://nobody/nothing"
    found = forecast_of(demo, tmp_path)
    assert (found.trainings["pretrain"].facts.knows_vocabulary, found.unchecked) == (False, "")
    assert "vocabulary is not known" in " ".join(found.warnings)
    from tests.models import write_llama, write_tokenizer

    demo.dense = str(write_tokenizer(write_llama(tmp_path / "parent", vocab_size=259)))
    (tmp_path / "parent/model.safetensors").unlink()
    found = forecast_of(demo, tmp_path)
    assert (found.trainings["pretrain"].facts.arch.vocab_size, "config.json alone" in found.warnings[0]) == (259, True)


def test_a_recipe_of_plain_settings_is_forecast_with_the_defaults_it_will_train_with(
    demo: Any, tmp_path: Path
) -> None:
    """Batches that a recipe does not name are those of its data module, plugins and callbacks are none."""
    from nemo.collections.llm.gpt.data import MockDataModule

    demo.pretrain.data = run.Config(MockDataModule, seq_length=1024)
    for name in ("plugins", "callbacks"):
        delattr(demo.pretrain.trainer, name)
    pretrain = forecast_of(demo, tmp_path).trainings["pretrain"]
    assert (pretrain.facts.seq_length, pretrain.facts.global_batch, pretrain.facts.profile.precision) == (
        1024,
        8,
        "bf16",
    )


def test_a_run_that_does_not_fit_the_disk_is_refused(llama: Any, tmp_path: Path) -> None:
    found = forecast_of(llama, tmp_path)
    needed_bytes = found.disk.needed_bytes
    enough = replace(found, disk=replace(found.disk, free_bytes=needed_bytes))
    check_space(enough)
    short = replace(found, disk=replace(found.disk, free_bytes=needed_bytes - 1))
    with pytest.raises(UpcycleError, match=r"disk space for .*: got .* GiB free, expected .*checkpoints of pretrain"):
        check_space(short)
    check_space(short, alive=[stage.name for stage in STAGES])  # to watch what is submitted adds nothing
    with pytest.raises(UpcycleError, match="exported model"):
        check_space(replace(short, disk=replace(short.disk, free_bytes=0)), alive=["pretrain", "dense_ct"])
    assert any("disk is too small" in warning for warning in short.warnings)
    assert not any("disk is too small" in warning for warning in enough.warnings)


def test_trainings_side_by_side_need_both_their_checkpoints_at_once(llama: Any, tmp_path: Path) -> None:
    finish(llama, tmp_path, "import", "data", "upcycle")
    sizes = {use.stage: use for use in forecast_of(llama, tmp_path, stages=STAGES[3:5]).disk.uses}
    moe, dense = sizes["pretrain"], sizes["dense_ct"]
    assert (2 * moe.peak_bytes, 2 * dense.peak_bytes) == (3 * moe.kept_bytes, 3 * dense.kept_bytes)
    in_turn = forecast_of(llama, tmp_path, stages=STAGES[3:5]).disk
    beside = forecast_of(llama, tmp_path, cluster=SiteCluster(SiteExecutor()), stages=STAGES[3:5]).disk
    assert in_turn.needed_bytes == moe.peak_bytes
    assert beside.needed_bytes == moe.peak_bytes + dense.peak_bytes


def test_settings_are_shown_as_they_were_changed(tmp_path: Path) -> None:
    from nemo_upcycle import recipes
    from nemo_upcycle.trainers.nemo.evaluating import EvaluateWhileTraining

    chain = recipes.llama3_8b_e8t2.pipeline_recipe(num_nodes=16)
    chain.pretrain.trainer.max_steps = 100
    chain.pretrain.trainer.callbacks.append(run.Config(EvaluateWhileTraining))
    found = forecast_of(chain, tmp_path)
    values = {setting.name: setting.value for setting in found.settings}
    assert values["pretrain.trainer.max_steps"] == "100"
    assert values["dense_ct.trainer.max_steps"] == "23842"
    assert values["dense_ct.trainer.num_nodes"] == "16"
    assert values["data"] == "redpajama_v2_academic_7_3"
    assert any("different numbers of tokens" in warning for warning in found.warnings)
    rows = {tuple(line.split()) for line in render_forecast(found).splitlines()}
    assert rows >= {("pretrain.trainer.num_nodes", "16"), ("evaluation", "watch", "every", "500", "steps")}
    assert ("dense_ct.trainer.num_nodes", "16") not in rows, "what is as in pretrain"


def test_an_executor_of_others_is_no_machine_of_ours(demo: Any, tmp_path: Path) -> None:
    """NeMo-Run's, which may not be constructed without their clouds' packages."""
    sky = type("SkypilotExecutor", (SiteExecutor,), {"gpus_per_node": 8})()
    found = forecast_of(demo, tmp_path, executor=sky)
    assert "SkypilotExecutor: 1 node x 2 ranks; gpus_per_node 8" in render_forecast(found)
    assert found.trainings["pretrain"].gpu_origin == "assumed"
    assert "this machine: 1 node" in render_forecast(forecast_of(demo, tmp_path, executor=run.LocalExecutor()))


def test_a_cluster_adds_resources_cost_jobs_and_scripts(llama: Any, tmp_path: Path) -> None:
    found = forecast_of(llama, tmp_path, cluster=SiteCluster(SiteExecutor()))
    pretrain = found.trainings["pretrain"]
    assert pretrain.gpu_hours_left is not None
    assert pretrain.cost_left == pytest.approx(2.5 * pretrain.gpu_hours_left)
    assert (pretrain.limit_s, pretrain.jobs_left) == (4 * 3600, 4)
    text = render_forecast(found)
    assert "Site: 64 nodes x 8 ranks; partition batch; time 4:00:00" in text
    script = tmp_path / "jobs/pretrain/job.sh"
    assert text.count(str(script)) == 2
    assert text.endswith(f"--- {tmp_path / 'jobs/report/job.sh'}\n#!/bin/sh\n{_command(tmp_path, 'report')}")


def _command(run_dir: Path, stage: str) -> str:
    return f"python -m nemo_upcycle.pipeline {stage} {run_dir}"


def test_a_time_limit_shorter_than_the_way_to_a_checkpoint_is_warned_about(llama: Any, tmp_path: Path) -> None:
    short = forecast_of(llama, tmp_path, cluster=SiteCluster(SiteExecutor(time="0:20:00")))
    (warning,) = [text for text in short.warnings if "time limit" in text]
    assert warning.startswith("pretrain: the time limit (20 min) is shorter than")
    assert "pretrain.log.ckpt.every_n_train_steps" in warning


@pytest.fixture(scope="module")
def large() -> Any:
    from nemo_upcycle.recipes import llama3_70b_e8t2

    return llama3_70b_e8t2.pipeline_recipe(dir="runs/70b")


def test_a_checkpoint_that_a_signal_leaves_too_little_time_for_is_said_with_the_speed_it_takes(
    large: Any, llama: Any, tmp_path: Path
) -> None:
    cluster = forecasts.CLUSTERS["slurm"]()
    found = forecast_of(large, tmp_path, cluster=cluster)
    (warning,) = [text for text in found.warnings if "TERM@600" in text]
    assert warning.startswith("pretrain: ")
    assert "10.5 GiB/s" in warning
    assert "run.executor.stages.pretrain.signal=TERM@3060" in warning
    cluster.executor.stages["pretrain"]["signal"] = "TERM@3060"
    assert not [text for text in forecast_of(large, tmp_path, cluster=cluster).warnings if "GiB/s" in text]
    small = forecast_of(llama, tmp_path, cluster=forecasts.CLUSTERS["slurm"]())
    assert not [text for text in small.warnings if "GiB/s" in text], "at the usual 2 GiB/s it ends in time"
    assert "1.04 GiB/s (signal TERM@600)" in render_forecast(small)


def test_a_save_that_hang_detection_would_take_for_a_hang_is_said(large: Any, tmp_path: Path) -> None:
    cluster = forecasts.CLUSTERS["slurm"]()
    cluster.executor.stages["pretrain"] |= {"hang_detection": True, "signal": "TERM@3600"}
    (warning,) = [text for text in forecast_of(large, tmp_path, cluster=cluster).warnings if "GiB/s" in text]
    assert "silence_s 600 of hang detection" in warning
    assert "run.executor.stages.pretrain.silence_s=3060" in warning


def test_pods_that_are_killed_before_a_checkpoint_is_saved_are_said(llama: Any, tmp_path: Path) -> None:
    cluster = forecasts.CLUSTERS["kubernetes"]()
    cluster.executor.termination_grace_s = 0  # the pods' own
    assert "pretrain.termination_grace_s=360" in str(forecast_of(llama, tmp_path, cluster=cluster).warnings)


def test_performance_settings_are_shown(llama: Any, tmp_path: Path) -> None:
    text = render_forecast(forecast_of(llama, tmp_path, cluster=forecasts.CLUSTERS["slurm"]()))
    table = text.partition("\nPerformance settings by conf/performance.yaml\n")[2].partition("\n\n")[0]
    rows = {words[0]: words[1:] for line in table.splitlines() if (words := line.split())}
    assert rows["CUDA_DEVICE_MAX_CONNECTIONS"] == ["1"]
    assert rows["NCCL_P2P_NET_CHUNKSIZE"][-2:] == ["pretrain", "only"]
    assert "Performance settings by" not in render_forecast(forecast_of(llama, tmp_path))


def test_a_profile_is_the_recipes() -> None:
    from nemo_upcycle import recipes
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    recipe = recipes.llama3_8b_e8t2.pretrain_recipe(capacity_factor=0.0, fp8_recipe="current", dispatcher="deepep")
    found = NeMoTraining(dump_recipe(recipe)).facts("hf://nobody/nothing").profile
    assert (found.accelerator, found.tp, found.pp, found.ep) == ("gpu", 2, 4, 8)
    assert (found.precision, found.dispatcher) == ("fp8-current", "deepep")


def test_every_card_with_settings_has_a_speed(llama: Any, tmp_path: Path) -> None:
    assert set(performance.table()["cards"]) == set(gpu_names())
    cluster = forecasts.CLUSTERS["slurm"]()
    cluster.executor.card = "gb200"
    found = forecast_of(llama, tmp_path, cluster=cluster)
    gpu = found.trainings["pretrain"].gpu
    assert gpu is not None
    assert gpu.name.startswith("GB200")
    assert ("CUDA_DEVICE_MAX_CONNECTIONS", "32") in {(one.name, one.value) for one in found.performance["pretrain"]}


TIMES = {"4:00:00": 14_400, "30": 1800, "30:15": 1815, "2-0": 172_800, "1-12:30": 131_400, "7200s": 7200, "": None}


@pytest.mark.parametrize(("text", "seconds"), [*TIMES.items(), ("infinite", None)])
def test_time_limits_are_read_as_slurm_writes_them(text: str, seconds: float | None) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize(("recipe", "cluster"), forecasts.GOLDEN)
def test_text_equals_its_golden_file(recipe: str, cluster: str) -> None:
    """After an intended change: `python -m tests.golden`, and read the difference."""
    text = forecasts.forecast_text(recipe, cluster)
    assert text == forecasts.forecast_path(recipe, cluster).read_text(encoding="utf-8")
    forecast, *_ = text.partition("\n---")
    assert max(map(len, forecast.splitlines())) <= WIDTH


def test_every_golden_file_of_a_forecast_is_made() -> None:
    folder = forecasts.forecast_path("x", "y").parent
    assert set(folder.iterdir()) == {forecasts.forecast_path(*pair) for pair in forecasts.GOLDEN}
