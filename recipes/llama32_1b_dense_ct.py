"""Llama 3.2 1B, trained on as a dense model: the baseline that `llama32_1b_e8t2` has to beat on the same data.

A row of `h100_table.py`, which says how it is trained and where.
"""

from nemo_upcycle.recipes import h100_table


NAME = "llama32_1b_dense_ct"
model, trainer, pretrain_recipe = h100_table.baseline(NAME)
