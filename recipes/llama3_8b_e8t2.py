"""Llama 3 8B upcycled to 8 experts, top-2: the main run of arXiv 2412.09952."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from lightning.pytorch.callbacks.callback import Callback
from nemo import lightning as nl
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.gpt.model.llama import Llama3Config8B, LlamaModel
from nemo.collections.llm.recipes import llama3_8b

from nemo_upcycle.recipes.common import checkpoints, moe_settings, start_from
from nemo_upcycle.spec import UpcycleSpec


NAME = "llama3_8b_e8t2"
SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: The paper gives tokens, not steps: 100B, at 512 sequences of 8192 a step (NeMo's batch for Llama 3 8B).
MAX_STEPS = 23_842


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Llama 3 8B configuration: 47.49B parameters, 13.67B active.

    Llama's own configuration keeps its rotary base; a Mixtral configuration would not hold a Llama 3.1's scaling.
    Capacity factor 4 is the paper's; with 8 experts and top-2 it can drop nothing.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the upcycled model.

    Examples:
        CLI usage:
            $ nemo llm pretrain model=llama3_8b_e8t2 ...
    """
    config = run.Config(
        Llama3Config8B,
        **moe_settings(SPEC),
        moe_grouped_gemm=True,
        moe_permute_fusion=True,
        moe_expert_capacity_factor=4.0,
    )
    return run.Config(LlamaModel, config=config)


def trainer(
    tensor_parallelism: int = 2,
    pipeline_parallelism: int = 4,
    virtual_pipeline_parallelism: Optional[int] = 8,
    context_parallelism: int = 1,
    sequence_parallelism: bool = True,
    expert_parallelism: int = 8,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    max_steps: int = MAX_STEPS,
    callbacks: Optional[list[run.Config[Callback]]] = None,
) -> run.Config[nl.Trainer]:
    """Configure the NeMo Lightning Trainer with the paper's layout: TP2 EP8 PP4 VPP8; experts are not cut by TP.

    Args:
        tensor_parallelism (int): Degree of tensor model parallelism.
        pipeline_parallelism (int): Degree of pipeline model parallelism.
        virtual_pipeline_parallelism (int | None): Size of virtual pipeline parallelism.
        context_parallelism (int): Degree of context parallelism.
        sequence_parallelism (bool): Whether to use sequence parallelism; MoE layers under tensor parallelism need it.
        expert_parallelism (int): Degree of expert parallelism.
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs per node.
        max_steps (int): Maximum number of training steps.
        callbacks (list[run.Config[Callback]] | None): List of callback configurations.

    Returns:
        run.Config[nl.Trainer]: Configuration for the NeMo Lightning Trainer.
    """
    config = llama3_8b.trainer(
        tensor_parallelism=tensor_parallelism,
        pipeline_parallelism=pipeline_parallelism,
        pipeline_parallelism_type=torch.bfloat16,
        virtual_pipeline_parallelism=virtual_pipeline_parallelism,
        context_parallelism=context_parallelism,
        sequence_parallelism=sequence_parallelism,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        max_steps=max_steps,
        callbacks=callbacks,
    )
    config.strategy.expert_model_parallel_size = expert_parallelism
    config.strategy.expert_tensor_parallel_size = 1
    return config


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    dense: str = "hf://meta-llama/Meta-Llama-3-8B",
    fn: Callable = pretrain,
) -> run.Partial:
    """Create a recipe of the paper's main run: BF16, capacity factor 4, 100B tokens, learning rate 3e-5 -> 3e-7.

    Not stated by the paper and chosen here: batch 512 x 8192 tokens, Adam and clipping as in NeMo's Llama 3 8B, load
    balancing loss 0.01, router std 0.02.

    Args:
        dir (str | None): Directory for saving logs and checkpoints.
        name (str): Name of the run.
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs per node.
        dense (str): The dense checkpoint to start from.
        fn (Callable): The pretraining function to use.

    Returns:
        run.Partial: Partial configuration for pretraining.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama3_8b_e8t2 --dryrun
            $ nemo llm pretrain --factory "llama3_8b_e8t2(dense='/models/Llama-3-8B', num_nodes=16)" --yes

        Python API usage:
            >>> recipe = pretrain_recipe(num_nodes=16)

    Note:
        Training data is NeMo's mock data, as in NeMo's own recipes: set `recipe.data`.
    """
    recipe = llama3_8b.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn)
    recipe.model = model()
    recipe.trainer = trainer(
        num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node, callbacks=recipe.trainer.callbacks
    )
    recipe.optim.config.lr = 3e-5
    recipe.optim.lr_scheduler.warmup_steps = 100
    recipe.optim.lr_scheduler.constant_steps = 0
    recipe.optim.lr_scheduler.min_lr = 3e-7
    recipe.log.ckpt = checkpoints(every_n_steps=1000)
    return start_from(recipe, dense, SPEC)
