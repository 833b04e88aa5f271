"""Recipes, named and shaped like NeMo's own. Importing the package registers them with NeMo-Run."""

from nemo_upcycle.pipeline.console import quiet_imports


with quiet_imports():
    from nemo.collections.llm.api import pretrain

    from nemo_upcycle.pipeline import launch
    from nemo_upcycle.pipeline.context import PretrainContext
    from nemo_upcycle.recipes import (
        llama3_8b_dense_ct,
        llama3_8b_e8t2,
        llama3_70b_dense_ct,
        llama3_70b_e8t2,
        llama31_8b_dense_ct,
        llama31_8b_e8t2,
        smollm2_135m_dense_ct,
        smollm2_135m_e8t2,
    )

# `nemo llm pretrain` is NeMo's own command: with a recipe of ours it checks the arguments first, with others nothing.
pretrain.cli_entrypoint.run_ctx_cls = PretrainContext

__all__ = [
    "launch",
    "llama3_8b_dense_ct",
    "llama3_8b_e8t2",
    "llama3_70b_dense_ct",
    "llama3_70b_e8t2",
    "llama31_8b_dense_ct",
    "llama31_8b_e8t2",
    "smollm2_135m_dense_ct",
    "smollm2_135m_e8t2",
]
