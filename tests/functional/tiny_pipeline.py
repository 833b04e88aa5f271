"""`nemo upcycle pipeline` with the demo's recipes shrunk, as a user's script that tests start as a process."""

# No postponed annotations, because NeMo-Run reads the annotations of factories.

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
    """Disturbs training as environment variables say, because a changed recipe would belong to another run.

    Fails in step FAIL_AT, waits forever in step HOLD_AT, sleeps SLOW_S seconds after each step, and hangs once in the
    fifth step if HUNG names a file.
    """

    def __init__(self) -> None:
        self.hang = Hang(step=4, once=os.environ["HUNG"]) if os.environ.get("HUNG") else None

    def on_train_batch_start(self, trainer, *arguments) -> None:
        """Hang."""
        if self.hang:
            self.hang.on_train_batch_start(trainer, *arguments)

    def on_train_batch_end(self, trainer, *_) -> None:
        """Fail, or wait."""
        step = str(trainer.global_step)
        if os.environ.get("FAIL_AT") == step and os.environ.get("RANK") == "1":
            raise RuntimeError("rank 1 met its fate")
        time.sleep(float(os.environ.get("SLOW_S", "0")))
        while os.environ.get("HOLD_AT") == step:
            time.sleep(0.1)


@run.cli.factory(target=pipeline, name="tiny")
def tiny(inputs: str, dir: str = "", nodes: int = 1) -> run.Partial:
    """Return the chain for a tiny parent on two ranks; on two nodes, the training saves when a signal stops it."""
    sizes = {"num_nodes": nodes, "num_gpus_per_node": 2 // nodes}
    moe = smollm2_135m_e8t2.pretrain_recipe(**sizes, expert_parallelism=2)
    moe.trainer.callbacks.append(run.Config(Disturb))
    if nodes > 1:
        moe.trainer.callbacks += [run.Config(hang_detection), run.Config(SaveOnSignal)]
    run_dir = Path(dir or f"{inputs}/run")
    return tiny_pipeline(Path(inputs), run_dir, moe, smollm2_135m_dense_ct.pretrain_recipe(**sizes))


if __name__ == "__main__":
    run.cli.main(pipeline)
