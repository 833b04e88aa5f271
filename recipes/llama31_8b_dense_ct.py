"""Llama 3.1 8B, trained on as a dense model: the baseline that `llama31_8b_e8t2` has to beat on the same data.

The layout is NeMo's own for this model: TP1 CP2, no pipeline.
"""

from nemo.collections.llm.recipes import llama31_8b
from nemo.collections.llm.recipes.llama31_8b import model, pretrain_performance_optimizations, trainer

from nemo_upcycle.recipes.h100 import dense_baseline


__all__ = ["NAME", "model", "pretrain_performance_optimizations", "pretrain_recipe", "trainer"]

NAME = "llama31_8b_dense_ct"
pretrain_recipe = dense_baseline(NAME, llama31_8b, dense="hf://meta-llama/Llama-3.1-8B")
