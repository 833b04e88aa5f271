"""Run a Megatron-Bridge script that knows this package's recipes and conversions.

torchrun ... -m nemo_upcycle.bridge Megatron-Bridge/scripts/training/run_recipe.py --recipe NAME KEY=VALUE ...

Your own script can import `with_upcycling`, `with_parent`, `upcycled` and `upcycled_pretraining` from this module.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.recipes import bridge_functions
from nemo_upcycle.trainers.bridge import require_bridge
from nemo_upcycle.utils.checkout import require_one_checkout


#: Environment variable that named the parent before release 0.3.
_OLD = "NEMO_UPCYCLE_DENSE"


def __getattr__(name: str) -> Any:
    """Import a name on demand, so that importing this module does not import a trainer."""
    if name not in ("with_upcycling", "with_parent", "upcycled", "upcycled_pretraining"):
        raise AttributeError(name)
    return getattr(importlib.import_module("nemo_upcycle.trainers.bridge.recipes.common"), name)


def main() -> None:
    """Register this package's recipes and conversions, then run the given script with its arguments."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.stderr.write("usage: python -m nemo_upcycle.bridge SCRIPT [ARGUMENT ...]\n")
        raise SystemExit(UpcycleError.exit_status)
    try:
        require_one_checkout()
        require_bridge()
        if _OLD in os.environ:
            raise UpcycleError(
                _OLD,
                kind="refused",
                got="is no longer used",
                fix="unset it, and add upcycling.hf_model_path=MODEL (for a baseline: hf_model_path=MODEL)",
            )
    except UpcycleError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(error.exit_status) from None
    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.trainers.bridge.recipes import register

    use_cpu_backend()
    register(bridge_functions())
    import nemo_upcycle.trainers.bridge.conversion  # noqa: F401

    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
