"""Recipes of parents of real size, of which there is a `config.json` alone: what a dry run says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nemo.collections import llm

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of
from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.recipes import upcycled
from nemo_upcycle.trainers.nemo.checks import check_recipe
from nemo_upcycle.trainers.nemo.decoder import decoder_model
from nemo_upcycle.trainers.nemo.phi3mini import phi3_model
from nemo_upcycle.trainers.nemo.recipes import dump_recipe
from nemo_upcycle.trainers.nemo.training import NeMoTraining
from tests.models import write_tokenizer
from tests.unit.cli.test_plan_parents import PARENTS


SPEC = UpcycleSpec(num_experts=8, top_k=2)
MAKERS = {"Phi3ForCausalLM": phi3_model}
MAKERS |= dict.fromkeys(
    ("SmolLM3ForCausalLM", "Exaone4ForCausalLM", "Olmo3ForCausalLM", "GraniteForCausalLM"), decoder_model
)
MAKERS |= dict.fromkeys(("GraniteMoeHybridForCausalLM", "SeedOssForCausalLM", "InternLM3ForCausalLM"), decoder_model)
MAKERS |= dict.fromkeys(("ExaoneForCausalLM", "CwmForCausalLM"), decoder_model)
#: Pipeline stages of those that are too large for one, on 512 H100.
STAGES = {"Phi-4": 4, "EXAONE 4.0 32B": 8, "Granite 3.3 8B": 2, "Seed-OSS 36B": 8, "InternLM3 8B": 2}
#: Layers whose rotary frequencies are scaled: in Megatron-Core and Bridge alone.
NOT_IN_NEMO = ("OLMo 3 7B", "OLMo 3 32B, as transformers 5 has it", "EXAONE 3.5 2.4B", "CWM 32B")


def _folder(name: str, tmp_path: Path) -> Path:
    config, _ = PARENTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return write_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", [name for name, (config, _) in PARENTS.items() if config["architectures"][0] in MAKERS]
)
def test_a_parent_of_real_size_dry_runs(tmp_path: Path, name: str) -> None:
    folder = _folder(name, tmp_path)
    make = MAKERS[PARENTS[name][0]["architectures"][0]]
    if name in NOT_IN_NEMO:
        with pytest.raises(SpecError, match="rope_scaling of the dense checkpoint"):
            make(str(folder))
        return
    recipe = llm.llama3_70b.pretrain_recipe(num_nodes=64)
    recipe.model = make(str(folder))
    recipe = upcycled(recipe, dense=str(folder), spec=SPEC)
    strategy = recipe.trainer.strategy
    strategy.tensor_model_parallel_size, strategy.context_parallel_size = 2, 1
    strategy.pipeline_model_parallel_size = STAGES.get(name, 1)
    strategy.virtual_pipeline_model_parallel_size = None
    strategy.expert_model_parallel_size = 8
    if name in STAGES:
        config = recipe.model.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    check_recipe(recipe)
    facts = NeMoTraining(dump_recipe(recipe)).facts("hf://of/its-config-alone")
    assert facts is not None
    _, plan = plans_of(facts, known_gpu("h100"))
    assert plan.verdict == "fits", plan.memory.total / 2**30
