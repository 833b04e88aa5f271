"""Llama 3.2 3B upcycled to 8 experts, top-2: 18.01B parameters, 5.33B active. RoPE scaling is kept.

A row of `h100_table.py`, which says how it is trained and where.
"""

from nemo_upcycle.recipes import h100_table, llama32_3b_dense_ct


NAME = "llama32_3b_e8t2"
model, trainer, pretrain_performance_optimizations, pretrain_recipe, pipeline_recipe = h100_table.upcycled(
    NAME, llama32_3b_dense_ct.pretrain_recipe
)
