"""Qwen3-0.6B, trained on as a dense model: the baseline that `qwen3_600m_e8t2` has to beat on the same data.

The few steps, the data and the schedule are those of `smollm2_135m_dense_ct`.
"""

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.recipes import qwen3_600m

from nemo_upcycle.recipes.common import change_model
from nemo_upcycle.recipes.smollm2_135m_dense_ct import baseline_recipe, trainer


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


pretrain_recipe = baseline_recipe(NAME, DENSE, model)
