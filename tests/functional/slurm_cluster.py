"""The demo's chain cut down, as a script of a user's: what test_slurm.py starts with run.executor=FILE.yaml."""

# No postponed annotations: NeMo-Run reads those of factories.

from pathlib import Path

import nemo_run as run

from nemo_upcycle.pipeline.launch import pipeline
from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_e8t2
from nemo_upcycle.training.stopping import SaveOnSignal
from nemo_upcycle.training.watchers import hang_detection
from tests.functional.runs import Hang
from tests.functional.tiny import tiny_pipeline
from tests.functional.tiny_pipeline import SlowSteps


@run.cli.factory(target=pipeline, name="tiny")
def tiny(inputs: str, dir: str, slow: float = 0.0, hang: bool = False) -> run.Partial:
    """The chain on a tiny parent; its trainings have two nodes of one rank, and save when they are told to stop."""
    moe = smollm2_135m_e8t2.pretrain_recipe(num_nodes=2, num_gpus_per_node=1, expert_parallelism=2)
    dense_ct = smollm2_135m_dense_ct.pretrain_recipe(num_nodes=2, num_gpus_per_node=1)
    moe.trainer.callbacks += [run.Config(SlowSteps, seconds=slow), run.Config(SaveOnSignal)]
    if hang:
        moe.trainer.callbacks += [run.Config(hang_detection), run.Config(Hang, step=4, once=f"{dir}/hung")]
    return tiny_pipeline(Path(inputs), Path(dir), moe, dense_ct)


if __name__ == "__main__":
    run.cli.main(pipeline)
