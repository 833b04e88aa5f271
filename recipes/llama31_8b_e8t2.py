"""Llama 3.1 8B upcycled to 8 experts, top-2, trained as in arXiv 2412.09952. RoPE scaling is kept.

The paper did not train it; sizes, layout and training are those of `llama3_8b_e8t2`, checkpoints as large.
"""

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.gpt.model.llama import Llama31Config8B, LlamaModel
from nemo.collections.llm.recipes import llama31_8b

from nemo_upcycle.recipes import llama31_8b_dense_ct
from nemo_upcycle.recipes.common import moe_settings
from nemo_upcycle.recipes.h100 import chain, upcycled_recipe
from nemo_upcycle.recipes.h100_arguments import moe_kernels
from nemo_upcycle.recipes.llama3_8b_e8t2 import SPEC, pretrain_performance_optimizations, trainer


NAME = "llama31_8b_e8t2"


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Llama 3.1 8B configuration: 47.49B parameters, 13.67B active.

    Llama 3.1's own configuration scales the rotary frequencies (factor 8); NeMo's Mixtral has no field for it, and
    would change the logits silently. Sequences of 8192 in place of 131072, as in NeMo's recipe.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the upcycled model.

    Examples:
        CLI usage:
            $ nemo llm pretrain model=llama31_8b_e8t2 ...
    """
    config = run.Config(Llama31Config8B, seq_length=8192, **moe_settings(SPEC), **moe_kernels(capacity_factor=4.0))
    return run.Config(LlamaModel, config=config)


pretrain_recipe = upcycled_recipe(
    NAME, llama31_8b, model, trainer, "hf://meta-llama/Llama-3.1-8B", SPEC, pretrain_performance_optimizations
)
pipeline_recipe = chain(NAME, pretrain_recipe, llama31_8b_dense_ct.pretrain_recipe)
