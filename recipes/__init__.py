"""Recipes, named and shaped like NeMo's own. Importing the package registers every module in it with NeMo-Run."""

import importlib
import pkgutil

from nemo_upcycle.pipeline.console import quiet_imports


with quiet_imports():
    from nemo.collections.llm.api import pretrain

    from nemo_upcycle.pipeline import launch
    from nemo_upcycle.pipeline.ablations import launch as ablations
    from nemo_upcycle.pipeline.context import PretrainContext

    for _module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{_module.name}")

# `nemo llm pretrain` is NeMo's own command: with a recipe of ours it checks the arguments first, with others nothing.
pretrain.cli_entrypoint.run_ctx_cls = PretrainContext

__all__ = ["ablations", "launch"]
