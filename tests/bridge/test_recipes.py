"""Recipes by Bridge's naming: found by Bridge, complete, and of the model that they name."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.utils.files import read_json
from tests.functional.tiny import write_parent
from tests.models import LLAMA3_8B


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
DENSE = "NEMO_UPCYCLE_DENSE"


@pytest.fixture
def llama3_8b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of Llama 3 8B, fetched: nothing is read of the weights before the start."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B | {"model_type": "llama"}))
    monkeypatch.setattr("nemo_upcycle.trainers.bridge.recipes.common.ensure_dense", lambda source: tmp_path)


def test_a_forecast_says_of_the_papers_run_what_it_says_in_nemo(llama3_8b: None, tmp_path: Path) -> None:
    from nemo_upcycle.pipeline.forecast import forecast, render_forecast
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import planned_of
    from nemo_upcycle.pipeline.launch import jobs_of
    from nemo_upcycle.pipeline.stages import STAGES, RunPlan
    from nemo_upcycle.trainers.bridge.training import BridgeTraining

    (tmp_path / "tokenizer.json").write_text("{}")
    name = "llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config"
    training = BridgeTraining(name, ("checkpoint.save_interval=500",), nodes=64, ranks_per_node=8)
    blend = "redpajama_v2_academic_7_3"
    plan = RunPlan(name, str(tmp_path), blend, "paper", training.to_text(), None, trainer="bridge")
    run_dir = tmp_path / "run"
    jobs = jobs_of(STAGES, run_dir, plan, "python")
    found = forecast(STAGES, run_dir, plan, None, jobs)
    facts = found.trainings["pretrain"].facts
    assert (facts.step_tokens, facts.steps, facts.save_every, facts.keeps) == (4_194_304, 23_842, 500, 2)
    planned = planned_of(facts, "NVIDIA H100 80GB HBM3")
    assert planned is not None
    assert 0 < planned["memory_gib"] < 80
    values = {setting.name: setting.value for setting in found.settings}
    assert (values["pretrain.checkpoint.save_interval"], values["pretrain.train.train_iters"]) == ("500", "23842")
    text = " ".join(render_forecast(found).split())
    assert "619.22 GiB every 500 steps, 3 at once" in text


@pytest.mark.parametrize(
    "name", ["llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config", "llama3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config"]
)
def test_a_recipe_is_found_under_bridges_own(llama3_8b: None, name: str) -> None:
    from nemo_upcycle.trainers.bridge.recipes import register

    register()
    config = getattr(importlib.import_module("megatron.bridge.recipes"), name)()  # where its run_recipe.py looks
    model = config.model
    assert (model.num_layers, model.num_moe_experts, model.moe_router_topk, model.vocab_size) == (32, 8, 2, 128256)
    assert config.checkpoint.load == config.checkpoint.save
    assert model.pre_wrap_hook is not None


@pytest.mark.parametrize("options", [[], ["--precision", "fp8-blockwise", "--dispatcher", "hybridep"]], ids=str)
def test_the_planners_command_is_understood_by_bridge(
    llama3_8b: None, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from nemo_upcycle.cli.main import main
    from nemo_upcycle.trainers.bridge.recipes import named_recipes

    layout = ["--layout", "tp=2,pp=4,vp=8,ep=8", "--backend", "bridge", "--json"]
    assert main(["plan", "--recipe", "llama3_8b_e8t2", "--gpus", "256", *layout, *options]) == 0
    command = json.loads(capsys.readouterr().out)["rows"][0]["command"]
    assert "--recipe llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config" in command

    config = named_recipes()["llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config"]()
    settings = [part for part in shlex.split(command) if "=" in part and not part.startswith("checkpoint")]
    config = process_config_with_overrides(config, cli_overrides=settings)
    model = config.model
    assert (model.tensor_model_parallel_size, model.virtual_pipeline_model_parallel_size) == (2, 8)
    assert (model.sequence_parallel, model.moe_flex_dispatcher_backend) == (True, "hybridep" if options else "deepep")
    assert config.mixed_precision == ("bf16_with_fp8_subchannel_scaling_mixed" if options else "bf16_mixed")


#: A launcher of a user's own, as Bridge's `setup_experiment.py` is one.
_LAUNCHER = """
import sys
import nemo_run as run

if __name__ == "__main__":
    train = run.Script("nemo_upcycle.bridge", args=sys.argv[1:], entrypoint="python", m=True)
    with run.Experiment("bridge", log_level="WARN") as experiment:
        experiment.add(train, executor=run.LocalExecutor(launcher="torchrun", ntasks_per_node=2), name="train")
        experiment.run(tail_logs=True)
    (job,) = experiment.status(return_dict=True).values()
    sys.exit(str(job["status"]) != "SUCCEEDED")
"""
#: What stands for `run_recipe.py`, which is not in Bridge's package.
_RUN_RECIPE = """
import sys
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from tests.bridge.recipes import tiny

config = tiny()
config.train.train_iters, config.validation.eval_iters = 1, 0
config.checkpoint.save = config.checkpoint.load = sys.argv[1]
pretrain(config, forward_step)
"""


def test_nemo_run_starts_a_recipe_as_a_script(tmp_path: Path) -> None:
    dense = write_parent(tmp_path / "dense")
    (tmp_path / "launch.py").write_text(_LAUNCHER)
    (tmp_path / "run_recipe.py").write_text(_RUN_RECIPE)
    command = [sys.executable, tmp_path / "launch.py", tmp_path / "run_recipe.py", tmp_path / "run"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "NEMORUN_HOME": str(tmp_path), DENSE: str(dense)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | environment | {"PATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run/iter_0000001"
    assert read_json(tmp_path / "run/receipt.json")["ranks"] == 2
