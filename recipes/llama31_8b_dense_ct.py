"""Llama 3.1 8B, continued as the dense model it is: the twin that `llama31_8b_e8t2` has to beat on the same data."""

from collections.abc import Callable
from typing import Optional

import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.recipes import llama31_8b
from nemo.collections.llm.recipes.llama31_8b import model, pretrain_performance_optimizations, trainer

from nemo_upcycle.recipes.common import start_from
from nemo_upcycle.recipes.h100 import paper_training


__all__ = ["NAME", "model", "pretrain_performance_optimizations", "pretrain_recipe", "trainer"]

NAME = "llama31_8b_dense_ct"


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = "hf://meta-llama/Llama-3.1-8B",
    fn: Callable = pretrain,
) -> run.Partial:
    """Create a recipe that continues the pretraining of Llama 3.1 8B: data, batches and schedule of the upcycled run.

    The layout is NeMo's own for this model: TP1 CP2, no pipeline.

    Args:
        dir (str | None): Directory for saving logs and checkpoints.
        name (str): Name of the run.
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs per node.
        performance_mode (bool): NeMo's own optimizations of this model.
        dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
        fn (Callable): The pretraining function to use.

    Returns:
        run.Partial: Partial configuration for pretraining.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama31_8b_dense_ct --dryrun
            $ nemo llm pretrain --factory "llama31_8b_dense_ct(dense='/models/dense')" --yes
    """
    recipe = paper_training(llama31_8b.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, performance_mode, fn))
    return start_from(recipe, dense, None)
