"""Llama 3.1 8B upcycled to 8 experts, top-2, trained as in arXiv 2412.09952. RoPE scaling is kept."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.gpt.model.llama import Llama31Config8B, LlamaModel
from nemo.collections.llm.recipes import llama31_8b

from nemo_upcycle.recipes.common import moe_settings, start_from
from nemo_upcycle.recipes.h100 import adjust, moe_kernels, paper_training
from nemo_upcycle.recipes.llama3_8b_e8t2 import (
    RECOMPUTE_MOE_STEPS,
    SPEC,
    pretrain_performance_optimizations,
    trainer,
)


NAME = "llama31_8b_e8t2"


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Llama 3.1 8B configuration: 47.49B parameters, 13.67B active.

    Llama 3.1's own configuration scales the rotary frequencies (factor 8); NeMo's Mixtral has no field for it, and
    would change the logits without a word. Sequences of 8192 in place of 131072, as in NeMo's recipe.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the upcycled model.

    Examples:
        CLI usage:
            $ nemo llm pretrain model=llama31_8b_e8t2 ...
    """
    config = run.Config(Llama31Config8B, seq_length=8192, **moe_settings(SPEC), **moe_kernels(capacity_factor=4.0))
    return run.Config(LlamaModel, config=config)


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = "hf://meta-llama/Llama-3.1-8B",
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
    """Create the recipe of `llama3_8b_e8t2` for Llama 3.1 8B: the same sizes, layout and training.

    The paper did not train it. Every argument below `dense` changes one setting; None leaves it as it stands.

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
            $ nemo llm pretrain --factory llama31_8b_e8t2 --dryrun
            $ nemo llm pretrain --factory "llama31_8b_e8t2(performance_mode=True, num_nodes=16)" --yes

    Note:
        Training data is NeMo's mock data, as in NeMo's own recipes: set `recipe.data`.
        A checkpoint with optimizer states takes about 665 GB: the last one is kept, and one more while it is written.
    """
    recipe = paper_training(llama31_8b.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn))
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
