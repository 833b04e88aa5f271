"""Llama 3 70B upcycled to 8 experts, top-2, trained as in arXiv 2412.09952 on the layout of Parallel Folding."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from lightning.pytorch.callbacks.callback import Callback
from nemo import lightning as nl
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.gpt.model.llama import Llama3Config70B, LlamaModel
from nemo.collections.llm.recipes import llama3_70b

from nemo_upcycle.recipes.common import moe_settings, start_from
from nemo_upcycle.recipes.h100 import MAX_STEPS, adjust, fast_run, moe_kernels, paper_training
from nemo_upcycle.recipes.llama3_8b_e8t2 import RECOMPUTE_MOE_STEPS, SPEC


NAME = "llama3_70b_e8t2"


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Llama 3 70B configuration: 465.16B parameters, 126.93B active.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the upcycled model.

    Examples:
        CLI usage:
            $ nemo llm pretrain model=llama3_70b_e8t2 ...
    """
    config = run.Config(Llama3Config70B, **moe_settings(SPEC), **moe_kernels(capacity_factor=4.0))
    return run.Config(LlamaModel, config=config)


def trainer(
    tensor_parallelism: int = 8,
    pipeline_parallelism: int = 16,
    virtual_pipeline_parallelism: Optional[int] = 5,
    context_parallelism: int = 2,
    sequence_parallelism: bool = True,
    expert_parallelism: int = 8,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    max_steps: int = MAX_STEPS,
    callbacks: Optional[list[run.Config[Callback]]] = None,
) -> run.Config[nl.Trainer]:
    """Configure the NeMo Lightning Trainer: TP8 CP2 EP8 PP16 VPP5; experts are not cut by TP.

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
    config = llama3_70b.trainer(
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
    performance_mode: bool = False,
    dense: str = "hf://meta-llama/Meta-Llama-3-70B",
    fp8_recipe: Optional[str] = None,
    capacity_factor: Optional[float] = None,
    pad_to_capacity: Optional[bool] = None,
    router_order: Optional[str] = None,
    scale_output: Optional[bool] = None,
    dispatcher: Optional[str] = None,
    recompute_moe_steps: Optional[int] = None,
    comm_overlap: Optional[bool] = None,
    tensor_parallelism: Optional[int] = None,
    pipeline_parallelism: Optional[int] = None,
    virtual_pipeline_parallelism: Optional[int] = None,
    context_parallelism: Optional[int] = None,
    expert_parallelism: Optional[int] = None,
    expert_tensor_parallelism: Optional[int] = None,
    fn: Callable = pretrain,
) -> run.Partial:
    """Create a recipe that trains the upcycled Llama 3 70B as the paper trains the 8B.

    The paper has no 70B. TP8 EP8 PP16 is what Parallel Folding (arXiv 2504.14960) reports for Llama3-8x70B: 41.6 % MFU
    on 256 H100 with sequences of 4096. Chosen here: sequences of 8192, cut in two (CP2), so that a rank holds as many
    tokens as there; one layer in each chunk (VPP5); 512 H100, on which model states take about 32 GiB of each
    (derived, not measured). Everything else as in `llama3_8b_e8t2`. Every argument below `dense` changes one setting;
    None leaves it as it stands.

    Args:
        dir (str | None): Directory for saving logs and checkpoints.
        name (str): Name of the run.
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs per node.
        performance_mode (bool): The fast run, see `pretrain_performance_optimizations`.
        dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
        fp8_recipe (str | None): Compute in FP8: `delayed`, `tensorwise` (current scaling) or `blockwise`.
        capacity_factor (float | None): Capacity of an expert over perfect balance; 0 is dropless.
        pad_to_capacity (bool | None): Let every expert compute its whole capacity.
        router_order (str | None): `topk_softmax` (Mixtral type) or `softmax_topk` (ST type).
        scale_output (bool | None): Scale the experts' down projection where the router's order asks for it.
        dispatcher (str | None): `alltoall` or `deepep`.
        recompute_moe_steps (int | None): Recompute the MoE layers in so many first steps.
        comm_overlap (bool | None): Overlap pipeline and data-parallel communication with computation.
        tensor_parallelism (int | None): Degree of tensor model parallelism; above 1 with sequence parallelism.
        pipeline_parallelism (int | None): Degree of pipeline model parallelism.
        virtual_pipeline_parallelism (int | None): Size of virtual pipeline parallelism; 1 without.
        context_parallelism (int | None): Degree of context parallelism.
        expert_parallelism (int | None): Degree of expert parallelism.
        expert_tensor_parallelism (int | None): Degree of tensor parallelism of the experts.
        fn (Callable): The pretraining function to use.

    Returns:
        run.Partial: Partial configuration for pretraining.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama3_70b_e8t2 --dryrun
            $ nemo llm pretrain --factory "llama3_70b_e8t2(performance_mode=True, fp8_recipe='blockwise')" --yes

    Note:
        Training data is NeMo's mock data, as in NeMo's own recipes: set `recipe.data`.
        A checkpoint with optimizer states takes about 6.5 TB: the last one is kept, and one more while it is written.
    """
    recipe = paper_training(llama3_70b.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn))
    recipe.model = model()
    recipe.trainer = trainer(
        num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node, callbacks=recipe.trainer.callbacks
    )
    recipe = adjust(start_from(recipe, dense, SPEC), recompute_moe_steps=RECOMPUTE_MOE_STEPS, comm_overlap=True)
    if performance_mode:
        recipe = pretrain_performance_optimizations(recipe)
    return adjust(
        recipe,
        fp8_recipe=fp8_recipe,
        capacity_factor=capacity_factor,
        pad_to_capacity=pad_to_capacity,
        router_order=router_order,
        scale_output=scale_output,
        dispatcher=dispatcher,
        recompute_moe_steps=recompute_moe_steps,
        comm_overlap=comm_overlap,
        tensor_parallelism=tensor_parallelism,
        pipeline_parallelism=pipeline_parallelism,
        virtual_pipeline_parallelism=virtual_pipeline_parallelism,
        context_parallelism=context_parallelism,
        expert_parallelism=expert_parallelism,
        expert_tensor_parallelism=expert_tensor_parallelism,
    )


def pretrain_performance_optimizations(recipe: run.Partial) -> run.Partial:
    """Create the fast run: capacity factor 1 with padding on the same layout, communication overlapped.

    What it shares with NeMo's own `performance_mode` and what it does otherwise, and why, stands in `recipes/h100.py`.

    Args:
        recipe (run.Partial): Recipe of the upcycled model, changed in place.

    Returns:
        run.Partial: Partial configuration for performance-optimized pretraining.
    """
    return fast_run(recipe, tensor_parallelism=8, context_parallelism=2)
