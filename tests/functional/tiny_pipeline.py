"""`nemo upcycle pipeline` with the demo's recipes cut down, as a script of a user's: what test_launch.py starts."""

# No postponed annotations: NeMo-Run reads those of factories.

import os
import time
from pathlib import Path

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from nemo_upcycle.pipeline.launch import pipeline
from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_e8t2
from tests.functional.tiny import tiny_pipeline


class SlowSteps(Callback):
    """Takes its time, so that a signal finds the training at work; of this script, as a user's own callback may be."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer, *_) -> None:
        """Wait."""
        if os.environ.get("FAIL_AT") == str(trainer.global_step) and os.environ.get("RANK") == "1":
            raise RuntimeError("rank 1 met its fate")
        time.sleep(self.seconds)


@run.cli.factory(target=pipeline, name="tiny")
def tiny(inputs: str, ranks: int = 2, slow: float = 0.0) -> run.Partial:
    """The chain on a tiny parent."""
    moe = smollm2_135m_e8t2.pretrain_recipe(num_gpus_per_node=ranks, expert_parallelism=ranks)
    dense_ct = smollm2_135m_dense_ct.pretrain_recipe(num_gpus_per_node=ranks)
    if slow:
        moe.trainer.callbacks.append(run.Config(SlowSteps, seconds=slow))
    return tiny_pipeline(Path(inputs), Path(inputs) / "run", moe, dense_ct)


if __name__ == "__main__":
    run.cli.main(pipeline)
