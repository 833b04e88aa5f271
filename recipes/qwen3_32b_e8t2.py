"""Qwen3 32B upcycled to 8 experts, top-2: 208.93B parameters, 57.93B active.

A row of `h100_table.py`, which says how it is trained and where.
"""

from nemo_upcycle.recipes import h100_table, qwen3_32b_dense_ct


NAME = "qwen3_32b_e8t2"
model, trainer, pretrain_performance_optimizations, pretrain_recipe, pipeline_recipe = h100_table.upcycled(
    NAME, qwen3_32b_dense_ct.pretrain_recipe
)
