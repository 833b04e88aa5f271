"""The demo's chain cut down, as a script of a user's: what test_slurm.py starts with run.executor=FILE.yaml."""

# No postponed annotations: NeMo-Run reads those of factories.

import os
import time
from pathlib import Path

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from nemo_upcycle.pipeline.nemo.pipeline import pipeline
from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_e8t2
from nemo_upcycle.trainers.nemo.stopping import SaveOnSignal
from nemo_upcycle.trainers.nemo.watchers import hang_detection
from tests.functional.runs import Hang
from tests.functional.tiny import tiny_pipeline


class Disturb(Callback):
    """Takes SLOW_S seconds after each step, and hangs once in the fifth where HUNG names a file; not by the recipe.

    A recipe that differed would be another run's.
    """

    def __init__(self) -> None:
        self.hang = Hang(step=4, once=os.environ["HUNG"]) if os.environ.get("HUNG") else None

    def on_train_batch_start(self, trainer, *arguments) -> None:
        """Hang."""
        if self.hang:
            self.hang.on_train_batch_start(trainer, *arguments)

    def on_train_batch_end(self, trainer, *_) -> None:
        """Wait."""
        time.sleep(float(os.environ["SLOW_S"]))


@run.cli.factory(target=pipeline, name="tiny")
def tiny(inputs: str, dir: str) -> run.Partial:
    """The chain on a tiny parent; its trainings have two nodes of one rank, and save when they are told to stop."""
    moe = smollm2_135m_e8t2.pretrain_recipe(num_nodes=2, num_gpus_per_node=1, expert_parallelism=2)
    dense_ct = smollm2_135m_dense_ct.pretrain_recipe(num_nodes=2, num_gpus_per_node=1)
    moe.trainer.callbacks += [run.Config(Disturb), run.Config(hang_detection), run.Config(SaveOnSignal)]
    return tiny_pipeline(Path(inputs), Path(dir), moe, dense_ct)


if __name__ == "__main__":
    run.cli.main(pipeline)
