"""Recipes for H100 that are alike but for their model and its layout: one row each.

The planner says that a row's layouts fit 80 GB, with room (tests/unit/recipes/test_table.py asks it). Training and
data are those of `llama3_8b_e8t2`, in sequences that are no longer than the parent's.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.recipes import (
    llama3_8b,
    llama32_1b,
    llama32_3b,
    qwen3_1p7b,
    qwen3_4b,
    qwen3_14b,
    qwen3_32b,
)

from nemo_upcycle.recipes.common import change_model, moe_settings
from nemo_upcycle.recipes.h100 import (
    NODES,
    chain,
    dense_baseline,
    fast_run,
    moe_trainer,
    upcycled_recipe,
)
from nemo_upcycle.recipes.h100_arguments import moe_kernels
from nemo_upcycle.recipes.qwen3_8b_dense_ct import FUSIONS
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.nemo.olmo2 import Olmo2Config7B, Olmo2Model


SPEC = UpcycleSpec(num_experts=8, top_k=2)
Model = Callable[[], run.Config[pl.LightningModule]]


class Row(NamedTuple):
    """A dense parent, and how it is trained.

    Args:
        title: how a text calls it.
        dense: the checkpoint to start from.
        model: its configuration, without experts.
        layout: of the upcycled model beside EP8: TP, PP, VPP and CP.
        dense_layout: of the baseline, as Megatron's settings; empty: TP1 CP2.
        num_nodes: of eight H100.
    """

    title: str
    dense: str
    model: Model
    layout: tuple[int, int, int | None, int] = (1, 1, None, 1)
    dense_layout: tuple[tuple[str, int], ...] = ()
    num_nodes: int = NODES


def _qwen3(module: ModuleType) -> Model:
    return lambda: change_model(module.model(), seq_length=8192, **FUSIONS)


def _olmo2_7b() -> run.Config[pl.LightningModule]:
    return run.Config(Olmo2Model, config=run.Config(Olmo2Config7B))


def _cut(tensor: int, **others: int) -> tuple[tuple[str, int], ...]:
    return ("tensor_model_parallel_size", tensor), ("sequence_parallel", True), *others.items()


ROWS = {
    "llama32_1b": Row("Llama 3.2 1B", "hf://meta-llama/Llama-3.2-1B", llama32_1b.model, num_nodes=8),
    "llama32_3b": Row("Llama 3.2 3B", "hf://meta-llama/Llama-3.2-3B", llama32_3b.model, (1, 1, None, 2), num_nodes=8),
    "qwen3_1p7b": Row("Qwen3 1.7B", "hf://Qwen/Qwen3-1.7B-Base", _qwen3(qwen3_1p7b), num_nodes=8),
    "qwen3_4b": Row("Qwen3 4B", "hf://Qwen/Qwen3-4B-Base", _qwen3(qwen3_4b), (2, 1, None, 1), num_nodes=8),
    "qwen3_14b": Row("Qwen3 14B", "hf://Qwen/Qwen3-14B-Base", _qwen3(qwen3_14b), (2, 4, 10, 2), _cut(2)),
    "qwen3_32b": Row(
        "Qwen3 32B",
        "hf://Qwen/Qwen3-32B",  # there is no base model of this size
        _qwen3(qwen3_32b),
        (4, 8, 8, 2),
        _cut(
            4,
            context_parallel_size=1,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=16,
        ),
    ),
    "olmo2_7b": Row("OLMo 2 7B", "hf://allenai/OLMo-2-1124-7B", _olmo2_7b, (1, 2, 16, 1)),
}


def baseline(
    name: str,
) -> tuple[Model, Callable[..., run.Config], Callable[..., run.Partial]]:
    """Register the dense baseline of a row, and return its `model`, `trainer` and `pretrain_recipe`.

    Args:
        name: of the recipe: the row's, and `_dense_ct`.
    """
    row = ROWS[name.removesuffix("_dense_ct")]
    model = _factory(name, row.model, f"Factory function to create the {row.title} configuration.")
    layout = dict(row.dense_layout)
    return (
        model,
        llama3_8b.trainer,
        dense_baseline(name, llama3_8b, row.dense, model, layout=layout, num_nodes=row.num_nodes),
    )


def upcycled(
    name: str, dense_recipe: Callable[..., run.Partial]
) -> tuple[
    Model,
    Callable[..., run.Config],
    Callable[[run.Partial], run.Partial],
    Callable[..., run.Partial],
    Callable[..., run.Partial],
]:
    """Register the recipe of a row's upcycled model and its chain, and return what their module holds.

    Args:
        name: of the recipe: the row's, and `_e8t2`.
        dense_recipe: `pretrain_recipe` of its dense baseline.

    Returns:
        `model`, `trainer`, `pretrain_performance_optimizations`, `pretrain_recipe` and `pipeline_recipe`.
    """
    row = ROWS[name.removesuffix("_e8t2")]
    tensor, stages, virtual, context = row.layout

    def make() -> run.Config[pl.LightningModule]:
        return change_model(row.model(), **moe_settings(SPEC), **moe_kernels(capacity_factor=4.0))

    def fast(recipe: run.Partial) -> run.Partial:
        """Create the fast run: capacity factor 1 with padding on the same layout, communication overlapped.

        Args:
            recipe (run.Partial): Recipe of the upcycled model, changed in place.

        Returns:
            run.Partial: Partial configuration for performance-optimized pretraining.
        """
        return fast_run(recipe, tensor_parallelism=tensor, context_parallelism=context)

    model = _factory(name, make, f"Factory function to create the upcycled {row.title} configuration.")
    trainer = moe_trainer(
        llama3_8b.trainer,
        tensor_parallelism=tensor,
        pipeline_parallelism=stages,
        virtual_pipeline_parallelism=virtual,
        context_parallelism=context,
    )
    recipe = upcycled_recipe(name, llama3_8b, model, trainer, row.dense, SPEC, fast, num_nodes=row.num_nodes)
    return model, trainer, fast, recipe, chain(name, recipe, dense_recipe)


def _factory(name: str, make: Model, text: str) -> Model:
    def model() -> run.Config[pl.LightningModule]:
        return make()

    model.__doc__ = f"""{text}

    Returns:
        run.Config[pl.LightningModule]: Configuration of the model.
    """
    registered: Model = run.cli.factory(name=name)(model)
    return registered
