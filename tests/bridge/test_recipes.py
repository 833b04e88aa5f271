"""Bridge finds recipes that follow its naming. Each recipe is complete, and builds the model that its name says."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.recipes import bridge_functions
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.trainers.bridge.recipes import register
from nemo_upcycle.utils.files import read_json
from tests.functional.tiny import write_parent


@pytest.mark.parametrize(
    "name", ["llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config", "llama3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config"]
)
def test_a_recipe_is_found_under_bridges_own(name: str) -> None:
    register(bridge_functions())
    config = getattr(importlib.import_module("megatron.bridge.recipes"), name)()  # Bridge's run_recipe.py looks here
    model = config.model
    assert (model.num_layers, model.num_moe_experts, model.moe_router_topk, model.vocab_size) == (32, 8, 2, 128256)
    assert config.checkpoint.load == config.checkpoint.save
    assert model.pre_wrap_hook is not None


@pytest.mark.parametrize("options", [[], ["--precision", "fp8-blockwise", "--dispatcher", "hybridep"]], ids=str)
def test_the_planners_command_is_understood_by_bridge(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from nemo_upcycle.cli.main import main

    layout = ["--layout", "tp=2,pp=4,vp=8,ep=8", "--backend", "bridge", "--json"]
    assert main(["plan", "--recipe", "llama3_8b_e8t2", "--gpus", "256", *layout, *options]) == 0
    command = json.loads(capsys.readouterr().out)["rows"][0]["command"]
    assert "--recipe llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config" in command

    config = bridge_functions()["llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config"]()
    settings = [part for part in shlex.split(command) if "=" in part and not part.startswith("checkpoint")]
    config = process_config_with_overrides(config, cli_overrides=settings)
    model = config.model
    assert (model.tensor_model_parallel_size, model.virtual_pipeline_model_parallel_size) == (2, 8)
    assert (model.sequence_parallel, model.moe_flex_dispatcher_backend) == (True, "hybridep" if options else "deepep")
    assert config.mixed_precision == ("bf16_with_fp8_subchannel_scaling_mixed" if options else "bf16_mixed")


def test_the_command_line_replaces_a_recipes_parent(dense: Path) -> None:
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from nemo_upcycle.trainers.bridge.upcycling import follow_node

    config = bridge_functions()["llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config"]()
    config = process_config_with_overrides(config, cli_overrides=[f"upcycling.hf_model_path={dense}"])
    follow_node(config)
    assert config.parents == (str(dense),)
    assert (config.model.hidden_size, config.model.num_moe_experts, config.model.seq_length) == (64, 8, 8192)


#: Replaces `run_recipe.py`, which is missing in Bridge's package.
_RUN_RECIPE = """
import sys
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from tests.bridge.recipes import tiny

config = tiny(sys.argv[2])
config.train.train_iters, config.validation.eval_iters = 1, 0
config.checkpoint.save = config.checkpoint.load = sys.argv[1]
pretrain(config, forward_step)
"""


def test_torchrun_starts_a_recipe_by_the_planners_command(tmp_path: Path) -> None:
    dense = write_parent(tmp_path / "dense")
    (tmp_path / "run_recipe.py").write_text(_RUN_RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["nemo_upcycle.bridge", tmp_path / "run_recipe.py", tmp_path / "run", dense]
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run/iter_0000001"
    assert read_json(tmp_path / "run/receipt.json")["ranks"] == 2
    assert done.stderr.count(f"parent: {dense}\n") == 1, "the first rank says it"
