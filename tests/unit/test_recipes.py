"""The recipes: registered under their names, the paper's numbers, and whole after a trip through text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError


NAMES = ("llama3_8b_e8t2", "smollm2_135m_dense_ct", "smollm2_135m_e8t2")
UPCYCLED = ("llama3_8b_e8t2", "smollm2_135m_e8t2")


@pytest.fixture(scope="module")
def recipes() -> Any:
    from nemo_upcycle import recipes

    return recipes


def _nemo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(Path(sys.executable).with_name("nemo")), *arguments], cwd=cwd, capture_output=True, text=True, timeout=180
    )


def test_importing_the_package_registers_every_factory(recipes: Any) -> None:
    import lightning.pytorch as pl
    from nemo.collections.llm.api import pretrain
    from nemo_run.cli.api import resolve_factory

    from nemo_upcycle.pipeline.launch import pipeline

    for name in NAMES:
        module = getattr(recipes, name)
        assert name == module.NAME
        assert resolve_factory(pretrain, name) is module.pretrain_recipe
        assert resolve_factory(pl.LightningModule, name) is module.model
        for attribute in ("model", "trainer", "pretrain_recipe"):
            assert getattr(module, attribute).__doc__
    assert resolve_factory(pipeline, "smollm2_135m_e8t2") is recipes.smollm2_135m_e8t2.pipeline_recipe


def test_llama3_8b_e8t2_has_the_papers_numbers(recipes: Any) -> None:
    from nemo_upcycle.pipeline.recipes_io import check_recipe, ranks_of, spec_of

    recipe = recipes.llama3_8b_e8t2.pretrain_recipe()
    strategy, config = recipe.trainer.strategy, recipe.model.config
    assert strategy.tensor_model_parallel_size == 2
    assert strategy.expert_model_parallel_size == 8
    assert strategy.pipeline_model_parallel_size == 4
    assert strategy.virtual_pipeline_model_parallel_size == 8
    assert strategy.expert_tensor_parallel_size == 1
    assert strategy.context_parallel_size == 1
    assert strategy.sequence_parallel is True
    assert ranks_of(recipe) == (64, 8)
    assert (config.num_moe_experts, config.moe_router_topk) == (8, 2)
    assert config.moe_expert_capacity_factor == 4.0
    assert config.moe_aux_loss_coeff == 0.01
    assert recipe.data.seq_length == 8192
    assert recipe.optim.config.lr == 3e-5
    assert recipe.optim.lr_scheduler.min_lr == 3e-7
    assert recipe.optim.lr_scheduler.warmup_steps == 100
    assert recipe.trainer.max_steps * recipe.data.global_batch_size * 8192 == pytest.approx(100e9, rel=1e-4)
    assert spec_of(recipe) == UpcycleSpec(num_experts=8, top_k=2)
    assert recipe.resume.restore_config.path == "hf://meta-llama/Meta-Llama-3-8B"
    check_recipe(recipe)


def test_built_llama3_8b_e8t2_is_llama_3_8b_with_experts(recipes: Any) -> None:
    """Megatron's own checks accept the built configuration, and sizes and rotary base are the dense model's."""
    from nemo_upcycle.training.cpu import use_cpu_backend

    use_cpu_backend()
    config = fdl.build(recipes.llama3_8b_e8t2.model().config)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (32, 4096, 14336)
    assert (config.num_attention_heads, config.num_query_groups) == (32, 8)
    assert config.moe_ffn_hidden_size == 14336
    assert config.rotary_base == 500_000
    assert config.share_embeddings_and_output_weights is False


@pytest.mark.parametrize("name", UPCYCLED)
def test_model_and_spec_agree(recipes: Any, name: str) -> None:
    from nemo_upcycle.pipeline.recipes_io import spec_of

    recipe = getattr(recipes, name).pretrain_recipe()
    config, spec = recipe.model.config, spec_of(recipe)
    assert config.num_moe_experts == spec.num_experts
    assert config.moe_router_topk == spec.top_k
    assert config.moe_router_pre_softmax is (spec.router_order == "softmax_topk")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_starts_from_its_dense_parent(recipes: Any, name: str) -> None:
    from nemo_upcycle.training.metrics import MetricsLogger
    from nemo_upcycle.training.upcycling import UpcycleConfig, UpcycleStrategy

    recipe = getattr(recipes, name).pretrain_recipe(dir="runs", name="mine", dense="/models/parent")
    assert recipe.resume.restore_config.__fn_or_cls__ is UpcycleConfig
    assert recipe.resume.restore_config.path == "/models/parent"
    assert recipe.trainer.strategy.__fn_or_cls__ is UpcycleStrategy
    assert [callback for callback in recipe.trainer.callbacks if callback.__fn_or_cls__ is MetricsLogger]
    assert (recipe.log.log_dir, recipe.log.name) == ("runs", "mine")
    assert bool(recipe.resume.restore_config.spec) is (name in UPCYCLED)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_the_trip_through_text(recipes: Any, name: str) -> None:
    from nemo_upcycle.pipeline.recipes_io import check_recipe, dump_recipe, load_recipe

    recipe = getattr(recipes, name).pretrain_recipe(dir="runs/mine")
    text = dump_recipe(recipe)
    back = load_recipe(text)
    assert back == recipe
    assert dump_recipe(back) == text
    check_recipe(back)
    back.optim.config.lr = 1.0
    assert back != recipe
    assert dump_recipe(back) != text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_model_parallel_size": 3}, "tensor parallelism: got 3, expected a divisor of the key-value heads"),
        ({"expert_model_parallel_size": 3}, "expert parallelism: got 3, expected a divisor of num_moe_experts"),
        ({"pipeline_model_parallel_size": 3}, "pipeline stages: got 24, expected a divisor of num_layers"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(recipes: Any, changes: dict[str, int], words: str) -> None:
    from nemo_upcycle.pipeline.recipes_io import check_recipe

    recipe = recipes.llama3_8b_e8t2.pretrain_recipe()
    for name, value in changes.items():
        setattr(recipe.trainer.strategy, name, value)
    with pytest.raises(SpecError, match=words):
        check_recipe(recipe)


def test_a_spec_that_does_not_fit_the_model_is_refused_before_launch(recipes: Any) -> None:
    from nemo_upcycle.pipeline.recipes_io import check_recipe

    recipe = recipes.smollm2_135m_e8t2.pretrain_recipe()
    recipe.resume.restore_config.spec.num_experts = 4
    with pytest.raises(SpecError, match="num_moe_experts: got 8, expected 4"):
        check_recipe(recipe)


def test_nemo_shows_the_recipe_without_running_it(tmp_path: Path) -> None:
    shown = _nemo("llm", "pretrain", "--factory", "llama3_8b_e8t2", "--dryrun", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "UpcycleStrategy" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_factory_is_an_error(tmp_path: Path) -> None:
    shown = _nemo("llm", "pretrain", "--factory", "llama3_8b_e8t3", "--dryrun", cwd=tmp_path)
    assert shown.returncode != 0
    assert "llama3_8b_e8t3" in shown.stdout + shown.stderr
