"""Llama 3.2 1B upcycled to 8 experts, top-2: 6.87B parameters, 2.04B active. RoPE scaling is kept.

A row of `h100_table.py`, which says how it is trained and where.
"""

from nemo_upcycle.recipes import h100_table, llama32_1b_dense_ct


NAME = "llama32_1b_e8t2"
model, trainer, pretrain_performance_optimizations, pretrain_recipe, pipeline_recipe = h100_table.upcycled(
    NAME, llama32_1b_dense_ct.pretrain_recipe
)
