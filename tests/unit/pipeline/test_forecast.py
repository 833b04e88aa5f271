"""The forecast of a changed run: trainings, disk, settings and saves. Golden files test the rest."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from lightning.pytorch.loggers import WandbLogger

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.site_file import cluster_for, read_executor
from nemo_upcycle.pipeline.forecast.network import forecast_network
from nemo_upcycle.pipeline.forecast.recipe_to_plan import planned_of, plans_of
from nemo_upcycle.pipeline.forecast.run import TYPED, check_space
from nemo_upcycle.pipeline.forecast.text import WIDTH, render_forecast
from nemo_upcycle.pipeline.stages import STAGES, RunPlan
from nemo_upcycle.planning.failures import USUAL_GPU_HOURS
from nemo_upcycle.planning.hardware import gpu_names, known_gpu
from nemo_upcycle.sources.demo.assets import asset_folder
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.nemo.evaluating import EvaluateWhileTraining
from nemo_upcycle.trainers.nemo.recipes import dump_recipe
from nemo_upcycle.trainers.nemo.training import NeMoTraining
from nemo_upcycle.utils.files import MARKER, write_json
from tests.blends import write_blend
from tests.golden import forecasts
from tests.golden.forecasts import forecast_of
from tests.models import write_llama, write_tokenizer
from tests.tiers import quick
from tests.unit.pipeline.test_forecast_stages import finish


#: Together, these pairs cover every executor, and every recipe with a size or family of its own.
EACH_ONCE = [
    *(("llama3_8b_e8t2", "here"), ("llama3_8b_e8t2", "slurm"), ("llama3_8b_e8t2", "kubernetes")),
    *(("llama3_70b_e8t2", "slurm"), ("qwen3_8b_e8t2", "kubernetes"), ("smollm2_135m_e8t2", "here")),
]


@pytest.mark.parametrize(("recipe", "cluster"), quick(forecasts.GOLDEN, *EACH_ONCE))
def test_text_equals_its_golden_file(recipe: str, cluster: str) -> None:
    """After an intended change, run `python -m tests.golden` and read the difference."""
    text = forecasts.forecast_text(recipe, cluster)
    assert text == forecasts.forecast_path(recipe, cluster).read_text(encoding="utf-8")
    forecast, *_ = text.partition("\n---")
    if (recipe, cluster) not in forecasts.IN_FULL:
        assert max(map(len, forecast.splitlines())) <= WIDTH
        assert len(forecast.splitlines()) <= 60


def test_a_report_gets_what_the_forecast_said(llama: Any, tmp_path: Path) -> None:
    pretrain = forecast_of(llama, tmp_path).trainings["pretrain"]
    facts = NeMoTraining(dump_recipe(llama.pretrain)).facts(Parent(llama.dense))
    planned = planned_of(facts, "NVIDIA H100 80GB HBM3")
    assert planned is not None
    assert planned["memory_gib"] == pytest.approx(pretrain.memory_gib)
    assert planned_of(facts, "another GPU") is None


def test_forecast_plans_the_recipe_as_it_was_changed(llama: Any, tmp_path: Path) -> None:
    from nemo_upcycle.recipes import llama3_8b_e8t2

    llama.pretrain = llama3_8b_e8t2.pretrain_recipe(performance_mode=True, fp8_recipe="tensorwise")
    llama.pretrain.trainer.strategy.pipeline_model_parallel_size = 1
    llama.pretrain.trainer.strategy.virtual_pipeline_model_parallel_size = None
    in_bf16 = forecast_of(llama, tmp_path).trainings["pretrain"].fullest
    assert (in_bf16.work.gradients, in_bf16.verdict) == ("bf16", "tight")
    llama.pretrain.trainer.plugins.grad_reduce_in_fp32 = True
    found = forecast_of(llama, tmp_path)
    plan = found.trainings["pretrain"].fullest
    assert (plan.work.precision, plan.work.pad, plan.work.capacity_factor) == ("fp8-current", True, 1.0)
    assert (plan.layout.pp, plan.layout.vp, plan.layout.cp, plan.verdict) == (1, 1, 2, "no")
    (misfit,) = [text for text in found.misfits if text.startswith("pretrain: memory does not fit")]
    assert "nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 512" in misfit


def test_vocabulary_of_an_unknown_parent_is_said_to_be_unknown(demo: Any, tmp_path: Path) -> None:
    for recipe in (demo.pretrain, demo.dense_ct):
        recipe.model.config.hidden_size, recipe.model.config.num_attention_heads = 64, 4
    demo.dense = "hf://nobody/nothing"
    found = forecast_of(demo, tmp_path)
    assert not found.trainings["pretrain"].facts.knows_vocabulary
    assert "the vocabulary is known only after the parent is fetched" in " ".join(found.warnings)
    demo.dense = str(write_tokenizer(write_llama(tmp_path / "parent", vocab_size=259)))
    (tmp_path / "parent/model.safetensors").unlink()
    found = forecast_of(demo, tmp_path)
    assert found.trainings["pretrain"].facts.arch.vocab_size == 259


def test_plain_settings_are_forecast_with_their_defaults(demo: Any, tmp_path: Path) -> None:
    """A recipe without batch sizes gets the sizes of its data module; missing plugins and callbacks count as empty."""
    from nemo.collections.llm.gpt.data import MockDataModule

    demo.pretrain.data = run.Config(MockDataModule, seq_length=1024)
    for name in ("plugins", "callbacks"):
        delattr(demo.pretrain.trainer, name)
    facts = forecast_of(demo, tmp_path).trainings["pretrain"].facts
    assert (facts.seq_length, facts.global_batch, facts.profile.precision) == (1024, 8, "bf16")


def test_a_run_that_does_not_fit_the_disk_is_refused(llama: Any, tmp_path: Path) -> None:
    found = forecast_of(llama, tmp_path)
    enough, short = (
        replace(found, disk=replace(found.disk, free_bytes=found.disk.needed_bytes - missing)) for missing in (0, 1)
    )
    check_space(enough)
    with pytest.raises(UpcycleError, match="checkpoints of pretrain"):
        check_space(short)
    # Submitted jobs already have their space, and watching these jobs needs no more space.
    check_space(short, alive=[stage.name for stage in STAGES])
    with pytest.raises(UpcycleError, match="exported model"):
        check_space(replace(short, disk=replace(short.disk, free_bytes=0)), alive=["pretrain", "dense_ct"])
    assert (len(short.misfits), enough.misfits) == (1, ())


def test_a_clusters_folder_has_a_disk_of_unknown_size(llama: Any) -> None:
    there = Path("/not-mounted/runs")
    assert forecast_of(llama, there, cluster=forecasts.CLUSTERS["slurm"]()).disk.free_bytes is None
    assert forecast_of(llama, there).disk.free_bytes is not None


def test_trainings_side_by_side_need_both_their_checkpoints_at_once(llama: Any, tmp_path: Path) -> None:
    finish(llama, tmp_path, "import", "data", "upcycle")
    in_turn = forecast_of(llama, tmp_path, stages=STAGES[3:5]).disk
    beside = forecast_of(llama, tmp_path, cluster=forecasts.CLUSTERS["slurm"](), stages=STAGES[3:5]).disk
    moe, dense = in_turn.uses
    assert (4 * moe.peak_bytes, 4 * dense.peak_bytes) == (5 * moe.kept_bytes, 5 * dense.kept_bytes)
    assert in_turn.needed_bytes == moe.peak_bytes
    assert beside.needed_bytes == moe.peak_bytes + dense.peak_bytes


def test_finished_data_warn_of_a_run_that_is_longer(llama: Any, tmp_path: Path) -> None:
    parent = write_tokenizer(write_llama(tmp_path / "parent", vocab_size=259))
    llama.data = str(write_blend(tmp_path / "blend", parent, {"talks": (1.0, {"train": [9], "validation": [1]})}))
    said = [text for text in forecast_of(llama, tmp_path / "run").warnings if "max_epochs" in text]
    assert [text.partition(": data: source talks is read ")[0] for text in said] == ["pretrain", "dense_ct"]


def test_a_screen_shows_only_typed_settings_of_a_recipe(llama: Any, tmp_path: Path) -> None:
    llama.pretrain.trainer.max_steps = 100
    llama.pretrain.trainer.callbacks.append(run.Config(EvaluateWhileTraining))
    typed = {"dense": llama.dense, "pretrain.trainer.max_steps": "1e2", "dense_ct.model.tokenizer": "null"}
    found = forecast_of(llama, tmp_path, typed=typed)
    shown = [(one.name, one.value) for one in found.settings if one.origin == TYPED]
    assert shown == list((typed | {"pretrain.trainer.max_steps": "100"}).items())
    rows = {line.split()[0] for line in render_forecast(found).splitlines() if line}
    assert rows & {"pretrain.trainer.max_steps", "pretrain.trainer.num_nodes"} == {"pretrain.trainer.max_steps"}
    assert any("different numbers of tokens" in warning for warning in found.warnings)
    rows = {tuple(line.split()) for line in render_forecast(found, verbose=True).splitlines()}
    assert ("evaluation", "watch", "every", "500", "steps") in rows
    assert ("pretrain.trainer.num_nodes", "recipe", "64") in rows
    assert "dense_ct.trainer.num_nodes" not in {one.name for one in found.settings}, "what is as in pretrain"


def test_every_card_with_settings_has_a_speed(llama: Any, tmp_path: Path) -> None:
    assert set(performance.table()["cards"]) == set(gpu_names())
    cluster = forecasts.CLUSTERS["slurm"]()
    cluster.executor.card = "gb200"
    assert forecast_of(llama, tmp_path, cluster=cluster).trainings["pretrain"].gpu.name.startswith("GB200")


@pytest.mark.parametrize(
    ("chain", "cluster", "fields", "words"),
    [
        ("llama", "slurm", {"time": "0:20:00"}, "the time limit (20 min) is shorter"),
        ("large", "slurm", {}, "run.executor.stages.pretrain.signal=TERM@3060"),
        ("large", "slurm", {"signal": "TERM@3060"}, ""),
        ("large", "slurm", {"hang_detection": True, "signal": "TERM@3600"}, "stages.pretrain.silence_s=3060"),
        ("llama", "kubernetes", {"termination_grace_s": 0}, "pretrain.termination_grace_s=360"),
    ],
)
def test_a_step_or_save_without_time_names_its_setting(
    chain: str, cluster: str, fields: dict[str, Any], words: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    scheduler = forecasts.CLUSTERS[cluster]()
    scheduler.executor.stages["pretrain"] |= fields
    found = forecast_of(request.getfixturevalue(chain), tmp_path, cluster=scheduler)
    said = "\n".join(text for text in found.warnings if text.startswith("pretrain: "))
    assert words in said if words else "GiB/s" not in said


def test_a_save_is_planned_at_the_speed_of_the_site(llama: Any, tmp_path: Path) -> None:
    cluster = forecasts.CLUSTERS["slurm"]()
    cluster.executor.write_gib_s = 0.5
    slow = forecast_of(llama, tmp_path, cluster=cluster)
    (warning,) = [text for text in slow.warnings if text.startswith("pretrain: a checkpoint of 619.22 GiB")]
    assert "At 0.5 GiB/s, set run.executor.stages.pretrain.signal=TERM@1260" in warning
    assert "1,238 s at 0.5 GiB/s, " in render_forecast(slow, verbose=True)
    cluster.executor.write_gib_s = 0
    with pytest.raises(SpecError) as refused:
        forecast_of(llama, tmp_path, cluster=cluster)
    assert refused.value.field == "run.executor.write_gib_s"


def test_failures_lengthen_a_training(llama: Any, tmp_path: Path) -> None:
    cluster = forecasts.CLUSTERS["slurm"]()
    usual = forecast_of(llama, tmp_path, cluster=cluster).trainings["pretrain"]
    assert usual.between_failures_s == pytest.approx(USUAL_GPU_HOURS / 512 * 3600)
    cluster.executor.gpu_hours_between_failures, cluster.executor.restart_s = 2000.0, 1200.0
    found = forecast_of(llama, tmp_path, cluster=cluster)
    often = found.trainings["pretrain"]
    assert often.seconds_left < usual.seconds_with_failures < often.seconds_with_failures
    assert often.goodput(often.best_every_n_steps) > often.goodput(often.facts.saving.every_n_steps)
    (warning,) = [text for text in found.warnings if text.startswith("pretrain: ")]
    assert f"set pretrain.log.ckpt.every_n_train_steps={often.best_every_n_steps}" in warning
    assert "one in 3.9 h, restart 1,200 s (given)" in render_forecast(found, verbose=True)


def test_a_restart_is_measured_if_a_job_has_run(llama: Any, tmp_path: Path) -> None:
    for folder, name, time_s in (("jobs/pretrain", "started", 1000), ("pretrain", "training.json", 1450)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("{}")
        os.utime(tmp_path / folder / name, (time_s, time_s))
    found = forecast_of(llama, tmp_path, cluster=forecasts.CLUSTERS["slurm"]()).trainings["pretrain"]
    assert (found.restart_s, found.restart_origin) == (450, "measured")


def test_nccl_ep_is_refused_without_buffers(llama: Any) -> None:
    facts = NeMoTraining(dump_recipe(llama.pretrain)).facts(Parent(llama.dense))
    computation = replace(facts.computation, capacity_factor=None, recompute="none", first_steps=0)

    def plan(name: str, room: float | None = None) -> Any:
        profile = replace(facts.profile, dispatcher=name)
        changed = replace(facts, profile=profile, computation=replace(computation, rank_capacity=room))
        return plans_of(changed, known_gpu("h100"))[1]

    assert plan("ncclep", 1.5).memory == plan("hybridep").memory
    assert plan("ncclep", 2.0).memory.routed > plan("ncclep", 1.5).memory.routed
    assert plan("ncclep", 1.5).time == plan("hybridep").time
    with pytest.raises(SpecError) as refused:
        plan("ncclep")
    assert refused.value.field == "moe_expert_rank_capacity_factor"
    with pytest.raises(SpecError, match="allgather"):
        plan("allgather")


def test_suite_and_logger_of_a_training_need_a_network(
    llama: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.data = str(tmp_path)
    llama.pretrain.trainer.callbacks.append(run.Config(EvaluateWhileTraining))
    llama.dense_ct.log.wandb = run.Config(WandbLogger, project="me")
    network = forecast_of(llama, tmp_path).network
    assert [name for names in network.stages["pretrain"].values() for name in names] == ["questions mmlu"]
    assert list(network.stages["dense_ct"]) == ["Weights & Biases"]
    assert network.command.endswith("evaluation=paper && nemo-upcycle fetch DIR evaluation=watch")
    monkeypatch.setenv("WANDB_MODE", "offline")
    llama.evaluation = "watch"
    again = forecast_of(llama, tmp_path).network
    assert "dense_ct" not in again.stages
    assert again.command.count("fetch") == 1


def test_an_offline_hub_is_a_problem_without_a_cache(
    llama: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(cache))
    assert forecast_of(llama, tmp_path).network.problems == ()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = forecast_of(llama, tmp_path)
    assert any(
        one.startswith("import needs model meta-llama/")
        and "and HF_HUB_OFFLINE=1 or TRANSFORMERS_OFFLINE=1 for" in one
        for one in map(str, found.problems)
    )


DEMO = RunPlan("tiny", "asset://smollm2-135m", "sotu", "demo", "", None)
JOBS = {stage.name: Job(stage.name, Path("/runs/tiny"), ("python",)) for stage in STAGES}


def _names(plan: RunPlan, *site: str) -> dict[str, list[str]]:
    """List the names that each stage needs from the network, on this machine or on a Slurm cluster."""
    cluster = cluster_for(read_executor("slurm", ["account=a", "partition=b", *site])) if site else None
    stages = forecast_network(STAGES, plan, cluster, JOBS).stages
    return {stage: [name for names in places.values() for name in names] for stage, places in stages.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which this machine's environment variables name."""
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


