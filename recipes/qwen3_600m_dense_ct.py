"""Qwen3-0.6B, trained on as a dense model: the baseline that `qwen3_600m_e8t2` has to beat on the same data."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.recipes import qwen3_600m

from nemo_upcycle.recipes import smollm2_135m_dense_ct as smollm2
from nemo_upcycle.recipes.common import change_model
from nemo_upcycle.recipes.smollm2_135m_dense_ct import trainer


__all__ = ["DENSE", "NAME", "model", "pretrain_recipe", "trainer"]

NAME = "qwen3_600m_dense_ct"
DENSE = "hf://Qwen/Qwen3-0.6B-Base"


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the Qwen3-0.6B configuration (596.0M parameters), for sequences of 512.

    Returns:
        run.Config[pl.LightningModule]: NeMo's own configuration.
    """
    # Attention scores are recomputed: a third of the activations, unfused.
    return change_model(qwen3_600m.model(), seq_length=512, recompute_granularity="selective")


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    dense: str = DENSE,
    data: Optional[str] = None,
    fn: Callable = pretrain,
) -> run.Partial:
    """Create the recipe of `smollm2_135m_dense_ct` for Qwen3-0.6B: the same few steps, data and schedule.

    Args:
        dir (str | None): Directory for saving logs and checkpoints.
        name (str): Name of the run.
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs (without CUDA: processes) per node.
        dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
        data (str | None): A finished folder of `nemo-upcycle data`; None: the blend `sotu`, built on first use.
        fn (Callable): The pretraining function to use.

    Returns:
        run.Partial: Partial configuration for pretraining.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory "qwen3_600m_dense_ct(dense='/models/Qwen3-0.6B')" --yes
    """
    recipe = smollm2.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, dense, data, fn)
    recipe.model = model()
    return recipe
