"""Run one stage of a run. The launcher on this machine and every job of Slurm and Kubernetes call this module.

python -m nemo_upcycle.pipeline STAGE RUN_DIR [SCRIPT ...]
"""

import runpy
import sys

from nemo_upcycle.pipeline.answers import answered
from nemo_upcycle.pipeline.executors.local import end_with_launcher
from nemo_upcycle.pipeline.runner import run_stage
from nemo_upcycle.utils.checkout import require_one_checkout
from nemo_upcycle.utils.console import end_soon


if __name__ == "__main__":
    end_with_launcher()
    with answered():
        require_one_checkout()
    stage, folder, *scripts = sys.argv[1:]
    for script in scripts:  # a recipe may name objects of the script that launched it, as `__main__.MyCallback`
        globals().update(runpy.run_path(script, run_name="__external_main__"))
    try:
        run_stage(stage, folder)
    finally:
        end_soon()
