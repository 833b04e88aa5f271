"""Recipes, named and shaped like NeMo's own. Importing the package registers every module in it with NeMo-Run.

Beside Megatron-Bridge, where NeMo's language models are not, it registers the chains in Bridge.
"""

import importlib
import pkgutil
import sys
from importlib.util import find_spec

from nemo_upcycle.trainers.nemo.imports import quiet_imports
from nemo_upcycle.utils.console import collector_paused


if find_spec("nemo"):
    from nemo_upcycle.pipeline.answers import answered, refuse_bridge

    if sys.argv[1:3] == ["upcycle", "pipeline"]:
        with answered():  # before NeMo is imported, which takes longest
            refuse_bridge(sys.argv[3:])
    with quiet_imports():
        from nemo.collections.llm.api import finetune, pretrain

        importlib.import_module("nemo_upcycle.pipeline.ablations.launch")
        from nemo_upcycle.pipeline.nemo.pipeline import PretrainContext
        from nemo_upcycle.pipeline.nemo.pipeline import pipeline as pipeline

        for _module in pkgutil.iter_modules(__path__):  # `table` adds those of its rows
            importlib.import_module(f"{__name__}.{_module.name}")
        from nemo_upcycle.recipes.common import upcycled as upcycled
        from nemo_upcycle.recipes.own_parent import upcycled_from as upcycled_from

    # `nemo llm pretrain` and `finetune` are NeMo's own: with a recipe of ours they check the arguments first, with
    # others nothing.
    pretrain.cli_entrypoint.run_ctx_cls = finetune.cli_entrypoint.run_ctx_cls = PretrainContext
elif find_spec("megatron"):
    if find_spec("megatron.bridge"):
        with collector_paused():
            importlib.import_module("megatron.bridge")  # which NeMo-Run imports next, as an entry point of its own
    importlib.import_module("nemo_upcycle.pipeline.ablations.launch")
    from nemo_upcycle.pipeline.bridge.pipeline import pipeline as pipeline
