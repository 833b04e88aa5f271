"""Qwen3 8B upcycled to 8 experts, top-2, trained as in arXiv 2412.09952; exported as Qwen3-MoE.

The paper did not train it; the training is that of `llama3_8b_e8t2`, with nine virtual stages in place of eight.

A checkpoint with optimizer states takes about 650 GB: the last two are kept, and one more is written.
"""

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.recipes import llama3_8b

from nemo_upcycle.recipes import qwen3_8b_dense_ct as dense_ct
from nemo_upcycle.recipes.common import change_model, moe_settings
from nemo_upcycle.recipes.h100 import chain, fast_run, moe_trainer, upcycled_recipe
from nemo_upcycle.recipes.h100_arguments import moe_kernels
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
    return change_model(dense_ct.model(), **moe_settings(SPEC), **moe_kernels(capacity_factor=4.0))


def pretrain_performance_optimizations(recipe: run.Partial) -> run.Partial:
    """Create the fast run: TP1 CP2 ETP1 EP8 PP4 VPP9 at capacity factor 1 with padding, as for Llama 3 8B.

    Args:
        recipe (run.Partial): Recipe of the upcycled model, changed in place.

    Returns:
        run.Partial: Partial configuration for performance-optimized pretraining.
    """
    return fast_run(recipe, tensor_parallelism=1, context_parallelism=2)


pretrain_recipe = upcycled_recipe(
    NAME, llama3_8b, model, trainer, "hf://Qwen/Qwen3-8B-Base", SPEC, pretrain_performance_optimizations
)
pipeline_recipe = chain(NAME, pretrain_recipe, dense_ct.pretrain_recipe)
