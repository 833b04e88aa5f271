"""Recipes, named and shaped like NeMo's own. Importing the package registers every module in it with NeMo-Run.

Beside Megatron-Bridge, where NeMo's language models are not, it registers the chains in Bridge.

Raises:
    CheckoutError: this folder is of another checkout than the package that imports it.
"""

import importlib
import pkgutil
from importlib.util import find_spec

from nemo_upcycle.trainers.nemo.imports import quiet_imports
from nemo_upcycle.utils.checkout import require_one_checkout
from nemo_upcycle.utils.console import collector_paused
from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


require_one_checkout()
need_no_cuda_to_import()
if find_spec("nemo"):
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
