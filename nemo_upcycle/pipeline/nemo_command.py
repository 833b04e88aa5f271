"""Where the command `nemo` begins for this package: NeMo-Run imports this module, its entry point `upcycle`.

Importing the library only imports. What has to be answered before NeMo is imported, which takes longest, is answered
here: that all parts are of one checkout, and that the words name a recipe and stages of the installed trainer.
"""

import importlib
import sys
from importlib.util import find_spec

from nemo_upcycle.pipeline.answers import answered, refuse_bridge
from nemo_upcycle.pipeline.early import refuse_early
from nemo_upcycle.utils.checkout import require_one_checkout
from nemo_upcycle.utils.console import collector_paused


with answered():
    require_one_checkout()
    if sys.argv[1:3] == ["upcycle", "pipeline"]:
        if find_spec("nemo"):
            refuse_bridge(sys.argv[3:])
        elif find_spec("megatron"):
            refuse_early(sys.argv[3:])
# They register the recipes and the commands.
if find_spec("nemo"):
    importlib.import_module("nemo_upcycle.pipeline.nemo.recipes")
elif find_spec("megatron"):
    if find_spec("megatron.bridge"):
        with collector_paused():
            importlib.import_module("megatron.bridge")  # which NeMo-Run imports next, as an entry point of its own
    importlib.import_module("nemo_upcycle.pipeline.ablations.launch")
    importlib.import_module("nemo_upcycle.pipeline.bridge.pipeline")