def test_the_demo_needs_its_assets_until_the_cache_has_them(cache: Path) -> None:
    assert list(_names(DEMO)) == ["import", "data", "evaluate"]
    for name in ("smollm2-135m", "mmlu"):
        write_json(asset_folder(name, cache) / MARKER, {})
    assert _names(DEMO) == {"data": ["corpus sotu"]}
    assert list(cache.iterdir()) == [cache / "assets"]


def test_a_job_finds_what_its_own_variables_name(cache: Path) -> None:
    for name in ("smollm2-135m", "sotu", "mmlu"):
        write_json(asset_folder(name, cache) / MARKER, {})
    image = "container_image=a"
    assert _names(DEMO, "container_image=null") == {}
    assert list(_names(DEMO, image)) == ["import", "data", "evaluate"]  # the user's home is not mounted
    assert _names(DEMO, image, f"env_vars={{NEMO_UPCYCLE_CACHE: {cache}}}") == {}


def test_a_hub_model_is_needed_until_it_is_whole(cache: Path, tmp_path: Path) -> None:
    plan = replace(DEMO, dense="hf://acme/tiny", data=str(tmp_path), evaluation="laptop")
    assert _names(plan) == {"import": ["model acme/tiny"]}
    kept = tmp_path / "hf/hub/models--acme--tiny"
    weights = write_llama(kept / "snapshots" / ("c" * 40), layers=1) / "model.safetensors"
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("c" * 40)
    assert _names(plan) == {}
    weights.unlink()
    assert _names(plan) == {"import": ["model acme/tiny"]}


def test_what_was_fetched_beforehand_is_not_needed(cache: Path) -> None:
    plan = replace(DEMO, data="fineweb_edu_academic_7_3", evaluation="paper")
    assert {"lm-eval's drop", "lm-eval's piqa"} <= set(_names(plan)["data"])
    write_json(cache / "fetched.json", {"fetched": {"lm-eval's piqa": {}}})
    assert "lm-eval's piqa" not in _names(plan)["data"]
