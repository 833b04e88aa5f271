"""The recipes that tune: registered with NeMo's `finetune`, on packs, and refused where a pack does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle.errors import SpecError


MODELS = ("llama3_8b", "qwen3_8b", "qwen3_600m", "smollm2_135m", "llama32_1b", "qwen3_1p7b")
NAMES = tuple(f"{model}_{kind}_sft" for model in MODELS for kind in ("e8t2", "dense"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_nemos_finetune_of_the_pretraining_recipe(recipes: Any, name: str) -> None:
    from nemo.collections.llm.api import finetune
    from nemo_run.cli.api import resolve_factory

    from nemo_upcycle.data.chat_module import chat_data
    from nemo_upcycle.trainers.nemo.checks import check_recipe

    module = getattr(recipes, name)
    base = getattr(recipes, name.replace("_sft", "").replace("_dense", "_dense_ct")).pretrain_recipe()
    recipe = module.finetune_recipe()
    assert resolve_factory(finetune, name) is module.finetune_recipe
    assert recipe.__fn_or_cls__ is finetune
    assert recipe.data.__fn_or_cls__ is chat_data
    assert recipe.tokenizer == "data"
    check_recipe(recipe)
    kept = ("trainer.strategy.tensor_model_parallel_size", "trainer.strategy.expert_model_parallel_size")
    for setting in (*kept, "model.config.num_moe_experts", "resume.restore_config.spec", "trainer.callbacks"):
        values = [_setting(one, setting) for one in (recipe, base)]
        assert values[0] == values[1], setting


@pytest.mark.parametrize("name", [name for name in NAMES if "dense" not in name])
def test_a_chain_tunes_the_dense_model_alike(recipes: Any, name: str) -> None:
    from nemo_run.cli.api import resolve_factory

    from nemo_upcycle.pipeline.nemo.pipeline import pipeline

    chain = getattr(recipes, name).pipeline_recipe()
    assert resolve_factory(pipeline, name) is getattr(recipes, name).pipeline_recipe
    assert chain.pretrain.data == chain.dense_ct.data
    assert chain.pretrain.optim.config == chain.dense_ct.optim.config
    assert chain.pretrain.trainer.max_steps == chain.dense_ct.trainer.max_steps
    assert chain.pretrain.data.dense == chain.dense


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.micro_batch_size", 2),
        ("trainer.strategy.context_parallel_size", 2),
        ("data.teacher_weight", -1.0),
        ("data.teacher_temperature", 0.0),
        ("tokenizer", "model"),
        ("peft", "lora"),
    ],
)
def test_what_packs_do_not_take_is_refused_by_name(recipes: Any, field: str, value: Any) -> None:
    from nemo_upcycle.trainers.nemo.checks import check_settings

    recipe = recipes.smollm2_135m_e8t2_sft.finetune_recipe()
    if value == "lora":
        import nemo_run as run
        from nemo.collections.llm.peft import LoRA

        value = run.Config(LoRA)
    owner, _, name = field.rpartition(".")
    setattr(_setting(recipe, owner) if owner else recipe, name, value)
    with pytest.raises(SpecError) as caught:
        check_settings(recipe, "pretrain.")
    assert caught.value.field == f"pretrain.{field}"


def test_a_tuning_round_trips_through_text_and_says_what_it_reads(recipes: Any) -> None:
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    recipe = recipes.llama3_8b_e8t2_sft.finetune_recipe(data="data/mine", start="runs/first/pretrain")
    assert load_recipe(dump_recipe(recipe)) == recipe
    training = NeMoTraining.from_text(dump_recipe(recipe))
    facts = training.facts("hf://meta-llama/Meta-Llama-3-8B-Instruct")
    assert training.reads_chat
    assert (facts.seq_length, facts.global_batch, facts.layout.cp, facts.layout.gpus) == (4096, 128, 1, 64)
    assert recipe.resume.restore_config.checkpoint == "runs/first/pretrain"


def test_a_teacher_is_in_the_forecast_with_its_memory_and_its_time(recipes: Any) -> None:
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of
    from nemo_upcycle.planning.hardware import known_gpu
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    plans, shown = [], []
    for weight in (0.0, 0.5):
        recipe = recipes.qwen3_600m_e8t2_sft.finetune_recipe()
        recipe.data.teacher_weight = weight
        training = NeMoTraining.from_text(dump_recipe(recipe))
        plans.append(plans_of(training.facts("hf://Qwen/Qwen3-0.6B-Base"), known_gpu("h100"))[1])
        shown.append({name: value for name, value in training.shown_settings("").items() if "teacher" in name})
    logits = 4096 * 151_936
    assert plans[1].memory.logits - plans[0].memory.logits == pytest.approx(5 * logits, rel=0.01)
    assert 1.01 < plans[1].time.total / plans[0].time.total < 1.3
    assert shown == [{}, {"data.teacher_weight": 0.5, "data.teacher_temperature": 1.0}]


def _setting(recipe: Any, name: str) -> Any:
    for part in name.split("."):
        recipe = getattr(recipe, part, None)
    return recipe


def test_the_planner_commands_a_tuning_with_a_pack_a_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """Two packs at a time would be faster, but NeMo takes one."""
    from nemo_upcycle.cli.main import main

    assert main(["plan", "--recipe", "qwen3_600m_e8t2_sft", "--gpus", "1", "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert 'nemo llm finetune --factory \\\n  "qwen3_600m_e8t2_sft(' in text
    assert "mbs=2" not in text
    assert "micro_batch_size" not in text
