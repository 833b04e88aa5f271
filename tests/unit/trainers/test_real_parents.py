"""Dry runs of recipes for parents of real size, made from a `config.json` alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of
from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.recipes import upcycled_from
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.nemo.checks import check_recipe
from nemo_upcycle.trainers.nemo.recipes import dump_recipe
from nemo_upcycle.trainers.nemo.training import NeMoTraining
from tests.models import write_tokenizer
from tests.unit.cli.test_plan_parents import PARENTS


SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: Pipeline stages of parents that are too large for one stage, on 512 H100.
STAGES = {
    "OLMo 2 7B": 2,
    "Mistral Small 3 24B": 8,
    "Qwen3 14B": 4,
    "EXAONE 4.0 32B": 8,
    "Seed-OSS 36B": 8,
    "InternLM3 8B": 2,
    "MiMo 7B": 2,
    "IQuest-Coder 40B": 16,
    "CWM 32B": 8,
    "HyperCLOVA X SEED Think 14B": 2,
    "LLaVA 1.5 7B": 2,
    "Qwen2.5-VL 7B": 2,
}
#: Parents with rotary frequencies or gated delta nets that no model of NeMo has.
NOT_IN_NEMO = {
    "OLMo 3 32B, as transformers 5 has it": "OLMo 3",
    "Gemma 3 1B": "Gemma 3",
    "Gemma 3 4B": "Gemma 3",
    "Ministral 3 14B": "Ministral 3",
    "AFM 4.5B": "Arcee",
    "Qwen3.5 27B": "Qwen3.5",
}


@pytest.mark.parametrize("name", PARENTS)
def test_a_parent_of_real_size_dry_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PARENTS[name][1]))
    sizes = {"seq_length": 8192, "global_batch_size": 512, "max_steps": 10_000, "lr": 3e-5, "num_nodes": 64}
    sizes |= {"num_gpus_per_node": 8, "tensor_parallelism": 2, "expert_parallelism": 8}
    sizes |= {"pipeline_parallelism": STAGES.get(name, 1)}
    folder = str(write_tokenizer(tmp_path))
    if name in NOT_IN_NEMO:
        with pytest.raises(
            SpecError, match=f"{NOT_IN_NEMO[name]} with .* cannot be trained by NeMo. Train it in Megatron-"
        ):
            upcycled_from(folder, spec=SPEC, **sizes)
        return
    recipe = upcycled_from(folder, spec=SPEC, **sizes)
    if name in STAGES:
        config = recipe.model.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    check_recipe(recipe)
    facts = NeMoTraining(dump_recipe(recipe)).facts(Parent("hf://of/its-config-alone"))
    assert facts is not None
    _, plan = plans_of(facts, known_gpu("h100"))
    assert plan.verdict == "fits", plan.memory.total / 2**30
