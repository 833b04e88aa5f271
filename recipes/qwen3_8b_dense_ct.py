"""Qwen3 8B, trained on as a dense model: the baseline that `qwen3_8b_e8t2` has to beat on the same data.

Training and layout are those of Llama 3 8B's baseline, TP1 CP2: the models have the same width, and NeMo's own recipe
for Qwen3 8B is one for a single node, with batches of 32 sequences.
"""

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.recipes import llama3_8b, qwen3_8b
from nemo.collections.llm.recipes.llama3_8b import pretrain_performance_optimizations, trainer

from nemo_upcycle.recipes.common import change_model
from nemo_upcycle.recipes.h100 import dense_baseline


__all__ = ["FUSIONS", "NAME", "model", "pretrain_performance_optimizations", "pretrain_recipe", "trainer"]

NAME = "qwen3_8b_dense_ct"
#: Switched on in NeMo's configuration of Llama 3, left off in that of Qwen3.
FUSIONS = dict.fromkeys(
    ("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion"), True
)


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the Qwen3 8B configuration: sequences of 8192, the kernels of NeMo's Llama 3.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the dense model, 8.19B parameters.
    """
    return change_model(qwen3_8b.model(), seq_length=8192, **FUSIONS)


pretrain_recipe = dense_baseline(NAME, llama3_8b, dense="hf://Qwen/Qwen3-8B-Base", model=model)
