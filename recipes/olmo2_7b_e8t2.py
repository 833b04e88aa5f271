"""OLMo 2 7B upcycled to 8 experts, top-2: 37.60B parameters, 11.63B active.

A row of `h100_table.py`, which says how it is trained and where.
"""

from nemo_upcycle.recipes import h100_table, olmo2_7b_dense_ct


NAME = "olmo2_7b_e8t2"
model, trainer, pretrain_performance_optimizations, pretrain_recipe, pipeline_recipe = h100_table.upcycled(
    NAME, olmo2_7b_dense_ct.pretrain_recipe
)
