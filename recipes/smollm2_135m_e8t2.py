"""SmolLM2-135M upcycled to 8 experts, top-2: the whole chain on a laptop, with a real model."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from lightning.pytorch.callbacks.callback import Callback
from nemo import lightning as nl
from nemo.collections.llm.api import pretrain

from nemo_upcycle.data.blend import DEMO
from nemo_upcycle.pipeline.nemo.pipeline import pipeline
from nemo_upcycle.planning.recipe_table import SPEC
from nemo_upcycle.recipes import smollm2_135m_dense_ct as dense_ct
from nemo_upcycle.recipes.common import change_model, moe_settings, recompute_layers, start_from


NAME = "smollm2_135m_e8t2"


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled SmolLM2-135M configuration: 692.0M parameters, 214.2M active.

    Returns:
        run.Config[pl.LightningModule]: the dense model's own configuration with its MoE fields switched on.

    Examples:
        Python API usage:
            >>> model_config = model()
    """
    return change_model(dense_ct.model(), **moe_settings(SPEC))


def trainer(
    expert_parallelism: int = 1,
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    max_steps: int = dense_ct.MAX_STEPS,
    callbacks: Optional[list[run.Config[Callback]]] = None,
) -> run.Config[nl.Trainer]:
    """Configure the NeMo Lightning Trainer; expert parallelism is the only dimension that pays at this size.

    Args:
        expert_parallelism (int): Degree of expert parallelism.
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs (without CUDA: processes) per node.
        max_steps (int): Maximum number of training steps.
        callbacks (list[run.Config[Callback]] | None): List of callback configurations.

    Returns:
        run.Config[nl.Trainer]: Configuration for the NeMo Lightning Trainer.
    """
    config = dense_ct.trainer(num_nodes, num_gpus_per_node, max_steps, callbacks)
    config.strategy.expert_model_parallel_size = expert_parallelism
    return config


def upcycled_recipe(name: str, baseline: Callable[..., run.Partial], dense: str) -> Callable[..., run.Partial]:
    """Register the `pretrain_recipe` of a small upcycled model, which trains for a few steps.

    Args:
        name: the recipe's.
        baseline: `pretrain_recipe` of the dense model.
        dense: the checkpoint to start from, by default.
    """

    @run.cli.factory(target=pretrain, name=name)
    def pretrain_recipe(
        dir: Optional[str] = None,
        name: str = name,
        num_nodes: int = 1,
        num_gpus_per_node: int = 1,
        expert_parallelism: int = 1,
        dense: str = dense,
        data: Optional[str] = None,
        fn: Callable = pretrain,
    ) -> run.Partial:
        """Create a recipe that upcycles a small dense model online and continues its pretraining.

        Args:
            dir (str | None): Directory for saving logs and checkpoints.
            name (str): Name of the run.
            num_nodes (int): Number of compute nodes to use.
            num_gpus_per_node (int): Number of GPUs (without CUDA: processes) per node.
            expert_parallelism (int): Degree of expert parallelism.
            dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
            data (str | None): A finished folder of `nemo-upcycle data`; None: the blend `sotu`, built on first use.
            fn (Callable): The pretraining function to use.

        Returns:
            run.Partial: Partial configuration for pretraining.

        Examples:
            CLI usage:
                $ nemo llm pretrain --factory smollm2_135m_e8t2 trainer.max_steps=4 --yes
                $ nemo llm pretrain --factory "smollm2_135m_e8t2(dir='runs/first')" optim.config.lr=1e-4 --yes

            Python API usage:
                >>> recipe = pretrain_recipe(dir="runs/first")
        """
        recipe = baseline(dir, name, num_nodes, num_gpus_per_node, dense, data, fn)
        recipe.trainer = trainer(expert_parallelism, num_nodes, num_gpus_per_node)
        return start_from(recipe, dense, SPEC)

    return pretrain_recipe


pretrain_recipe = upcycled_recipe(NAME, dense_ct.pretrain_recipe, dense_ct.DENSE)


def fit_laptop(recipe: run.Partial) -> run.Partial:
    """Let a recipe of the upcycled model recompute its layers where there is no GPU, in place, and return it.

    A laptop has memory for 692M parameters and their Adam states; of activations it keeps the layers' inputs.
    """
    if not torch.cuda.is_available():
        recompute_layers(recipe.model.config)
    return recipe


_RANKS = 1 if torch.cuda.device_count() == 1 else 2
#: How the chain of a tuning differs from that of other models.
TUNED = {"adapt": fit_laptop, "num_gpus_per_node": _RANKS, "expert_parallelism": _RANKS}


@run.cli.factory(target=pipeline, name=NAME)
def pipeline_recipe(dir: str = "runs/smollm2_135m_e8t2", processes: Optional[int] = None) -> run.Partial:
    """Create the whole chain: import, upcycle, pretrain, dense baseline, export, evaluate, report.

    Args:
        dir (str): Folder of the run.
        processes (int | None): Ranks of the two training stages; the experts are spread over them. None: two, or one
            on a machine with one GPU.

    Returns:
        run.Partial: Partial configuration of the pipeline.

    Examples:
        CLI usage:
            $ nemo upcycle pipeline --factory smollm2_135m_e8t2 dir=runs/demo --yes
            $ nemo upcycle pipeline --factory smollm2_135m_e8t2 dir=runs/more pretrain.trainer.max_steps=100 --yes
    """
    processes = processes or (1 if torch.cuda.device_count() == 1 else 2)
    return run.Partial(
        pipeline,
        dir=dir,
        dense=dense_ct.DENSE,
        pretrain=fit_laptop(pretrain_recipe(num_gpus_per_node=processes, expert_parallelism=processes)),
        dense_ct=dense_ct.pretrain_recipe(num_gpus_per_node=processes),
        data=DEMO,
    )
