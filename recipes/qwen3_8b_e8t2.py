"""Qwen3 8B upcycled to 8 experts, top-2, trained as in arXiv 2412.09952; exported as Qwen3-MoE."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.recipes import llama3_8b

from nemo_upcycle.recipes import qwen3_8b_dense_ct as dense_ct
from nemo_upcycle.recipes.common import moe_settings
from nemo_upcycle.recipes.h100 import chain, fast_run, moe_kernels, moe_trainer, paper_recipe
from nemo_upcycle.recipes.h100_arguments import with_overrides
from nemo_upcycle.spec import UpcycleSpec


NAME = "qwen3_8b_e8t2"
SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: The paper's layout for 8B parameters with EP8; 36 layers make 9 virtual stages of one layer.
trainer = moe_trainer(llama3_8b.trainer, tensor_parallelism=2, pipeline_parallelism=4, virtual_pipeline_parallelism=9)


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Qwen3 8B configuration: 46.24B parameters, 13.63B active.

    Returns:
        run.Config[pl.LightningModule]: the dense model's own configuration with its MoE fields switched on.

    Examples:
        CLI usage:
            $ nemo llm pretrain model=qwen3_8b_e8t2 ...
    """
    config = dense_ct.model()
    for name, value in {**moe_settings(SPEC), **moe_kernels(capacity_factor=4.0)}.items():
        setattr(config.config, name, value)
    return config


@run.cli.factory(target=pretrain, name=NAME)
@with_overrides
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = "hf://Qwen/Qwen3-8B-Base",
    data: Optional[str] = None,
    fn: Callable = pretrain,
) -> run.Partial:
    """Create the recipe of `llama3_8b_e8t2` for Qwen3 8B: the same training, nine virtual stages in place of eight.

    The paper did not train it. Every argument below `data` changes one setting; None keeps it.

    Args:
        dir (str | None): Directory for saving logs and checkpoints.
        name (str): Name of the run.
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs per node.
        performance_mode (bool): The fast run, see `pretrain_performance_optimizations`.
        dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
        data (str | None): A finished folder of `nemo-upcycle data`; None: NeMo's mock data, random tokens.
        fn (Callable): The pretraining function to use.

    Returns:
        run.Partial: Partial configuration for pretraining.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory qwen3_8b_e8t2 --dryrun
            $ nemo llm pretrain --factory "qwen3_8b_e8t2(dense='/models/Qwen3-8B-Base', data='data/mine')" --yes

    Note:
        A checkpoint with optimizer states takes about 650 GB: the last two are kept, and one more is written.
    """
    nemo_recipe = llama3_8b.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn)
    recipe = paper_recipe(nemo_recipe, model(), trainer, dense, SPEC, data)
    return pretrain_performance_optimizations(recipe) if performance_mode else recipe


pipeline_recipe = chain(NAME, pretrain_recipe, dense_ct.pretrain_recipe)


def pretrain_performance_optimizations(recipe: run.Partial) -> run.Partial:
    """Create the fast run: TP1 CP2 ETP1 EP8 PP4 VPP9 at capacity factor 1 with padding, as for Llama 3 8B.

    Args:
        recipe (run.Partial): Recipe of the upcycled model, changed in place.

    Returns:
        run.Partial: Partial configuration for performance-optimized pretraining.
    """
    return fast_run(recipe, tensor_parallelism=1, context_parallelism=2)
