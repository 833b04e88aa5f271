"""`nemo upcycle pipeline` with the demo's recipes cut down, as a script of a user's: what test_launch.py starts."""

# No postponed annotations: NeMo-Run reads those of factories.

import os
import time
from pathlib import Path

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from nemo_upcycle.pipeline.nemo.pipeline import pipeline
from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_e8t2
from tests.functional.tiny import tiny_pipeline


class Disturb(Callback):
    """Fails, or goes on for good, in a step that a variable names; of this script, as a user's own callback may be."""

    def on_train_batch_end(self, trainer, *_) -> None:
        """Look whether this is the step."""
        step = str(trainer.global_step)
        if os.environ.get("FAIL_AT") == step and os.environ.get("RANK") == "1":
            raise RuntimeError("rank 1 met its fate")
        while os.environ.get("HOLD_AT") == step:
            time.sleep(0.1)


@run.cli.factory(target=pipeline, name="tiny")
def tiny(inputs: str, ranks: int = 2, disturbed: bool = False) -> run.Partial:
    """The chain on a tiny parent."""
    moe = smollm2_135m_e8t2.pretrain_recipe(num_gpus_per_node=ranks, expert_parallelism=ranks)
    dense_ct = smollm2_135m_dense_ct.pretrain_recipe(num_gpus_per_node=ranks)
    if disturbed:
        moe.trainer.callbacks.append(run.Config(Disturb))
    return tiny_pipeline(Path(inputs), Path(inputs) / "run", moe, dense_ct)


if __name__ == "__main__":
    run.cli.main(pipeline)
