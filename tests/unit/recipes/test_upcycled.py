"""`upcycled` makes a NeMo 2.7 recipe upcycle and pass our checks, or refuses the recipe with a reason."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from operator import attrgetter
from typing import Any

import fiddle as fdl
import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from tests.tiers import quick


SPEC = UpcycleSpec(num_experts=8, top_k=2)
DENSE = "/models/parent"
#: Module of `nemo.collections.llm.recipes` -> nodes, if the recipe's own number is too small for its layout.
UPCYCLED: dict[str, int | None] = {
    **dict.fromkeys(("gemma_2b", "gemma_7b", "llama2_7b", "phi3_mini_4k_instruct")),
    **dict.fromkeys(f"llama3_{size}" for size in ("8b", "8b_16k", "8b_64k", "8b_128k", "70b_16k", "70b_64k")),
    **dict.fromkeys(("llama31_8b", "llama32_1b", "llama32_3b")),
    **dict.fromkeys(("mistral_7b", "mistral_nemo_12b", "mistral_small3_24b")),
    **dict.fromkeys(f"qwen2_{size}" for size in ("500m", "1p5b", "7b", "72b")),
    **dict.fromkeys(f"qwen25_{size}" for size in ("500m", "1p5b", "7b", "14b", "32b", "72b")),
    **dict.fromkeys(f"qwen3_{size}" for size in ("600m", "1p7b", "4b", "8b", "14b", "32b")),
    **{"llama3_70b": 4, "llama31_70b": 4, "llama31_405b": 32},
}
#: One recipe of each family; some use tensor parallelism.
OF_EACH_FAMILY = ("gemma_2b", "llama2_7b", "llama32_1b", "mistral_7b", "phi3_mini_4k_instruct")
OF_EACH_FAMILY += ("qwen2_72b", "qwen3_8b")
#: Module of a parent with experts -> experts and top-k of a model with twice as many experts.
GROWN = {
    **dict.fromkeys(("mixtral_8x7b", "mixtral_8x7b_16k", "mixtral_8x7b_64k"), (16, 4)),
    **dict.fromkeys(("mixtral_8x22b", "mixtral_8x22b_64k"), (16, 4)),
    **dict.fromkeys(("qwen3_30b_a3b", "qwen3_235b_a22b"), (256, 16)),
}
#: Distilled models; NeMo itself makes no pretraining recipe for these models.
NONE = {"llama31_nemotron_ultra_253b", "llama33_nemotron_super_49b"}


def _stock(name: str, **arguments: Any) -> Any:
    return importlib.import_module(f"nemo.collections.llm.recipes.{name}").pretrain_recipe(**arguments)


@pytest.mark.parametrize("name", quick(UPCYCLED, "llama31_405b", "llama3_70b", *OF_EACH_FAMILY))
def test_a_dense_recipe_of_nemo_becomes_one_that_upcycles(recipes: Any, name: str) -> None:
    from nemo_upcycle.trainers.nemo.checks import check_recipe
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe, recipe_spec

    nodes = {"num_nodes": count} if (count := UPCYCLED[name]) else {}
    stock = _stock(name, **nodes)
    before = copy.deepcopy(stock)
    recipe = recipes.upcycled(stock, dense=DENSE, spec=SPEC)
    assert stock == before
    check_recipe(recipe)
    assert recipe_spec(recipe) == SPEC
    assert recipe.resume.restore_config.path == DENSE
    assert (recipe.optim.config, recipe.optim.lr_scheduler) == (stock.optim.config, stock.optim.lr_scheduler)
    assert recipe.log == stock.log
    assert recipe.model.__fn_or_cls__ is stock.model.__fn_or_cls__
    _only_differs(recipe.model.config, stock.model.config, "num_moe_experts moe_router_topk moe_router_pre_softmax")
    _only_differs(recipe.trainer.strategy, stock.trainer.strategy, "sequence_parallel expert_tensor_parallel_size")
    _only_differs(recipe.data, stock.data, "tokenizer")
    _only_differs(recipe.trainer, stock.trainer, "callbacks strategy")
    assert load_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", quick(GROWN, "mixtral_8x7b", "qwen3_30b_a3b"))
def test_a_parent_with_experts_gets_more_experts(recipes: Any, name: str) -> None:
    from nemo_upcycle.trainers.nemo.recipes import recipe_spec
    from nemo_upcycle.trainers.nemo.upcycled import use_spec

    experts, top_k = GROWN[name]
    spec, stock = UpcycleSpec(num_experts=experts, top_k=top_k), _stock(name)
    recipe = recipes.upcycled(stock, dense=DENSE, spec=spec)
    assert recipe_spec(recipe) == spec
    config = recipe.model.config
    assert (config.num_moe_experts, config.moe_router_topk) == (experts, top_k)
    for kept in ("moe_aux_loss_coeff", "moe_token_dispatcher_type"):
        assert getattr(config, kept) == getattr(stock.model.config, kept)
    _only_differs(config, stock.model.config, "num_moe_experts moe_router_topk")
    more = UpcycleSpec(num_experts=2 * experts, top_k=2 * top_k)
    assert use_spec(recipe, more).model.config.num_moe_experts == 2 * experts
    assert recipe.model.config.moe_ffn_hidden_size == stock.model.config.moe_ffn_hidden_size


def _only_differs(recipe: Any, stock: Any, names: str) -> None:
    """Check that only the named settings, load balancing, and settings that NeMo ignores have changed."""
    always = "moe_router_load_balancing_type moe_aux_loss_coeff moe_token_dispatcher_type ckpt_include_optimizer"
    allowed = {*names.split(), *always.split()}
    settings = {*recipe.__arguments__, *stock.__arguments__} - allowed
    changed = [name for name in settings if getattr(recipe, name, None) != getattr(stock, name, None)]
    assert changed == []


def test_every_other_recipe_of_nemo_is_refused_with_the_reason(recipes: Any) -> None:
    from nemo.collections.llm import recipes as stock

    names = {module.name for module in pkgutil.iter_modules(stock.__path__)} - {*UPCYCLED, *GROWN, *NONE}
    refused = 0
    for module in (importlib.import_module(f"{stock.__name__}.{name}") for name in sorted(names)):
        if hasattr(module, "pretrain_recipe"):
            recipe = module.pretrain_recipe()
            before, refused = copy.deepcopy(recipe), refused + 1
            with pytest.raises(SpecError, match="and only the families"):
                recipes.upcycled(recipe, dense=DENSE, spec=SPEC)
            assert recipe == before
    assert refused > 40


def _with(name: str, value: Any) -> Any:
    recipe = _stock("llama32_1b")
    path, _, last = name.rpartition(".")
    setattr(attrgetter(path)(recipe), last, value)
    return recipe


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.config.mtp_num_layers", 1),
        ("trainer.strategy.fsdp", "megatron"),
        ("trainer.strategy.tensor_parallel_size", 2),
        ("trainer.strategy", "auto"),
        ("model.config.position_embedding_type", "none"),
        ("model.config.seq_len_interpolation_factor", 2.0),
    ],
)
def test_a_setting_that_upcycling_cannot_have_is_named(recipes: Any, name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=name.replace(".", r"\.")):
        recipes.upcycled(_with(name, value), dense=DENSE, spec=SPEC)


def test_a_recipe_may_keep_its_parameters_in_fp8(recipes: Any) -> None:
    from nemo.collections.llm.recipes.precision.mixed_precision import bf16_with_fp8_mixed

    recipe = recipes.upcycled(_with("trainer.plugins", bf16_with_fp8_mixed()), dense=DENSE, spec=SPEC)
    assert recipe.trainer.plugins.fp8_param_gather


def test_refuses_recipes_that_are_not_dense_pretrainings(recipes: Any) -> None:
    from nemo.collections.llm.recipes import llama32_1b

    with pytest.raises(SpecError, match="finetune"):
        recipes.upcycled(llama32_1b.finetune_recipe(), dense=DENSE, spec=SPEC)
    with pytest.raises(SpecError, match="pretrain_recipe"):
        recipes.upcycled(llama32_1b, dense=DENSE, spec=SPEC)
    with pytest.raises(SpecError, match="use_spec"):
        recipes.upcycled(recipes.smollm2_135m_e8t2.pretrain_recipe(), dense=DENSE, spec=SPEC)


def test_does_not_silently_replace_a_users_strategy(recipes: Any) -> None:
    from nemo import lightning as nl

    from nemo_upcycle.trainers.nemo.upcycling import UpcycleStrategy

    for base in (nl.MegatronStrategy, UpcycleStrategy):
        recipe = _stock("llama32_1b")
        fdl.update_callable(recipe.trainer.strategy, mine := type("MyStrategy", (base,), {}))
        if base is UpcycleStrategy:
            assert recipes.upcycled(recipe, dense=DENSE, spec=SPEC).trainer.strategy.__fn_or_cls__ is mine
        else:
            with pytest.raises(SpecError, match="MyStrategy"):
                recipes.upcycled(recipe, dense=DENSE, spec=SPEC)


def test_completes_a_recipe_without_log_resume_and_optimizer(recipes: Any) -> None:
    import nemo_run as run
    from nemo.collections import llm

    from nemo_upcycle.trainers.nemo.checks import check_recipe

    stock = _stock("llama32_1b")
    mine = run.Partial(llm.pretrain, model=stock.model, trainer=stock.trainer, data=stock.data)
    recipe = recipes.upcycled(mine, dense=DENSE, spec=UpcycleSpec(num_experts=16, top_k=4, granularity=2))
    check_recipe(recipe)
    assert (recipe.resume.resume_if_exists, recipe.log.ckpt.save_last) == (True, True)
    assert (recipe.model.config.moe_ffn_hidden_size, recipe.model.config.moe_router_dtype) == (4096, "fp32")


def test_it_says_what_it_changed_and_nothing_else(recipes: Any, caplog: pytest.LogCaptureFixture) -> None:
    from nemo_upcycle.utils.progress import show_messages

    show_messages().addHandler(caplog.handler)
    recipes.upcycled(_stock("qwen2_72b"), dense=DENSE, spec=UpcycleSpec(num_experts=16, top_k=2))
    show_messages().removeHandler(caplog.handler)
    said = [record.getMessage().strip() for record in caplog.records]
    assert "trainer.strategy: MegatronStrategy -> UpcycleStrategy" in said
    assert f"resume.restore_config: None -> UpcycleConfig(path='{DENSE}', spec=UpcycleSpec(num_experts=16))" in said
    assert not [line for line in said if "ffn_hidden_size" in line or "router_topk" in line]
    assert len(said) <= 14


def test_use_spec_refuses_a_recipe_that_does_not_upcycle(recipes: Any) -> None:
    from nemo_upcycle.recipes import use_spec

    for recipe in (_stock("llama32_1b"), recipes.smollm2_135m_dense_ct.pretrain_recipe()):
        with pytest.raises(SpecError, match=r"upcycled\("):
            use_spec(recipe, SPEC)


def test_a_recipe_equals_its_upcycled_dense_baseline(recipes: Any) -> None:
    dense = recipes.smollm2_135m_dense_ct
    made = recipes.upcycled(
        dense.pretrain_recipe(name="mine"), dense=recipes.known_recipe("smollm2_135m_e8t2").inputs["dense"], spec=SPEC
    )
    assert made == recipes.smollm2_135m_e8t2.pretrain_recipe(name="mine")


def test_mock_data_without_a_tokenizer_get_the_parents_vocabulary(recipes: Any, tmp_path: Any) -> None:
    from tests.models import write_llama, write_tokenizer

    parent = write_tokenizer(write_llama(tmp_path / "parent", vocab_size=259))
    recipe = recipes.upcycled(_stock("llama32_1b"), dense=str(parent), spec=SPEC)
    assert fdl.build(recipe.data.tokenizer).vocab_size == 259
