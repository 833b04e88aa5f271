"""The Llama of `llama_1m_dense_ct` upcycled online to 8 experts, top-2: the arms of `conf/ablations/laptop.yaml`."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.api import pretrain

from nemo_upcycle.recipes import llama_1m_dense_ct as dense_ct
from nemo_upcycle.recipes.common import change_model, moe_settings, start_from
from nemo_upcycle.spec import UpcycleSpec


NAME = "llama_1m_e8t2"
SPEC = UpcycleSpec(num_experts=8, top_k=2)


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled configuration: 3.95M parameters, 1.30M active.

    Returns:
        run.Config[pl.LightningModule]: the dense model's own configuration with its MoE fields switched on.
    """
    return change_model(dense_ct.model(), **moe_settings(SPEC))


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dense: str,
    dir: Optional[str] = None,
    name: str = NAME,
    num_gpus_per_node: int = 1,
    data: Optional[str] = None,
    fn: Callable = pretrain,
) -> run.Partial:
    """Create a recipe that upcycles the small Llama online and continues its pretraining.

    Args:
        dense (str): The dense checkpoint to start from.
        dir (str | None): Directory for saving logs and checkpoints.
        name (str): Name of the run.
        num_gpus_per_node (int): Number of GPUs (without CUDA: processes).
        data (str | None): A finished folder of `nemo-upcycle data`; None: the blend `sotu`, built on first use.
        fn (Callable): The pretraining function to use.

    Returns:
        run.Partial: Partial configuration for pretraining.

    Examples:
        CLI usage:
            $ nemo upcycle ablate --grid laptop dir=runs/laptop --yes
    """
    recipe = dense_ct.pretrain_recipe(dense, dir, name, num_gpus_per_node, data, fn)
    return start_from(recipe, dense, SPEC)
