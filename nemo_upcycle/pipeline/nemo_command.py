"""The entry point `upcycle` of the command `nemo`, which NeMo-Run imports.

The import of NeMo takes longest, so this module first makes the checks that do not need NeMo. All modules of the
package must belong to one checkout, and the command line must name a recipe and stages of the installed trainer. The
plain `import nemo_upcycle` makes no checks.
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
# These modules register the recipes and the commands.
if find_spec("nemo"):
    importlib.import_module("nemo_upcycle.pipeline.nemo.recipes")
elif find_spec("megatron"):
    if find_spec("megatron.bridge"):
        with collector_paused():
            importlib.import_module("megatron.bridge")  # NeMo-Run would import it later, without the pause
    importlib.import_module("nemo_upcycle.pipeline.ablations.launch")
    importlib.import_module("nemo_upcycle.pipeline.bridge.pipeline")
