"""Llama 3 8B, trained on as a dense model: the baseline that `llama3_8b_e8t2` has to beat on the same data.

The paper's dense run (27B tokens, 52.4 % MFU) states no layout; this is NeMo's own for the model: TP1 CP2, no
pipeline. For equal FLOPs in place of equal tokens give it 1.58 times the steps (`conf/ablations`).
"""

from nemo.collections.llm.recipes import llama3_8b
from nemo.collections.llm.recipes.llama3_8b import model, pretrain_performance_optimizations, trainer

from nemo_upcycle.recipes.h100 import dense_baseline


__all__ = ["NAME", "model", "pretrain_performance_optimizations", "pretrain_recipe", "trainer"]

NAME = "llama3_8b_dense_ct"
pretrain_recipe = dense_baseline(NAME, llama3_8b, dense="hf://meta-llama/Meta-Llama-3-8B")
