"""Tuning recipes: registered with NeMo's `finetune`, trained on packs, and refused if a pack does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.recipes import known_recipes
from nemo_upcycle.sources.find import Parent


NAMES = tuple(known.name for known in known_recipes().values() if known.tunes and "nemo" in known.trainers)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_nemos_finetune_of_the_pretraining_recipe(recipes: Any, name: str) -> None:
    from nemo.collections.llm.api import finetune
    from nemo_run.cli.api import resolve_factory

    from nemo_upcycle.data.chat_module import chat_data
    from nemo_upcycle.trainers.nemo.checks import check_recipe

    module = getattr(recipes, name)
    base = getattr(recipes, name.replace("_sft", "").replace("_dense", "_dense_ct")).pretrain_recipe()
    recipe = module.finetune_recipe()
    assert resolve_factory(finetune, name)() == recipe
    assert recipe.__fn_or_cls__ is finetune
    assert recipe.data.__fn_or_cls__ is chat_data
    assert recipe.tokenizer == "data"
    check_recipe(recipe)
    by_lora = getattr(recipe, "peft", None) is not None
    layout = ("tensor", *(() if by_lora else ("expert",)))
    kept = [f"trainer.strategy.{kind}_model_parallel_size" for kind in layout]
    for setting in (*kept, "model.config.num_moe_experts", "resume.restore_config.spec", "trainer.callbacks"):
        assert _setting(recipe, setting) == _setting(base, setting), setting


@pytest.mark.parametrize("name", [name for name in NAMES if "dense" not in name])
def test_a_chain_tunes_the_dense_model_alike(recipes: Any, name: str) -> None:
    from nemo_run.cli.api import resolve_factory

    from nemo_upcycle.pipeline.nemo.pipeline import pipeline

    chain = getattr(recipes, name).pipeline_recipe()
    assert resolve_factory(pipeline, name)() == chain
    for setting in ("data", "optim.config", "trainer.max_steps"):
        assert _setting(chain.pretrain, setting) == _setting(chain.dense_ct, setting)
    assert chain.pretrain.data.dense == chain.dense


@pytest.mark.parametrize(
    ("scheme", "field", "value"),
    [
        ("none", "tokenizer", "model"),
        ("none", "peft", "lora"),
        ("lora", "trainer.strategy.expert_model_parallel_size", 2),
        ("lora", "model.config.moe_grouped_gemm", True),
    ],
)
def test_refuses_settings_that_packs_and_lora_lack(recipes: Any, scheme: str, field: str, value: Any) -> None:
    import nemo_run as run
    from nemo.collections.llm.peft import LoRA

    from nemo_upcycle.trainers.nemo.checks import check_settings

    recipe = recipes.qwen3_8b_e8t2_sft.finetune_recipe(peft_scheme=scheme)
    check_settings(recipe, "pretrain.")
    owner, _, name = field.rpartition(".")
    setattr(_setting(recipe, owner) if owner else recipe, name, run.Config(LoRA) if value == "lora" else value)
    with pytest.raises(SpecError) as caught:
        check_settings(recipe, "pretrain.")
    assert caught.value.field == f"pretrain.{field}"


def _setting(recipe: Any, name: str) -> Any:
    for part in name.split("."):
        recipe = getattr(recipe, part, None)
    return recipe


def test_a_scheme_is_lora_or_none_as_in_nemos_recipes(recipes: Any) -> None:
    usual = {name: getattr(recipes, name).finetune_recipe() for name in NAMES}
    by_lora = [name for name, one in usual.items() if getattr(one, "peft", None)]
    assert by_lora == [name for name in NAMES if name.startswith(("llama32_1b", "qwen3_1p7b"))]
    whole = recipes.qwen3_1p7b_e8t2_sft.finetune_recipe(peft_scheme="none")
    assert getattr(whole, "peft", None) is None
    assert whole.model.config.moe_grouped_gemm
    with pytest.raises(SpecError, match="peft_scheme"):
        recipes.qwen3_600m_e8t2_sft.finetune_recipe(peft_scheme="dora")


def test_loras_rank_is_set_on_the_command_line(recipes: Any) -> None:
    from nemo.collections.llm.api import finetune
    from nemo_run.cli.cli_parser import parse_cli_args, parse_factory

    recipe = parse_factory(finetune, "", finetune, "qwen3_600m_e8t2_sft(peft_scheme='lora')")
    recipe = parse_cli_args(finetune, ["peft.dim=16", "peft.alpha=32"], recipe)
    assert (recipe.peft.dim, recipe.peft.alpha) == (16, 32)


def test_a_lora_chain_tunes_both_models_without_expert_parallelism(recipes: Any) -> None:
    from nemo_upcycle.trainers.nemo.checks import check_settings

    chain = recipes.smollm2_135m_e8t2_sft.pipeline_recipe(peft_scheme="lora")
    for training in (chain.pretrain, chain.dense_ct):
        check_settings(training, "")
        assert training.peft.dim == 8
    assert chain.pretrain.trainer.strategy.expert_model_parallel_size == 1


@pytest.mark.parametrize(
    "spec",
    [None, UpcycleSpec(), UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1, moe_layers="every-2")],
)
def test_the_planner_counts_the_adapters_of_megatrons_modules(recipes: Any, spec: UpcycleSpec | None) -> None:
    """The heads together are wider than the hidden size. The modules are on the meta device."""
    from dataclasses import replace

    from nemo.collections.llm.fn.base import walk

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.cpu.one_rank import megatron_rank
    from nemo_upcycle.planning.hardware import known_shape
    from nemo_upcycle.planning.layout import Layout
    from nemo_upcycle.planning.memory import lora_params
    from nemo_upcycle.trainers.nemo.lora import UpcycleLoRA
    from tests.megatron_ranks import build_rank

    use_cpu_backend()
    sizes = {"num_layers": 4, "hidden_size": 72, "ffn_size": 168, "num_heads": 8, "num_kv_heads": 4, "head_dim": 10}
    arch = replace(known_shape("llama3_8b"), **sizes)
    arch = arch.upcycled(spec) if spec else arch
    layout = Layout(gpus=1)
    with megatron_rank(layout, 0):
        [chunk] = build_rank(arch, layout)
        walk(chunk, UpcycleLoRA(dim=4).transform)
        named = dict(chunk.named_parameters())
    adapters = sum(one.numel() for name, one in named.items() if ".adapter." in name)
    routers = sum(one.numel() for name, one in named.items() if name.endswith("mlp.router.weight"))
    assert (adapters, routers) == lora_params(arch, 4)


def test_a_forecast_by_lora_has_states_of_few_weights(recipes: Any) -> None:
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of
    from nemo_upcycle.planning.hardware import known_gpu
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    for name, card in (("llama32_1b_e8t2_sft", "rtx4090"), ("qwen3_1p7b_e8t2_sft", "h100")):
        plans, sizes = [], []
        for scheme in ("lora", "none"):
            recipe = getattr(recipes, name).finetune_recipe(peft_scheme=scheme)
            facts = NeMoTraining.from_text(dump_recipe(recipe)).facts(Parent(recipe.resume.restore_config.path))
            sizes.append(facts.checkpoint_bytes)
            plans.append(plans_of(facts, known_gpu(card))[1])
        assert [plan.verdict for plan in plans] == ["fits", "no"]
        assert sizes[0] < 0.2 * sizes[1]
        assert plans[0].work.recompute == "moe"
        assert plans[0].memory.optimizer < 0.02 * plans[1].memory.optimizer
