"""Llama 3 70B upcycled to 8 experts, top-2, trained as in arXiv 2412.09952 on the layout of Parallel Folding.

The paper has no 70B. TP8 EP8 PP16 is what Parallel Folding (arXiv 2504.14960) reports for Llama3-8x70B: 41.6 % MFU on
256 H100 with sequences of 4096. Chosen here: sequences of 8192, cut in two (CP2), so that a rank holds as many tokens
as there; one layer in each chunk (VPP5); 512 H100, on which model states take about 32 GiB of each (derived, not
measured). Everything else as in `llama3_8b_e8t2`.

A checkpoint with optimizer states takes about 6.5 TB: the last two are kept, and one more is written.
"""

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.gpt.model.llama import Llama3Config70B, LlamaModel
from nemo.collections.llm.recipes import llama3_70b

from nemo_upcycle.recipes import llama3_70b_dense_ct
from nemo_upcycle.recipes.common import moe_settings
from nemo_upcycle.recipes.h100 import chain, fast_run, moe_trainer, upcycled_recipe
from nemo_upcycle.recipes.h100_arguments import moe_kernels
from nemo_upcycle.recipes.llama3_8b_e8t2 import SPEC


NAME = "llama3_70b_e8t2"
trainer = moe_trainer(
    llama3_70b.trainer,
    tensor_parallelism=8,
    pipeline_parallelism=16,
    virtual_pipeline_parallelism=5,
    context_parallelism=2,
)


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


def pretrain_performance_optimizations(recipe: run.Partial) -> run.Partial:
    """Create the fast run: capacity factor 1 with padding on the same layout, communication overlapped.

    `recipes/h100.py` says what it shares with NeMo's own `performance_mode`, what differs, and why.

    Args:
        recipe (run.Partial): Recipe of the upcycled model, changed in place.

    Returns:
        run.Partial: Partial configuration for performance-optimized pretraining.
    """
    return fast_run(recipe, tensor_parallelism=8, context_parallelism=2)


pretrain_recipe = upcycled_recipe(
    NAME, llama3_70b, model, trainer, "hf://meta-llama/Meta-Llama-3-70B", SPEC, pretrain_performance_optimizations
)
pipeline_recipe = chain(NAME, pretrain_recipe, llama3_70b_dense_ct.pretrain_recipe)
