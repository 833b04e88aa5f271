"""Where the command `nemo` begins for this package: NeMo-Run imports this module, its entry point `upcycle`.

Importing the library only imports. What has to be answered before NeMo is imported, which takes longest, is answered
here: whether all parts are of one checkout, and whether the words are those of the trainer that is installed.
"""

import importlib
import sys
from importlib.util import find_spec

from nemo_upcycle.pipeline.answers import answered, refuse_bridge
from nemo_upcycle.utils.checkout import require_one_checkout


with answered():
    require_one_checkout()
    if find_spec("nemo") and sys.argv[1:3] == ["upcycle", "pipeline"]:
        refuse_bridge(sys.argv[3:])
importlib.import_module("nemo_upcycle.recipes")  # registers the recipes and the commands
