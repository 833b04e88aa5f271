"""Qwen3 4B upcycled to 8 experts, top-2: 22.85B parameters, 6.71B active.

A row of `h100_table.py`, which says how it is trained and where.
"""

from nemo_upcycle.recipes import h100_table, qwen3_4b_dense_ct


NAME = "qwen3_4b_e8t2"
model, trainer, pretrain_performance_optimizations, pretrain_recipe, pipeline_recipe = h100_table.upcycled(
    NAME, qwen3_4b_dense_ct.pretrain_recipe
)
