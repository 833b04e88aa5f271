"""Llama 3 70B, trained on as a dense model: the baseline that `llama3_70b_e8t2` has to beat on the same data.

The layout is NeMo's own for this model: TP4 CP2 PP4 VPP5.
"""

from nemo.collections.llm.recipes import llama3_70b
from nemo.collections.llm.recipes.llama3_70b import model, pretrain_performance_optimizations, trainer

from nemo_upcycle.recipes.h100 import dense_baseline


__all__ = ["NAME", "model", "pretrain_performance_optimizations", "pretrain_recipe", "trainer"]

NAME = "llama3_70b_dense_ct"
pretrain_recipe = dense_baseline(NAME, llama3_70b, dense="hf://meta-llama/Meta-Llama-3-70B")
