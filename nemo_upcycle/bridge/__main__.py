"""Run a script of Megatron-Bridge's with this package's recipes and conversions known to it.

torchrun ... -m nemo_upcycle.bridge Megatron-Bridge/scripts/training/run_recipe.py --recipe NAME KEY=VALUE ...
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    """Register what is ours, then run the script that is named, with its arguments."""
    from nemo_upcycle.bridge.recipes import register
    from nemo_upcycle.cpu.backend import use_cpu_backend

    if len(sys.argv) < 2:
        sys.exit("usage: python -m nemo_upcycle.bridge SCRIPT [ARGUMENT ...]")
    use_cpu_backend()
    register()
    import nemo_upcycle.bridge.conversion  # noqa: F401

    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
